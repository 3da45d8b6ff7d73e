"""A network with its scales: fake-quantized floats in training, the integer specification itself in evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.history import history_of, origin_of
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.masks import refuse_filled_masks
from swincompress_pl.quant.bits import Bits
from swincompress_pl.quant.full_precision import full_precision, require_float32
from swincompress_pl.quant.gradient_checkpointing import CheckpointedRun, checkpointed_paths
from swincompress_pl.quant.graph import Graph, Run
from swincompress_pl.quant.graph.widths import weight_bits, with_bits
from swincompress_pl.quant.lower import lower
from swincompress_pl.quant.preprocessing import checked_preprocessing, pixels_of
from swincompress_pl.quant.scale_cut import Kept, ScaleCut, check_fit, cut_scales, undo_cut
from swincompress_pl.quant.scales import Scales
from swincompress_pl.quant.twin import TorchTwin
from swincompress_pl.registry import adapter_for, changed_attributes
from swincompress_pl.spec import Program

METHODS = ("searched", "max", "affine")
_CHECKED_IMAGES = 32


class QuantizedNetwork(nn.Module):
    """`network` run in integers of up to 8 bits. Takes and returns what `network` does: normalized float (N, C, H, W)
    -> float logits (N, classes).

    train(): float fake quantization with straight-through gradients; `network` keeps the float master weights.
    eval(): the integer Program in its torch twin, on the pixels that the input was normalized from (rounded to uint8),
    so a validation reports exactly what the engine gives. Logits there carry no gradient.

    preprocessing: mapping with "mean" and "std" (per channel, [0, 1] units) of the normalization; stored in the
    artifact whole. method "affine" is a simulation in both modes and has no Program. bits: see `Bits`; unsigned: names
    of activation quantizers whose codes have no sign. learned_scales: as after `learn_scales`. without_signal: layers
    that had no influence on the answers when the scales were searched.

    Weights and scales are float32 and stay so: what casts a module (`half()`, `to(torch.bfloat16)`) moves this one only
    (`quantize` brings a network of another number format to float32). Images of any floating type are taken, and
    logits are float32. A network without a classifier gives its features, in the type of the images, for the head
    outside it.
    """

    _told = False  # that compiled training does no gradient checkpointing
    _mode_before: bool | None = None  # a training pass

    @full_precision()
    def __init__(
        self,
        network: nn.Module,
        *,
        preprocessing: Mapping[str, Any],
        method: str = "searched",
        classes: Sequence[str] | None = None,
        bits: Bits | str | Mapping[str, Any] = "W8A8",
        unsigned: Sequence[str] = (),
        learned_scales: bool = False,
        without_signal: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
        if isinstance(network, QuantizedNetwork):
            raise ValueError("the network is already quantized; quantize its .network again if you want new scales")
        self.network = network
        self.preprocessing = checked_preprocessing(preprocessing)
        self.method = method
        self.classes = None if classes is None else tuple(classes)
        self.bits, self.unsigned, self.without_signal = Bits.of(bits), tuple(unsigned), tuple(without_signal)
        self.graph = self._present_graph()
        self.scales = Scales(self.graph, network, weight_bits(self.graph, self.bits), affine=method == "affine")
        self.register_load_state_dict_post_hook(_take_up_signs)  # type: ignore[no-untyped-call]
        self._twin: tuple[tuple[Any, ...], TorchTwin] | None = None
        self.compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
        self._compiled: Callable[[Run, Tensor], Tensor] | None = None
        self._entries_before = len(history_of(network))
        device = next(network.parameters()).device
        self.scales.to(device)
        if learned_scales:
            self.learn_scales()

    @property
    def compression_history(self) -> list[dict[str, Any]]:
        """What was done to the network, in order, as data that `checkpoint.restore` replays; what came after the entry
        of quantization was done to `network`, with the scales following."""
        classes = None if self.classes is None else list(self.classes)
        quantized: dict[str, Any] = {
            "method": self.method,
            "preprocessing": self.preprocessing,
            "classes": classes,
            "bits": self.bits.to_dict(),
            "unsigned": list(self.unsigned),
        }
        if self.scales.adjustment is not None:
            quantized["learned_scales"] = True
        if self.without_signal:
            quantized["without_signal"] = list(self.without_signal)
        history = history_of(self.network)
        return [*history[: self._entries_before], {"quantize": quantized}, *history[self._entries_before :]]

    def _present_graph(self) -> Graph:
        """The graph at the network's present widths."""
        graph = adapter_for(self.network).graph(self.network, self.preprocessing)
        return with_bits(graph, self.bits, self.unsigned)

    def follow(self, kept: Kept) -> ScaleCut:
        """Keep the scales of what a cut of `network` kept, exactly as they are: what was removed takes its own along.

        kept: {name of a tensor of `network`: {axis: kept indices}}, for all that the cut changed. Learned scales get a
        new parameter: hand `ScaleCut.adjustment` to the optimizer. Raises ValueError where they do not fit the network
        then. Whatever is raised, the scales are as before.
        """
        with all_or_nothing(self, written=[self.scales]):
            cut = cut_scales(self.scales, self.graph, kept)
            self.graph = self._present_graph()
            self.scales.retarget(self.graph)
            check_fit(self.scales, self.graph, self.network)
            self.forget_twin()
            return cut

    def unfollow(self, cut: ScaleCut) -> None:
        """Undo the latest `follow`, when the network's own cut is undone."""
        with all_or_nothing(self, written=[self.scales]):
            undo_cut(self.scales, cut)
            self.graph = cut.graph
            self.scales.retarget(self.graph)
            self.forget_twin()

    def make_unsigned(self, names: Sequence[str]) -> None:
        """From now on the codes of these quantizers have no sign; ValueError for one that there is not."""
        with all_or_nothing(self, written=[self.scales]):
            self.graph = with_bits(self.graph, self.bits, names)
            self.scales.retarget(self.graph)
            self.unsigned = (*self.unsigned, *names)

    def learn_scales(self) -> None:
        """From now on scales and weight steps are trained with the weights (`Scales.learn`), from what they are."""
        self.scales.learn()

    def fixed_scales(self) -> Scales:
        """The scales that the integers use now: `scales` itself, or a copy with what was learned written into it."""
        return self.scales.fixed(self.graph, self.network)

    def forward(self, images: Tensor) -> Tensor:
        answers = self._answers(images)
        return answers.to(images.dtype) if self.graph.embeds else answers

    def _answers(self, images: Tensor) -> Tensor:
        if self.training and self._compiled is not None:
            self._tell_of_checkpointing()
            # Learned scales are computed before it, where what is wrong with them can be raised.
            require_float32(self)
            return self._compiled(Run(self.graph, self.network, self.scales.quantizer()), images.float())
        if self.training or self.method == "affine":
            return self.fake_quantized(images)
        return self.integer_logits(self.pixels(images)).to(torch.float32) * self.twin().program.logit_scale

    def fake_quantized(self, images: Tensor) -> Tensor:
        """The float simulation, whatever the mode; with gradient checkpointing where `network` has it on."""
        require_float32(self)
        return CheckpointedRun(self.graph, self.network, self.scales.quantizer())(images.float())

    def compile(self, *args: Any, **options: Any) -> None:
        """As `nn.Module.compile`, for the fake quantization of training alone: evaluation is integer arithmetic that
        gains nothing by it. Copies are not compiled. Raises ValueError for method "affine"."""
        self.compile_with(torch.compile(*args, **options))

    def compile_with(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """`compile` with a compiler that there is already: a function of the function to compile."""
        if self.method == "affine":
            raise ValueError("method 'affine' has operators that torch.compile does not trace; train it uncompiled")
        self.compiler, self._compiled = compiler, compiler(_run)

    def _tell_of_checkpointing(self) -> None:
        if not self._told and checkpointed_paths(self.network):
            warnings.warn(
                f"{type(self.network).__name__} has gradient checkpointing on, which compiled fake quantization does "
                "not do: it keeps the values that the compiler wants kept. Train uncompiled where memory is short",
                stacklevel=4,
            )
        self._told = True

    def integer_logits(self, pixels: Tensor) -> Tensor:
        """uint8 (N, H, W, C) -> int32 logits (N, classes), as reference and engine give them."""
        return self.twin()(pixels)

    def pixels(self, images: Tensor) -> Tensor:
        """The uint8 pixels (N, H, W, C) of normalized images (N, C, H, W), rounded, with time behind the batch where
        there is any; ValueError if they cannot be pixels."""
        return pixels_of(images, self.preprocessing, events=self.graph.time_steps is not None)

    def check_pixels(self, images: Tensor) -> None:
        """ValueError where normalized images cannot be pixels, as `pixels` says; some of them at a time."""
        for part in images.split(_CHECKED_IMAGES):
            self.pixels(part)

    @full_precision()
    def to_program(self) -> Program:
        """The integer Program with the present weights and scales; ValueError where masked weights are not 0."""
        refuse_filled_masks(self.network, "export")
        return self._lowered()

    def _lowered(self) -> Program:
        require_float32(self)
        if self.method == "affine":
            raise ValueError(
                "method 'affine' is a simulation with zero-points; quantize with 'searched' or 'max' to export"
            )
        return lower(
            self.graph,
            self.network,
            self.fixed_scales(),
            preprocessing=self.preprocessing,
            classes=self.classes,
            origin=self._origin(),
        )

    def _origin(self) -> dict[str, Any]:
        """How the float network is built again, as far as it can be: what is not stored must not look as if it were."""
        try:
            return origin_of(self.network, self.compression_history, changed_attributes(self.network))
        except ValueError:  # changed since it was created, in what no argument says
            return {"network": None, "history": self.compression_history}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedNetwork:
        """What moves every module moves this; what casts it to another number format leaves it in float32."""
        refused: set[torch.dtype] = set()

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if not result.is_floating_point() or result.dtype is torch.float32:
                return result
            refused.add(result.dtype)
            return tensor.to(result.device, torch.float32)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        if refused:
            warnings.warn(
                f"a QuantizedNetwork keeps its weights and scales in float32; the cast to {min(map(str, refused))} "
                "changed none of them",
                stacklevel=2,
            )
        return self

    def train(self, mode: bool = True) -> QuantizedNetwork:
        """As for every module; and the twin is built again, see `forget_twin`."""
        self.forget_twin()
        return super().train(mode)

    def begin_training_pass(self) -> None:
        """Fake quantization until `end_training_pass`, whatever the mode: a module that is trained in `eval()`, without
        dropout and with fixed statistics, needs gradients. `network` and its children stay in their modes."""
        if self._mode_before is None:
            self._mode_before, self.training = self.training, True

    def end_training_pass(self) -> None:
        """The mode of before `begin_training_pass` again."""
        if self._mode_before is not None:
            self.training, self._mode_before = self._mode_before, None

    def keep_mode(self) -> None:
        """Take over the mode of `network`, which keeps it, and so do its children."""
        self.scales.train(self.network.training)
        self.training = self.network.training

    def forget_twin(self) -> None:
        """Build the twin again at its next use: for weights written through `.data`, as averaging callbacks do, which
        no version counter shows."""
        self._twin = None

    def twin(self) -> TorchTwin:
        """The torch twin of the present weights; rebuilt when a weight or scale has changed."""
        tensors = [*self.parameters(), *self.buffers()]
        key = tuple((id(t), t._version, t.data_ptr(), t.device) for t in tensors)
        if self._twin is None or self._twin[0] != key:
            self._twin = (key, TorchTwin(self._lowered(), tensors[0].device))
        return self._twin[1]

    def __getstate__(self) -> dict[str, Any]:
        # copies build their own
        return {**self.__dict__, "_twin": None, "compiler": None, "_compiled": None}


def _run(run: Run, images: Tensor) -> Tensor:
    return run(images)


def _take_up_signs(quantized: QuantizedNetwork, _: Any) -> None:
    """What was loaded may have other quantizers without a sign, beside those that never had one."""
    graph = adapter_for(quantized.network).graph(quantized.network, quantized.preprocessing)
    loaded = [name for name in quantized.scales.unsigned if graph.quantizers[name].signed]
    if set(loaded) != set(quantized.unsigned):
        quantized.unsigned = tuple(loaded)
        quantized.graph = quantized._present_graph()
        quantized.scales.retarget(quantized.graph)

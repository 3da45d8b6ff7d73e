"""A network with its scales: fake-quantized floats in training, the integer specification itself in evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.arguments import names, optional
from swincompress_pl.history import history_of, origin_of
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.masks import refuse_filled_masks
from swincompress_pl.pictures import resolved
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
    """A network with scales for its values and weights, which runs in integers of 2 to 8 bits.

    `quantize` makes it; the constructor alone leaves the scales empty. It takes and returns what the network does:
    normalized float images (N, C, H, W) to float logits (N, classes), or to a list of feature maps.

    In training mode, values are rounded in floats with straight-through gradients, and `network` keeps the float
    weights. In eval mode it runs the integer Program in torch, on the pixels that the input was normalized from,
    rounded to uint8. So a validation reports exactly what the engine gives. The logits then have no gradient. The
    method "affine" is a simulation in both modes and has no Program.

    Weights and scales are float32 and stay so: a cast (`half()`, `to(torch.bfloat16)`) changes none of them, which a
    warning says. Images may have any floating type, and logits are float32. A network without a classifier gives its
    features, in the type of the images, for the head outside it.

    Args:
        network: The float network. It is wrapped, not copied.
        preprocessing: Mapping with "mean" and "std" of the normalization, per channel and for pixels in [0, 1]. The
            artifact stores all of it.
        method: "searched", "max" or "affine", as in `quantize`.
        classes: Names of the classes in the order of the logits, for the artifact; None for none.
        bits: The widths: a text such as "W4A8", a `Bits`, or a mapping of its fields.
        unsigned: Names of the activation quantizers whose codes have no sign.
        learned_scales: Whether scales are trained, as after `learn_scales`.
        without_signal: Names of the layers that had no influence on the answers when the scales were searched.

    Raises:
        UnsupportedNetworkError: If the network has no adapter or no integer form.
        ValueError: If the method is unknown, the network is already quantized, or another argument does not fit.
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
        self.classes = optional(names, "classes", classes, "a list of the classes' names")
        self.bits, self.unsigned, self.without_signal = Bits.of(bits), tuple(unsigned), tuple(without_signal)
        self.graph = self._present_graph()
        self.preprocessing = resolved(self.preprocessing, height=self.graph.height, width=self.graph.width)
        self.scales = Scales(self.graph, network, weight_bits(self.graph, self.bits), affine=method == "affine")
        self.register_load_state_dict_post_hook(_take_up_signs)  # type: ignore[no-untyped-call]
        self._twin: tuple[tuple[Any, ...], TorchTwin] | None = None
        self.compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
        self._compiled: Callable[[Run, Tensor], list[Tensor]] | None = None
        self._entries_before = len(history_of(network))
        device = next(network.parameters()).device
        self.scales.to(device)
        if learned_scales:
            self.learn_scales()

    @property
    def compression_history(self) -> list[dict[str, Any]]:
        """What was done to the network, in order, as data that `checkpoint.restore` replays.

        What comes after the entry of quantization was done to `network`, and the scales were changed with it.
        """
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
        """The graph of the network as it is now, at the widths of `bits`."""
        graph = adapter_for(self.network).graph(self.network, self.preprocessing)
        return with_bits(graph, self.bits, self.unsigned)

    def follow(self, kept: Kept) -> ScaleCut:
        """Cuts the scales after units were cut from `network`, and keeps the others exactly as they are.

        Learned scales get a new parameter; hand `ScaleCut.adjustment` to the optimizer. If anything is raised, the
        scales are as before.

        Args:
            kept: Maps the name of each tensor of `network` that was cut to {axis: indices that were kept}.

        Returns:
            What `unfollow` needs.

        Raises:
            ValueError: If the scales then do not fit the network; the message names the layer.
        """
        with all_or_nothing(self, written=[self.scales]):
            cut = cut_scales(self.scales, self.graph, kept)
            self.graph = self._present_graph()
            self.scales.retarget(self.graph)
            check_fit(self.scales, self.graph, self.network)
            self.forget_twin()
            return cut

    def unfollow(self, cut: ScaleCut) -> None:
        """Undoes the latest `follow`, after the cut of the network was undone.

        Args:
            cut: What `follow` returned.
        """
        with all_or_nothing(self, written=[self.scales]):
            undo_cut(self.scales, cut)
            self.graph = cut.graph
            self.scales.retarget(self.graph)
            self.forget_twin()

    def make_unsigned(self, names: Sequence[str]) -> None:
        """Takes the sign from the codes of some activation quantizers.

        Args:
            names: Names of the quantizers.

        Raises:
            ValueError: If the network has no such quantizer, or its sign cannot go.
        """
        with all_or_nothing(self, written=[self.scales]):
            self.graph = with_bits(self.graph, self.bits, names)
            self.scales.retarget(self.graph)
            self.unsigned = (*self.unsigned, *names)

    def learn_scales(self) -> None:
        """Makes scales and weight steps trainable, starting at their present values.

        Raises:
            ValueError: If the method is "affine".
        """
        self.scales.learn()

    def fixed_scales(self) -> Scales:
        """Returns the scales that the integers use now: `scales`, or a copy with the learned values."""
        return self.scales.fixed(self.graph, self.network)

    def forward(self, images: Tensor) -> Any:
        """Computes the logits: by fake quantization in training mode, by integers in eval mode.

        Args:
            images: Normalized float images (N, C, H, W), or events (N, T, C, H, W).

        Returns:
            The logits (N, classes), float32; or the features, in the type of the images. A network with named outputs
            gives the list of them, as the float network does.

        Raises:
            TypeError: If a weight or a scale is not float32.
            ValueError: If the images have another shape, or in eval mode cannot be pixels.
        """
        answers = self._answers(images)
        if self.graph.outputs:
            return [answer.to(images.dtype) for answer in answers]
        return answers[0].to(images.dtype) if self.graph.embeds else answers[0]

    def _answers(self, images: Tensor) -> list[Tensor]:
        """The named outputs as the network gives them, or the logits or features alone."""
        if self.training and self._compiled is not None:
            self._tell_of_checkpointing()
            # Learned scales are computed outside of the compiled part, which could not raise errors about them.
            require_float32(self)
            return self._compiled(Run(self.graph, self.network, self.scales.quantizer()), images.float())
        if self.training or self.method == "affine":
            return self._simulated(images)
        integers, program = self.integer_logits(self.pixels(images)), self.twin().program
        if not self.graph.outputs:
            return [integers.to(torch.float32) * program.logit_scale]
        scales = {output.name: output.scale for output in program.outputs}
        return [o.from_value(integers[o.name].to(torch.float32) * scales[o.name]) for o in self.graph.outputs]

    def fake_quantized(self, images: Tensor) -> Any:
        """Computes the logits by the float simulation, whatever the mode.

        Gradient checkpointing works where `network` has it on.

        Args:
            images: Normalized float images (N, C, H, W), or events (N, T, C, H, W).

        Returns:
            The logits (N, classes), the features, or the list of named outputs, float32.

        Raises:
            TypeError: If a weight or a scale is not float32.
            ValueError: If the images have another shape than the network takes.
        """
        answers = self._simulated(images)
        return answers if self.graph.outputs else answers[0]

    def _simulated(self, images: Tensor) -> list[Tensor]:
        require_float32(self)
        return CheckpointedRun(self.graph, self.network, self.scales.quantizer()).outputs(images.float())

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles the fake quantization of training, with the arguments of `torch.compile`.

        Evaluation is integer arithmetic that would not gain anything by it. Copies of the network are not compiled.

        Args:
            *args: As in `torch.compile`.
            **options: As in `torch.compile`.

        Raises:
            ValueError: If the method is "affine".
        """
        self.compile_with(torch.compile(*args, **options))

    def compile_with(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compiles the fake quantization of training with a given compiler.

        Args:
            compiler: A function that takes a function and returns the compiled one.

        Raises:
            ValueError: If the method is "affine".
        """
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

    def integer_logits(self, pixels: Tensor) -> Any:
        """Computes the logits or the named outputs in integers, as the reference and the engine do.

        Args:
            pixels: uint8 pixels (N, H, W, C), or counts of events (N, T, H, W, C).

        Returns:
            int32 logits (N, classes); with named outputs, {name: integers (N, *shape)}, channels last.

        Raises:
            ValueError: If the pixels have another type, shape or device, the network has no scales, or the method is
                "affine".
        """
        twin = self.twin()
        return twin.outputs(pixels) if self.graph.outputs else twin(pixels)

    def pixels(self, images: Tensor) -> Tensor:
        """Computes the pixels that images were normalized from.

        Args:
            images: Normalized float images (N, C, H, W), or events (N, T, C, H, W).

        Returns:
            uint8 pixels (N, H, W, C), or counts of events (N, T, H, W, C), rounded.

        Raises:
            ValueError: If the images have another shape, cannot be pixels with this mean and std, or hold NaN.
        """
        self.graph.check_images(images)
        return pixels_of(images, self.preprocessing, events=self.graph.time_steps is not None)

    def check_pixels(self, images: Tensor) -> None:
        """Checks that images can be pixels with this mean and std, some of them at a time.

        Args:
            images: Normalized float images (N, C, H, W), or events (N, T, C, H, W).

        Raises:
            ValueError: If they cannot, or have another shape.
        """
        for part in images.split(_CHECKED_IMAGES):
            self.pixels(part)

    @full_precision()
    def to_program(self) -> Program:
        """Makes the integer Program with the present weights and scales.

        Returns:
            The Program, which `accel.export` writes.

        Raises:
            TypeError: If a weight or a scale is not float32.
            ValueError: If the method is "affine", masked weights are not 0, or a weight or a scale is not finite or
                does not fit the integers.
        """
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
        """How the float network can be built again, or the history alone, and whether it gives features."""
        answers = {"answers": "features"} if self.graph.embeds and not self.graph.outputs else {}
        try:
            return origin_of(self.network, self.compression_history, changed_attributes(self.network)) | answers
        except ValueError:  # changed since it was created, in what no argument says
            return {"network": None, "history": self.compression_history} | answers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedNetwork:
        """Moves the module as any other, but keeps it in float32 when it is cast to another format."""
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
        """Sets the mode, as for every module; the integers are made again when they are next used.

        Args:
            mode: True for training mode, False for eval mode.

        Returns:
            The network itself.
        """
        self.forget_twin()
        return super().train(mode)

    def begin_training_pass(self) -> None:
        """Switches to fake quantization until `end_training_pass`, whatever the mode.

        A module that is trained in `eval()`, without dropout and with fixed statistics, needs gradients. `network` and
        its children keep their modes.
        """
        if self._mode_before is None:
            self._mode_before, self.training = self.training, True

    def end_training_pass(self) -> None:
        """Returns to the mode from before `begin_training_pass`."""
        if self._mode_before is not None:
            self.training, self._mode_before = self._mode_before, None

    def keep_mode(self) -> None:
        """Takes over the mode of `network`, whose children keep theirs."""
        self.scales.train(self.network.training)
        self.training = self.network.training

    def forget_twin(self) -> None:
        """Makes the integers again when they are next used.

        This is for weights that were written through `.data`, as averaging callbacks do, which no version counter
        shows.
        """
        self._twin = None

    def twin(self) -> TorchTwin:
        """Makes the torch twin of the present weights and scales, and keeps it until one of them changes.

        Returns:
            The twin, which runs the integer Program on the network's device.

        Raises:
            ValueError: If the network has no Program, as in `to_program`.
        """
        tensors = [*self.parameters(), *self.buffers()]
        key = tuple((id(t), t._version, t.data_ptr(), t.device) for t in tensors)
        if self._twin is None or self._twin[0] != key:
            self._twin = (key, TorchTwin(self._lowered(), tensors[0].device))
        return self._twin[1]

    def __getstate__(self) -> dict[str, Any]:
        # copies make their own
        return {**self.__dict__, "_twin": None, "compiler": None, "_compiled": None}


def _run(run: Run, images: Tensor) -> list[Tensor]:
    return run.outputs(images)


def _take_up_signs(quantized: QuantizedNetwork, _: Any) -> None:
    """Takes over which codes have no sign from a state dict that was loaded."""
    graph = adapter_for(quantized.network).graph(quantized.network, quantized.preprocessing)
    loaded = [name for name in quantized.scales.unsigned if graph.quantizers[name].signed]
    if set(loaded) != set(quantized.unsigned):
        quantized.unsigned = tuple(loaded)
        quantized.graph = quantized._present_graph()
        quantized.scales.retarget(quantized.graph)

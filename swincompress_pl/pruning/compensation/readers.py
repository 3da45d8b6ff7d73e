"""The layers that read what a cut removes: linear layers and convolutions, seen as a matrix over rows of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swincompress_pl.layer_types import LAYERS, alteration
from swincompress_pl.pruning.structure.groups import Group

Predict = Callable[[nn.Module, Tensor], object]
"""(network, images) -> anything: moves the images to the network's device and runs it."""

_ROWS_AT_ONCE = 4096  # bounds the memory of patches
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer whose weights are solved again.

    Attributes:
        name: Path of the layer.
        taps: Columns of the weight matrix per input channel: 1, or the size of a convolution's kernel.
        norm: Path of the BatchNorm right behind it, whose mean takes up the bias of a layer without one; None if the
            layer has a bias, or nothing behind it can take one up.
        fixed_bias: Whether neither the layer nor a BatchNorm behind it can take up a bias.
    """

    name: str
    taps: int = 1
    norm: str | None = None
    fixed_bias: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the parameters and buffers that a solution changes."""
        if self.norm is not None:
            return f"{self.name}.weight", f"{self.norm}.running_mean"
        return (f"{self.name}.weight",) if self.fixed_bias else (f"{self.name}.weight", f"{self.name}.bias")

    def columns(self, channels: Iterable[int]) -> list[int]:
        """The columns of the weight matrix that belong to input channels."""
        return [channel * self.taps + tap for channel in channels for tap in range(self.taps)]

    def count(self, layer: nn.Module, x: Tensor) -> int:
        """The number of rows that an input gives; of a strided convolution, one for each place of the input."""
        return x.numel() // x.shape[-1 if isinstance(layer, nn.Linear) else -1 - _spatial(layer)]

    def given(self, layer: nn.Module, output: Tensor) -> Tensor:
        """What the layer gives, or its gradient, as rows (rows, outputs) in the order of `rows`."""
        if isinstance(layer, nn.Linear):
            return output.flatten(0, -2)
        return output.flatten(0, -2 - _spatial(layer)).flatten(2).transpose(1, 2).flatten(0, 1)

    def rows(self, layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
        """Yields what the layer reads, (rows, inputs), in parts.

        There is one row for each place of the output, of each image and time step.
        """
        if isinstance(layer, nn.Linear):
            yield from x.flatten(0, -2).split(_ROWS_AT_ONCE)
            return
        images = x.flatten(0, -2 - _spatial(layer))  # time steps are images, too
        for part in images.split(max(1, _ROWS_AT_ONCE // images[0, 0].numel())):
            yield _patches(layer, part)


def _spatial(layer: nn.Module) -> int:
    """The number of spatial dimensions of a convolution."""
    return 1 if isinstance(layer, nn.Conv1d) else 2


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each place of a convolution reads, (rows, inputs), of images x (N, C, ...)."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    assert isinstance(layer.padding, tuple)
    if all(size == 1 for size in (*layer.kernel_size, *layer.stride)) and not any(layer.padding):
        return x.flatten(2).transpose(1, 2).flatten(0, 1)
    if isinstance(layer, nn.Conv2d):
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)
    unfolded = F.unfold(
        x.unsqueeze(-1),
        (layer.kernel_size[0], 1),
        (layer.dilation[0], 1),
        (layer.padding[0], 0),
        (layer.stride[0], 1),
    )
    return unfolded.transpose(1, 2).flatten(0, 1)


def readers_of(network: nn.Module, groups: Iterable[Group], images: Tensor, predict: Predict) -> Readers:
    """The readers of the units of some groups, and why the others are left alone.

    A group of a residual stream (with `norms`) has none: a LayerNorm lies between its units and what reads them.
    `images` are run once, to see which BatchNorm lies behind which layer.
    """
    names = dict.fromkeys(
        part.tensor.removesuffix(".weight")
        for group in groups
        if not group.norms
        for part in group.consumers()
        if part.axis == 1 and part.tensor.endswith(".weight")
    )
    return readers_named(network, names, images, predict)


def readers_named(network: nn.Module, names: Iterable[str], images: Tensor, predict: Predict) -> Readers:
    """The readers of these names, in the order in which a pass reaches them; see `readers_of`."""
    found, left_alone = dict[str, nn.Module](), dict[str, str]()
    for name in names:
        reason = _why_not(network, name)
        if reason is None:
            found[name] = network.get_submodule(name)
        else:
            left_alone[name] = reason
    order, norms = _seen(network, found, images, predict)
    readers = [_reader(name, found[name], norms.get(name)) for name in order]
    left_alone |= {name: "no image reaches it" for name in found if name not in order}
    return Readers(readers={reader.name: reader for reader in readers}, left_alone=left_alone)


@dataclass(frozen=True, kw_only=True)
class Readers:
    """readers: {path: reader}, in the order of a pass. left_alone: {path: why its weights are not solved again}."""

    readers: Mapping[str, Reader]
    left_alone: Mapping[str, str]


def _reader(name: str, layer: nn.Module, norm: str | None) -> Reader:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    has_bias = layer.bias is not None
    return Reader(
        name=name,
        taps=weight[0, 0].numel(),
        norm=None if has_bias else norm,
        fixed_bias=not has_bias and norm is None,
    )


def _why_not(network: nn.Module, name: str) -> str | None:
    """Why the weights of a layer are not solved again; None if they can be."""
    layer = network.get_submodule(name)
    if type(layer).__name__.startswith("Quant") or not isinstance(layer, _LAYERS):
        return f"a {type(layer).__name__} is neither a linear layer nor a convolution"
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups != 1:
            return "a convolution with groups"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return "a convolution whose padding is not zeros of a given size"
    altered = alteration(layer) if isinstance(layer, LAYERS) else None
    if altered is not None:
        return altered
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    if not all(p.requires_grad for p in parameters):
        return "it is frozen (requires_grad=False)"
    places = [full for full, p in network.named_parameters(remove_duplicate=False) if any(p is q for q in parameters)]
    if len(places) > len(parameters):
        return f"its parameters are shared ({', '.join(places)})"
    return None


def _seen(
    network: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, predict: Predict
) -> tuple[list[str], dict[str, str]]:
    """The layers in the order of a pass, and the BatchNorm that reads the output of each and nothing else."""
    order, norms = list[str](), dict[str, str]()
    outputs = dict[str, Tensor]()  # kept alive, so that no other tensor gets their memory
    handles = []

    def after_layer(name: str, output: Tensor) -> None:
        if name not in outputs:
            order.append(name)
        outputs[name] = output

    def before_norm(norm: str, x: Tensor) -> None:
        for name, output in outputs.items():
            if x.untyped_storage().data_ptr() == output.untyped_storage().data_ptr() and x.numel() == output.numel():
                norms.setdefault(name, norm)

    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda _, __, y, name=name: after_layer(name, y)))
    for path, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(lambda _, x, path=path: before_norm(path, x[0])))
    try:
        predict(network, images)
    finally:
        for handle in handles:
            handle.remove()
    return order, norms

"""The head of a network as the steps of a graph: what stands between the pooled features and the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from swincompress_pl.layer_types import full_name, in_order, maps_each_value, passes
from swincompress_pl.quant.graph.quantizer_spec import LOGIT_BITS, QuantizerSpec, residual_spec
from swincompress_pl.registry import UnsupportedNetworkError

OR_A_HEAD = " for a head, as num_classes > 0 makes it, or an nn.Sequential or timm Mlp that ends in one"
_LAYERS = (
    "nn.Linear, nn.LayerNorm, nn.BatchNorm1d right before or behind an nn.Linear, elementwise activations and "
    "nn.Dropout, with an nn.Linear at the end"
)
_PROBED = 8  # channels on which an activation is tried


@dataclass(kw_only=True)
class HeadStep:
    """One node of a head; `regularizers` act on its output in training."""

    kind: str  # "linear", "layer_norm" or "activation"
    path: str
    norm_before: str | None = None
    norm_after: str | None = None
    regularizers: list[str] = field(default_factory=list)


class Head:
    """The steps of the modules at some paths, which run one after the other on the features (N, C).

    `regularizers` act on the features in training. `embeds` says that the last module is an nn.Identity, so the network
    gives the features themselves.

    Args:
        network: The network.
        *paths: Paths of the modules, the classifier the last one.

    Raises:
        UnsupportedNetworkError: If there are no integers for the head. The message names the layer.
    """

    def __init__(self, network: nn.Module, *paths: str) -> None:
        self._network, self.path = network, paths[-1]
        self.steps: list[HeadStep] = []
        self.regularizers: list[str] = []
        self.embeds = type(network.get_submodule(self.path)) is nn.Identity
        self._norm: str | None = None
        for path in self._layers(paths):
            self._take(path, network.get_submodule(path))
        last = self.steps[-1] if self.steps else None
        if self._norm is not None:
            raise self._refused(self._norm, "no nn.Linear stands beside it")
        if not self.embeds and (last is None or last.kind != "linear"):
            raise self._refused(
                self.path if last is None else last.path,
                "its integers end in logits; put it outside the network, as a loss or a metric does",
            )

    def operand(self, name: str, channels: int, *, normed: bool = False, reader: int = 0) -> QuantizerSpec:
        """The quantizer of a value that a step of the head reads.

        Args:
            name: Its name.
            channels: Its width.
            normed: Whether a LayerNorm makes the value, so that its channels may have ranges of their own.
            reader: The number of the step.

        Returns:
            16 bits for a LayerNorm, 32 for the logits, and 8 otherwise.
        """
        if reader == len(self.steps) and not self.embeds:
            return QuantizerSpec(name="logits", segments=(channels,), bits=LOGIT_BITS)
        kind = self.steps[reader].kind if reader < len(self.steps) else "linear"
        if kind == "layer_norm":
            return residual_spec(name, channels)
        if kind == "activation":
            return QuantizerSpec(name=name, segments=(channels,), operand=False)
        return QuantizerSpec(name=name, segments=(channels,), equalized=normed)

    def _layers(self, paths: Sequence[str]) -> Iterator[str]:
        for path in paths:
            for inner in in_order(self._network.get_submodule(path)):
                yield f"{path}.{inner}" if inner else path

    def _take(self, path: str, module: Any) -> None:
        previous = self.steps[-1] if self.steps else None
        if passes(module):
            if type(module) is nn.Dropout:
                if self._norm is not None:
                    if module.p:
                        raise self._refused(path, f"it stands between {self._norm} and the nn.Linear; put it before")
                    return
                (self.regularizers if previous is None else previous.regularizers).append(path)
        elif type(module) is nn.BatchNorm1d:
            self._take_norm(path, module, previous)
        elif isinstance(module, nn.LayerNorm):
            self._step("layer_norm", path)
        elif _is_activation(module):
            if not maps_each_value(module, _PROBED):
                raise self._refused(path, "it does not map each value alone, so it cannot become a table of values")
            self._step("activation", path)
        else:  # something else than an nn.Linear is refused there, or folded
            self.steps.append(HeadStep(kind="linear", path=path, norm_before=self._norm))
            self._norm = None

    def _take_norm(self, path: str, module: nn.BatchNorm1d, previous: HeadStep | None) -> None:
        if module.running_mean is None:
            raise self._refused(path, "it has no running statistics; make it with track_running_stats=True")
        free = previous is not None and previous.kind == "linear" and previous.norm_after is None
        if free and previous is not None and not previous.regularizers:
            previous.norm_after = path
        elif self._norm is None:
            self._norm = path
        else:
            raise self._refused(path, "two of them stand before one nn.Linear")

    def _step(self, kind: str, path: str) -> None:
        if self._norm is not None:
            raise self._refused(self._norm, f"{path} stands behind it, and not an nn.Linear")
        self.steps.append(HeadStep(kind=kind, path=path))

    def _refused(self, path: str, why: str) -> UnsupportedNetworkError:
        layer = self._network.get_submodule(path)
        return UnsupportedNetworkError(
            f"{type(self._network).__name__}: {path} is {full_name(type(layer))} in the head, and {why}. A head with "
            f"an integer form has {_LAYERS}"
        )


def _is_activation(module: nn.Module) -> bool:
    """Whether a module has no parts and nothing to learn but slopes."""
    parts = [*module.children(), *module.parameters(recurse=False), *module.buffers(recurse=False)]
    return not parts or type(module) is nn.PReLU

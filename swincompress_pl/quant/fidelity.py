"""Whether a graph computes what its network does: both run in float, and are compared at the modules that both have.

A graph is written for the modules of a family as they are published. A hook, a patched forward, a subclass or an
adapter beside a layer changes the network and not the graph. The integers would then be those of another network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import on_trial
from swincompress_pl.layer_types import full_name, peculiarities
from swincompress_pl.quant.graph import Graph, Node, Passthrough, Run
from swincompress_pl.quant.graph.conv_norm import ConvNormNode
from swincompress_pl.quant.graph.head_nodes import LatentQkvNode, NormedLinearNode
from swincompress_pl.quant.graph.nodes import (
    ActivationNode,
    AttentionNode,
    EmbeddingNode,
    LayerNormNode,
    LinearNode,
    PixelConvNode,
)
from swincompress_pl.quant.graph.outputs import joined
from swincompress_pl.quant.graph.spiking_nodes import CountNode, MaxPoolNode, NeuronNode
from swincompress_pl.registry import UnsupportedNetworkError

BOUND = 1e-4
"""The largest relative error between a graph and its network, both in float64."""

_IMAGES = 2
_ROUNDING = 1000
"""Multiples of the type's epsilon that rounding may leave where numbers of about 1 cancel out, as in a BatchNorm that
takes the bias of silent inputs away."""
_REMEDY = (
    "Quantization follows what the modules of the family compute: remove the hook, the patch or the subclass, fold it "
    "into the weights, or register an adapter whose graph has it"
)
# Figures of a value that do not depend on its layout: its size; and mean, mean magnitude, RMS, maximum, minimum.
_Print = tuple[int, Tensor]
_SINGLE = (
    LinearNode,
    LayerNormNode,
    ActivationNode,
    PixelConvNode,
    ConvNormNode,
    NeuronNode,
    CountNode,
    MaxPoolNode,
)


def check_graph(graph: Graph, network: nn.Module, images: Tensor | None = None) -> None:
    """Checks that a graph computes what its network does in eval mode. The network is left as it was.

    The logits, the inputs and outputs of the modules that the graph names, and the parameters on which both depend are
    compared.

    Args:
        graph: The graph.
        network: The network that it describes.
        images: Normalized images as the network takes them, of which a few are used; None for random ones.

    Raises:
        UnsupportedNetworkError: If the two differ by a relative error above `BOUND`, or in their parameters. The
            message names the first module that differs.
    """
    device = next(network.parameters()).device
    images = _random_images(graph) if images is None else images[:_IMAGES]
    # Rounding can flip spikes, and GPUs and half precision round coarsely, so the comparison runs in float64.
    dtypes = (None,) if device.type == "mps" else (torch.float64, None)
    for dtype in dtypes:
        try:
            with on_trial(network, dtype):
                kind = next(network.parameters()).dtype
                _compare(graph, network, images.detach().to(device, kind, copy=True), _bound(kind))
            return
        except (RuntimeError, NotImplementedError):
            if dtype is dtypes[-1]:
                raise


def _bound(dtype: torch.dtype) -> float:
    return max(BOUND, math.sqrt(torch.finfo(dtype).eps))


def _random_images(graph: Graph) -> Tensor:
    time = () if graph.time_steps is None else (graph.time_steps,)
    shape = (_IMAGES, *time, graph.channels, graph.height, graph.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _compare(graph: Graph, network: nn.Module, images: Tensor, bound: float) -> None:
    theirs, ours = _NetworkPrints(), _GraphPrints()
    with torch.no_grad():
        with _without_hooks(network):
            # first, as it names the right shape of images
            found = Run(_in_evaluation(graph), network, ours).outputs(images)
        with theirs.watching(graph, network):
            expected = _answers(graph, network(images))
    name = type(network).__name__
    if not _fit(expected, found, graph):
        gives = "logits" if not graph.outputs else "the outputs"
        wanted = "returns logits (N, classes)" if not graph.outputs else "returns the list of them"
        raise UnsupportedNetworkError(
            f"{name}: it returns {_shown(expected)} where its graph gives {gives} {_shown(found)}; quantize the "
            f"network that {wanted}. {_REMEDY}"
        )
    if not all(part.isfinite().all() for part in expected):
        return  # calibration finds where NaN and infinite values begin
    difference = _first_difference(graph, theirs, ours, bound)
    pairs = zip(found, expected, strict=True)
    error = max(_relative(part.flatten(1), theirs.flatten(1)) for part, theirs in pairs)
    if difference is None and error > bound:
        difference = _Difference(after="", at="", error=error)
    if difference is not None:
        raise UnsupportedNetworkError(
            f"{name}: its graph computes something else than the network does, {difference.where(network)} (relative "
            f"error {difference.error:.2g} in float, at most {bound:.2g} is allowed). {_REMEDY}"
        )
    _check_parameters(graph, network, images[:1])


def _answers(graph: Graph, answer: Any) -> list[Any]:
    return list(answer) if graph.outputs and isinstance(answer, list | tuple) else [answer]


def _fit(expected: Sequence[Any], found: Sequence[Tensor], graph: Graph) -> bool:
    """Whether a network's answer has the form that its graph gives; that of one output may have more axes."""
    if len(expected) != len(found) or not all(isinstance(part, Tensor) for part in expected):
        return False
    if graph.outputs:
        return all(part.shape == theirs.shape for part, theirs in zip(found, expected, strict=True))
    return bool(expected[0].flatten(1).shape == found[0].shape)


def _shown(answer: Sequence[Any]) -> str:
    parts = [str(tuple(part.shape)) if isinstance(part, Tensor) else full_name(type(part)) for part in answer]
    return parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]"


def _in_evaluation(graph: Graph) -> Graph:
    """The graph as integers compute it, without the modules in the places of dropout."""

    def bare(node: Node) -> Node:
        node = replace(node, regularizers=())
        return replace(node, dropout=None) if isinstance(node, AttentionNode) else node

    return replace(graph, nodes=tuple(bare(node) for node in graph.nodes))


@contextmanager
def _without_hooks(network: nn.Module) -> Iterator[None]:
    """Removes the hooks for a while, which integers do not have; some nodes run the module itself."""
    tables = [
        table for module in network.modules() for table in (module._forward_hooks, module._forward_pre_hooks) if table
    ]
    saved = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, saved, strict=True):
            table.update(hooks)


def _relative(a: Tensor, b: Tensor) -> float:
    """The largest error of any image, relative to the size of its values; 0 for what is rounding."""
    size = b.norm(dim=1)
    error = (a - b).norm(dim=1)
    rounding = _ROUNDING * torch.finfo(b.dtype).eps * math.sqrt(b.shape[1])
    return float(torch.where(error > rounding, error / size, 0.0).max())


# What modules and nodes read and give


def _print(x: Any) -> _Print | None:
    if not isinstance(x, Tensor) or not x.numel():
        return None
    values = x.detach()
    values = values if values.is_floating_point() else values.double()
    magnitude = values.abs()
    rms = values.norm() / math.sqrt(values.numel())
    return values.numel(), torch.stack([values.mean(), magnitude.mean(), rms, values.max(), values.min()])


def _joined(prints: Sequence[_Print | None]) -> _Print | None:
    """The figures of a whole value from those of its parts, which go different ways; None if one is unknown."""
    known = [entry for entry in prints if entry is not None]
    if len(known) < len(prints):
        return None
    counts = torch.tensor([count for count, _ in known], dtype=torch.float64)
    rows = torch.stack([values.double().cpu() for _, values in known])
    shares = counts / counts.sum()
    rms = (shares * rows[:, 2].square()).sum().sqrt()
    means = [(shares * rows[:, column]).sum() for column in (0, 1)]
    return int(counts.sum()), torch.stack([*means, rms, rows[:, 3].max(), rows[:, 4].min()])


def _distance(a: _Print | None, b: _Print | None) -> float | None:
    """The relative error between two values, 0 for rounding; None if they have different sizes or are not finite."""
    if a is None or b is None or a[0] != b[0]:
        return None
    rounding = _ROUNDING * max(torch.finfo(values.dtype).eps for _, values in (a, b))
    first, second = a[1].double().cpu(), b[1].double().cpu()
    size = float(torch.maximum(first[2], second[2]))
    error = float((first - second).abs().max())
    return (error / size if error > rounding else 0.0) if math.isfinite(error) else None


@dataclass
class _NetworkPrints:
    """The inputs and outputs of modules in a pass of the network; only those of modules that run once are used."""

    calls: dict[str, list[tuple[_Print | None, _Print | None]]] = field(default_factory=dict)

    @contextmanager
    def watching(self, graph: Graph, network: nn.Module) -> Iterator[None]:
        paths = {path for node in graph.nodes for path in _modules_of(node)}
        with ExitStack() as hooks:
            for path in paths:
                hooks.callback(network.get_submodule(path).register_forward_hook(self._hook(path)).remove)
            yield

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen = (_print(inputs[0]) if inputs else None, _print(output))
            self.calls.setdefault(path, []).append(seen)

        return hook

    def into(self, path: str) -> _Print | None:
        return self._only(path)[0]

    def out_of(self, path: str) -> _Print | None:
        return self._only(path)[1]

    def _only(self, path: str) -> tuple[_Print | None, _Print | None]:
        calls = self.calls.get(path, [])
        return calls[0] if len(calls) == 1 else (None, None)


class _GraphPrints(Passthrough):
    """The same for a pass of the graph, by the modules of a node; several nodes may each compute a part of a module."""

    def __init__(self) -> None:
        self.reads: dict[tuple[str, ...], list[_Print | None]] = {}
        self.gives: dict[tuple[str, ...], list[_Print | None]] = {}

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        modules = _modules_of(node)
        if modules:
            scaled = (
                isinstance(node, CountNode | NeuronNode) and node.gain != 1.0
            )  # the network scales before the neurons
            self.reads.setdefault(modules, []).append(None if scaled else _print(inputs[0]))
            self.gives.setdefault(modules, []).append(_print(output))


def _modules_of(node: Node) -> tuple[str, ...]:
    """The module that has the node's input and the one that has its output; () for nodes without such modules."""
    if not isinstance(node, _SINGLE) or isinstance(node, EmbeddingNode | LatentQkvNode):
        return ()
    gives = node.module
    if isinstance(node, LinearNode) and node.layer_scale is not None:
        gives = node.layer_scale.rpartition(".")[0]
    elif isinstance(node, LinearNode) and node.factor != 1.0:
        return ()  # no module has the output
    elif isinstance(node, NormedLinearNode):
        return node.norm_before or node.module, node.norm_after or node.module
    elif isinstance(node, ConvNormNode) and node.norms:
        gives = node.norms[-1]
    return node.module, gives


# Where network and graph begin to differ


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """Where a graph begins to differ from its network.

    The module `after` was still right, and `at` reads something else; with "" for it the logits differ. If `inside` is
    set, `at` reads the right value and gives another one.
    """

    after: str
    at: str
    error: float
    inside: bool = False

    def where(self, network: nn.Module) -> str:
        """The difference in words, with the modules that are likely to cause it."""
        if self.inside:
            return f"first in {_named(network, [self.at])}{_reasons(network, [self.at])}"
        before, behind = _ancestors(self.after), _ancestors(self.at)
        shared = [path for path in before if path in behind] or [""]
        apart = [path for path in (*reversed(before), *reversed(behind)) if path not in shared]  # outer ones first
        suspects = [*apart, *([self.at] if self.at else []), *shared]
        trusted = type(network).__module__.partition(".")[0]
        blamed = [path for path in suspects if any(peculiarities(network.get_submodule(path), trusted))]
        ends = [f"behind {self.after}" if self.after else "", f"before {self.at}" if self.at else ""]
        found = _named(network, blamed or [*apart[:1], shared[0]])
        return f"{' and '.join(end for end in ends if end) or 'somewhere'}, in {found}{_reasons(network, blamed)}"


def _ancestors(path: str) -> list[str]:
    """The modules that contain the one at `path`, the closest first, and the network ("") last."""
    found = []
    while path:
        path = path.rpartition(".")[0]
        found.append(path)
    return found


def _named(network: nn.Module, paths: Sequence[str]) -> str:
    kinds = [(path, full_name(type(network.get_submodule(path)))) for path in dict.fromkeys(paths)]
    return " or ".join(f"{path} ({kind})" if path else f"the {kind} itself" for path, kind in kinds[:3])


def _reasons(network: nn.Module, paths: Sequence[str]) -> str:
    trusted = type(network).__module__.partition(".")[0]
    found = [reason for path in paths for reason in peculiarities(network.get_submodule(path), trusted)]
    return f": {'; '.join(dict.fromkeys(found))}" if found else ""


def _first_difference(graph: Graph, theirs: _NetworkPrints, ours: _GraphPrints, bound: float) -> _Difference | None:
    after = ""
    for reader, giver in dict.fromkeys(paths for node in graph.nodes if (paths := _modules_of(node))):
        reads, gives = ours.reads[reader, giver], ours.gives[reader, giver]
        before = _distance(_joined(reads), theirs.into(reader))
        before = _distance(reads[0], theirs.into(reader)) if before is None else before
        if before is not None and before > bound:
            return _Difference(after=after, at=reader, error=before)
        behind = _distance(_joined(gives), theirs.out_of(giver))
        if behind is not None and behind > bound:
            return _Difference(after=after, at=giver, error=behind, inside=before is not None)
        after = giver if behind is not None else after
    return None


# What the values of a graph do not show


def _check_parameters(graph: Graph, network: nn.Module, image: Tensor) -> None:
    """Raises an error for parameters that the network uses and its graph does not.

    Values do not show all of them: a new adapter, for example, still adds 0.
    """
    with torch.enable_grad():
        used = _parameters_behind(joined(_answers(graph, network(image))), network)
        followed = _parameters_behind(Run(_in_evaluation(graph), network, Passthrough())(image), network)
    lost = [name for name in used if name not in followed]
    if lost:
        path = lost[0].rpartition(".")[0]
        raise UnsupportedNetworkError(
            f"{type(network).__name__}: the parameter {lost[0]} of {_named(network, [path])} acts in the network, but "
            f"its graph does not have it ({len(lost)} such parameters). {_REMEDY}"
        )


def _parameters_behind(output: Tensor, network: nn.Module) -> dict[str, None]:
    """The names of the parameters from which `output` was computed, in the order of the network."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found: set[str] = set()
    known, waiting = set(), [output.grad_fn]
    while waiting:
        step = waiting.pop()
        if step is None or step in known:
            continue
        known.add(step)
        name = names.get(id(getattr(step, "variable", None)))
        if name is not None:
            found.add(name)
        waiting += [behind for behind, _ in step.next_functions]
    return {name: None for name in names.values() if name in found}

"""The quantizable graph of a network: which values exist, which of them carry a scale, and which modules make them.

An adapter in `models/` writes the graph of its family once; everything else follows from it: the float pass that
calibration watches, the fake-quantized pass that training differentiates, and the integer Program. Values are token
matrices `(N, rows, channels)`; the input is the normalized image `(N, C, H, W)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from swincompress_pl.spec import INPUT_VALUE

if TYPE_CHECKING:
    from swincompress_pl.quant.lower import Lowering

RESIDUAL_BITS = 16
LOGIT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place where values are quantized; several values may share one (the residual stream of a stage).

    segments: sizes of the channel runs that share one scale, in order: `(C,)` a tensor, three entries for q | k | v.
    balanced: each channel also has a fixed ratio to the scale, which the next linear layer absorbs in its weights
    (LayerNorm outputs). shiftable: its codes may stand for the value plus a constant, which its neighbours absorb in
    their biases and tables (`GraphBuilder` finds out which). bits: 2 to 8, 16 (residual stream) or 32 (logits);
    unsigned sites use the whole range.
    operand: its values go into a product; one that only goes into a table (GELU's input) is no operand.
    fixed_scale: a scale that quantization has no say in: 1 for spikes and their sums, which are whole numbers, and for
    currents, whose unit is that of the weights; the unit of a stream of membrane potentials. Such values are not
    rounded in training.
    """

    name: str
    segments: tuple[int, ...]
    bits: int = 8
    signed: bool = True
    balanced: bool = False
    shiftable: bool = False
    operand: bool = True
    fixed_scale: float | None = None

    @property
    def channels(self) -> int:
        return sum(self.segments)

    @property
    def dtype(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def storage(self) -> str:
        """The type of array that holds its codes: narrow ones take a byte."""
        return ("int8" if self.signed else "uint8") if self.bits <= 8 else self.dtype

    @property
    def q_max(self) -> int:
        """Largest code; logits keep 2**20 steps, well inside int32."""
        if self.bits == LOGIT_BITS:
            return 2**20
        return int(2 ** (self.bits - self.signed) - 1)

    @property
    def searched(self) -> bool:
        """Sites of up to eight bits have their scale searched; wider ones keep the true maximum with headroom."""
        return self.bits <= 8 and self.fixed_scale is None


class Quantizer(Protocol):
    """What happens to values and weights on the way through the graph: nothing, observation, or fake quantization.

    balances: ratios (C,) of the channels to the scale, for the balanced sites, by name.
    """

    @property
    def balances(self) -> Mapping[str, Tensor]: ...

    def activation(self, site: Site, x: Tensor) -> Tensor: ...

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor: ...

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None: ...


class Passthrough:
    """The float network."""

    @property
    def balances(self) -> Mapping[str, Tensor]:
        return {}

    def activation(self, site: Site, x: Tensor) -> Tensor:
        return x

    def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
        return weight

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Node:
    """One step of the graph. `site` is where its output is quantized; None: the output is in the unit of its first
    input.

    `regularizers` are paths of dropout and stochastic-depth modules that act on the output in training.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    site: str | None = None
    regularizers: tuple[str, ...] = ()

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def lower(self, lowering: Lowering) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WeightedNode(Node):
    """A linear layer or convolution: has quantized weights with one step per output channel."""

    module: str

    def folded_weight(self, network: nn.Module, balance: Tensor | None) -> Tensor:
        """(M, K...) the weight as it is quantized: with input ratios and layer scale folded in."""
        raise NotImplementedError

    def folded_bias(self, network: nn.Module) -> Tensor | None:
        """(M,) the real bias, or None."""
        raise NotImplementedError

    def set_folded_weight(self, network: nn.Module, folded: Tensor, balance: Tensor | None) -> None:
        """Make `folded_weight` give (M, K...) `folded`, in the network itself."""
        raise NotImplementedError

    def add_to_bias(self, network: nn.Module, change: Tensor) -> None:
        """Add (M,) to what `folded_bias` gives, in the network itself; a layer without a bias stays as it is."""
        raise NotImplementedError

    def input_rows(self, network: nn.Module, x: Tensor) -> Tensor:
        """(N, rows, K) the input as the rows that `search_weight` multiplies."""
        raise NotImplementedError

    def search_weight(self, network: nn.Module) -> Tensor:
        """(M, K) the folded weight without ratios, as the matrix that a search tries steps on."""
        return self.folded_weight(network, None).flatten(1)

    def sampled_rows(self, network: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        """(R, K) some of the rows, counted over the whole batch."""
        return self.input_rows(network, x).flatten(0, 1)[index]

    def groups(self, network: nn.Module) -> int:
        """Into how many equal parts outputs and inputs split, that have nothing to do with each other."""
        return 1

    def grid(self, network: nn.Module, step: Tensor, balance: Tensor | None) -> float:
        """The step (M,) of the folded weight in the network's own weight, for a typical channel."""
        return float(step.median()) / (1.0 if balance is None else float(balance.median()))

    def settled_step(self, network: nn.Module, step: Tensor, in_scale: float) -> Tensor:
        """(M,) the steps nearest to these that what reads the layer can take."""
        return step


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Sites by name and nodes in order; the last node writes the logits. time_steps: of events; None for images."""

    sites: dict[str, Site]
    nodes: tuple[Node, ...]
    height: int
    width: int
    channels: int
    time_steps: int | None = None

    def __post_init__(self) -> None:
        owner: dict[str, str | None] = {INPUT_VALUE: None}
        for node in self.nodes:
            missing = [name for name in node.inputs if name not in owner]
            if missing or node.output in owner:
                raise ValueError(f"graph node {node.name!r}: reads unknown {missing} or rewrites {node.output!r}")
            if node.site is not None and node.site not in self.sites:
                raise ValueError(f"graph node {node.name!r}: unknown site {node.site!r}")
            owner[node.output] = node.site if node.site is not None else owner[node.inputs[0]]
        object.__setattr__(self, "_site_of", owner)
        last = {name: number for number, node in enumerate(self.nodes) for name in node.inputs}
        object.__setattr__(self, "_last_use", last)

    def last_use(self, value: str) -> int:
        """The number of the last node that reads a value; -1: none does."""
        uses: dict[str, int] = self._last_use  # type: ignore[attr-defined]
        return uses.get(value, -1)

    def blocks(self) -> list[range]:
        """The numbers of the nodes, cut wherever a single value is all that goes on, with weights in every part."""
        blocks, start = [], 0
        for number, node in enumerate(self.nodes):
            alive = {n.output for n in self.nodes[: number + 1] if self.last_use(n.output) > number}
            later = any(isinstance(n, WeightedNode) for n in self.nodes[number + 1 :])
            weighted = any(isinstance(n, WeightedNode) for n in self.nodes[start : number + 1])
            if alive <= {node.output} and weighted and later:
                blocks.append(range(start, number + 1))
                start = number + 1
        return [*blocks, range(start, len(self.nodes))]

    def site_of(self, value: str) -> Site | None:
        """The site in whose unit `value` is; None for the pixels."""
        name = self._site_of[value]  # type: ignore[attr-defined]
        return None if name is None else self.sites[name]

    @property
    def weighted_nodes(self) -> tuple[WeightedNode, ...]:
        return tuple(node for node in self.nodes if isinstance(node, WeightedNode))


class Run:
    """One pass of the graph over a network with a quantizer."""

    def __init__(self, graph: Graph, network: nn.Module, quantizer: Quantizer) -> None:
        self.graph, self.network, self.quantizer = graph, network, quantizer

    def __call__(self, images: Tensor) -> Tensor:
        """images: normalized float (N, C, H, W), or events (N, T, C, H, W) -> logits (N, classes)."""
        time = () if self.graph.time_steps is None else (self.graph.time_steps,)
        expected = (*time, self.graph.channels, self.graph.height, self.graph.width)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this network takes (N, {', '.join(map(str, expected))})"
            )
        values = self.advance({INPUT_VALUE: images}, range(len(self.graph.nodes)))
        return values[self.graph.nodes[-1].output].flatten(1)

    def advance(self, values: Mapping[str, Tensor], numbers: range) -> dict[str, Tensor]:
        """Run the nodes of these numbers on what is known so far: the values that later nodes read, or the result."""
        known = dict(values)
        for number in numbers:
            node = self.graph.nodes[number]
            inputs = tuple(known[name] for name in node.inputs)
            output = node.forward(self, *inputs)
            self.quantizer.output(node, inputs, output)
            if node.site is not None:
                output = self.quantizer.activation(self.graph.sites[node.site], output)
            for path in node.regularizers:
                output = self.network.get_submodule(path)(output)
            known[node.output] = output
            for name in node.inputs:
                if self.graph.last_use(name) == number:
                    known.pop(name, None)
        return known

    def weight(self, node: WeightedNode) -> Tensor:
        """The weight of `node` as this pass uses it, input ratios divided out again."""
        balance = self.balance(node)
        folded = self.quantizer.weight(node, node.folded_weight(self.network, balance))
        return folded if balance is None else folded / balance

    def balance(self, node: WeightedNode) -> Tensor | None:
        """(K,) ratios of the input's channels to its scale, or None."""
        site = self.graph.site_of(node.inputs[0])
        return None if site is None else self.quantizer.balances.get(site.name)


def parameter(network: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(network.get_submodule(owner), name)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{path} is {type(tensor).__name__}, not a tensor")
    return tensor


def float_logits(graph: Graph, network: nn.Module, images: Tensor) -> Tensor:
    """The float network through its graph; equal to `network(images)` up to float rounding."""
    with torch.no_grad():
        return Run(graph, network, Passthrough())(images)


def residual_site(name: str, channels: int) -> Site:
    return Site(name=name, segments=(channels,), bits=RESIDUAL_BITS)


def collect_sites(sites: Sequence[Site]) -> dict[str, Site]:
    """Sites by name; a name given twice must mean the same site."""
    table: dict[str, Site] = {}
    for site in sites:
        if table.setdefault(site.name, site) != site:
            raise ValueError(f"site {site.name!r} is declared twice, differently")
    return table

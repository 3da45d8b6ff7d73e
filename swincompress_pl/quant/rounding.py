"""Rounds weights with regard to each other, block by block, instead of each to its nearest value.

The network is cut into blocks between which only the residual stream passes. In order, each block reads what the
quantized blocks before it give.

First each layer is rounded by second-order compensation (GPTQ, arXiv 2210.17323), which spreads the error of a column
over the columns that are not rounded yet. Then the rounding of all weights of the block is learned together, against
the float network's output of the block. BRECQ (arXiv 2102.05426) does so with AdaRound's choice between two neighbors.
Here a straight-through gradient moves the weights, which may go further.

The result is written to the network's own weights, so that rounding to nearest finds it again. Weights that are exactly
0, such as pruned ones, stay 0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swincompress_pl.arguments import flag, integer, number
from swincompress_pl.quant.graph import Delegating, Node, Passthrough, Quantizer, Run, WeightedNode
from swincompress_pl.quant.graph.outputs import joined
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.quant.probe import Probe
from swincompress_pl.quant.progress import Progress, track
from swincompress_pl.quant.scales import Scales
from swincompress_pl.spec import INPUT_VALUE

_DAMPING = 0.1  # as a part of the mean diagonal, because the rows of a few images tell little about most directions
Values = Sequence[dict[str, Tensor]]
"""The live values of each batch."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the rounding "learned" trains each block, after its second-order rounding.

    Attributes:
        iterations: Iterations of Adam per block; 0 leaves the second-order rounding as it is.
        batch_images: Images per iteration.
        lr: Learning rate, in steps of the weights' grid, above 0.
        sensitive: Whether the errors of a block's outputs are weighted by how much the network's answers depend on
            them. The weight is the mean squared gradient as in BRECQ, but averaged over the images.
        seed: Seed of the choice of images.

    Raises:
        ValueError: If a field is outside its range; the message names it.
    """

    iterations: int = 200
    batch_images: int = 16
    lr: float = 0.02
    sensitive: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        checked = {
            "iterations": integer("iterations", self.iterations, least=0),
            "batch_images": integer("batch_images", self.batch_images, least=1),
            "lr": number("lr", self.lr, lambda rate: rate > 0, "above 0, e.g. 0.02"),
            "sensitive": flag("sensitive", self.sensitive),
            "seed": integer("seed", self.seed, least=0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@torch.no_grad()
def round_blocks(
    quantized: QuantizedNetwork, batches: Sequence[Tensor], learning: Learning, *, progress: Progress = False
) -> None:
    """Rounds all weights of a calibrated network in eval mode; the biases take up the remaining mean error.

    `batches` are normalized images (N, C, H, W) on the network's device. The values between two blocks are kept for all
    images, and for learning also those of the float network.
    """
    graph, network = quantized.graph, quantized.network
    integer = Run(graph, network, quantized.scales)
    float_run = None
    if learning.iterations:
        float_run = Run(graph, copy.deepcopy(network).requires_grad_(False), Passthrough())
    importance = _sensitivities(float_run, batches, learning.seed) if float_run and learning.sensitive else {}
    wanted: Values = [{INPUT_VALUE: images} for images in batches]
    given: Values = [{INPUT_VALUE: images} for images in batches]
    for numbers in track(graph.blocks(), "rounding", progress):
        nodes = [node for node in graph.nodes[numbers.start : numbers.stop] if isinstance(node, WeightedNode)]
        end = graph.nodes[numbers.stop - 1].output  # named outputs beside it have no weights of their own
        for node in nodes:
            _compensate(node, numbers, integer, given)
        if float_run is not None:
            wanted = [{end: float_run.advance(values, numbers)[end]} for values in wanted]
            rates = _rates(nodes, integer, learning.lr)
            if rates:  # the last block of a network without a classifier has no parameters
                _learn(_Block(integer, numbers, given, wanted, importance), rates, learning)
        given = [{end: integer.advance(values, numbers)[end]} for values in given]


class _Watch(Delegating):
    """A quantizer that keeps the rows that one layer reads."""

    def __init__(self, inner: Quantizer, node: WeightedNode, network: nn.Module) -> None:
        super().__init__(inner)
        self.node, self.network = node, network
        self.rows = torch.empty(0)

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if node is self.node:
            self.rows = self.node.input_rows(self.network, inputs[0]).flatten(0, 1)


def _rows(node: WeightedNode, run: Run, values: dict[str, Tensor], numbers: range) -> Tensor:
    """The rows (R, K) that `node` reads when its block runs on `values`."""
    watch = _Watch(run.quantizer, node, run.network)
    upto = next(n for n in numbers if run.graph.nodes[n] is node)
    Run(run.graph, run.network, watch).advance(values, range(numbers.start, upto + 1))
    return watch.rows


def _compensate(node: WeightedNode, numbers: range, integer: Run, given: Values) -> None:
    """Rounds one layer by second order for the inputs that it gets; its bias takes up the mean error.

    Neither tries to correct errors of the layers before. Fitted to a few images, that cost DeiT-Tiny more on other
    images than it gained.
    """
    scales = integer.quantizer
    assert isinstance(scales, Scales)
    equalization = integer.equalization(node)
    weight = node.folded_weight(integer.network, equalization)
    groups = node.groups(integer.network)
    flat = weight.flatten(1).double().unflatten(0, (groups, -1))
    inputs = flat.shape[2]
    gram, total, count = flat.new_zeros(groups, inputs, inputs), flat.new_zeros(groups, inputs), 0
    for values in given:
        rows = _rows(node, integer, values, numbers)
        x = (rows if equalization is None else rows / equalization).unflatten(1, (groups, inputs)).transpose(0, 1)
        gram += (x.transpose(1, 2) @ x).double()
        total += x.double().sum(1)
        count += x.shape[1]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_((_DAMPING * diagonal.mean(1, keepdim=True)).clamp(min=1e-12))
    step, q_max = scales.step(node).double(), scales.weight_quantizer(node).q_max
    rounded = second_order_rounding(flat, step.unflatten(0, (groups, -1)), gram, q_max)
    node.set_folded_weight(integer.network, rounded.to(weight).reshape(weight.shape), equalization)
    error = ((flat - rounded) @ (total / count)[:, :, None]).flatten()
    node.add_to_bias(integer.network, error.to(weight))


def second_order_rounding(weight: Tensor, step: Tensor, gram: Tensor, q_max: int) -> Tensor:
    """The multiples (..., M, K) of `step` (..., M), within +-q_max steps, near `weight` by the metric of `gram`.

    All are float64. `gram` (..., K, K) is the sum of x x^T over the inputs, positive definite. Columns are rounded in
    the order of its diagonal, the largest first. The error of a column is spread over the columns after it by the
    Cholesky factor of the inverse. Weights that are exactly 0 stay 0 and pass on what was spread over them.
    """
    order = torch.argsort(gram.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True)
    columns = order[..., None, :].expand_as(weight)
    left = weight.gather(-1, columns)
    pruned = left == 0
    ordered = gram.take_along_dim(order[..., :, None], -2).take_along_dim(order[..., None, :], -1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    factor = torch.linalg.cholesky(inverse, upper=True)
    result = torch.empty_like(left)
    for column in range(left.shape[-1]):
        codes = torch.floor(left[..., column] / step + 0.5).clamp(-q_max, q_max).masked_fill_(pruned[..., column], 0)
        result[..., column] = codes * step
        error = (left[..., column] - result[..., column]) / factor[..., column, column, None]
        left[..., column + 1 :] -= error[..., None] * factor[..., None, column, column + 1 :]
    return torch.empty_like(result).scatter_(-1, columns, result)


def _sensitivities(run: Run, batches: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
    """{output of a block: the mean square (1, rows, C) of the loss's gradient over all images, relative to the mean}.

    The gradient is that of a `Probe`. Squares of small gradients need float64. If it tells nothing, all are 1.
    """
    probe = Probe.of(run.graph, run.network, batches, seed=seed)
    total: dict[str, Tensor] = {}
    for images in batches:
        values: Mapping[str, Tensor] = {INPUT_VALUE: images.detach().clone().requires_grad_(True)}
        ends: dict[str, Tensor] = {}
        with torch.enable_grad():
            for numbers in run.graph.blocks():
                values = run.advance(values, numbers)
                end = run.graph.nodes[numbers.stop - 1].output
                ends[end] = values[end]
            answer = probe(joined(run.results(values)))
        for name, gradient in zip(ends, torch.autograd.grad(answer, list(ends.values())), strict=True):
            total[name] = total.get(name, 0.0) + gradient.double().square().sum(0, keepdim=True)
    return {name: _relative(squares).to(batches[0].dtype) for name, squares in total.items()}


def _relative(squares: Tensor) -> Tensor:
    mean = squares.mean()
    return squares / mean if bool(torch.isfinite(mean) & (mean > 0)) else torch.ones_like(squares)


class _Block:
    """A block of the integer network, together with the float network's output for the same images.

    `given` and `wanted` have the one value before the block and the one after it; `importance` is that of
    `_sensitivities`.
    """

    def __init__(
        self, integer: Run, numbers: range, given: Values, wanted: Values, importance: Mapping[str, Tensor]
    ) -> None:
        (self._start,), (self._end,) = tuple(given[0]), tuple(wanted[0])
        self._integer, self._numbers, self._given, self._wanted = integer, numbers, given, wanted
        self._weight = importance.get(self._end, wanted[0][self._end].new_ones(()))
        self.images = sum(len(values[self._start]) for values in given)

    def total_error(self) -> float:
        """The error over all images."""
        pairs = zip(self._given, self._wanted, strict=True)
        return sum(float(self._errors(values, wanted[self._end]).sum()) for values, wanted in pairs)

    def loss(self, picked: Tensor) -> Tensor:
        """The mean error of these images."""
        start, end = _picked(self._given, self._start, picked), _picked(self._wanted, self._end, picked)
        return self._errors({self._start: start}, end).mean()

    def _errors(self, values: dict[str, Tensor], wanted: Tensor) -> Tensor:
        return (self._integer.advance(values, self._numbers)[self._end] - wanted).square() * self._weight


def _picked(values: Values, name: str, images: Tensor) -> Tensor:
    """Some images of a value; all batches except the last one have the same size."""
    size = len(values[0][name])
    return torch.stack([values[image // size][name][image % size] for image in images.tolist()])


def _rates(nodes: Sequence[WeightedNode], integer: Run, lr: float) -> dict[nn.Parameter, float]:
    """{weight or bias: `lr` steps of its layer's grid}.

    A layer may belong to several nodes, each with some of its rows; so the mapping names each parameter once.
    """
    scales, network = integer.quantizer, integer.network
    assert isinstance(scales, Scales)
    rates: dict[nn.Parameter, float] = {}
    for node in nodes:
        rate = lr * node.grid(network, scales.step(node), integer.equalization(node))
        rates |= dict.fromkeys(network.get_submodule(node.module).parameters(recurse=False), rate)
    return rates


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets parameters take gradients inside the context; afterwards all is as before, and none has a gradient."""
    required = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in zip(parameters, required, strict=True):
            parameter.requires_grad_(was)
            parameter.grad = None


def _learn(block: _Block, rates: Mapping[nn.Parameter, float], learning: Learning) -> None:
    """Trains the weights and biases of a block, rounded with a straight-through gradient, against the wanted output.

    A step of Adam moves a weight by at most about `lr` of its grid's step, so the result is another rounding and not
    another network. If the error over all images is not smaller afterwards, the weights stay as they were.
    """
    parameters = list(rates)
    generator = torch.Generator().manual_seed(learning.seed)
    before, error = [p.clone() for p in parameters], block.total_error()
    pruned = [p == 0 if p.ndim > 1 else None for p in parameters]  # a bias of 0 was not pruned
    with _trainable(parameters):
        adam = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in rates.items()])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, learning.iterations)
        for _ in range(learning.iterations):
            picked = torch.randperm(block.images, generator=generator)[: learning.batch_images]
            with torch.enable_grad():
                gradients = torch.autograd.grad(block.loss(picked), parameters)
            for parameter, gradient, zeros in zip(parameters, gradients, pruned, strict=True):
                parameter.grad = gradient if zeros is None else gradient.masked_fill(zeros, 0)
            adam.step()
            schedule.step()
    if not block.total_error() < error:
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)

"""What is known about a layer that is solved again: its sums, what it lost, and what solves it."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swincompress_pl.masks import masked_parameters
from swincompress_pl.pruning.compensation.moments import Moments, System
from swincompress_pl.pruning.compensation.readers import Reader
from swincompress_pl.pruning.compensation.rows import Felt, RowSystem, best_weights
from swincompress_pl.pruning.evaluation.ranks import world_size
from swincompress_pl.pruning.structure.apply import stored_tensor

MOST_ROWS = 131_072  # per layer; more say little more
# What gradients decide, the rest being the same for all. All of it would fit the few rows that are felt most, and is
# noisy, as there is one gradient per image.
_FELT_PART = 0.3  # of a row's weight
_FELT_POWER = 0.5  # of the mean squared gradient of an output
_LEAST_FELT = 1e-4  # of the mean over the outputs
_FELT_FAR = 4.0  # times the mean of an image's rows: such rows, as of a class token, are a group of their own
_FELT_ERROR = 1e-2  # the error of the mean squared gradient in 32 bits
_MOST_OUTPUTS = 2048  # of a layer whose errors are weighed together; two matrices of them have 67 MB


class ReaderState:
    """What is known about one reader.

    `moments` are of all inputs that it had when they were collected, and `columns` are those that it still has.
    `gone` are columns, of those, that are lost for now. `weight` and `bias` are what it has without that; `mean` and
    `scale` are of the BatchNorm behind it; `scale` besides says how much the answers feel each output.
    """

    def __init__(self, network: nn.Module, reader: Reader) -> None:
        self.reader, self.gone = reader, frozenset[int]()
        self._draw = torch.Generator().manual_seed(0)
        outputs, inputs = stored_tensor(network, f"{reader.name}.weight").flatten(1).shape
        device = stored_tensor(network, f"{reader.name}.weight").device
        self._felt = torch.zeros(outputs, dtype=torch.float64, device=device)  # squared gradients of outputs, summed
        self._felt_rows = 0
        # Products of gradients: of the rows that are felt far more than others of their image, and of the others.
        self._felt_together = self._felt.new_zeros(2, outputs, outputs) if outputs <= _MOST_OUTPUTS else None
        self._read(network)
        self.moments = Moments.empty(inputs, outputs, self.weight.device)
        self._far = Moments.empty(inputs, outputs, self.weight.device)  # of the rows that are felt far more
        self._by_width = {inputs: torch.arange(inputs, device=self.weight.device)}
        self._mask: Tensor | None = None  # of single weights, True where one stays; None if none are masked
        self._solved: dict[frozenset[int], tuple[Tensor, Tensor]] = {}

    def _read(self, network: nn.Module) -> None:
        layer = network.get_submodule(self.reader.name)
        self.weight = stored_tensor(network, f"{self.reader.name}.weight").detach().double().flatten(1)
        bias = layer._parameters["bias"]
        self.bias = self.weight.new_zeros(len(self.weight)) if bias is None else bias.detach().double()
        self.mean, self.scale = self.bias, torch.ones_like(self.bias)
        if self.reader.norm is not None:
            norm = network.get_submodule(self.reader.norm)
            assert isinstance(norm, _BatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            self.mean = norm.running_mean.double().clone()
            self.scale = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                self.scale = self.scale * norm.weight.detach().double()
        if float(self._felt.sum()) > 0:
            felt = (self._felt / self._felt.mean()).clamp_min(_LEAST_FELT)
            self.scale = self.scale * felt.pow(_FELT_POWER / 2)

    def add(self, layer: nn.Module, x: Tensor, gradient: Tensor | None, images: int, *, of: int) -> None:
        """Adds what the layer reads of some `images`, and the gradients of what it gives, to the sums.

        A random part of the rows is taken if all images, `of`, have too many.
        """
        far = weights = None
        if gradient is not None:
            weights, far = self._weights(self.reader.given(layer, gradient.detach()).double(), images)
        part, start = min(1.0, MOST_ROWS * images / of / self.reader.count(layer, x)), 0
        for rows in self.reader.rows(layer, x):
            here = slice(start, start + len(rows))
            start += len(rows)
            chosen = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            if part < 1:
                chosen = (torch.rand(len(rows), generator=self._draw) < part).to(rows.device)
                rows = rows[chosen]
            self.moments.add(rows, None if weights is None else weights[here][chosen])
            if far is not None and weights is not None and bool(far[here].any()):
                apart = far[here][chosen]
                self._far.add(rows[apart], weights[here][chosen][apart])

    def _weights(self, gradients: Tensor, images: int) -> tuple[Tensor | None, Tensor]:
        """The weights (rows,) of rows with gradients (rows, outputs), and which are felt far more than others.

        The weights are None if the answers felt none so far.
        """
        squares = gradients.square()
        self._felt += squares.sum(0)
        felt = squares.sum(1)
        by_image = felt.reshape(images, -1) if len(felt) % images == 0 else felt.reshape(1, -1)
        far = (by_image > _FELT_FAR * by_image.mean(1, keepdim=True)).flatten()
        if self._felt_together is not None:
            rounded = gradients.float()
            for number, each in enumerate((rounded[far], rounded[~far])):
                self._felt_together[number] += each.T @ each
        self._felt_rows += len(felt)
        mean = float(self._felt.sum()) / self._felt_rows
        return (1 - _FELT_PART) + _FELT_PART * felt / mean if mean > 0 else None, far

    def over_ranks(self) -> Moments:
        """The moments of all ranks of a distributed run, which all have to call it; the gradients become theirs too."""
        if world_size() > 1:
            distributed.all_reduce(self._felt)
            if self._felt_together is not None:
                distributed.all_reduce(self._felt_together)
        self._far.over_ranks()
        return self.moments.over_ranks()

    def fits(self, network: nn.Module) -> bool:
        """Whether the sums still tell all about the reader: it lost inputs as `narrowed` said, and no outputs."""
        weight = stored_tensor(network, f"{self.reader.name}.weight").flatten(1)
        return weight.shape[1] in self._by_width and len(weight) == len(self.moments.y)

    def take_up(self, network: nn.Module) -> None:
        """Begins again with the weights that the network has now, which may have been cut as `narrowed` said."""
        self._read(network)
        mask = masked_parameters(network).get(f"{self.reader.name}.weight")
        stays = torch.ones_like(self.weight, dtype=torch.bool) if mask is None else mask[1].flatten(1)
        lost = ~stays.any(0)
        self._mask = None if bool((stays | lost).all()) else stays
        self._solved, self.gone = {}, frozenset(lost.nonzero().flatten().tolist())
        self.columns = self._by_width[self.weight.shape[1]]

    def narrowed(self, columns: frozenset[int]) -> None:
        """Says that columns are cut away; if that is undone, the network is as wide as before."""
        kept = self.columns[self._without(columns)]
        self._by_width[len(kept)] = kept

    def turned(self, matrix: Tensor) -> None:
        """Says that the reader reads `matrix` times what the moments are of."""
        for moments in (self.moments, self._far):
            moments.xx = matrix @ moments.xx @ matrix.T
            moments.x = matrix @ moments.x

    def _without(self, columns: frozenset[int]) -> Tensor:
        kept = [c for c in range(self.weight.shape[1]) if c not in columns]
        return torch.tensor(kept, dtype=torch.long, device=self.weight.device)

    def felt(self) -> Felt | None:
        """How much the answers feel errors of the outputs together; None if they feel none, or outputs are too many.

        It is None, too, if gradients are so small or so large that their products do not fit 32 bits, as those of a
        saturated softmax.

        That is E[g g^T] of the gradients g of what the layer gives (a Kronecker factor of Martens & Grosse, 2015).
        """
        mean = float(self._felt.mean())
        if self._felt_together is None or not mean > 0:
            return None
        of_far, of_others = self._felt_together / mean
        if not abs(float((of_far + of_others).diagonal().mean()) - 1) < _FELT_ERROR:
            return None
        parts = [(of_far, self._far), (of_others, self.moments.without(self._far))]
        about = self.moments.x * (0.0 if self.reader.fixed_bias else 1 / self.moments.rows)
        return Felt(
            together=of_far + of_others,
            parts=tuple((g, each.second(about)[self.columns][:, self.columns]) for g, each in parts if each.rows > 0),
        )

    def system(self) -> System:
        """The normal equations of the columns that the reader still has."""
        return self.moments.system(intercept=not self.reader.fixed_bias).of(self.columns)

    def solution(self, damping: float | None) -> tuple[Tensor, Tensor]:
        """The weight matrix, 0 where columns are gone, and the bias."""
        if self.gone not in self._solved:
            kept, solved = self._without(self.gone), torch.zeros_like(self.weight)
            if self._mask is None:
                solved[:, kept] = self.system().solve(self.weight, kept, damping)
            else:
                rows, stays = RowSystem.of(self.system(), self.weight, damping), torch.zeros_like(self._mask)
                stays[:, kept] = self._mask[:, kept]
                solved = best_weights(rows, self.weight, stays, exactly=False)
            bias = self.bias if self.reader.fixed_bias else self.moments.intercept(solved, self.columns)
            self._solved[self.gone] = solved, bias
        return self._solved[self.gone]

    def inverse_hessian(self, damping: float | None) -> tuple[Tensor, Tensor]:
        """The inverse of the damped second moments (columns, columns), and the weights as a BatchNorm scales them.

        Columns that are gone are as good as independent of the others, with weights of 0.
        """
        kept, system = self._without(self.gone), self.system()
        inverse = torch.eye(len(system.xx), dtype=torch.float64, device=system.xx.device)
        inverse[kept.unsqueeze(1), kept] = system.of(kept).inverse(damping)
        return inverse, self.solution(damping)[0] * self.scale.unsqueeze(1)

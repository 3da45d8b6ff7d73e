"""A layer whose every output loses weights of its own: which ones go, and what makes up for them.

Each row w of the weights, with the Hessian A = E[x x^T] + d and the right-hand side r = E[x y] + d w, has the error
w A w^T - 2 w r^T. Over weights that are 0 outside of a mask it is least where A_KK w_K = r_K, with K what stays. Every
row has another K, so every row is another system; `RowSystem.solve` solves them in parts of bounded memory. Where that
takes too long, `RowSystem.approach` does some steps of conjugate gradients, for all rows together. Which weights go is
a search over all masks; `RowSystem.mask` does it by the alternating direction method of multipliers with a growing
number of zeros (Boza, arXiv 2401.02938).

What follows a layer may feel errors of several outputs together: with G their matrix, the error of the layer is
tr(G (W - V) A (W - V)^T), V the weights if nothing is lost. That is the Kronecker-factored curvature with which LLM
Surgeon updates weights (van der Ouderaa et al., ICLR 2024). One output can then make up for another, rows are no
systems of their own, and conjugate gradients approach all of them. Inputs that are felt far more than others, as those
of a class token, have a G and an A of their own (`Felt`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from swincompress_pl.pruning.compensation.moments import System, factorized

Keep = Callable[[Tensor, float], Tensor]
"""(saliency (outputs, inputs), part of the removal that is done, 0 to 1) -> mask, True where a weight stays"""

_ELEMENTS_AT_ONCE = 1 << 23  # of batched matrices; 64 MB
_CONJUGATE_STEPS = 64
_STEPS = 20  # of the search for a mask; the number of zeros grows in the first half
# G is estimated from one gradient per image, and far away the error is no square: so much of its diagonal is added to
# it. A search for masks, whose errors are larger, takes its root, and adds so much of the mean.
_TOGETHER_DAMPING = 0.5
_TOGETHER_DAMPING_OF_MASKS = 0.3
MOST_OPERATIONS = 1e11  # of the exact solution of a layer; above it, it is approached


@dataclass(frozen=True, kw_only=True, eq=False)
class Felt:
    """How much what follows a layer feels errors of its outputs.

    Attributes:
        together: G (outputs, outputs), with a diagonal of mean 1.
        parts: (G (outputs, outputs), A (inputs, inputs)) of groups of rows: the G are parts of the whole, and every A
            is the mean over its group, about the mean of all.
    """

    together: Tensor = field(repr=False)
    parts: tuple[tuple[Tensor, Tensor], ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSystem:
    """The damped normal equations of a layer, with one right-hand side per output. All is float64.

    Attributes:
        hessian: A (inputs, inputs), positive definite.
        right: r (outputs, inputs).
        factor: The lower Cholesky factor of A.
        felt: How outputs count together; None if each counts for itself.
    """

    hessian: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    factor: Tensor = field(repr=False)
    felt: Felt | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, system: System, weight: Tensor, damping: float | None = None, felt: Felt | None = None
    ) -> RowSystem | None:
        """The equations of a layer, damped towards `weight` (outputs, inputs); see `System.solve`.

        None if the inputs say nothing, or the damping is infinite.
        """
        scale = float(system.xx.diagonal().mean())
        if not scale > 0 or damping == float("inf"):
            return None
        factor, used = factorized(system.xx, scale, damping)
        if used == float("inf"):
            return None
        hessian = system.xx.clone()
        hessian.diagonal().add_(used * scale)
        return cls(hessian=hessian, right=system.xy.T + used * scale * weight, factor=factor, felt=felt)

    @cached_property
    def inverse(self) -> Tensor:
        """A^-1 (inputs, inputs)."""
        return torch.cholesky_inverse(self.factor)

    @cached_property
    def best(self) -> Tensor:
        """The weights (outputs, inputs) if nothing is lost."""
        return torch.cholesky_solve(self.right.T, self.factor).T

    def solve(self, mask: Tensor) -> Tensor:
        """The best weights (outputs, inputs) that are 0 where `mask` (outputs, inputs) is False."""
        kept, lost = int(mask.sum(1).max()), int((~mask).sum(1).max())
        solved = torch.zeros_like(self.right)
        if kept <= lost:
            for rows, columns, inside in _parts(mask):
                factor = torch.linalg.cholesky(_blocks(self.hessian, columns, inside))
                right = (self.right[rows.unsqueeze(1), columns] * inside).unsqueeze(2)
                found = torch.cholesky_solve(right, factor).squeeze(2)
                solved[rows] = _scattered(found * inside, columns, solved.shape[1])
            return solved
        # w = best - z A^-1 with z that is 0 outside of the lost weights and makes w 0 there.
        for rows, columns, inside in _parts(~mask):
            factor = torch.linalg.cholesky(_blocks(self.inverse, columns, inside))
            right = (self.best[rows.unsqueeze(1), columns] * inside).unsqueeze(2)
            found = torch.cholesky_solve(right, factor).squeeze(2)
            solved[rows] = _scattered(found * inside, columns, solved.shape[1])
        return (self.best - solved @ self.inverse).masked_fill_(~mask, 0.0)

    def approach(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Good weights (outputs, inputs) that are 0 where `mask` is False, never worse than `weight` with those zeros.

        These are some steps of conjugate gradients from there, for all rows at once.
        """
        inside = mask.to(weight)
        apply, size = self._curvature()

        def total(products: Tensor) -> Tensor:
            return products.sum(1, keepdim=True) if self.felt is None else products.sum()

        found = weight * inside
        missed = apply(self.best - found) * inside
        direction = missed / size
        product = total(missed * direction)
        for _ in range(_CONJUGATE_STEPS):
            along = apply(direction) * inside
            length = _divided(product, total(direction * along))
            found += length * direction
            missed -= length * along
            before, product = product, total(missed.square() / size)
            direction = missed / size + _divided(product, before) * direction
        return found

    def _curvature(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The gradient of the error as a function of a change of weights, and its diagonal: of a row, or of all."""
        if self.felt is None:
            return lambda x: x @ self.hessian, self.hessian.diagonal()
        terms = [(g.float(), a.float()) for g, a in self.felt.parts]  # half the precision steers well
        alone, hessian = _TOGETHER_DAMPING * self.felt.together.diagonal().float().unsqueeze(1), self.hessian.float()
        size = alone * hessian.diagonal() + sum(torch.outer(g.diagonal(), a.diagonal()) for g, a in terms)

        def apply(x: Tensor) -> Tensor:
            narrow = x.float()
            found: Tensor = alone * (narrow @ hessian) + sum(g @ narrow @ a for g, a in terms)
            return found.to(x)

        return apply, size.double()

    def operations(self, mask: Tensor) -> float:
        """About how many floating-point operations `solve` takes."""
        kept = mask.sum(1).double()
        return float(torch.minimum(kept, mask.shape[1] - kept).pow(3).sum()) / 3

    def errors(self, weight: Tensor, mask: Tensor) -> Tensor:
        """How far the error of a row rises if one of its weights goes and the others make up for it.

        That is w^2 / [A_KK^-1]_jj (Hassibi & Stork, 1993), for weights (outputs, inputs) that are 0 outside of `mask`;
        0 there. The inverse of all inputs stands for those of the rows if theirs take too long.
        """
        if bool(mask.all()) or float(mask.sum(1).double().pow(3).sum()) > MOST_OPERATIONS:
            return weight.square() / self.inverse.diagonal()
        found = torch.zeros_like(weight)
        for rows, columns, inside in _parts(mask):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(_blocks(self.hessian, columns, inside)))
            here = weight[rows.unsqueeze(1), columns].square() / inverse.diagonal(dim1=1, dim2=2)
            found[rows] = _scattered(here * inside, columns, weight.shape[1])
        return found

    def mask(self, weight: Tensor, scale: Tensor, keep: Keep) -> Tensor:
        """Searches the mask whose best weights have the least error.

        Args:
            weight: The weights (outputs, inputs) to begin with.
            scale: What a BatchNorm multiplies each output (outputs,) with.
            keep: Chooses what stays, by the squares of weights whose inputs have a variance of 1.

        Returns:
            The mask (outputs, inputs), True where a weight stays.
        """
        # Half the precision will do to choose; with inputs, and outputs, of variance 1 one penalty fits all.
        felt = None if self.felt is None else _plus(_root(self.felt.together.float()), _TOGETHER_DAMPING_OF_MASKS)
        factors = (scale if felt is None else felt.diagonal().sqrt()).unsqueeze(1)
        size = self.hessian.diagonal().sqrt()
        pull = _pull(self.hessian / size / size.unsqueeze(1), None if felt is None else felt / factors / factors.T)
        best, found = (self.best * size * factors).float(), (weight * size * factors).float()
        missed = torch.zeros_like(found)
        for step in range(1, _STEPS + 1):
            part = min(1.0, 2 * step / _STEPS) ** (1 / 3)  # most of it early, as the weights then have time to follow
            mask = keep((found + missed).square(), part)
            masked = (found + missed) * mask
            missed = missed + found - masked
            found = best + pull(masked - missed - best)
        return mask


def _pull(hessian: Tensor, felt: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The d that minimizes tr(G d A d^T) + |d - c|^2, as a function of c (outputs, inputs), in half the precision."""
    if felt is None:
        damped = hessian.float()
        damped.diagonal().add_(1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return lambda c: c @ inverse
    sizes, inputs = torch.linalg.eigh(hessian.float())
    weights, outputs = torch.linalg.eigh(felt.float())
    parts = 1 / (1 + torch.outer(weights.clamp_min(0), sizes.clamp_min(0)))
    return lambda c: outputs @ (outputs.T @ c @ inputs * parts) @ inputs.T


def _root(matrix: Tensor) -> Tensor:
    """The square root of a matrix without negative eigenvalues, of mean 1 on the diagonal."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root / root.diagonal().mean()


def _plus(matrix: Tensor, by: float) -> Tensor:
    """The matrix with so much added to its diagonal."""
    found = matrix.clone()
    found.diagonal().add_(by)
    return found


def best_weights(rows: RowSystem | None, weight: Tensor, mask: Tensor, *, exactly: bool = True) -> Tensor:
    """The best weights (outputs, inputs) that are 0 where `mask` is False; without equations, those of `weight`.

    They are approached from `weight` if they need not be solved `exactly`, or that takes too long.
    """
    if rows is None:
        return weight * mask
    if exactly and rows.operations(mask) <= MOST_OPERATIONS:
        weight = rows.solve(mask)
        if rows.felt is None:
            return weight
    return rows.approach(weight, mask)


def _parts(mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields rows of alike counts (rows,), what is True of each as columns (rows, most), and which of these count."""
    counts = mask.sum(1)
    order, start = counts.argsort(descending=True), 0
    while start < len(order) and int(counts[order[start]]):
        most = int(counts[order[start]])
        rows = order[start : start + max(1, _ELEMENTS_AT_ONCE // most**2)]
        columns = (~mask[rows]).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        yield rows, columns, torch.arange(most, device=mask.device) < counts[rows].unsqueeze(1)
        start += len(rows)


def _blocks(matrix: Tensor, columns: Tensor, inside: Tensor) -> Tensor:
    """The parts (rows, most, most) of a matrix, like the identity where a row has fewer columns."""
    blocks = matrix[columns.unsqueeze(2), columns.unsqueeze(1)]
    blocks *= inside.unsqueeze(2) & inside.unsqueeze(1)
    blocks.diagonal(dim1=1, dim2=2).add_(~inside)
    return blocks


def _scattered(values: Tensor, columns: Tensor, inputs: int) -> Tensor:
    return torch.zeros(len(values), inputs, dtype=values.dtype, device=values.device).scatter_(1, columns, values)


def _divided(one: Tensor, other: Tensor) -> Tensor:
    """The quotient, 0 where there is nothing left to divide."""
    return torch.where(other > 0, one / other.clamp_min(torch.finfo(other.dtype).tiny), 0.0)

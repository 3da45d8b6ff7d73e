"""Second moments of what a layer reads and of what it should give, and the weights that they determine.

The least squares problem of a layer with weights W (outputs, inputs) that loses some of its inputs is

    minimize  E |y - W' x - b'|^2 + d |W' - W|^2    over W' with zeros at the lost inputs, and b'

Here x are the inputs, y is what the layer should give, and d is the damping. With y = W x + b it is the update of
Optimal Brain Surgeon (Hassibi & Stork, 1993) with the Hessian E[x x^T] + d. All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from swincompress_pl.pruning.evaluation.ranks import world_size

LEAST_DAMPING = 1e-4  # as a part of the mean variance of the inputs
_MOST_DAMPING = 1.0
_NO_VARIANCE = 1e-12
_FLOAT32_INTEGERS = 2**24  # all integers below have a float32
_LARGEST_CONDITION = 1e10  # of a system that is solved in float64


class CalibrationError(ValueError):
    """The calibration images give a layer values that nothing can be computed from."""


@dataclass(kw_only=True, eq=False)
class Moments:
    """Weighted sums over rows: what one layer reads, x (inputs,), and what it should give, y (outputs,).

    Attributes:
        xx: Sum of x x^T (inputs, inputs), float64.
        xy: Sum of x y^T (inputs, outputs), float64.
        x: Sum of x (inputs,), float64.
        y: Sum of y (outputs,), float64.
        rows: Sum of the rows' weights; their number, where all weigh 1.
    """

    xx: Tensor = field(repr=False)
    xy: Tensor = field(repr=False)
    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    rows: float = 0.0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> Moments:
        """Makes the moments of no rows."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(xx=zeros(inputs, inputs), xy=zeros(inputs, outputs), x=zeros(inputs), y=zeros(outputs))

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows x (rows, inputs) with weights (rows,), float64; None for 1."""
        if weights is not None:
            x = x.double()
            weighted = x * weights.unsqueeze(1)
            self.xx.addmm_(weighted.T, x)
            self.x += weighted.sum(0)
            self.rows += float(weights.sum())
            return
        if _exact_in_float32(x):
            self.xx += x.T @ x
            self.x += x.sum(0)
        else:
            x = x.double()
            self.xx.addmm_(x.T, x)
            self.x += x.sum(0)
        self.rows += len(x)

    def give(self, weight: Tensor, bias: Tensor) -> None:
        """Makes y what `weight` (outputs, inputs) and `bias` (outputs,) give of the rows of x."""
        self.y = weight @ self.x + bias * self.rows
        self.xy = self.xx @ weight.T + torch.outer(self.x, bias)

    def without(self, others: Moments) -> Moments:
        """The moments of the rows that are not among `others`; it has no y."""
        found = Moments.empty(len(self.x), len(self.y), self.x.device)
        found.xx, found.x, found.rows = self.xx - others.xx, self.x - others.x, self.rows - others.rows
        return found

    def second(self, about: Tensor) -> Tensor:
        """E[(x - about) (x - about)^T] (inputs, inputs)."""
        cross = torch.outer(about, self.x / self.rows)
        return self.xx / self.rows - cross - cross.T + torch.outer(about, about)

    def over_ranks(self) -> Moments:
        """The moments of the rows of all ranks of a distributed run; all ranks have to call it."""
        if world_size() > 1:
            rows = torch.tensor(self.rows, dtype=torch.float64, device=self.x.device)
            for tensor in (self.xx, self.x, rows):
                distributed.all_reduce(tensor)
            self.rows = float(rows)
        return self

    def check(self, layer: str) -> None:
        """Raises CalibrationError, naming `layer`, if there are no rows or a sum is not finite."""
        if not self.rows:
            raise CalibrationError(f"calibration: no image reaches {layer}; give at least one batch of images")
        if not all(bool(t.isfinite().all()) for t in (self.xx, self.x)):
            raise CalibrationError(
                f"calibration: the images give NaN or infinite values at {layer}; look for NaN pixels or NaN weights"
            )

    def system(self, *, intercept: bool) -> System:
        """The mean moments, about the means if an `intercept` absorbs them."""
        xx, xy = self.xx / self.rows, self.xy / self.rows
        if intercept:
            x, y = self.x / self.rows, self.y / self.rows
            xx, xy = xx - torch.outer(x, x), xy - torch.outer(x, y)
        return System(xx=xx, xy=xy)

    def intercept(self, weight: Tensor, columns: Tensor) -> Tensor:
        """The bias (outputs,) with which `weight` (outputs, columns), of some inputs, meets the mean of y."""
        return (self.y - weight @ self.x[columns]) / self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """The normal equations of one layer: E[x x^T] (inputs, inputs) and E[x y^T] (inputs, outputs), float64."""

    xx: Tensor = field(repr=False)
    xy: Tensor = field(repr=False)

    def of(self, columns: Tensor) -> System:
        """The equations of some of the inputs."""
        if len(columns) == len(self.xx):
            return self
        return System(xx=self.xx[columns][:, columns], xy=self.xy[columns])

    def inverse(self, damping: float | None = None) -> Tensor:
        """The inverse of the damped E[x x^T]; see `solve`."""
        scale = float(self.xx.diagonal().mean())
        factor, used = factorized(self.xx, scale, damping if damping != float("inf") else None)
        eye = torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        if not scale > 0:
            return eye / _NO_VARIANCE  # the inputs say nothing, so what weighs them costs nothing
        if used == float("inf"):
            return eye
        return torch.cholesky_inverse(factor)

    def solve(self, weight: Tensor, kept: Tensor, damping: float | None = None) -> Tensor:
        """Solves for the weights that stay.

        Args:
            weight: The given weights (outputs, inputs), float64, which the damping pulls towards.
            kept: Indices of the inputs that stay.
            damping: As a part of the mean variance, 0 or more; infinite returns the given weights. None takes
                `LEAST_DAMPING`, or ten times as much until the condition of the system allows a solution in float64.

        Returns:
            The weights (outputs, kept inputs), float64.
        """
        given = weight[:, kept]
        scale = float(self.xx.diagonal()[kept].mean()) if len(kept) else 0.0
        if not scale > 0 or damping == float("inf"):
            return given  # the inputs say nothing
        xx, xy = self.xx[kept][:, kept], self.xy[kept]
        right = xy - xx @ given.T  # what the given weights miss
        factor, used = factorized(xx, scale, damping)
        return given + torch.cholesky_solve(right, factor).T if used < float("inf") else given


def _exact_in_float32(x: Tensor) -> bool:
    """Whether products of float32 sum to the same as in float64, and faster: spikes and their counts."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not len(x):
        return False
    most = float(x.abs().max())
    return most * most * len(x) < _FLOAT32_INTEGERS and bool((x == x.round()).all())


def factorized(xx: Tensor, scale: float, damping: float | None) -> tuple[Tensor, float]:
    """The Cholesky factor of xx + d * scale * I, and d: `damping`, or the least that conditions the system well.

    If none does, d is infinite.
    """
    tried: Sequence[float] = [damping] if damping is not None else _dampings()
    for each in tried:
        damped = xx.clone()
        damped.diagonal().add_(each * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        diagonal = factor.diagonal()
        # The squared ratio of the diagonal's ends bounds the condition from below, and is close to it in practice.
        if not int(failed) and float(diagonal.max() / diagonal.min()) ** 2 < _LARGEST_CONDITION:
            return factor, each
    return torch.eye(len(xx), dtype=xx.dtype, device=xx.device), float("inf")


def _dampings() -> list[float]:
    found, each = [], LEAST_DAMPING
    while each <= _MOST_DAMPING:
        found.append(each)
        each *= 10
    return found

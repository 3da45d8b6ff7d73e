"""The neuron of networks that are trained with integers; importing this module imports spikingjelly."""

from __future__ import annotations

from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

COUNT_MAX = 255  # counts are bytes


class MultiSpike(nn.Module):
    """A neuron that gives counts of spikes: round(clamp(x, 0, D)) / norm; halves are rounded to even.

    It stands for an integrate-and-fire neuron without leak, with threshold 1 and an initial potential of 1/2. This one
    is charged with x once and fires in D binary time steps, minus the threshold after each spike. The gradient is that
    of x where 0 <= x <= D, and 0 elsewhere.

    Args:
        D: The most spikes, `max_value` in the published code.
        norm: What counts are divided by, `Norm` there; D, or 1 for counts as they are.

    Raises:
        ValueError: If `D` is not a whole number from 1 to 255, or `norm` is neither D nor 1.
    """

    def __init__(self, D: int = 4, norm: int | None = None):  # noqa: N803  # as in the paper
        super().__init__()
        if type(D) is not int or not 1 <= D <= COUNT_MAX:
            raise ValueError(f"MultiSpike: D={D!r}; a neuron gives at most D spikes, from 1 to {COUNT_MAX}, e.g. 4.")
        if norm not in (None, 1, D):
            raise ValueError(
                f"MultiSpike: norm={norm!r} with D={D}; counts are divided by D (norm=None), or by 1 before the head. "
                "Another factor belongs in the weights of the next layer."
            )
        self.D = D
        self.norm = D if norm is None else norm
        self.surrogate_function = surrogate.MultiLevelSpikeCount(D)

    def forward(self, x: Tensor) -> Tensor:
        """Maps real values of any shape to counts over `norm`."""
        counts: Tensor = self.surrogate_function(x)
        return counts / self.norm if self.norm != 1 else counts

    def extra_repr(self) -> str:
        """D and norm."""
        return f"D={self.D}, norm={self.norm}"

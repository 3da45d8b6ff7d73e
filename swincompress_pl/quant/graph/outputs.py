"""The named outputs of a graph, such as feature maps, and the layouts in which networks give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("NCHW", "NHWC", "NLC", "NC")


@dataclass(frozen=True, kw_only=True)
class GraphOutput:
    """One named output of a graph.

    Attributes:
        name: Its name, unique and not empty, such as "blocks.11".
        value: Name of the value that it gives.
        shape: Its shape for one image, channels last: (height, width, channels), (rows, channels) or (channels,).
        layout: How the float network gives it: "NCHW", "NHWC", "NLC" or "NC".

    Raises:
        ValueError: If the layout is unknown, or the shape has another number of axes.
    """

    name: str
    value: str
    shape: tuple[int, ...]
    layout: str

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or len(self.shape) != len(self.layout) - 1:
            raise ValueError(f"graph output {self.name!r} of shape {self.shape} cannot have the layout {self.layout!r}")

    def from_value(self, value: Tensor) -> Tensor:
        """Turns a value of the graph into what the network gives.

        Args:
            value: The value, (N, rows, C), or another shape with channels last.

        Returns:
            The output in its layout.
        """
        shaped = value.reshape(len(value), *self.shape)
        return shaped.permute(0, 3, 1, 2).contiguous() if self.layout == "NCHW" else shaped


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """All outputs of an image in one row, (N, K)."""
    rows = [output.flatten(1) for output in outputs]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

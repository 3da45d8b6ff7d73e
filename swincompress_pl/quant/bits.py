"""How many bits weights and activations get: one width for all, and others for some layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from swincompress_pl.arguments import as_float, shown

WIDTHS = range(2, 9)
_SPELLING = re.compile(r"w(\d+)a(\d+)", re.IGNORECASE)


def checked_width(name: str, width: Any) -> int:
    """`width` as an int, from any integer type; a ValueError that shows it is raised if it is not a width."""
    found = as_float(width)
    if found is None or found not in WIDTHS:
        raise ValueError(f"{name} is {shown(width)} bits; widths are integers from {WIDTHS[0]} to {WIDTHS[-1]}")
    return int(found)


@dataclass(frozen=True, kw_only=True)
class Bits:
    """The widths of a quantized network, each 2 to 8 bits.

    The input of GELU stays at 8 bits, because its table costs the same. The residual stream stays at 16 bits.

    Attributes:
        weights: Width of the weights of linear layers and convolutions.
        activations: Width of every operand of a product: inputs of linear layers, q, k and v.
        first_and_last: Width of the weights of the first layer, which reads pixels, and of the classifier; also of the
            classifier's input.
        layers: Weight widths of single layers, by module path. They count before the other fields.

    Raises:
        ValueError: If a width is not an integer from 2 to 8, or `layers` is not a mapping.
    """

    weights: int = 8
    activations: int = 8
    first_and_last: int = 8
    layers: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers={shown(self.layers)}: it has to be a mapping, module path: bits")
        layers = {key: checked_width(f"layers[{shown(key)}]", width) for key, width in self.layers.items()}
        object.__setattr__(self, "layers", layers)
        for name in ("weights", "activations", "first_and_last"):
            object.__setattr__(self, name, checked_width(name, getattr(self, name)))

    @classmethod
    def of(cls, bits: Bits | str | Mapping[str, Any]) -> Bits:
        """Converts any spelling of widths to `Bits`.

        Args:
            bits: A `Bits`, a text such as "W4A8" (4-bit weights, 8-bit activations), or a mapping of the fields.

        Returns:
            The widths.

        Raises:
            ValueError: If `bits` is something else, or a width is not an integer from 2 to 8.
        """
        if isinstance(bits, Bits):
            return bits
        if isinstance(bits, Mapping):
            unknown = [shown(key).strip("'") for key in bits if key not in cls.__dataclass_fields__]
            if unknown:
                raise ValueError(
                    f"bits has unknown entries {', '.join(unknown)}; there are {', '.join(cls.__dataclass_fields__)}"
                )
            return cls(**bits)
        match = _SPELLING.fullmatch(bits) if isinstance(bits, str) else None
        if match is None:
            raise ValueError(f"bits is {shown(bits)}; give 'W8A8', 'W4A8', ... or quant.Bits(weights=4, activations=8)")
        return cls(weights=int(match[1]), activations=int(match[2]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types; `of` is the inverse."""
        return asdict(self)

    def of_layer(self, name: str, *, outer: bool) -> int:
        """Returns the width of the weights of a layer.

        Args:
            name: Name of the layer, its module path.
            outer: Whether it is the first or the last layer.

        Returns:
            The width in bits.
        """
        return self.layers.get(name, self.first_and_last if outer else self.weights)

    def __str__(self) -> str:
        mixed = f", {len(self.layers)} layers apart" if self.layers else ""
        return f"W{self.weights}A{self.activations}{mixed}"

"""What a quantizable graph says about its values: how wide their codes are, and what their scales may do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swincompress_pl._deprecated import renamed, renamed_attributes

RESIDUAL_BITS = 16
LOGIT_BITS = 32
EMBEDDING = "embedding"  # name of the quantizer of a network's features, if it ends with them


@renamed(balanced="equalized", shiftable="can_center")
@renamed_attributes(balanced="equalized", shiftable="can_center")
@dataclass(frozen=True, kw_only=True)
class QuantizerSpec:
    """An activation quantizer as the graph declares it.

    Several values may share one quantizer, such as the residual stream of a stage.

    Attributes:
        name: Its name, unique in the graph.
        segments: Sizes of the runs of channels that share one scale, in order: `(C,)` for one scale per tensor, three
            entries for q, k and v.
        bits: Width of the codes: 2 to 8, 16 (residual stream) or 32 (logits).
        signed: Whether the codes have a sign. Codes without a sign use the whole range.
        equalized: Whether each channel also has a fixed ratio to the scale, which the next linear layer absorbs in its
            weights (outputs of LayerNorm).
        can_center: Whether the codes may stand for the value plus a constant, which the neighbors absorb in their
            biases and tables. `GraphBuilder.graph` finds out where.
        operand: Whether the values go into a product. A value that goes only into a table (GELU's input) does not.
        fixed_scale: A scale that quantization does not choose, or None. It is 1 for spikes and their sums, which are
            whole numbers, and for currents, whose unit is that of the weights; for a stream of membrane potentials it
            is the stream's unit. Such values are not rounded in training.
    """

    name: str
    segments: tuple[int, ...]
    bits: int = 8
    signed: bool = True
    equalized: bool = False
    can_center: bool = False
    operand: bool = True
    fixed_scale: float | None = None

    @property
    def channels(self) -> int:
        """The number of channels."""
        return sum(self.segments)

    @property
    def dtype(self) -> str:
        """The type of the specification, such as "int8" or "uint4"."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def storage(self) -> str:
        """The type of an array that holds the codes; narrow codes take a byte each."""
        return ("int8" if self.signed else "uint8") if self.bits <= 8 else self.dtype

    @property
    def q_max(self) -> int:
        """The largest code. Logits have 2**20 steps, well inside int32."""
        if self.bits == LOGIT_BITS:
            return 2**20
        return int(2 ** (self.bits - self.signed) - 1)

    @property
    def searched(self) -> bool:
        """Whether the scale is searched, which is so up to 8 bits; wider ones keep the true maximum with headroom."""
        return self.bits <= 8 and self.fixed_scale is None


def residual_spec(name: str, channels: int) -> QuantizerSpec:
    """The spec of a residual stream: 16 bits and one scale."""
    return QuantizerSpec(name=name, segments=(channels,), bits=RESIDUAL_BITS)


def collect_specs(specs: Sequence[QuantizerSpec]) -> dict[str, QuantizerSpec]:
    """The specs by name; a ValueError is raised if two different ones have the same name."""
    table: dict[str, QuantizerSpec] = {}
    for spec in specs:
        if table.setdefault(spec.name, spec) != spec:
            raise ValueError(f"activation quantizer {spec.name!r} is declared twice, differently")
    return table

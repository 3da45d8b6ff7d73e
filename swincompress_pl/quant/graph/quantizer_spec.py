"""What a quantizable graph says of its values: how wide their codes are, and what a scale may do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swincompress_pl._deprecated import renamed, renamed_attributes

RESIDUAL_BITS = 16
LOGIT_BITS = 32
EMBEDDING = "embedding"  # the quantizer of a network's features, where it ends with them


@renamed(balanced="equalized", shiftable="can_center")
@renamed_attributes(balanced="equalized", shiftable="can_center")
@dataclass(frozen=True, kw_only=True)
class QuantizerSpec:
    """An activation quantizer as the graph declares it; several values may share one (the residual stream of a stage).

    segments: sizes of the channel runs that share one scale, in order: `(C,)` a tensor, three entries for q | k | v.
    equalized: each channel also has a fixed ratio to the scale, which the next linear layer absorbs in its weights
    (LayerNorm outputs). can_center: its codes may stand for the value plus a constant, which its neighbours absorb in
    their biases and tables (`GraphBuilder` finds out which). bits: 2 to 8, 16 (residual stream) or 32 (logits);
    unsigned codes use the whole range.
    operand: its values go into a product; one that only goes into a table (GELU's input) is no operand.
    fixed_scale: a scale that quantization has no say in: 1 for spikes and their sums, which are whole numbers, and for
    currents, whose unit is that of the weights; the unit of a stream of membrane potentials. Such values are not
    rounded in training.
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


def residual_spec(name: str, channels: int) -> QuantizerSpec:
    return QuantizerSpec(name=name, segments=(channels,), bits=RESIDUAL_BITS)


def collect_specs(specs: Sequence[QuantizerSpec]) -> dict[str, QuantizerSpec]:
    """Specs by name; a name given twice must mean the same spec."""
    table: dict[str, QuantizerSpec] = {}
    for spec in specs:
        if table.setdefault(spec.name, spec) != spec:
            raise ValueError(f"activation quantizer {spec.name!r} is declared twice, differently")
    return table

"""What can be cut: a structured group as plain data.

A group is a set of interchangeable units (the heads of one attention, the hidden channels of one MLP) together with
every tensor index that belongs to each unit. Removing a unit means removing all of its indices at once. Example, the
heads of a ViT block with two heads of 16 channels:

    Group(name="blocks.0.attn.heads", kind="heads", units=2,
          slices=(Slice(tensor="blocks.0.attn.qkv.weight", axis=0, width=16, offsets=(0, 32, 64)),  # q, k and v rows
                  Slice(tensor="blocks.0.attn.qkv.bias", axis=0, width=16, offsets=(0, 32, 64)),
                  Slice(tensor="blocks.0.attn.proj.weight", axis=1, width=16, consumer=True)),
          attributes=(Attribute(module="blocks.0.attn", name="num_heads"), ...))

Two things go beyond tensors and integers: a LayerNorm that the units go through (`NormSlice`), and a module whose class
has to be exchanged before its width may differ from what its forward assumes (`ClassSwap`).

Groups are written down by the adapter of each family (`swincompress_pl.models`), never guessed from a trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from swincompress_pl._deprecated import renamed


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The indices along one axis of one tensor that belong to each unit of a group.

    tensor: name of a parameter or buffer, dotted, from the network. axis: its axis.
    Unit u owns the indices `offset + u * width + [0, width)` for each offset, e.g. offsets (0, D, 2 * D) for q, k and
    v.
    consumer: these indices are zero while the unit is masked. The consumers of a group together remove a unit exactly:
    usually the columns that read it, for a dimension of the heads its q and k rows as well.
    """

    tensor: str
    axis: int
    width: int = 1
    offsets: tuple[int, ...] = (0,)
    consumer: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(self.offsets))
        if self.axis < 0 or self.width < 1 or not self.offsets or min(self.offsets) < 0:
            raise ValueError(
                f"{self.tensor}: a slice needs axis >= 0, width >= 1 and offsets >= 0, not axis={self.axis}, "
                f"width={self.width}, offsets={self.offsets}"
            )

    def indices(self, units: Iterable[int]) -> list[int]:
        """The indices along `axis` that `units` own, sorted."""
        starts = [offset + unit * self.width for offset in self.offsets for unit in units]
        return sorted(start + i for start in starts for i in range(self.width))

    def end(self, units: int) -> int:
        """One past the highest index that any of `units` units owns."""
        return max(self.offsets) + units * self.width


@dataclass(frozen=True, kw_only=True)
class NormSlice:
    """A LayerNorm over the last axis that a group's units go through: unit u is its channel `offset + u` for each
    offset.

    module: its name, dotted. While units are masked its statistics run over the other channels and the masked ones give
    0, as if it were sliced. Its weight and bias are cut by slices of their own.
    """

    module: str
    offsets: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(self.offsets))

    def channels(self, units: Iterable[int]) -> list[int]:
        """The channels that are `units`, sorted."""
        return sorted(offset + unit for offset in self.offsets for unit in units)


@dataclass(frozen=True, kw_only=True)
class ClassSwap:
    """A module that gets another class when units are removed: one that computes the same at any width.

    module: its name, dotted. type: the class, "package.module:Class"; a subclass of the present one that adds no state.
    """

    module: str
    type: str


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """An attribute of a module that has to follow when units are removed: an integer, or a tuple of one.

    Without `size_of` its value is the number of units (`num_heads`); with it, the length of that tensor's `axis`
    (`out_features`), which stays right when two groups cut the same tensor. With `value` it is set to that constant
    (`fused_attn` to False), whatever it was.
    name: may lead through lists and dictionaries, e.g. "feature_info.0.num_chs".
    """

    module: str
    name: str
    size_of: str | None = None
    axis: int = 0
    value: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}".lstrip(".")
        if self.value is not None:
            return f"{path} = {self.value}"
        return f"{path} = {f'length of {self.size_of} axis {self.axis}' if self.size_of else 'units'}"


@renamed(exchanges="class_swaps")
@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that can be removed from a network, with everything that is coupled to them.

    name: unique in the network and stable under pruning. kind: "heads", "head_dim" (a dimension of every head of an
    attention), "mlp" (hidden channels) or "embed" (a channel of a residual stream).
    units: how many the network has now. min_units: how many have to stay, at least one.
    norms: LayerNorms that the units go through. class_swaps: modules that cannot change width as they are.
    The data can be printed (`str(group)`), stored (`to_dict`, JSON types only) and read back (`from_dict`).
    """

    name: str
    kind: str
    units: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()
    min_units: int = 1
    norms: tuple[NormSlice, ...] = ()
    class_swaps: tuple[ClassSwap, ...] = ()

    def __post_init__(self) -> None:
        for field in ("slices", "attributes", "norms", "class_swaps"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.units < 1 or not 1 <= self.min_units <= self.units:
            raise ValueError(
                f"{self.name}: a group needs units >= 1 and 1 <= min_units <= units, not units={self.units}, "
                f"min_units={self.min_units}"
            )
        if not self.norms and not any(s.consumer for s in self.slices):
            raise ValueError(
                f"{self.name}: no slice is marked as consumer, so its units cannot be masked; mark the reader"
            )

    def consumers(self) -> tuple[Slice, ...]:
        """The slices whose indices are zero while a unit is masked."""
        return tuple(s for s in self.slices if s.consumer)

    def masked_parameters(self) -> tuple[str, ...]:
        """The names of the parameters at which a masked network differs: those of the consumers, and the weights of the
        norms, whose statistics run over fewer channels. Nothing before the first of them computes anything else."""
        names = [s.tensor for s in self.consumers()] + [f"{norm.module}.weight" for norm in self.norms]
        return tuple(dict.fromkeys(names))

    def to_dict(self) -> dict[str, Any]:
        """The group in JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Group:
        """The group that `to_dict` wrote, also after a way through JSON (lists for tuples)."""
        fields = dict(data)
        fields["slices"] = tuple(Slice(**s) for s in fields["slices"])
        fields["attributes"] = tuple(Attribute(**a) for a in fields.get("attributes", ()))
        fields["norms"] = tuple(NormSlice(**n) for n in fields.get("norms", ()))
        swaps = fields.pop("exchanges", fields.get("class_swaps", ()))  # the former name, in files of version 0.1
        fields["class_swaps"] = tuple(ClassSwap(**e) for e in swaps)
        return cls(**fields)

    def __str__(self) -> str:
        rows = [
            f"  {s.tensor} axis {s.axis}: {s.width} a unit at "
            f"{', '.join(map(str, s.offsets))}{' (consumer)' * s.consumer}"
            for s in self.slices
        ]
        rows += [f"  {n.module} over the kept channels at {', '.join(map(str, n.offsets))}" for n in self.norms]
        rows += [f"  {a}" for a in self.attributes]
        rows += [f"  {e.module} becomes a {e.type}" for e in self.class_swaps]
        return "\n".join([f"{self.name}: {self.units} {self.kind}, at least {self.min_units}", *rows])


def validate_units(group: Group, units: Iterable[int], what: str) -> tuple[int, ...]:
    """`units` as a sorted tuple; ValueError, naming the group, for repeated units or ones that it does not have."""
    chosen = tuple(sorted(units))
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{group.name}: {what} repeat a unit: {_shorten(chosen)}")
    if chosen and not 0 <= chosen[0] <= chosen[-1] < group.units:
        wrong = [u for u in chosen if not 0 <= u < group.units]
        raise ValueError(
            f"{group.name}: {what} name units {_shorten(wrong)}, but the group has units 0 to {group.units - 1}; "
            "was the plan made for another network, or was the network already pruned?"
        )
    return chosen


def _shorten(values: Iterable[int], most: int = 8) -> str:
    listed = list(values)
    return ", ".join(map(str, listed[:most])) + (f", ... ({len(listed)} in all)" if len(listed) > most else "")

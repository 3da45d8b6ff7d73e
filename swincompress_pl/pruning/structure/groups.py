"""What can be cut: a structured group as plain data.

A group is a set of interchangeable units, such as the heads of one attention or the hidden channels of one MLP. It has
every tensor index that belongs to each unit; removing a unit removes all of its indices at once. As an example, these
are the heads of a ViT block with two heads of 16 channels:

    Group(name="blocks.0.attn.heads", kind="heads", units=2,
          slices=(Slice(tensor="blocks.0.attn.qkv.weight", axis=0, width=16, offsets=(0, 32, 64)),  # q, k and v rows
                  Slice(tensor="blocks.0.attn.qkv.bias", axis=0, width=16, offsets=(0, 32, 64)),
                  Slice(tensor="blocks.0.attn.proj.weight", axis=1, width=16, consumer=True)),
          attributes=(Attribute(module="blocks.0.attn", name="num_heads"), ...))

Two things go beyond tensors and integers. A LayerNorm that the units go through is a `NormSlice`. A module that needs
another class before its width may differ from what its forward assumes is a `ClassSwap`.

The adapter of each family (`swincompress_pl.models`) defines its groups; they are never guessed from a trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from swincompress_pl._deprecated import renamed


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The indices along one axis of one tensor that belong to each unit of a group.

    Unit u owns the indices `offset + u * width + [0, width)` for each offset.

    Attributes:
        tensor: Name of a parameter or buffer of the network, dotted.
        axis: The axis, 0 or more.
        width: Indices per unit and offset, 1 or more.
        offsets: Index at which unit 0 begins, one for each repetition, such as (0, D, 2 * D) for q, k and v.
        consumer: Whether these indices are zero while the unit is masked. The consumers of a group together remove a
            unit exactly. Usually they are the columns that read it; for "head_dim" they include the q and k rows.

    Raises:
        ValueError: If `axis`, `width` or an offset is out of range.
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
        """The sorted indices along `axis` that `units` own."""
        starts = [offset + unit * self.width for offset in self.offsets for unit in units]
        return sorted(start + i for start in starts for i in range(self.width))

    def end(self, units: int) -> int:
        """One more than the highest index, for a group of this number of units."""
        return max(self.offsets) + units * self.width


@dataclass(frozen=True, kw_only=True)
class NormSlice:
    """A LayerNorm over the last axis that a group's units go through.

    Unit u is its channel `offset + u` for each offset. While units are masked, its statistics are those of the other
    channels, and the masked channels are 0, as if it were sliced. Its weight and bias have slices of their own.

    Attributes:
        module: Name of the LayerNorm, dotted.
        offsets: Channel of unit 0, one for each repetition.
    """

    module: str
    offsets: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(self.offsets))

    def channels(self, units: Iterable[int]) -> list[int]:
        """The sorted channels of `units`."""
        return sorted(offset + unit for offset in self.offsets for unit in units)


@dataclass(frozen=True, kw_only=True)
class ClassSwap:
    """A module that gets another class when units are removed: one that computes the same at any width.

    Attributes:
        module: Name of the module, dotted.
        type: The class, as "package.module:Class"; a subclass of the present one that adds no state.
    """

    module: str
    type: str


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """An attribute of a module that has to change when units are removed: an integer, or a tuple of one integer.

    Attributes:
        module: Name of the module, dotted.
        name: Name of the attribute. It may lead through lists and dictionaries, as in "feature_info.0.num_chs".
        size_of: Name of a tensor: the attribute is the length of its `axis`, such as `out_features`. This stays right
            if two groups cut the same tensor. None for the number of units, such as `num_heads`.
        axis: Axis of that tensor.
        value: Constant to set in any case, such as False for `fused_attn`; None for a width.
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

    `str(group)` lists the data.

    Attributes:
        name: Name, unique in the network and stable under pruning.
        kind: "heads", "head_dim" (a dimension of every head of an attention), "mlp" (hidden channels) or "embed" (a
            channel of a residual stream). Spiking networks also have "conv" (channels between convolutions), "qk"
            (dimensions in which q and k meet) and "v" (dimensions that go to the projection).
        units: Number of units that the network has now.
        slices: Tensor indices that the units own.
        attributes: Attributes of modules that follow the width.
        min_units: Number of units that have to stay, 1 or more.
        norms: LayerNorms that the units go through.
        class_swaps: Modules that cannot change width with their present class.
        free_basis: Whether any change of basis of the units of a head leaves the network's function, if it is made of
            queries and keys, and of values and their reader. So nothing but the products of plain attention may lie
            between; only for "head_dim".
        heads: Number of heads that share every unit, if the order of the units inside each head is free: the function
            stays if the units of one head are permuted in all slices. Offset i of a slice is then that of head
            i % heads, and the heads lie side by side. 1 for one order of all.

    Raises:
        ValueError: If `units` or `min_units` is out of range, neither a slice is marked as consumer nor a norm is
            given, so that no unit could be masked, or the slices are not those of `heads`.
    """

    name: str
    kind: str
    units: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()
    min_units: int = 1
    norms: tuple[NormSlice, ...] = ()
    class_swaps: tuple[ClassSwap, ...] = ()
    free_basis: bool = False
    heads: int = 1

    def __post_init__(self) -> None:
        for field in ("slices", "attributes", "norms", "class_swaps"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.units < 1 or not 1 <= self.min_units <= self.units or self.heads < 1:
            raise ValueError(
                f"{self.name}: a group needs units >= 1, 1 <= min_units <= units and heads >= 1, not "
                f"units={self.units}, min_units={self.min_units}, heads={self.heads}"
            )
        if not self.norms and not any(s.consumer for s in self.slices):
            raise ValueError(
                f"{self.name}: no slice is marked as consumer, so its units cannot be masked; mark the reader"
            )
        for part in self.slices if self.heads > 1 else ():
            self._check_heads(part)

    def _check_heads(self, part: Slice) -> None:
        """Raises a ValueError unless the offsets of a slice are those of all heads, once or several times."""
        wanted = [first + head * self.units for first in part.offsets[:: self.heads] for head in range(self.heads)]
        if self.norms or part.width != 1 or list(part.offsets) != wanted:
            raise ValueError(
                f"{self.name}: heads={self.heads} needs slices of width 1 at offsets 0, {self.units}, ... for one head "
                f"after the other, and no norms; {part.tensor} has width {part.width} and offsets {part.offsets}"
            )

    def consumers(self) -> tuple[Slice, ...]:
        """Returns the slices whose indices are zero while a unit is masked."""
        return tuple(s for s in self.slices if s.consumer)

    def masked_parameters(self) -> tuple[str, ...]:
        """Returns the names of the parameters at which a masked network differs.

        They are the tensors of the consumers, and the weights of the norms. What runs before the first of them computes
        the same as without a mask.
        """
        names = [s.tensor for s in self.consumers()] + [f"{norm.module}.weight" for norm in self.norms]
        return tuple(dict.fromkeys(names))

    def to_dict(self) -> dict[str, Any]:
        """Returns the group in JSON types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Group:
        """Rebuilds a group.

        Args:
            data: What `to_dict` gave, also after a way through JSON (lists for tuples).

        Returns:
            The group.

        Raises:
            KeyError: If `slices` is missing.
            TypeError: If another entry is missing or unknown.
            ValueError: If an entry is out of range.
        """
        fields = dict(data)
        fields["slices"] = tuple(Slice(**s) for s in fields["slices"])
        fields["attributes"] = tuple(Attribute(**a) for a in fields.get("attributes", ()))
        fields["norms"] = tuple(NormSlice(**n) for n in fields.get("norms", ()))
        swaps = fields.pop("exchanges", fields.get("class_swaps", ()))  # the former name, in files of version 0.1
        fields["class_swaps"] = tuple(ClassSwap(**e) for e in swaps)
        return cls(**fields)

    def __str__(self) -> str:
        rows = [
            f"  {s.tensor} axis {s.axis}: {s.width} per unit at "
            f"{', '.join(map(str, s.offsets))}{' (consumer)' * s.consumer}"
            for s in self.slices
        ]
        rows += [f"  {n.module} over the kept channels at {', '.join(map(str, n.offsets))}" for n in self.norms]
        rows += [f"  {a}" for a in self.attributes]
        rows += [f"  {e.module} becomes a {e.type}" for e in self.class_swaps]
        return "\n".join([f"{self.name}: {self.units} {self.kind}, at least {self.min_units}", *rows])


def validate_units(group: Group, units: Iterable[int], what: str) -> tuple[int, ...]:
    """`units` as a sorted tuple; a ValueError for repeated units, or units that the group does not have."""
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

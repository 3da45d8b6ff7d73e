"""The principal axes of attention heads: a change of basis after which few dimensions hold what a head computes.

The dimensions of a head are as arbitrary as a basis is. Queries q' = T q and keys k' = T^-T k have the same products,
and values v' = S v, read by columns P S^-1, give the same sum. So before dimensions go, each head is turned: q and k to
the singular vectors of their products' second moment, v to those of what the projection reads. The last axes then
carry least, and leaving them out is the best approximation of that rank (Eckart & Young) of the logits and of the
projected values, as far as queries and keys are independent. The network computes the same, except for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swincompress_pl.masks import masked_parameters
from swincompress_pl.pruning.evaluation.ranks import world_size
from swincompress_pl.pruning.structure.apply import stored_tensor
from swincompress_pl.pruning.structure.change import gone_units
from swincompress_pl.pruning.structure.groups import Group

_LEAST = 1e-12  # of the largest eigenvalue: what a direction without any variance counts as
_NOTHING = 1e-30  # no variance at all; scaled to 1, what there is would not fit 32 bits


@dataclass(frozen=True, kw_only=True)
class Heads:
    """An attention whose heads can be turned, by the rows and columns of each head.

    Attributes:
        group: Name of its group of dimensions.
        qkv: Path of the layer whose rows are queries, keys and values.
        proj: Path of the layer that reads the values.
        units: The dimensions of each head that are turned: all but those that are masked.
        q: First row of the queries of each head.
        k: First row of the keys of each head.
        v: First row of the values of each head.
        columns: First column of the projection for each head.
    """

    group: str
    qkv: str
    proj: str
    units: tuple[int, ...]
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    columns: tuple[int, ...]


def heads_of(network: nn.Module, group: Group) -> Heads | None:
    """The heads of a group of dimensions; None if their basis is not free."""
    units = units_alike(network, group) if group.free_basis else ()
    if not units:
        return None
    by_role = {(part.tensor, part.axis, part.consumer): part for part in group.slices}
    (meeting,) = [p for (name, axis, c), p in by_role.items() if name.endswith(".weight") and axis == 0 and c]
    (values,) = [p for (name, axis, c), p in by_role.items() if name.endswith(".weight") and axis == 0 and not c]
    (reading,) = [p for (_, axis, c), p in by_role.items() if axis == 1 and c]
    count = len(values.offsets)
    return Heads(
        group=group.name,
        qkv=meeting.tensor.removesuffix(".weight"),
        proj=reading.tensor.removesuffix(".weight"),
        units=units,
        q=meeting.offsets[:count],
        k=meeting.offsets[count:],
        v=values.offsets,
        columns=reading.offsets,
    )


def units_alike(network: nn.Module, group: Group) -> tuple[int, ...]:
    """The units of a group that are not masked; none if the masks of single weights tell them apart.

    A mask that is not the same for all units of a head would not be kept if these were mixed or put in another order.
    """
    gone, masks = gone_units(network, group), masked_parameters(network)
    units = [unit for unit in range(group.units) if unit not in gone]
    for part in group.slices if units else ():
        if part.tensor in masks:
            mask = masks[part.tensor][1].movedim(part.axis, 0)
            rows = torch.tensor([[offset + unit for unit in units] for offset in part.offsets], device=mask.device)
            if not torch.equal(mask[rows], mask[rows[:, :1]].expand(-1, len(units), *mask.shape[1:])):
                return ()
    return tuple(units)


@dataclass(kw_only=True, eq=False)
class HeadMoments:
    """Sums over rows of queries and keys: q q^T and k k^T (heads, units, units), and k (heads, units), float64.

    Attributes:
        rows: Their number.
        at_most: How many rows of a call are added; a random part of more.
    """

    qq: Tensor = field(repr=False)
    kk: Tensor = field(repr=False)
    k: Tensor = field(repr=False)
    rows: int = 0
    at_most: float = float("inf")
    draw: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    @classmethod
    def empty(cls, heads: Heads, device: torch.device) -> HeadMoments:
        """Makes the sums of no rows."""
        square = torch.zeros(len(heads.q), len(heads.units), len(heads.units), dtype=torch.float64, device=device)
        return cls(qq=square, kk=square.clone(), k=square[:, 0].clone())

    def add(self, heads: Heads, rows: Tensor) -> None:
        """Adds rows (rows, outputs) of the layer that gives queries, keys and values."""
        if len(rows) > self.at_most:
            chosen = torch.rand(len(rows), generator=self.draw) < self.at_most / len(rows)
            rows = rows[chosen.nonzero().squeeze(1).to(rows.device)]
        q, k = (rows[:, _rows_of(starts, heads.units)].unflatten(1, (-1, len(heads.units))).movedim(1, 0).double()
                for starts in (heads.q, heads.k))  # fmt: skip
        self.qq += q.transpose(1, 2) @ q
        self.kk += k.transpose(1, 2) @ k
        self.k += k.sum(1)
        self.rows += len(rows)

    def over_ranks(self) -> HeadMoments:
        """The sums of all ranks of a distributed run; all ranks have to call it."""
        if world_size() > 1:
            rows = torch.tensor(self.rows, device=self.k.device)
            for tensor in (self.qq, self.kk, self.k, rows):
                torch.distributed.all_reduce(tensor)
            self.rows = int(rows)
        return self


def turn(network: nn.Module, heads: Heads, moments: HeadMoments, read: Tensor) -> Tensor:
    """Turns the heads of an attention to their principal axes, the first of which carries most.

    Args:
        network: The network; queries, keys, values and projection are written in place.
        heads: The attention.
        moments: Sums of its queries and keys.
        read: The second moments (inputs, inputs), about the mean, of what its projection reads; float64.

    Returns:
        The matrix (inputs, inputs), float64, that takes what the projection read to what it reads now.
    """
    weight, bias = (network.get_submodule(heads.qkv)._parameters.get(name) for name in ("weight", "bias"))
    projection = stored_tensor(network, f"{heads.proj}.weight").detach()
    assert weight is not None
    turned = torch.eye(len(read), dtype=torch.float64, device=read.device)
    mean = moments.k / moments.rows
    # What is added to all keys alike shifts all logits of a query alike, which the softmax does not see.
    keys = moments.kk / moments.rows - mean.unsqueeze(2) * mean.unsqueeze(1)
    for head, starts in enumerate(zip(heads.q, heads.k, heads.v, heads.columns, strict=True)):
        q, k, v, columns = (_rows_of([start], heads.units) for start in starts)
        to_q, to_k = _meeting_axes(moments.qq[head] / moments.rows, keys[head])
        to_v, from_v = _read_axes(projection[:, columns].double(), read[columns][:, columns])
        for tensor in (weight.detach(), *([] if bias is None else [bias.detach()])):
            for rows, matrix in ((q, to_q), (k, to_k), (v, to_v)):
                tensor[rows] = (matrix @ tensor[rows].double()).to(tensor.dtype)
        projection[:, columns] = (projection[:, columns].double() @ from_v).to(projection.dtype)
        turned[torch.tensor(columns).unsqueeze(1), columns] = to_v
    return turned


def _meeting_axes(qq: Tensor, kk: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices that take queries and keys to axes along which their product has falling second moments."""
    (root_q, inverse_q), (root_k, inverse_k) = _roots(qq), _roots(kk)
    left, singular, right = torch.linalg.svd(root_q @ root_k)
    # Each takes half of the product's size; one that is nothing keeps its directions, so that the turn can be inverted.
    size = singular.clamp_min(float(singular.max()) * _LEAST**0.5).sqrt().unsqueeze(1)
    return size * (left.T @ inverse_q), size * (right @ inverse_k)


def _read_axes(projection: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix that takes values to axes along which what is read has falling second moments, and its inverse."""
    root, inverse = _roots(read)
    _, _, right = torch.linalg.svd(projection @ root)
    return right @ inverse, root @ right.T


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a second moment, and its inverse; of no moment at all, the identity."""
    values, vectors = torch.linalg.eigh(moment)
    largest = float(values.max())
    if largest < _NOTHING:
        values, largest = torch.ones_like(values), 1.0
    values = values.clamp_min(largest * _LEAST)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _rows_of(starts: Sequence[int], units: Sequence[int]) -> list[int]:
    return [start + unit for start in starts for unit in units]


@contextmanager
def watched_heads(network: nn.Module, listed: Mapping[str, Heads]) -> Iterator[dict[str, HeadMoments]]:
    """Inside the context, {group: sums over the rows of all calls} of attentions; complete on all ranks at the end."""
    found = dict[str, HeadMoments]()
    with ExitStack() as hooks:
        for name, heads in listed.items():
            layer = network.get_submodule(heads.qkv)
            found[name] = HeadMoments.empty(heads, next(layer.parameters()).device)

            def add(_: nn.Module, __: object, output: Tensor, heads: Heads = heads, name: str = name) -> None:
                found[name].add(heads, output.detach().flatten(0, -2))

            hooks.callback(layer.register_forward_hook(add).remove)
        yield found
    for moments in found.values():
        moments.over_ranks()

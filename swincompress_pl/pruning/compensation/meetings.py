"""Units that meet before any layer reads them: queries and keys of spiking attention.

Without units U, the product of a head's queries and keys lacks the sum over u in U of q_u k_u^T. Its squared norm is
the sum over u, v in U of <q_u, q_v> <k_u, k_v>, over the tokens of an image and time step. Where queries are only
summed over a head (QKFormer), it is that of <q_u, q_v>. So sums of these products over images tell what the removal of
any set of units costs. Nothing can make up for it, as a product of spikes has no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swincompress_pl.pruning.compensation.errors import LARGER
from swincompress_pl.pruning.compensation.readers import Predict
from swincompress_pl.pruning.evaluation.ranks import world_size
from swincompress_pl.pruning.structure.groups import Group

_CHANNELS = 2  # the axis of the channels of spikes (T, N, C, ...)


@dataclass(kw_only=True, eq=False)
class Meeting:
    """Where the units of a group meet, and the sums of what they give there.

    Attributes:
        heads: Number of heads.
        units: Units of each head.
        factors: (path of the neuron, its first channel of each head) of what is multiplied.
        timed: Whether neurons give (T, N, C, ...), or else (N, C, ...).
        products: Mean over images and time steps of the products (heads, units, units), float64; complete after
            `watched_meetings`.
    """

    heads: int
    units: int
    factors: tuple[tuple[str, tuple[int, ...]], ...]
    timed: bool = True
    products: Tensor = field(repr=False)
    _waiting: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _count: int = 0

    def add(self, factor: int, spikes: Tensor) -> None:
        """Adds what the neuron of a factor gives."""
        spikes = spikes if self.timed else spikes[None]
        starts = torch.tensor(self.factors[factor][1], device=spikes.device)
        channels = (starts.unsqueeze(1) + torch.arange(self.units, device=spikes.device)).flatten()
        rows = spikes.detach().flatten(3).index_select(_CHANNELS, channels).unflatten(_CHANNELS, (self.heads, -1))
        self._waiting[factor] = rows @ rows.transpose(-2, -1)
        if len(self._waiting) == len(self.factors):
            product = torch.stack([each.double() for each in self._waiting.values()]).prod(0)
            self.products += product.sum((0, 1))
            self._count += product.shape[0] * product.shape[1]
            self._waiting = {}

    def over_ranks(self) -> None:
        """Makes the sums means over all ranks of a distributed run, which all have to call it."""
        count = torch.tensor(self._count, device=self.products.device)
        if world_size() > 1:
            torch.distributed.all_reduce(self.products)
            torch.distributed.all_reduce(count)
        self.products /= max(int(count), 1)

    def errors(self) -> Tensor:
        """What the removal of each unit, from all heads, adds to the squared error; see `removal_errors`."""
        return _one_after_the_other(self.products.sum(0).cpu())

    def errors_apart(self) -> Tensor:
        """The same for each unit of each head (heads * units,)."""
        return torch.cat([_one_after_the_other(each) for each in self.products.cpu()])

    def sort(self, now: Tensor) -> None:
        """Says that the units of `heads_apart` are in the order `now` (heads * units,)."""
        order = now.reshape(self.heads, self.units) % self.units
        heads = torch.arange(self.heads).reshape(-1, 1, 1)
        self.products = self.products[heads, order.unsqueeze(2), order.unsqueeze(1)]


def _one_after_the_other(products: Tensor) -> Tensor:
    """The scores (units,) in the order in which units are best removed: each with those before."""
    scores, highest = torch.zeros(len(products), dtype=torch.float64), 0.0
    costs = products.diagonal().clone()
    for _ in range(len(products)):
        unit = int(costs.argmin())
        highest = max(highest * LARGER, float(costs[unit]))
        scores[unit] = highest
        costs += 2 * products[unit]
        costs[unit] = float("inf")
    return scores


def meetings_of(network: nn.Module, groups: Iterable[Group], images: Tensor, predict: Predict) -> dict[str, Meeting]:
    """{group: meeting} of the groups whose units are masked in BatchNorms with a neuron behind each.

    `images` are run once, to see which module reads which BatchNorm.
    """
    silent = {group.name: group for group in groups if _norms(network, group)}
    if not silent:
        return {}
    neurons = _behind(network, [norm for group in silent.values() for norm in _norms(network, group)], images, predict)
    found = {}
    for name, group in silent.items():
        norms = _norms(network, group)
        timed = {neurons[norm].timed if norm in neurons else None for norm in norms}
        if len(timed) == 1 and None not in timed:
            factors = [
                (neurons[norm].path, offsets[start : start + group.heads])
                for norm, offsets in norms.items()
                for start in range(0, len(offsets), group.heads)
            ]
            device = next(network.parameters()).device
            zeros = torch.zeros(group.heads, group.units, group.units, dtype=torch.float64, device=device)
            found[name] = Meeting(
                heads=group.heads, units=group.units, factors=tuple(factors), timed=timed == {True}, products=zeros
            )
    return found


def _norms(network: nn.Module, group: Group) -> dict[str, tuple[int, ...]]:
    """{BatchNorm: offsets} that mask the units; empty if something else does, too."""
    found = {}
    for part in group.consumers():
        path, _, leaf = part.tensor.rpartition(".")
        if part.axis or part.width != 1 or not isinstance(network.get_submodule(path), _BatchNorm):
            return {}
        if leaf == "weight":
            found[path] = part.offsets
    return {} if group.norms else found


class _Neuron(NamedTuple):
    path: str
    timed: bool


def _behind(network: nn.Module, norms: Iterable[str], images: Tensor, predict: Predict) -> dict[str, _Neuron]:
    """{BatchNorm: the first module that is called with what it gave}, if that keeps its channels."""
    wanted, given = set(norms), dict[str, Tensor]()  # what is given is kept, so that no other tensor gets its memory
    found, shapes = dict[str, str](), dict[str, torch.Size]()

    def read(path: str, x: object) -> None:
        for norm, output in given.items():
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
                found.setdefault(norm, path)

    def gave(path: str, output: object) -> None:
        if isinstance(output, Tensor):
            shapes[path] = output.shape
            if path in wanted:
                given[path] = output

    with ExitStack() as hooks:
        for path, module in network.named_modules():
            hooks.callback(module.register_forward_pre_hook(lambda _, x, p=path: read(p, x[0] if x else None)).remove)
            hooks.callback(module.register_forward_hook(lambda _, __, y, p=path: gave(p, y)).remove)
        predict(network, images)
    behind = {}
    for norm, path in found.items():
        timed = _is_timed(network.get_submodule(norm), shapes[norm], shapes.get(path))
        if _channels(shapes.get(path), timed) == len(network.get_buffer(f"{norm}.running_mean")):
            behind[norm] = _Neuron(path, timed)
    return behind


def _is_timed(norm: nn.Module, given: torch.Size, spikes: torch.Size | None) -> bool:
    """Whether a neuron gives (T, N, C, ...): not if its shape is that of a BatchNorm without time steps."""
    return given != spikes or getattr(norm, "step_mode", "s") == "m"


def _channels(spikes: torch.Size | None, timed: bool) -> int:
    """The channels of (T, N, C, ...), or of (N, C, ...); 0 for another shape."""
    axis = _CHANNELS if timed else _CHANNELS - 1
    return spikes[axis] if spikes is not None and len(spikes) > axis + 1 else 0


@contextmanager
def watched_meetings(network: nn.Module, meetings: Mapping[str, Meeting]) -> Iterator[None]:
    """Inside the context, all calls are summed; at the end they are complete on all ranks."""
    with ExitStack() as hooks:
        for meeting in meetings.values():
            for number, (neuron, _) in enumerate(meeting.factors):
                add = partial(meeting.add, number)
                hook = network.get_submodule(neuron).register_forward_hook(lambda _, __, spikes, add=add: add(spikes))
                hooks.callback(hook.remove)
        yield
    for meeting in meetings.values():
        meeting.over_ranks()

"""Solves the layers that lose inputs again, for every trial of a search and for good, from sums collected once.

The sums are of the network before it was cut: what each layer reads, and what it gives of that. From them any cut of
its inputs is compensated in closed form. For masks of weights, rows and outputs weigh more the more the answers feel
them (`gradients.py`); for whole inputs, that is worse. So is fitting layer after layer to the unpruned network, on what
the pruned layers before give (docs/explanation/pruning.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import evaluation_mode, uncompiled
from swincompress_pl.interrupts import put_back_after
from swincompress_pl.pruning.compensation.axes import heads_of, turn, watched_heads
from swincompress_pl.pruning.compensation.errors import removal_errors
from swincompress_pl.pruning.compensation.gradients import run_watched
from swincompress_pl.pruning.compensation.meetings import Meeting, meetings_of, watched_meetings
from swincompress_pl.pruning.compensation.moments import CalibrationError
from swincompress_pl.pruning.compensation.order import heads_apart, sort_heads
from swincompress_pl.pruning.compensation.reader_state import MOST_ROWS, ReaderState
from swincompress_pl.pruning.compensation.readers import Predict, Reader, Readers, readers_named, readers_of
from swincompress_pl.pruning.evaluation.divergence import Divergence, run_network
from swincompress_pl.pruning.structure.apply import stored_tensor
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.unit_masks import mask_units
from swincompress_pl.registry import SpikingAdapter, UnsupportedNetworkError, adapter_for

Method = Literal["none", "bias", "ridge", "second_order"]
METHODS: tuple[Method, ...] = ("none", "bias", "ridge", "second_order")
Lost = Mapping[str, frozenset[int]]
"""{reader: columns of its weight matrix}"""

_PROBED_PARTS = (0.25, 0.5, 0.75)  # of a group's units, to see how sensitive the network is to its errors
_PROBED_IMAGES = 64
_LEAST_PROBED = 1e-3  # of the errors of all units; less may be rounding

Made = TypeVar("Made")


class Compensator:
    """Compensates the cuts of one network.

    Args:
        batches: Unlabelled calibration images (N, ...).
        method: What is done. "bias" adds what the lost inputs gave on average, "ridge" solves the weights again,
            and so does "second_order".
        predict: Runs a network on a batch; None calls it with the images, moved to its device.
        damping: As for `System.solve`.
        intercepts: Whether the means of BatchNorms take up what is lost on average; False if they are corrected later.

    Attributes:
        readers: The layers that are solved again, in the order of a pass.
    """

    def __init__(
        self,
        batches: Sequence[Tensor],
        *,
        method: Method = "ridge",
        predict: Predict | None = None,
        damping: float | None = None,
        intercepts: bool = True,
    ) -> None:
        self.batches, self.method = [batch for batch in batches if len(batch)], method
        if not self.batches:
            raise CalibrationError(f"compensation={method!r}: calibration has no images; give a few hundred")
        self._predict = predict or run_network
        self.damping = float("inf") if method == "bias" else damping
        self._intercepts = intercepts
        self.readers = Readers(readers={}, left_alone={})
        self._states: dict[str, ReaderState] = {}
        self._meetings: dict[str, Meeting] = {}
        self._divergence: Divergence | None = None  # from the network as the round began
        self._measured: dict[object, object] = {}
        self._scores: dict[tuple[object, ...], Tensor] = {}

    def begin_round(self, network: nn.Module, groups: Sequence[Group] | None, names: Iterable[str] = ()) -> None:
        """Prepares for cuts of the network as it is now; its readers are those of `groups`, or the layers `names`.

        The first time, after `forget`, and if readers lost outputs, this runs all images, and turns heads to their
        principal axes.
        """
        self._scores, self._divergence = {}, None
        with evaluation_mode(network), uncompiled(network), torch.no_grad():
            if self._states and all(state.fits(network) for state in self._states.values()):
                for state in self._states.values():
                    state.take_up(network)
                if any(self._has_other_units(group) for group in groups or ()):
                    self._meet(network, groups)
                return
            if groups is None:
                self.readers = readers_named(network, names, self.batches[0][:1], self._predict)
            else:
                self.readers = readers_of(network, groups, self.batches[0][:1], self._predict)
            self._tell_left_alone()
            self._collect(network, groups)

    def _tell_left_alone(self) -> None:
        if self.readers.left_alone:
            told = ", ".join(f"{name} ({reason})" for name, reason in self.readers.left_alone.items())
            warnings.warn(f"compensation leaves some layers as they are: {told}", stacklevel=2)

    def forget(self) -> None:
        """Says that the network was trained, so that the sums are of another one."""
        self._states, self._measured = {}, {}

    def ranks(self, group: Group) -> bool:
        """Whether `removal_errors` are known."""
        return group.name in self._meetings or bool(self._readers(group))

    def tensors(self, group: Group) -> tuple[str, ...]:
        """The names of the tensors that compensating a cut of the group changes."""
        return tuple(dict.fromkeys(name for reader in self._readers(group) for name in reader.tensors))

    def lost_columns(self, group: Group, units: Iterable[int]) -> dict[str, frozenset[int]]:
        """The columns of the readers that go with some units of a group."""
        units, lost = tuple(units), dict[str, frozenset[int]]()
        for part in group.consumers():
            reader = self.readers.readers.get(part.tensor.removesuffix(".weight"))
            if reader is not None and part.axis == 1:
                columns = frozenset(reader.columns(part.indices(units)))
                lost[reader.name] = lost.get(reader.name, frozenset()) | columns
        return lost

    def removal_errors(self, group: Group) -> Tensor | None:
        """What the removal of each unit costs (units,), see `errors.removal_errors`; None if that is not known.

        It is the rise of the mean squared error of what the readers give, per row; behind a BatchNorm, of what that
        gives. So layers that write to one residual stream, or to neurons of one threshold, can be compared. Of units
        that no layer reads, as they meet in a product before, it is the squared error of the product.
        """
        readers = self._readers(group)
        if not readers:
            return self._meetings[group.name].errors() if group.name in self._meetings else None
        key = (group.name, *(self._states[reader.name].gone for reader in readers))
        if key not in self._scores:
            systems = []
            for reader in readers:
                columns = [sorted(self.lost_columns(group, [unit])[reader.name]) for unit in range(group.units)]
                inverse, weight = self._states[reader.name].inverse_hessian(self.damping)
                systems.append((inverse, weight, torch.tensor(columns, device=weight.device)))
            self._scores[key] = removal_errors(systems)
        return self._scores[key].clone()

    def sensitivity(self, network: nn.Module, group: Group) -> float:
        """How far the network's answers move per unit of `removal_errors` of a group; see `distance`, `once`.

        A part of the group's units is masked, compensated, for that. It is 1 for a group without readers.
        """
        errors, names = self.removal_errors(group), [*group.masked_parameters(), *self.tensors(group)]
        order = [] if errors is None else errors.argsort(stable=True).tolist()
        for part in _PROBED_PARTS:
            units = order[: max(1, int(part * group.units))]
            error = 0.0 if errors is None else float(errors[units].sum())
            if errors is not None and len(units) < group.units and error > _LEAST_PROBED * float(errors.sum()):
                cut = partial(self._without, network, group, units)
                return self.once(group.name, partial(self._moved_per, error, network, cut, names))
        return 1.0

    def _moved_per(self, error: float, *of: Any) -> float:
        moved = self.distance(*of)
        return 1.0 if moved is None else moved / error

    @contextmanager
    def _without(self, network: nn.Module, group: Group, units: Sequence[int]) -> Iterator[None]:
        with mask_units(network, group, units), self.compensated(network, self.lost_columns(group, units)):
            yield

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """What `make` gave when it was first called with this key, until `forget`."""
        if key not in self._measured:
            self._measured[key] = make()
        return cast(Made, self._measured[key])

    def distance(
        self, network: nn.Module, cut: Callable[[], AbstractContextManager[None]], tensors: Sequence[str]
    ) -> float | None:
        """How far the network's answers move inside the context `cut`, on a few images; see `divergence.distance`.

        `tensors` are the names of those in which the network differs then. It is None if the network does not give one
        tensor.
        """
        if self._divergence is None:
            most = max(1, _PROBED_IMAGES // len(self.batches))  # of each batch, in case they are sorted
            few = [batch[:most] for batch in self.batches[:_PROBED_IMAGES]]
            self._divergence = Divergence(network, few, predict=self._predict)
        with cut():
            return self._divergence.now(tensors)

    @contextmanager
    def compensated(self, network: nn.Module, lost: Lost) -> Iterator[None]:
        """Inside the context, the readers make up for lost columns, and for those lost in contexts around it."""
        with ExitStack() as stack, torch.no_grad():
            for name, columns in lost.items():
                state = self._states[name]
                stack.enter_context(restored(network, state.reader.tensors))
                stack.callback(setattr, state, "gone", state.gone)
                state.gone |= columns
                self.write(network, state, *state.solution(self.damping))
            yield

    @torch.no_grad()
    def settle(self, network: nn.Module, lost: Lost) -> None:
        """Writes the weights that make up for lost columns for good; the lost columns become 0."""
        for name, columns in lost.items():
            state = self._states[name]
            before, state.gone = state.gone, state.gone | columns
            self.write(network, state, *state.solution(self.damping))
            state.gone = before

    def narrowed(self, lost: Lost) -> None:
        """Says that columns are sliced away, so that the next round begins without them, unless that is undone."""
        for name, columns in lost.items():
            self._states[name].narrowed(columns)

    def _readers(self, group: Group) -> list[Reader]:
        if group.norms:  # a LayerNorm lies between the units and what reads them
            return []
        found = (self.readers.readers.get(part.tensor.removesuffix(".weight")) for part in group.consumers())
        return list(dict.fromkeys(reader for reader in found if reader is not None))

    def state(self, name: str) -> ReaderState | None:
        """What is known about the reader `name`; None if it is left alone."""
        return self._states.get(name)

    def write(self, network: nn.Module, state: ReaderState, weight: Tensor, bias: Tensor) -> None:
        """Writes a solution, (outputs, inputs) and (outputs,), into the network."""
        reader = state.reader
        parameter = stored_tensor(network, f"{reader.name}.weight").detach()
        parameter.copy_(weight.reshape(parameter.shape))
        if reader.norm is not None:
            if self._intercepts:
                stored_tensor(network, f"{reader.norm}.running_mean").copy_(state.mean - bias)
        elif not reader.fixed_bias:
            stored_tensor(network, f"{reader.name}.bias").detach().copy_(bias)

    def _collect(self, network: nn.Module, groups: Sequence[Group] | None) -> None:
        """Runs all images once, and makes the state of each reader."""
        self._states = {name: ReaderState(network, reader) for name, reader in self.readers.readers.items()}
        heads = {g.name: found for g in groups or () if (found := heads_of(network, g)) and found.proj in self._states}
        with ExitStack() as hooks:
            met = hooks.enter_context(watched_heads(network, heads))
            self._meetings = meetings_of(network, groups or (), self.batches[0][:1], self._predict)
            hooks.enter_context(watched_meetings(network, self._meetings))
            images = sum(map(len, self.batches))
            watched = {name: partial(state.add, of=images) for name, state in self._states.items()}
            by_gradients = groups is None and _can_be_differentiated(network)
            draw = torch.Generator().manual_seed(0) if by_gradients else None
            for batch in self.batches:
                for heads_met in met.values():
                    heads_met.at_most = MOST_ROWS * len(batch) / images
                run_watched(network, batch, watched, self._predict, draw)
        for name, state in self._states.items():
            state.over_ranks().check(name)
        for group, attention in heads.items():
            state = self._states[attention.proj]
            state.turned(turn(network, attention, met[group], state.moments.system(intercept=True).xx))
        self._take_up(network)
        several = [each for each in groups or () if each.heads > 1]
        for each in several:
            self._sort_heads(network, each)
        if several:
            self._take_up(network)

    def _has_other_units(self, group: Group) -> bool:
        return group.name in self._meetings and self._meetings[group.name].units != group.units

    def _meet(self, network: nn.Module, groups: Sequence[Group] | None) -> None:
        """Runs all images for the meetings alone, whose units were cut."""
        self._meetings = meetings_of(network, groups or (), self.batches[0][:1], self._predict)
        with watched_meetings(network, self._meetings):
            for batch in self.batches:
                self._predict(network, batch)

    def _take_up(self, network: nn.Module) -> None:
        for state in self._states.values():
            state.take_up(network)
            state.moments.give(state.weight, state.bias)

    def _sort_heads(self, network: nn.Module, group: Group) -> None:
        """Puts the units of each head in the order of what their removal costs, if that is known."""
        apart, meeting = heads_apart(group), self._meetings.get(group.name)
        errors = self.removal_errors(apart) if meeting is None else meeting.errors_apart()
        if errors is None:
            return
        now = sort_heads(network, group, errors)
        if meeting is not None:
            meeting.sort(now)
        for part in apart.consumers():
            state = self._states.get(part.tensor.removesuffix(".weight"))
            if state is not None and part.axis == 1:
                columns = torch.arange(state.weight.shape[1])
                places = torch.tensor(state.reader.columns(part.indices(range(apart.units))))
                columns[places] = places.reshape(len(part.offsets), apart.units, -1)[:, now].flatten()
                state.turned(torch.eye(len(columns), dtype=torch.float64)[columns].to(state.weight.device))


def _can_be_differentiated(network: nn.Module) -> bool:
    """Whether the answers have gradients; those of spikes would be surrogates."""
    try:
        return not isinstance(adapter_for(network), SpikingAdapter)
    except UnsupportedNetworkError:
        return True


@contextmanager
def restored(network: nn.Module, tensors: Iterable[str]) -> Iterator[None]:
    """Puts back the values of some tensors when the context ends."""
    found = [stored_tensor(network, name).detach() for name in tensors]
    before = [tensor.clone() for tensor in found]

    def put_back() -> None:
        for tensor, values in zip(found, before, strict=True):
            tensor.copy_(values)

    with put_back_after(put_back):
        yield

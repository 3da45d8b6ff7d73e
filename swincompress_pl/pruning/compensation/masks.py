"""Makes up for masked weights in the layers that lose them, for every trial of a search and for good.

The sums are those of `Compensator`: of the network before anything was masked. Every layer is solved for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from swincompress_pl.masks import masked_parameters
from swincompress_pl.pruning.compensation.compensator import Compensator, Made, restored
from swincompress_pl.pruning.compensation.reader_state import ReaderState
from swincompress_pl.pruning.compensation.rows import RowSystem, best_weights
from swincompress_pl.pruning.structure.weight_masks import temporary_mask

Masks = Mapping[str, Tensor]
"""{parameter: mask, True where a weight stays}"""


class MaskCompensator:
    """Compensates masks of the weights of one network, for one round of a search.

    Each output of a layer is solved exactly, unless that takes too many operations for the layer. Then, and where the
    answers say how they feel the outputs together, the solution is approached by conjugate gradients. The methods
    "ridge" and "second_order" are the same.

    Args:
        compensator: Has the sums, and the method.
        writes: Whether masks are compensated; False if the compensator only ranks weights.
    """

    def __init__(self, compensator: Compensator, *, writes: bool) -> None:
        self._compensator, self._writes = compensator, writes
        self._masks: dict[str, Tensor] = {}  # of the network as it is now, with trials
        self._rows: dict[tuple[str, bool], RowSystem | None] = {}  # of the latest layer; they are large
        self._errors: dict[str, Tensor] = {}
        self._solved: dict[str, tuple[Tensor, tuple[Tensor, Tensor]]] = {}  # the latest of each layer

    def begin_round(self, network: nn.Module, names: Iterable[str]) -> None:
        """Prepares for masks of the parameters `names` of the network as it is now."""
        self._rows, self._errors, self._solved = {}, {}, {}
        self._compensator.begin_round(network, None, [_layer(name) for name in names])
        self._masks = {name: mask for name, (_, mask) in masked_parameters(network).items()}

    def tensors(self, name: str) -> tuple[str, ...]:
        """The names of the tensors that compensating a mask of a parameter changes."""
        state = self._state(name) if self._writes else None
        return () if state is None else state.reader.tensors

    def why(self, name: str) -> str:
        """Why the weights of a layer are not solved again."""
        return self._compensator.readers.left_alone.get(_layer(name), "the layer is unknown")

    def errors(self, name: str, shape: torch.Size) -> Tensor | None:
        """What the removal of each weight alone costs, of the parameter's shape; None for a layer without sums.

        That is the rise of the mean squared error of what the layer gives, per row, if its other weights make up for
        it; behind a BatchNorm, of what that gives. Lost weights have 0.
        """
        state = self._state(name)
        if state is None:
            return None
        if name not in self._errors:
            rows = self._system(name, damped=True)
            mask = self._mask(name, state)
            errors = state.weight.square() * mask if rows is None else rows.errors(state.weight, mask)
            self._errors[name] = errors * state.scale.square().unsqueeze(1)
        return self._errors[name].reshape(shape).clone()

    def best_mask(self, name: str, keep: Callable[[Tensor, float], Tensor], shape: torch.Size) -> Tensor | None:
        """Searches the mask, of the parameter's shape, that costs least; None for a layer without sums.

        `keep` takes a saliency of the parameter's shape, below 0 where weights are lost, as `RowSystem.mask` says.
        """
        state = self._state(name)
        rows = None if state is None else self._system(name, damped=True)
        if state is None or rows is None:
            return None
        gone = ~self._mask(name, state)

        def kept(saliency: Tensor, part: float) -> Tensor:
            return keep(saliency.masked_fill(gone, -1.0).reshape(shape), part).reshape(gone.shape)

        return rows.mask(state.weight, state.scale, kept).reshape(shape)

    def distance(self, network: nn.Module, mask: Masks) -> float | None:
        """How far the network's answers move with the mask of one parameter; see `Compensator.distance`."""
        (name,) = mask
        return self._compensator.distance(network, lambda: self.masked(network, mask), (name, *self.tensors(name)))

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """See `Compensator.once`."""
        return self._compensator.once(key, make)

    @contextmanager
    def masked(self, network: nn.Module, masks: Masks) -> Iterator[None]:
        """Inside the context, weights outside of `masks` and of contexts around it are 0, and made up for."""
        with ExitStack() as stack, torch.no_grad():
            for name, mask in masks.items():
                state = self._state(name) if self._writes else None
                if state is None:
                    stack.enter_context(temporary_mask(network, name, mask))
                    continue
                stack.enter_context(restored(network, state.reader.tensors))
                stack.callback(self._set, name, self._masks.get(name))
                self._write(network, name, state, mask)
            yield

    @torch.no_grad()
    def settle(self, network: nn.Module, masks: Masks) -> None:
        """Writes the weights that make up for `masks` for good; those outside of them become 0.

        The round is over then, unless that is reverted.
        """
        for name, mask in masks.items():
            state = self._state(name) if self._writes else None
            if state is not None:
                before = self._masks.get(name)
                self._write(network, name, state, mask)
                self._set(name, before)

    def _write(self, network: nn.Module, name: str, state: ReaderState, mask: Tensor) -> None:
        mask = mask.to(state.weight.device).reshape(state.weight.shape) & self._mask(name, state)
        known = self._solved.get(name)
        if known is None or not torch.equal(known[0], mask):
            known = self._solved[name] = mask, self._solution(name, state, mask)
        self._set(name, mask)
        self._compensator.write(network, state, *known[1])

    def _solution(self, name: str, state: ReaderState, mask: Tensor) -> tuple[Tensor, Tensor]:
        weight = best_weights(self._system(name, damped=False), state.weight, mask)
        return weight, state.bias if state.reader.fixed_bias else state.moments.intercept(weight, state.columns)

    def _system(self, name: str, *, damped: bool) -> RowSystem | None:
        """The equations of a layer; `damped` with the least damping, also where weights are not solved again."""
        damping = None if damped and self._compensator.damping == float("inf") else self._compensator.damping
        key = name, damping is None
        if key not in self._rows:
            state = self._state(name)
            assert state is not None
            self._rows = {key: RowSystem.of(state.system(), state.weight, damping, state.felt())}
        return self._rows[key]

    def _state(self, name: str) -> ReaderState | None:
        return self._compensator.state(_layer(name))

    def _mask(self, name: str, state: ReaderState) -> Tensor:
        known = self._masks.get(name)
        if known is None:
            return torch.ones_like(state.weight, dtype=torch.bool)
        return known.to(state.weight.device).reshape(state.weight.shape)

    def _set(self, name: str, mask: Tensor | None) -> None:
        if mask is None:
            self._masks.pop(name, None)
        else:
            self._masks[name] = mask


def _layer(name: str) -> str:
    return name.removesuffix(".weight")

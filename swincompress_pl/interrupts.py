"""Changes that an exception undoes, wherever it comes: an error in the middle, or Ctrl-C between any two lines.

Nothing here waits for the end of a change or holds signals back. What is going to change is remembered first; an
exception brings it back whole, so that there is no line at which a change is half done. Only a second exception while
the first one's way back is under way is not provided for.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

_DICTIONARIES = (dict, OrderedDict, defaultdict)
_LISTS = (list, deque)


@dataclass(frozen=True, eq=False)
class Attributes:
    """Of `holder`, those with these names alone; for an object whose other attributes are not ours to bring back."""

    holder: object
    names: tuple[str, ...]


class all_or_nothing:  # noqa: N801  # read as a statement: `with all_or_nothing(network):`
    """What changes within the context has changed whole, or, on any exception, is as it was before, to the bit.

    objects: those whose attributes change: optimizers, callbacks, and modules with all below them: their classes,
    modes, hooks, tensors (which ones, not what is in them), `requires_grad` and `grad`; or some `Attributes`. Lists and
    dictionaries inside count, other objects inside do not. written: modules that change so and whose tensors are
    written to in place as well; a copy of these is kept meanwhile. So are whether torch records gradients, and its
    default number format.

    A class and no generator: one that an interrupt leaves suspended would undo the change when it is collected.
    """

    def __init__(self, *objects: object, written: Iterable[nn.Module] = ()) -> None:
        self._written = tuple(written)
        self._objects = (*self._written, *objects)
        self._put_back: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        # The values first: a gradient fits its tensor's format.
        self._put_back = [*_values(self._written), *_structure(self._objects), *_settings()]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        put_back, self._put_back = self._put_back, []
        if kind is not None:
            for each in put_back:
                each()


@contextmanager
def put_back_after(put_back: Callable[[], None], still: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """`put_back` at the end of the context, once more where an exception came on the way there; so it may run twice.

    still: asked where an interrupt left the context behind, which comes to its end when it is collected, some time
    later: whether nothing has changed since that `put_back` would undo.
    """
    try:
        try:
            yield
        except GeneratorExit:
            if still():
                put_back()
            raise
        put_back()
    except GeneratorExit:
        raise
    except BaseException:
        put_back()
        raise


def unwritten(tensor: Tensor, *, writes: int) -> Callable[[], bool]:
    """Tells whether nothing was written to `tensor` since now but the next so many writes."""
    if tensor.is_inference():
        return lambda: True
    version = tensor._version + writes
    return lambda: tensor._version == version


def _structure(objects: Iterable[object]) -> list[Callable[[], None]]:
    """What brings attributes, and the lists and dictionaries in them, back to what they are now."""
    found: list[Callable[[], None]] = []
    waiting: list[Any] = [*objects]
    seen: dict[int, object] = {}  # holds what it knows: a number may be used again
    roots = {id(each) for each in waiting}
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if type(value) in _DICTIONARIES:
            found.append(partial(_refill, value, dict(value)))
            waiting += value.values()
        elif type(value) in _LISTS:
            found.append(partial(_extend, value, list(value)))
            waiting += value
        elif type(value) is set:
            found.append(partial(_renew, value, set(value)))
        elif isinstance(value, Tensor):
            found.append(partial(_follow, value, value.requires_grad, value.grad if value.is_leaf else None))
        elif isinstance(value, Attributes):
            own = vars(value.holder)
            known = {name: own[name] for name in value.names if name in own}
            found.append(partial(_assign, own, known, value.names))
            waiting += known.values()
        elif isinstance(value, nn.Module | Optimizer) or id(value) in roots:
            found.append(partial(_reclassify, value, type(value)))
            waiting.append(vars(value))
    return found


def _refill(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    pairs = zip(now.items(), before.items(), strict=True)
    if len(now) != len(before) or any(key is not old or value is not was for (key, value), (old, was) in pairs):
        now.clear()  # and not only what differs: the order counts, in state dicts and among hooks
        now.update(before)


def _assign(now: dict[str, Any], before: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name in before:
            now[name] = before[name]
        else:
            now.pop(name, None)


def _extend(now: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(now) != len(before) or any(value is not was for value, was in zip(now, before, strict=True)):
        now.clear()
        now.extend(before)


def _renew(now: set[Any], before: set[Any]) -> None:
    now.clear()
    now.update(before)


def _reclassify(value: Any, kind: type) -> None:
    if type(value) is not kind:
        value.__class__ = kind


def _follow(tensor: Tensor, requires_grad: bool, grad: Tensor | None) -> None:
    if tensor.is_leaf:
        if tensor.requires_grad is not requires_grad:
            tensor.requires_grad_(requires_grad)
        if tensor.grad is not grad:
            tensor.grad = grad


def _settings() -> list[Callable[[], None]]:
    """What brings back the settings of torch's that an interrupt on the way out of a context leaves."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    return [partial(_set_gradients, gradients), partial(torch.set_default_dtype, dtype)]


def _set_gradients(recorded: bool) -> None:
    torch.set_grad_enabled(recorded)


def _values(modules: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """What brings the values of parameters and buffers back; each once, however often it is held."""
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    tensors = [tensor for tensor in found.values() if not _is_fixed(tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return [
        *(partial(_write, tensor, tensor.detach(), tensor.detach().clone()) for tensor in tensors),
        *(partial(_write, gradient, gradient.detach(), None) for gradient in gradients),  # a cast casts them as well
    ]


def _is_fixed(tensor: Tensor) -> bool:
    """Whether nothing writes to it: it has no values yet, or is of inference mode."""
    return is_lazy(tensor) or tensor.is_inference()


@torch.no_grad()
def _write(tensor: Tensor, memory: Tensor, values: Tensor | None) -> None:
    """memory: an alias of the tensor from before, in which it had `values`; None where nothing writes them."""
    if tensor.data_ptr() != memory.data_ptr() or tensor.dtype is not memory.dtype or tensor.shape != memory.shape:
        tensor.data = memory  # it was moved, or cast to another number format
    if values is not None:
        tensor.copy_(values)

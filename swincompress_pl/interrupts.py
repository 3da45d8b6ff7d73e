"""Undoes changes on any exception, wherever it comes: an error in the middle, or Ctrl-C between any two lines.

Nothing here waits for the end of a change, or holds signals back. What is going to change is remembered first. An
exception restores all of it, so that no line leaves a change half done. A second exception, while the first one is
being handled, is not covered.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

T = TypeVar("T")
_DICTIONARIES = (dict, OrderedDict, defaultdict)
_LISTS = (list, deque)


@dataclass(frozen=True, eq=False)
class Attributes:
    """Some attributes of an object, whose other attributes must not be restored.

    Attributes:
        holder: The object.
        names: The names of the attributes.
    """

    holder: object
    names: tuple[str, ...]


class all_or_nothing:  # noqa: N801  # read as a statement: `with all_or_nothing(network):`
    """Makes all changes inside the context, or, on any exception, none: then everything is as before, to the bit.

    Whether torch records gradients, and its default dtype, are restored too.

    It is a class and not a generator, because a generator that an interrupt leaves suspended would undo the change when
    it is collected.

    Args:
        *objects: The objects whose attributes change: optimizers, callbacks, modules with all modules inside, or some
            `Attributes`. Of modules these are classes, modes, hooks, tensors (which ones, but not their values),
            `requires_grad` and `grad`. Lists and dictionaries inside count; other objects inside do not.
        written: Modules that change so, and whose tensors are also written to in place. A copy of their tensors is kept
            meanwhile.
    """

    def __init__(self, *objects: object, written: Iterable[nn.Module] = ()) -> None:
        self._written = tuple(written)
        self._objects = (*self._written, *objects)
        self._put_back: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        # The values first, because a gradient has the dtype of its tensor.
        self._put_back = [*_values(self._written), *_structure(self._objects), *_settings()]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        put_back, self._put_back = self._put_back, []
        if kind is not None:
            for each in put_back:
                each()


@contextmanager
def put_back_after(put_back: Callable[[], None], still: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Calls `put_back` at the end of the context, and once more if an exception interrupts that; so it may run twice.

    An interrupt may leave the context suspended, to end when it is collected, some time later. Then `put_back` runs
    only if `still()` says that nothing has changed since that it would undo.
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


@contextmanager
def surely_left(context: AbstractContextManager[T]) -> Iterator[T]:
    """Enters `context` and leaves it at the end, even if an interrupt comes between its last line and its `__exit__`.

    Python skips `__exit__` then. A context that changes what all networks do, as torch's counter of operations, would
    stay on for the rest of the process. `__exit__` is told of no exception.
    """
    inside = [True]

    def leave() -> None:
        if inside:
            context.__exit__(None, None, None)
            inside.clear()

    with put_back_after(leave):
        yield context.__enter__()


def unwritten(tensor: Tensor, *, writes: int) -> Callable[[], bool]:
    """Returns a function that tells whether nothing but the next `writes` writes has changed `tensor` since now."""
    if tensor.is_inference():
        return lambda: True
    version = tensor._version + writes
    return lambda: tensor._version == version


def _structure(objects: Iterable[object]) -> list[Callable[[], None]]:
    """Functions that restore attributes, and the lists and dictionaries in them, to their present state."""
    found: list[Callable[[], None]] = []
    waiting: list[Any] = [*objects]
    seen: dict[int, object] = {}  # keeps the objects alive, so that no id is used again
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
        now.clear()  # all, and not only what differs: the order counts, in state dicts and among hooks
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
    """Functions that restore settings of torch, which an interrupt at the end of a context may leave changed."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    return [partial(_set_gradients, gradients), partial(torch.set_default_dtype, dtype)]


def _set_gradients(recorded: bool) -> None:
    torch.set_grad_enabled(recorded)


def _values(modules: Iterable[nn.Module]) -> list[Callable[[], None]]:
    """Functions that restore the values of parameters and buffers, one per tensor."""
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    tensors = [tensor for tensor in found.values() if not _is_fixed(tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return [
        *(partial(_write, tensor, tensor.detach(), tensor.detach().clone()) for tensor in tensors),
        *(partial(_write, gradient, gradient.detach(), None) for gradient in gradients),  # a cast casts them as well
    ]


def _is_fixed(tensor: Tensor) -> bool:
    """Whether nothing writes to the tensor, because it has no values yet or was made in inference mode."""
    return is_lazy(tensor) or tensor.is_inference()


@torch.no_grad()
def _write(tensor: Tensor, memory: Tensor, values: Tensor | None) -> None:
    """Restores a tensor: its former `memory`, an alias, and the `values` in it; None if nothing writes to them."""
    if tensor.data_ptr() != memory.data_ptr() or tensor.dtype is not memory.dtype or tensor.shape != memory.shape:
        tensor.data = memory  # it was moved, or cast to another dtype
    if values is not None:
        tensor.copy_(values)

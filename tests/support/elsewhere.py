"""A pretended accelerator: tensors that say they are on another device. Code that mixes devices fails here, too.

As on CUDA: an operation on tensors of two devices raises (but for numbers, and for indices that are on the CPU), and so
does `.numpy()`. The device is "lazy", for which autograd needs no hardware; the work is the CPU's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ELSEWHERE = torch.device("lazy", 0)
_MOVES = ("aten._to_copy", "aten.copy_")
_INDEXING = ("aten.index.", "aten.index_put", "aten._index_put_impl_", "aten._unsafe_index")


class Away(Tensor):
    """`inner`, claimed to be elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        result: Away = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=ELSEWHERE,
        )  # fmt: skip
        result.inner = inner
        return result

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Within it, `ELSEWHERE` is a device like any other."""
    with _Dispatch(), _Functions():
        yield


class _Dispatch(TorchDispatchMode):
    """Sees what makes a tensor or moves it, which no tensor that is away takes part in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """`torch.tensor` passes every dispatch mode by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and _is_elsewhere(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs).to(ELSEWHERE)
        return func(*args, **kwargs)


def _is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == ELSEWHERE.type


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = list(_tensors_of((args, tuple(kwargs.values()))))
    name, device = _name_of(func), kwargs.get("device")
    away = any(isinstance(x, Away) for x in tensors)
    moves = name.startswith(_MOVES)
    if away and not moves:
        _refuse_two_devices(name, args, tensors)
    plain = {k: _brought(v) for k, v in kwargs.items() if not (k == "device" and (moves or _is_elsewhere(v)))}
    output = func(*_brought(args), **plain)
    if name.startswith("aten.copy_"):
        return args[0]
    stays = away if device is None else _is_elsewhere(device)
    if not stays:
        return output
    written = func._schema.is_mutable and isinstance(output, Tensor)
    if written:  # in place, or into `out`: that very tensor
        return next(x for x in (kwargs.get("out"), args[0]) if isinstance(x, Away))
    return _sent(output)


_name_of = functools.cache(str)


# An operator's arguments and results nest tuples and lists and nothing else; torch's own walks over trees, which know
# more, took most of the time here.


def _tensors_of(nested: Any) -> Iterator[Tensor]:
    for x in nested:
        if isinstance(x, Tensor):
            yield x
        elif type(x) in (tuple, list):
            yield from _tensors_of(x)


def _brought(x: Any) -> Any:
    if isinstance(x, Away):
        return x.inner
    return type(x)(map(_brought, x)) if type(x) in (tuple, list) else x


def _sent(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Away(x)
    return type(x)(map(_sent, x)) if type(x) in (tuple, list) else x


def _refuse_two_devices(name: str, args: Any, tensors: list[Tensor]) -> None:
    if name.startswith(_INDEXING) and isinstance(args[0], Away):
        return  # torch takes indices on the CPU, too
    here = [tuple(x.shape) for x in tensors if not isinstance(x, Away) and x.ndim > 0]
    if here:
        raise RuntimeError(f"{name}: {here} are on the CPU, the rest is elsewhere")

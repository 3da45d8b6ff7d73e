"""Exceptions at every line of a call, and the whole state of what it changes."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch.optim import Optimizer

import swincompress_pl

PACKAGE = str(Path(swincompress_pl.__file__).parent)
# What brings things back: an exception inside it is a second one, which nobody promises anything about.
_WAY_BACK = str(Path(PACKAGE) / "interrupts.py")


class Interrupt(KeyboardInterrupt):
    """Ctrl-C at a line."""


class Tracer:
    """Counts the lines of the package that run, and raises at the one with the number `at`."""

    def __init__(self, files: Sequence[str], at: int | None = None) -> None:
        self.files, self.at = tuple(f"{PACKAGE}/{file}" for file in files), at
        self.places: list[tuple[str, int]] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(self.files) or name == _WAY_BACK:
            return None
        if event == "line":
            self.places.append((name, frame.f_lineno))
            if len(self.places) - 1 == self.at:
                raise Interrupt(f"{name}:{frame.f_lineno}")
        return self


def run_traced(call: Callable[[], Any], tracer: Tracer) -> Any:
    """What `call` gives while `tracer` watches."""
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        return call()
    finally:
        sys.settrace(before)


def lines_of(call: Callable[[], Any], files: Sequence[str] = ("",)) -> list[tuple[str, int]]:
    """The lines of the package's `files` (paths that begin so) that `call` runs, each as often as it runs."""
    tracer = Tracer(files)
    run_traced(call, tracer)
    return tracer.places


def interruptions(places: Sequence[tuple[str, int]], most: int | None = None) -> list[int]:
    """The numbers in `places` at which to interrupt: each line when it runs first and when it runs last.

    most: so many of these, evenly spread, where there are more.
    """
    first: dict[tuple[str, int], int] = {}
    last: dict[tuple[str, int], int] = {}
    for number, place in enumerate(places):
        first.setdefault(place, number)
        last[place] = number
    numbers = sorted({*first.values(), *last.values()})
    if most is None or len(numbers) <= most:
        return numbers
    return [numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most)]


def interrupted(call: Callable[[], Any], at: int, files: Sequence[str] = ("",)) -> str | None:
    """Run `call` with an exception at the line with the number `at`; the place, None where it came to its end."""
    try:
        run_traced(call, Tracer(files, at))
    except Interrupt as interrupt:
        return str(interrupt)
    return None


def state_of(*objects: Any) -> Any:
    """Plain data that is equal where modules and optimizers are: classes, attributes, modes, hooks, tensors to the bit,
    gradients, groups and state; and torch's settings, and torch's, NumPy's and Python's random numbers."""
    numpy: Any = np.random.get_state(legacy=True)
    names: dict[int, str] = {}
    found = [_plain(value, names) for value in objects]
    found += [torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    found += [torch.is_autocast_enabled("cpu"), len(warnings.filters), *_modes(), *_hooks_of_all_modules()]
    return [*found, torch.get_rng_state().numpy().tobytes(), numpy[1].tobytes(), numpy[2], random.getstate()]


def _modes() -> list[Any]:
    """What sees every operation: a counter of FLOPs, say, that an interrupt left on."""
    return [_len_torch_dispatch_stack(), _len_torch_function_stack(), torch.backends.cuda.flash_sdp_enabled()]


def _hooks_of_all_modules() -> list[Any]:
    hooks = torch.nn.modules.module
    return [len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)]


def _plain(value: Any, names: dict[int, str]) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value, names)
    if isinstance(value, nn.Module):
        known = id(value) in names
        name = names.setdefault(id(value), f"module {len(names)}")
        return name if known else [name, type(value).__qualname__, _plain(vars(value), names)]
    if isinstance(value, Optimizer):
        own = {key: _plain(part, names) for key, part in vars(value).items() if key not in ("state", "param_groups")}
        groups = _plain(value.param_groups, names)
        return [type(value).__qualname__, own, groups, _plain(list(value.state.items()), names)]
    if isinstance(value, dict):
        return [[_key(key, names), _plain(inner, names)] for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(inner, names) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if value is None or isinstance(value, bool | int | float | str | bytes | type):
        return repr(value)
    return type(value).__qualname__


def _key(key: Any, names: dict[int, str]) -> Any:
    return _plain(key, names) if isinstance(key, Tensor) else str(key) if isinstance(key, str) else type(key).__name__


def _tensor(tensor: Tensor, names: dict[int, str]) -> Any:
    known = id(tensor) in names
    name = names.setdefault(id(tensor), f"tensor {len(names)}")
    if known:
        return name
    values = tensor.detach().cpu().contiguous().flatten()
    grad = None if not tensor.is_leaf or tensor.grad is None else _tensor(tensor.grad, names)
    return [name, type(tensor).__name__, str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad, grad,
            values.view(torch.uint8).numpy().tobytes() if values.numel() else b""]  # fmt: skip


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two states differ."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (mine, yours) in enumerate(zip(one, other, strict=True)):
            yield from differences(mine, yours, f"{path}/{mine[0] if isinstance(mine, list) and mine else number}")
    elif one != other:
        yield f"{path}: {str(one)[:200]} != {str(other)[:200]}"

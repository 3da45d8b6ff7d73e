"""A forward pass that begins in the middle, with the kept input of the first segment that a candidate changes.

The segments (`adapter.segments(network)`) run one after the other, each on the one tensor that the previous returned.
If a candidate differs from the network only from segment k on, the input of segment k is the same as before. To begin
there, the segments before k return a placeholder of the right shape during the call, and segment k gets the kept input.
The same code runs on the same numbers, so the result is equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swincompress_pl.interrupts import surely_left
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

T = TypeVar("T")


class PrefixCache:
    """Inputs of the segments of a network, kept for each batch of images, up to `size_bytes` in all.

    The batches and the network stay the same for the life of a cache, except for changes that are tried and undone
    (`run`), and changes that stay (`drop_behind`). Some networks always run as a whole: those without segments, with
    forward hooks on their modules, compiled, or with a segment that does not run exactly once.

    Attributes:
        off: Why nothing is kept; None while the cache works.
    """

    def __init__(self, network: nn.Module, *, size_bytes: int) -> None:
        self.network = network
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self.off: str | None = None
        self._inputs: dict[int, dict[int, Tensor]] = {}  # batch -> segment -> its input
        self._outputs: dict[int, dict[int, Tensor]] = {}  # batch -> segment -> a placeholder for its output
        self._segments: list[nn.Module] = []
        self._first_segment: dict[str, int] = {}
        self._part_before: list[float] = []
        try:
            self._find_segments()
        except (UnsupportedNetworkError, AttributeError) as error:
            self._turn_off(str(error))

    def _find_segments(self) -> None:
        names = [] if self.size_bytes == 0 else adapter_for(self.network).segments(self.network)
        self._segments = [self.network.get_submodule(name) for name in names]
        self._part_before = [0.0] * len(names)
        if len(names) < 2:
            return self._turn_off("fewer than two segments, or size_bytes=0")
        # hooks of the network itself see the images and the output as always
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.network.modules() if m is not self.network):
            return self._turn_off("the network's modules have forward hooks, which have to see a whole pass")
        if any(getattr(m, "_compiled_call_impl", None) is not None for m in self.network.modules()):
            return self._turn_off("the network is compiled")
        self._first_segment = _first_segments(self.network, names)

    def _turn_off(self, why: str) -> None:
        self.off = why
        self._segments = []
        self._inputs.clear()
        self._outputs.clear()
        self.used_bytes = 0

    def measure(self, forward: Callable[[], object]) -> None:
        """Counts the multiply-accumulates before each segment in one pass, such as one of a single image."""
        if self.off is not None:
            return
        before: dict[int, int] = {}
        # products of attention one by one, because not every version of torch counts its fused kernel on a CPU
        count = surely_left(FlopCounterMode(display=False))
        with sdpa_kernel(SDPBackend.MATH), count as counter, ExitStack() as hooks:

            def note(number: int) -> None:
                before.setdefault(number, counter.get_total_flops())

            for number, segment in enumerate(self._segments):
                handle = segment.register_forward_pre_hook(lambda *_, number=number: note(number))
                hooks.callback(handle.remove)
            forward()
            total = max(1, counter.get_total_flops())
        if len(before) < len(self._segments):  # a quantized network does not call its modules
            return self._turn_off("a pass does not run every segment")
        self._part_before = [before.get(number, 0) / total for number in range(len(self._segments))]

    def depth(self, tensors: Sequence[str]) -> int:
        """The first segment that a change of `tensors` (names of parameters and buffers) affects.

        It is 0, the whole network, if one of them lies outside the segments, or none is named.
        """
        if self.off is not None or not tensors:
            return 0
        unknown = [name for name in tensors if name not in self._first_segment]
        if unknown:
            raise ValueError(f"{unknown[0]}: no parameter or buffer of {type(self.network).__name__} has this name")
        return min(self._first_segment[name] for name in tensors)

    def run(self, batch: int, depth: int, forward: Callable[[], T]) -> tuple[T, float]:
        """Calls `forward()`, a pass over the images of `batch` of a network that is changed from segment `depth` on.

        Returns its result and the part of a whole pass that it took. Leaves the network as it was.
        """
        if self.off is not None:
            return forward(), 1.0
        kept = self._inputs.get(batch, {})
        start = max((number for number in kept if number <= depth), default=0)
        seen = _Recorder()
        with ExitStack() as hooks:
            if start:
                for number in range(start):
                    hooks.enter_context(_instead(self._segments[number], self._outputs[batch][number]))
                hooks.enter_context(_given(self._segments[start], kept[start]))
            for number in range(start, depth + 1):
                hooks.enter_context(seen.watching(number, self._segments[number]))
            result = forward()
        if depth and self._usable(seen, range(start, depth + 1)):
            self._keep(batch, start, depth, seen)
        return result, 1.0 - self._part_before[start]

    def drop_behind(self, depth: int) -> None:
        """Forgets the inputs of the segments behind `depth`, because a change from there on stays."""
        for kept in self._inputs.values():
            for number in [n for n in kept if n > depth]:
                self.used_bytes -= _size_bytes(kept.pop(number))

    def _usable(self, seen: _Recorder, numbers: range) -> bool:
        problem = seen.problem(numbers)
        if problem is not None:
            self._turn_off(problem)
        return problem is None

    def _keep(self, batch: int, start: int, depth: int, seen: _Recorder) -> None:
        """Keeps the inputs, the deepest first: a search in order of depth needs no others."""
        kept = self._inputs.setdefault(batch, {})
        for number in range(depth, start, -1):
            tensor = seen.inputs[number][0]
            size_bytes = _size_bytes(tensor)
            if number == depth:
                for shallower in sorted(kept):
                    if self.used_bytes + size_bytes > self.size_bytes and shallower < depth:
                        self.used_bytes -= _size_bytes(kept.pop(shallower))
            if self.used_bytes + size_bytes <= self.size_bytes:
                self.used_bytes += size_bytes
                kept[number] = tensor
        self._outputs.setdefault(batch, {}).update(
            {number: _placeholder(seen.outputs[number]) for number in range(start, depth)}
        )


class _Recorder:
    """The inputs and outputs of watched modules in one pass."""

    def __init__(self) -> None:
        self.inputs: dict[int, tuple[Tensor, int]] = {}  # with the version, which changes made in place increase
        self.outputs: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}
        self._odd: set[int] = set()

    @contextmanager
    def watching(self, number: int, module: nn.Module) -> Iterator[None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[number] = self._calls.get(number, 0) + 1
            if len(args) == 1 and not kwargs and _is_plain(args[0]):
                self.inputs[number] = (args[0], args[0]._version)
            else:
                self._odd.add(number)

        def after(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor):
                self.outputs[number] = output
            else:
                self._odd.add(number)

        handles = (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def problem(self, numbers: range) -> str | None:
        """Why what was seen cannot be used; None if it can."""
        if any(self._calls.get(number) != 1 for number in numbers):
            return "a segment does not run exactly once in a pass"
        if self._odd:
            return "a segment does not take one tensor and return one"
        if any(tensor._version != version for tensor, version in self.inputs.values()):
            return "a segment changes its input in place"
        return None


def _first_segments(network: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Maps the name of a parameter or buffer to the first segment that reads it; 0 if something outside may.

    A shared tensor has several names.
    """
    named = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    by_tensor: dict[int, int] = {}
    for name, tensor in named:
        inside = (number for number, segment in enumerate(names) if name.startswith(segment + "."))
        number = next(inside, 0)
        by_tensor[id(tensor)] = min(number, by_tensor.get(id(tensor), number))
    return {name: by_tensor[id(tensor)] for name, tensor in named}


@contextmanager
def _instead(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Inside the context, `module(...)` returns `output` without computing."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def _given(module: nn.Module, tensor: Tensor) -> Iterator[None]:
    """Inside the context, `module(...)` gets `tensor` as its input."""
    handle = module.register_forward_pre_hook(lambda _, __: (tensor,))
    try:
        yield
    finally:
        handle.remove()


def _placeholder(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, type and device that takes the memory of a single number."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _size_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()

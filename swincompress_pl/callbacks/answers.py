"""Finds out what a validation step gives to the network, and what it makes of the network's answer.

A step is watched while it runs. A hook notes the calls of the network. Outside of those calls, the functions are noted
that turn logits into predictions (`argmax`, `topk`, ...) or compare them with labels (`cross_entropy`, torchmetrics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from swincompress_pl.callbacks.loaders import leaves

_LOSSES = (functional.cross_entropy, functional.nll_loss)
_BINARY = (functional.binary_cross_entropy_with_logits,)
_PREDICTING = (
    *(torch.argmax, Tensor.argmax, torch.topk, Tensor.topk, torch.max, Tensor.max),
    *(torch.sort, Tensor.sort, torch.argsort, Tensor.argsort),
)
_COMPARING = (torch.eq, Tensor.eq, Tensor.__eq__)
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class", "cls")


@dataclass
class Call:
    """One call of the network: its arguments, and its output (None while it runs)."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: Any = None

    @property
    def images(self) -> Tensor:
        """The first tensor among the arguments; a TypeError if there is none."""
        for leaf in leaves([*self.arguments, *self.options.values()]):
            if isinstance(leaf, Tensor):
                return leaf
        raise TypeError("the network was called without a tensor")


@dataclass
class Step:
    """A step that was watched.

    Attributes:
        calls: The calls of the network, in order.
        part: The first call of a part of the network from outside, such as `net.forward_features(...)`.
        predicted: The tensors that `argmax` and similar functions were applied to.
        scored: (logits, targets) of losses.
        targets: Integers that predictions were compared with.
        answered: What the module's `forward` returned.
        classifies: Whether the network's own answer may be logits.
        error: The error that ended the step early.
    """

    calls: list[Call] = field(default_factory=list)
    part: Call | None = None
    predicted: list[Tensor] = field(default_factory=list)
    scored: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    answered: list[Tensor] = field(default_factory=list)
    classifies: bool = True
    error: Exception | None = None

    @property
    def answered_calls(self) -> bool:
        """Whether the network was called, and each call returned."""
        return bool(self.calls) and all(call.output is not None for call in self.calls)

    def answer(self, count: int) -> Tensor | None:
        """The logits (N, classes) of `count` images that the step predicts with; None if none of this form were seen.

        They are taken from the first of these that has any: what `argmax` or `topk` got last, a loss, the module's
        `forward`, the network. One logit z counts as the two logits (0, z).
        """
        outputs = [call.output for call in self.calls if self.classifies and isinstance(call.output, Tensor)]
        for found in (self.predicted, [logits for logits, _ in self.scored], self.answered, outputs):
            for logits in reversed(found):
                if logits.ndim == 2 and len(logits) == count and logits.shape[1] >= 2:
                    return logits
        for logits in reversed([*(one for one, _ in self.scored), *self.answered, *outputs]):
            if logits.numel() == count and len(logits) == count:
                return two_logits(logits)
        return None

    def labels(self, batch: Any) -> Tensor | None:
        """The class of each image (N,); None if it is not known.

        It is what predictions or logits were compared with, or else the only vector of whole numbers in the batch.
        """
        seen = [target for _, target in self.scored] + self.targets
        for target in seen:
            if target.ndim == 1 and len(target) and _is_whole(target):
                return target.long()
            if target.ndim == 2 and target.shape[1] == 1 and _is_whole(target):
                return target[:, 0].long()
        return _labels_in(batch)

    def soft_labels(self, batch: Any) -> Tensor | None:
        """Probabilities (N, classes) that a loss got, or else `labels`, or else the only such matrix in the batch."""
        for _, target in self.scored:
            if target.ndim == 2 and target.is_floating_point() and target.shape[1] >= 2:
                return target
        found = self.labels(batch)
        if found is not None:
            return found
        tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim == 2]
        soft = [leaf for leaf in tensors if leaf.is_floating_point() and leaf.shape[1] >= 2]
        return soft[0] if len(soft) == 1 else None


def two_logits(logits: Tensor) -> Tensor:
    """One logit z per image, (N,) or (N, 1), as the two logits (0, z); logits (N, classes) as they are."""
    if logits.numel() != len(logits):
        return logits
    flat = logits.reshape(-1, 1)
    return torch.cat([torch.zeros_like(flat), flat], 1)


def _is_whole(target: Tensor) -> bool:
    if target.is_complex() or target.dtype == torch.bool:
        return False
    if target.is_floating_point():  # of a loss with one logit
        return bool(((target == 0) | (target == 1)).all())
    return int(target.min()) >= 0


def _labels_in(batch: Any) -> Tensor | None:
    if isinstance(batch, list | tuple) and len(batch) >= 2 and _is_label(batch[1]):
        found: Tensor = batch[1]
        return found
    if isinstance(batch, Mapping):
        named = [batch[key] for key in batch if str(key).lower() in _LABEL_KEYS and _is_label(batch[key])]
        if len(named) == 1:
            return named[0]  # type: ignore[no-any-return]  # _is_label
    vectors = [leaf for leaf in leaves(batch) if _is_label(leaf)]
    return vectors[0] if len(vectors) == 1 else None


def _is_label(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 1 or not len(value):
        return False
    return not value.is_floating_point() and _is_whole(value)


@contextmanager
def watched(module: nn.Module, held: nn.Module) -> Iterator[Step]:
    """Watches what a step of `module` does with the network that it holds as `held`."""
    inner = getattr(held, "_orig_mod", held)
    step = Step(classifies=getattr(inner, "num_classes", None) != 0)  # timm's: 0 of a network that ends in features
    mode = _Watch(step)
    with ExitStack() as stack:
        for handle in (
            # Before hooks that change the arguments of forward, as spiking networks move time to the front: what is
            # noted can then be passed to another call.
            held.register_forward_pre_hook(mode.before, with_kwargs=True, prepend=True),
            held.register_forward_hook(mode.after, with_kwargs=True),
            module.register_forward_hook(lambda _, __, output: _keep(step.answered, output)),
        ):
            stack.callback(handle.remove)
        for child in held.children():
            stack.callback(child.register_forward_pre_hook(mode.before_part, with_kwargs=True).remove)
        for metric in module.modules():
            if isinstance(metric, Metric):
                stack.enter_context(_metric_watched(metric, step))
        stack.enter_context(mode.watching())
        yield step


class _Watch(TorchFunctionMode):
    """Notes the functions that a step calls outside of its network."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self._answers: list[Tensor] = []  # predictions, to know what is compared with them
        self._depth = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            if not self._depth:
                self._exit()

    def _enter(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]  # torch does not annotate it

    def _exit(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch does not annotate it

    # Inside the network nothing is watched: it may be compiled, and its own argmax is no prediction.
    def before(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self._depth:
            self._exit()
            self.step.calls.append(Call(arguments, options))
        self._depth += 1

    def before_part(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self._depth and self.step.part is None:
            self.step.part = Call(arguments, options)

    def after(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self.step.calls[-1].output = output
            self._enter()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _PREDICTING:
            self._note_prediction(args, result)
        elif func in _LOSSES or func in _BINARY:
            given = dict(zip(("input", "target"), args, strict=False)) | kwargs
            if isinstance(given.get("input"), Tensor) and isinstance(given.get("target"), Tensor):
                self.step.scored.append((given["input"], given["target"]))
        elif func in _COMPARING and len(args) == 2:
            self._note_comparison(*args)
        return result

    def _note_prediction(self, args: tuple[Any, ...], result: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 2 and args[0].is_floating_point():
            self.step.predicted.append(args[0])
            self._answers.extend(part for part in leaves([*result] if isinstance(result, tuple) else [result]))

    def _note_comparison(self, one: Any, other: Any) -> None:
        for mine, target in ((one, other), (other, one)):
            if any(mine is answer for answer in self._answers) and isinstance(target, Tensor):
                self.step.targets.append(target)


def _keep(answers: list[Tensor], output: Any) -> None:
    if isinstance(output, Tensor):
        answers.append(output)


@contextmanager
def _metric_watched(metric: Metric, step: Step) -> Iterator[None]:
    """Notes the targets that a torchmetrics metric is updated with."""
    update: Any = metric.update

    def noting(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("preds", "target"), args, strict=False)) | kwargs
        if isinstance(given.get("target"), Tensor) and not given["target"].is_floating_point():
            step.targets.append(given["target"])
        return update(*args, **kwargs)

    metric.update = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        metric.update = update  # type: ignore[method-assign]

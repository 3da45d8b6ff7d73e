"""Scores networks for a search inside a trainer: by the module's own answers on a hold-out, or by a metric it logs.

The hold-out is what the module's validation step gives to the network, and the score counts what the step predicts.
Usually the step predicts with the network's answer as it is. Then the network alone runs, on images that are kept as it
got them. Otherwise the step runs again for each candidate, on kept batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.callbacks.answers import Step, two_logits, watched
from swincompress_pl.callbacks.loaders import described, leaves, sampler_over_ranks, without_padding
from swincompress_pl.callbacks.rows import Rows, cloned
from swincompress_pl.callbacks.validation import ModuleValidation, on_device
from swincompress_pl.checkpoint.holder import held_by, network_of
from swincompress_pl.pruning import HoldOut
from swincompress_pl.pruning.evaluation.holdout import NETWORK_ALONE
from swincompress_pl.pruning.evaluation.images import TooLargeError, read_images
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks, world_size
from swincompress_pl.pruning.evaluation.scorer import FunctionScorer, Scorer, fingerprint_of, tensor_bytes
from swincompress_pl.quant import QuantizedNetwork

_CPU_BATCH, _GPU_BATCH = 64, 256  # decisions come after whole batches, so no larger than the device needs
_COMPARED = 64  # images on which step and scorer have to predict the same; for later ones the network is not run
_SAME_METRIC = 1e-4  # sums on a GPU may be in another order
_REMEDY = (
    "pass monitor= with a metric that your validation_step logs (a fraction between 0 and 1), or override "
    "predict(module, network, images)"
)

Predict = Callable[[nn.Module, Tensor], Tensor]
Standing = Callable[[nn.Module], AbstractContextManager[None]]
"""A context in which the module's network returns what is scored: its float or rounded values, never its integers."""


@dataclass(frozen=True)
class Seen:
    """A batch as a step got it, what the step did, and the class of each image (N,)."""

    batch: Any
    step: Step
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """The images of the network's first call."""
        call = self.step.calls[0] if self.step.calls else self.step.part
        assert call is not None  # run_step looks at that
        return call.images

    @property
    def answer(self) -> Tensor:
        """The logits (N, classes) that the step predicts with."""
        found = self.step.answer(len(self.labels))
        if found is None:
            shapes = [tuple(call.output.shape) for call in self.step.calls if isinstance(call.output, Tensor)]
            raise ValueError(
                f"the validation step makes no logits (N, classes) of {len(self.labels)} images out of the network's "
                f"answer {shapes}, so no classes can be counted; {_REMEDY}"
            )
        return found

    @property
    def is_direct(self) -> bool:
        """Whether the network gets one tensor with a row per image, and the step predicts with its answer as it is."""
        if len(self.step.calls) != 1:
            return False
        call = self.step.calls[0]
        images = call.arguments[0] if len(call.arguments) == 1 and not call.options else None
        fits = isinstance(images, Tensor) and images.ndim > 0 and len(images) == len(self.labels)
        return fits and isinstance(call.output, Tensor) and _is_same_ranking(self.answer, call.output)


def _is_same_ranking(answer: Tensor, output: Tensor) -> bool:
    """Whether `answer` is the network's output, perhaps as probabilities or their logarithms."""
    if answer is output:
        return True
    if output.numel() == len(answer):
        return torch.equal(answer, two_logits(output))
    if answer.shape != output.shape:
        return False
    one, other = answer.detach().float(), output.detach().float()
    return any(torch.allclose(one, each, atol=1e-6) for each in (other, other.softmax(-1), other.log_softmax(-1)))


class Named:
    """A function whose fingerprint (see `FunctionScorer`) is computed when it is asked for, because modules train."""

    def __init__(self, run: Callable[..., Any], fingerprint: Callable[[], str | None]) -> None:
        self._run, self._fingerprint = run, fingerprint

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        return self._run(*arguments)

    @property
    def fingerprint(self) -> str | None:
        """The present fingerprint; None if nothing names the function."""
        return self._fingerprint()


def _fingerprint_of_network_alone(validation: ModuleValidation) -> str:
    """The fingerprint of a step that predicts with the network's answer as it is."""
    precision = str(validation.trainer.precision)
    quantized = isinstance(network_of(validation.module, validation.model_attribute), QuantizedNetwork)
    return NETWORK_ALONE if precision == "32-true" and not quantized else _fingerprint_of_step(validation)


def _fingerprint_of_step(validation: ModuleValidation) -> str:
    """The fingerprint of the module by its class and state; its code is not looked at."""
    kind = type(validation.module)
    digest = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {validation.trainer.precision}".encode())
    for name, value in validation.module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


class StepHoldOut(HoldOut):
    """A hold-out whose images are numbers of `Rows`, for a step that does more than return the network's answer."""

    _measured_images = 2  # a step may squeeze a batch of one

    def __init__(self, images: Tensor, labels: Tensor, *, shape: tuple[int, ...], digest: str, **options: Any) -> None:
        super().__init__(images, labels, **options)
        self._shape, self._digest = shape, digest

    @property
    def fingerprint(self) -> str | None:
        """That of a hold-out, with the digest of the kept batches."""
        found = super().fingerprint
        return None if found is None else f"{found} {self._digest}"

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image as the network gets it."""
        return self._shape


class HoldOutReader:
    """Makes a `HoldOut` of what `validation` gives to the module's network for the batches of the loaders."""

    def __init__(
        self,
        validation: ModuleValidation,
        loaders: list[Iterable[Any]],
        standing: Standing,
        *,
        score: str = "accuracy",
        max_images: int | None,
        max_size_bytes: int,
    ) -> None:
        self._score = score
        self.validation, self.loaders, self.standing = validation, loaders, standing
        self._max_size_bytes = max_size_bytes
        trainer = validation.trainer
        self._sharded = world_size() > 1 and all(sampler_over_ranks(each) is not None for each in loaders)
        self._max_images = max_images
        self._batch_size = _CPU_BATCH if trainer.strategy.root_device.type == "cpu" else _GPU_BATCH

    def with_predict(self, predict: Predict) -> HoldOut:
        """A hold-out that is scored by the user's `predict`, on the images and labels that a batch begins with."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for loader_index, loader in enumerate(self.loaders):
                for raw, left in without_padding(loader):
                    images, labels = images_and_labels(on_device(self.validation.trainer, raw, loader_index))
                    yield _cut(images, left), _cut(labels, left)

        run = Named(self._in_precision(predict), lambda: fingerprint_of(predict))
        return HoldOut(*self._read(batches()), predict=run, **self._options)

    def _read(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        try:
            images, labels = read_images(
                batches, max_images=self._max_images, max_size_bytes=self._max_size_bytes, sharded=self._sharded
            )
            assert labels is not None  # all batches here have some
            return images, labels
        except TooLargeError as error:
            fewer = f"max_images={error.max_images}" if error.max_images else "smaller images"
            raise ValueError(
                f"the hold-out takes more than holdout_size_bytes={self._max_size_bytes}, {error.image_size_bytes} "
                f"bytes per image: the images are kept in memory. Allow more with holdout_size_bytes=, score on fewer "
                f"with {fewer}, or pass monitor= with a metric that your validation_step logs, which keeps no images"
            ) from None

    @property
    def _options(self) -> dict[str, Any]:
        return {"sharded": self._sharded, "batch_size": self._batch_size, "score": self._score}

    def holdout(self, network: nn.Module, predict: Predict) -> HoldOut:
        """A hold-out that is scored by the module's step, or by `predict` alone if the step adds nothing to it.

        Raises a ValueError if the step gives no classes to count, or if the scorer and the step predict differently.
        """
        with self.validation.without_trace(), self.standing(network):
            found = self._read_directly()
            if all(from_all_ranks(found is not None)):  # a rank without images does as the others
                assert found is not None
                return self._direct(network, predict, *found)
            return self._replayed(network)

    def _read_directly(self) -> tuple[Tensor, Tensor, list[Seen]] | None:
        """Images, labels, and what the first steps did; None if the step does more than return the network's answer."""
        compared: list[Seen] = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for seen, left in self._seen(sparing=True):
                if not seen.is_direct:
                    raise _NotDirectError
                images = seen.step.calls[0].arguments[0].detach()
                if sum(len(each.labels) for each in compared) < _COMPARED:
                    compared.append(seen)
                yield _cut(images, left), _cut(seen.labels, left)

        try:
            return *self._read(batches()), compared
        except _NotDirectError:
            return None

    def _direct(
        self, network: nn.Module, predict: Predict, images: Tensor, labels: Tensor, compared: list[Seen]
    ) -> HoldOut:
        run = Named(
            self._in_precision(lambda network, images: two_logits(predict(network, images))),
            partial(_fingerprint_of_network_alone, self.validation),
        )
        holdout = HoldOut(images, labels, predict=run, **self._options)
        for seen in compared:
            self._compare(seen.answer, run(network, seen.step.calls[0].arguments[0]))
        return holdout

    def _replayed(self, network: nn.Module) -> HoldOut:
        rows, answers = Rows(self._max_size_bytes), list[Tensor]()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for seen, left in self._seen(sparing=False):
                numbers = rows.add(seen.batch, len(seen.labels))
                if sum(len(each) for each in answers) < _COMPARED:
                    answers.append(seen.answer.detach())
                if not rows.shape:
                    rows.shape = tuple(seen.images.shape[1:])
                yield _cut(numbers, left), _cut(seen.labels, left)

        def predict(_: nn.Module, numbers: Tensor) -> Tensor:
            batch = rows.batch(numbers.tolist())
            step = run_step(self.validation, batch)
            answer = step.answer(len(numbers))
            assert answer is not None  # it gave one for the same images before
            return answer

        def kept(network: nn.Module, numbers: Tensor) -> Tensor:
            with self.validation.without_trace(), self.standing(network):
                self.validation.begin()
                return predict(network, numbers)

        numbers, labels = self._read(batches())
        run = Named(self._in_precision(kept), partial(_fingerprint_of_step, self.validation))
        shape = next(filter(None, from_all_ranks(rows.shape)), ())  # a rank without images has that of the others
        holdout = StepHoldOut(numbers, labels, predict=run, shape=shape, digest=rows.digest(), **self._options)
        if answers:
            known = torch.cat(answers)
            backwards = torch.arange(len(known)).flip(0)[:_COMPARED]
            self._compare(known[backwards.to(known.device)], run(network, backwards))
        return holdout

    def _seen(self, *, sparing: bool) -> Iterator[tuple[Seen, float]]:
        """Yields what the step does with each batch, and how many of its images count.

        With `sparing`, the network is not run once its answer is no longer needed.
        """
        self.validation.begin()
        first: Tensor | None = None
        count = 0
        for loader_index, loader in enumerate(self.loaders):
            for index, (raw, left) in enumerate(without_padding(loader)):
                batch = on_device(self.validation.trainer, raw, loader_index)
                put_in = first if sparing and count >= _COMPARED else None
                given = batch if sparing else cloned(batch)  # `batch` is kept as the step got it
                try:
                    step = run_step(self.validation, given, index, loader_index, put_in=put_in)
                except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, ValueError) as error:
                    if index:
                        raise
                    raise ValueError(_not_taken(self.validation, raw, error)) from error
                labels = step.labels(batch)
                if labels is None:
                    raise ValueError(_no_labels(self.validation, batch))
                count += len(labels)
                if step.calls and isinstance(step.calls[0].output, Tensor) and first is None:
                    first = step.calls[0].output.detach()
                yield Seen(batch, step, labels), left

    def _in_precision(self, predict: Predict) -> Predict:
        precision = self.validation.trainer.precision_plugin

        def predicted(network: nn.Module, images: Tensor) -> Tensor:
            with precision.val_step_context():
                return predict(network, images)

        return predicted

    def _compare(self, answer: Tensor, scored: Tensor) -> None:
        """Raises a ValueError if the scorer predicts other classes than the step did for the same images."""
        step, scorer = answer.detach().float().cpu(), scored.detach().float().cpu()
        if step.shape == scorer.shape:
            predicted = scorer.argmax(1)
            gap = step.max(1).values - step.gather(1, predicted[:, None])[:, 0]
            # Batches of another size sum in another order, visibly so in bfloat16: near-ties may fall either way.
            far = (gap > 0.02 * (step.max(1).values - step.min(1).values)).nonzero().flatten().tolist()
            if not far:
                return
            where = f"for images {far[:8]} of the first {len(step)} of the hold-out the step predicts classes "
            where += f"{step.argmax(1)[far[:8]].tolist()} and the scorer {predicted[far[:8]].tolist()}"
        else:
            where = f"the step's logits have the shape {tuple(step.shape)}, the scorer's {tuple(scorer.shape)}"
        raise ValueError(
            f"{type(self.validation.module).__name__}'s validation step and the search would not score the same: "
            f"{where}. Is something random in evaluation, or remembered from call to call? Else {_REMEDY}"
        )


class _NotDirectError(Exception):
    """The step does more than return the network's answer."""


def run_step(
    validation: ModuleValidation, batch: Any, index: int = 0, loader_index: int = 0, *, put_in: Tensor | None = None
) -> Step:
    """Watches a step on a batch that is on the device.

    With `put_in`, its rows are repeated as the network's answer, and the network does not run. Raises what the step
    raises, and a ValueError if it never calls the network.
    """
    held = held_by(validation.module, validation.model_attribute)
    with watched(validation.module, held) as step:
        if put_in is None:
            validation.step(batch, index, loader_index)
        else:
            with answering(held, lambda *_, **__: _repeated(put_in, len(step.calls[-1].images))):
                validation.step(batch, index, loader_index)
    if not step.calls and step.part is None:
        raise ValueError(
            f"{type(validation.module).__name__}'s validation step does not call {validation.model_attribute}, the "
            "network to compress; name the one that it calls by model_attribute="
        )
    return step


def _repeated(answer: Tensor, count: int) -> Tensor:
    return answer[torch.arange(count, device=answer.device) % len(answer)]


@contextmanager
def answering(held: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Lets `held(...)` return what `answer(...)` does, inside the context."""
    mine = vars(held)
    own: dict[str, Any] = {name: mine[name] for name in ("forward", "_compiled_call_impl") if name in mine}
    mine.update(forward=answer, _compiled_call_impl=None)
    try:
        yield
    finally:
        for name in ("forward", "_compiled_call_impl"):
            mine.pop(name, None)
        mine.update(own)


def _cut(rows: Tensor, left: float) -> Tensor:
    return rows if left >= len(rows) else rows[: int(left)]


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """The images and labels that a batch begins with, for the user's own `predict`."""
    if isinstance(batch, list | tuple) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    raise TypeError(
        f"the hold-out has a batch of type {type(batch).__name__}; for your own predict(), tensors (images, labels, "
        "...) are expected. Give the datamodule a holdout_dataloader() that yields such batches, or use monitor= with "
        "a metric that your validation_step logs"
    )


def _not_taken(validation: ModuleValidation, raw: Any, error: Exception) -> str:
    return (
        f"{type(validation.module).__name__}'s validation does not take the hold-out's batches ({described(raw)}): "
        f"{type(error).__name__}: {error}. Give the datamodule a holdout_dataloader() with batches of the form that "
        "validation_step takes, labels included, or leave it out to score on the validation data"
    )


def _no_labels(validation: ModuleValidation, batch: Any) -> str:
    return (
        f"{type(validation.module).__name__}'s validation batches ({described(batch)}) "
        "have no labels that are one class for each image (N,), whole numbers from 0, or several that could be; "
        f"{_REMEDY}"
    )


def metric_scorer(validation: ModuleValidation, monitor: str, loaders: list[Iterable[Any]]) -> Scorer:
    """Scores by what the module's validation logs as `monitor`, a fraction between 0 and 1, over the whole hold-out.

    It is tried out twice on the first batch. Raises a ValueError if the module does not log it (the message lists what
    it logs), if there are no images, if the second value differs from the first, or if it is no such fraction.
    """
    scoring = _MetricScoring(validation, monitor, loaders)
    one, other = scoring.try_out(), scoring.try_out()
    if abs(one - other) > _SAME_METRIC:
        raise ValueError(
            f"monitor={monitor!r} is {one} and then {other} for the same network and the same first batch; a search "
            "would follow chance. Is something random in evaluation (dropout, sampling, augmentation), or remembered?"
        )
    if any(from_all_ranks(not 0 <= one <= 1)):
        scoring.score()  # a few images may give what all do not, such as NaN or a negative correlation
    return FunctionScorer(Named(scoring.score, scoring.fingerprint))


class _MetricScoring:
    def __init__(self, validation: ModuleValidation, monitor: str, loaders: list[Iterable[Any]]) -> None:
        self.validation, self.monitor, self.loaders = validation, monitor, loaders

    def fingerprint(self) -> str:
        """Returns the fingerprint of the metric, the module and the hold-out."""
        return f"{self.monitor} of {_fingerprint_of_step(self.validation)} on {self._data_digest}"

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.sha256()
        for loader in self.loaders:
            for batch in loader:
                for leaf in leaves(batch):
                    digest.update(tensor_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
        return digest.hexdigest()

    def try_out(self) -> float:
        """Returns the metric of the first batch of each loader."""
        return self._value(most_batches=1)

    def score(self, network: nn.Module | None = None) -> float:
        """The metric in points, over all images of all ranks; the module holds the network."""
        value = self._value()
        if not 0 <= value <= 1:  # NaN is neither
            raise ValueError(
                f"monitor={self.monitor!r} is {value}: a fraction between 0 and 1 is expected, so that the tolerance "
                "in points has a meaning; log a metric that grows as the network gets better, such as an accuracy as "
                "torchmetrics gives it, and no loss (NaN: look for NaN weights)"
            )
        return 100.0 * value

    def _value(self, most_batches: int | None = None) -> float:
        with self.validation.without_trace() as logged:
            self.validation.epoch(self.loaders, logged, most_batches)
            if self.monitor not in logged.entries:
                raise ValueError(
                    f"monitor={self.monitor!r} is not logged by {type(self.validation.module).__name__}'s validation; "
                    f"it logs {', '.join(logged.entries) or 'nothing'}"
                )
            return logged.value(self.monitor)

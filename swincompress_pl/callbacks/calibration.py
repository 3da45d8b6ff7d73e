"""The images for calibration and gradients: what the module's own step gives to its network.

`validation_step` runs on training batches for this, never `training_step`, which makes optimizer steps under manual
optimization. If training batches have a form that it does not take, it runs on their parts (those of a
`CombinedLoader`), or the user says where the images are (`calibration_dataloader`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.callbacks.answers import Step, watched
from swincompress_pl.callbacks.loaders import described, leaves, transforms_of
from swincompress_pl.callbacks.validation import ModuleValidation, on_device
from swincompress_pl.checkpoint.holder import held_by
from swincompress_pl.quant.preprocessing import (
    check_fit,
    checked_preprocessing,
    find_preprocessing,
    fits,
    normalization_between,
    normalization_in,
)


class NoImagesError(ValueError):
    """The loaders gave no batch."""


def network_inputs(validation: ModuleValidation, loaders: Iterable[Iterable[Any]]) -> Iterator[Tensor]:
    """Yields the images that the network gets from each batch: one tensor for each call of it.

    A ValueError says so if the validation step does not take the batches, and names `calibration_dataloader`.
    """
    for loader in loaders:
        for raw in loader:
            _, step = _taken(validation, raw)
            yield from (call.images for call in step.calls)


def first_inputs(validation: ModuleValidation, loaders: Sequence[Iterable[Any]]) -> tuple[Any, list[Tensor]]:
    """The first batch, or the part of it that the step takes, as its loader gave it; and what the network got of it.

    Raises a NoImagesError if there is no batch.
    """
    for loader in loaders:
        for raw in loader:
            part, step = _taken(validation, raw)
            return part, [call.images for call in step.calls]
    raise NoImagesError("there are no images to calibrate on; give the fit training data")


def labelled_batches(
    validation: ModuleValidation, loaders: Iterable[Iterable[Any]], most_batches: int
) -> Iterator[tuple[tuple[Any, int], Tensor]]:
    """Yields ((batch for a step, N), classes (N,) or probabilities (N, classes)) of the first training batches."""
    batches = (raw for loader in loaders for raw in loader)
    for raw in islice(batches, most_batches):
        part, step = _taken(validation, raw, whole=False)
        batch = on_device(validation.trainer, part)
        labels = step.soft_labels(batch)
        if labels is None:
            raise ValueError(
                f"{_name(validation)}: training batches ({described(raw)}) have no labels with one class per image; "
                "pass calibration_dataloader= with batches of the form that validation_step takes, or a criterion "
                "without gradients (criterion='magnitude')"
            )
        yield (batch, len(labels)), labels


def answer_of(validation: ModuleValidation, batch: Any, count: int) -> Tensor:
    """The logits (N, classes) that the module's step makes of the network's answer, with their gradient."""
    step = _attempt(validation, batch)
    answer = step.scored[-1][0] if step.scored else step.answer(count)
    if answer is None or answer.ndim != 2:
        raise ValueError(
            f"{_name(validation)}: validation_step computes no logits (N, classes) from a training batch "
            f"({described(batch)}){_ended(step)}; pass calibration_dataloader= with batches of the form that it takes"
        )
    sums_to_one = bool((answer >= 0).all()) and torch.allclose(answer.sum(1), answer.new_ones(len(answer)), atol=1e-3)
    return answer.clamp(min=torch.finfo(answer.dtype).tiny).log() if sums_to_one else answer


def _taken(validation: ModuleValidation, raw: Any, *, whole: bool = True) -> tuple[Any, Step]:
    """The batch, or the first part of it, on which the validation step calls the network, and that step.

    With `whole`, a step that calls only modules inside the network is an error.
    """
    failures = []
    for part in (raw, *_parts(raw)):
        try:
            batch = on_device(validation.trainer, part)
        except Exception as error:  # the module's own hooks, which may know another form only
            failures.append(f"{type(error).__name__}: {error}")
            continue
        step = _attempt(validation, batch)
        if step.answered_calls or (step.part is not None and not whole):
            return part, step
        if step.part is not None:
            raise ValueError(
                f"{_name(validation)} calls parts of {validation.model_attribute} (forward_features, say) and not "
                f"{validation.model_attribute} itself; a quantized network has no parts to call. Call "
                f"self.{validation.model_attribute}(images), with num_classes=0 for features"
            )
        failures.append(
            "it does not call the network" if step.error is None else f"{type(step.error).__name__}: {step.error}"
        )
    raise ValueError(
        f"{_name(validation)}.validation_step does not take the training batches ({described(raw)}), so the images to "
        f"calibrate {validation.model_attribute} on are not known: {failures[0]}. Pass "
        "calibration_dataloader= to the callback (a loader, or a function of the number of images), or give the "
        "datamodule a calibration_dataloader(images), with batches of the form that validation_step takes"
    )


def _parts(raw: Any) -> list[Any]:
    """The batches in a batch of several loaders."""
    values = list(raw.values()) if isinstance(raw, Mapping) else list(raw) if isinstance(raw, list | tuple) else []
    return [value for value in values if isinstance(value, Mapping | list | tuple)]


def _attempt(validation: ModuleValidation, batch: Any) -> Step:
    """Watches a step that may fail after the network: labels of training may have another form (mixed, or none)."""
    with watched(validation.module, held_by(validation.module, validation.model_attribute)) as step:
        try:
            validation.step(batch, 0, 0)
        except Exception as error:  # told if it matters
            step.error = error
    return step


def _ended(step: Step) -> str:
    return "" if step.error is None else f" ({type(step.error).__name__}: {step.error})"


def _name(validation: ModuleValidation) -> str:
    return type(validation.module).__name__


def normalization(
    given: Any, of_data: Any, network: nn.Module, raw: Any, images: Tensor, loaders: Sequence[Iterable[Any]]
) -> dict[str, Any]:
    """How the network's images are normalized: as stated, or as found, or as assumed if the images agree.

    Args:
        given: The callback's argument.
        of_data: The datamodule's `preprocessing`.
        network: The network, which may state a normalization too.
        raw: A batch as its loader gave it.
        images: What the network got of this batch.
        loaders: The loaders, whose datasets may have a Normalize.

    Returns:
        Mean and std per channel, and what else is known of the images.

    Raises:
        ValueError: If nothing fits.
    """
    images = _before_a_cast(raw, images)
    if given is not None or of_data is not None:
        stated = find_preprocessing(given, of_data)
        check_fit(images, checked_preprocessing(stated), assumed=False)
        return stated
    own = _stated_by(network)
    found = _found(raw, images, loaders)
    if found is None and not (own and fits(images, own)):
        found = normalization_in(images)
    if found is not None:
        return {**_size_of(images), **own, **found}
    if not own:
        raise ValueError(
            "nothing says how the images are normalized, and they do not tell: no mean and std per channel leads from "
            "the loader's pixels to what the network gets, no dataset has a Normalize, and the images do not cover the "
            "values 0 to 255. Pass preprocessing={'mean': (...), 'std': (...)} in [0, 1] units, as the images have "
            "it; the integer network reads raw pixels"
        )
    check_fit(images, checked_preprocessing(own), assumed=getattr(network, "preprocessing", None) is None)
    return own


def _before_a_cast(raw: Any, images: Tensor) -> Tensor:
    """The loader's own tensor if `images` are a cast of it, which may no longer show pixels; else `images`."""
    for leaf in leaves(raw):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape == images.shape:
            on_device = leaf.to(images.device)
            if leaf.dtype != images.dtype and torch.equal(on_device.to(images.dtype), images):
                return on_device
    return images


def _found(raw: Any, images: Tensor, loaders: Sequence[Iterable[Any]]) -> dict[str, Any] | None:
    """Mean and std from the loader's pixels, or from a Normalize in a dataset's transforms; None if neither fits."""
    for leaf in leaves(raw):
        if isinstance(leaf, Tensor) and leaf.ndim >= 4:
            between = normalization_between(leaf, images)
            if between is not None:
                return between
    for transform in transforms_of(loaders):
        mean, std = getattr(transform, "mean", None), getattr(transform, "std", None)
        if mean is None or std is None:
            continue
        stated = {"mean": torch.as_tensor(mean).flatten().tolist(), "std": torch.as_tensor(std).flatten().tolist()}
        if len(stated["mean"]) == len(stated["std"]) == images.shape[-3] and fits(images, stated, resized=True):
            return stated
    return None


def _stated_by(network: nn.Module) -> dict[str, Any]:
    """What a network states about its images: mean and std, size, crop; {} if it states nothing."""
    try:
        return find_preprocessing(
            None, getattr(network, "preprocessing", None), getattr(network, "pretrained_cfg", None)
        )
    except ValueError:
        return {}


def _size_of(images: Tensor) -> dict[str, Any]:
    """The size of the images, for networks that do not state it."""
    size = {"height": images.shape[-2], "width": images.shape[-1]}
    return {**size, "time_steps": images.shape[1]} if images.ndim == 5 else size

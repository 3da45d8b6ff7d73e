"""The images of calibration and of gradients: what the module's own step gives to its network.

`validation_step` is run on training batches for it, never `training_step`, which steps by itself under manual
optimization. Where training batches have another form than it takes, it is run on their parts (those of a
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
    """The images that the network gets from each batch: one tensor for each call of it.

    Raises ValueError where the validation step does not take the batches, naming `calibration_dataloader`.
    """
    for loader in loaders:
        for raw in loader:
            _, step = _taken(validation, raw)
            yield from (call.images for call in step.calls)


def first_inputs(validation: ModuleValidation, loaders: Sequence[Iterable[Any]]) -> tuple[Any, list[Tensor]]:
    """The first batch as its loader gave it (or the part of it that the step takes), and what the network got of it.

    Raises NoImagesError where there is none.
    """
    for loader in loaders:
        for raw in loader:
            part, step = _taken(validation, raw)
            return part, [call.images for call in step.calls]
    raise NoImagesError("there are no images to calibrate on; give the fit training data")


def labelled_batches(
    validation: ModuleValidation, loaders: Iterable[Iterable[Any]], most_batches: int
) -> Iterator[tuple[tuple[Any, int], Tensor]]:
    """((batch as a step gets it, N), (N,) classes or (N, classes) probabilities) of up to so many training batches."""
    batches = (raw for loader in loaders for raw in loader)
    for raw in islice(batches, most_batches):
        part, step = _taken(validation, raw, whole=False)
        batch = on_device(validation.trainer, part)
        labels = step.soft_labels(batch)
        if labels is None:
            raise ValueError(
                f"{_name(validation)}: training batches ({described(raw)}) have no labels of one class for each "
                "image; pass calibration_dataloader= with batches of the form that validation_step takes, or a "
                "criterion without gradients (criterion='magnitude')"
            )
        yield (batch, len(labels)), labels


def answer_of(validation: ModuleValidation, batch: Any, count: int) -> Tensor:
    """(N, classes) what the module's step makes of the network's answer, with its gradient."""
    step = _attempt(validation, batch)
    answer = step.scored[-1][0] if step.scored else step.answer(count)
    if answer is None or answer.ndim != 2:
        raise ValueError(
            f"{_name(validation)}: validation_step makes no logits (N, classes) of a training batch "
            f"({described(batch)}){_ended(step)}; pass calibration_dataloader= with batches of the form that it takes"
        )
    sums_to_one = bool((answer >= 0).all()) and torch.allclose(answer.sum(1), answer.new_ones(len(answer)), atol=1e-3)
    return answer.clamp(min=torch.finfo(answer.dtype).tiny).log() if sums_to_one else answer


def _taken(validation: ModuleValidation, raw: Any, *, whole: bool = True) -> tuple[Any, Step]:
    """The batch, or the first part of it, on which the validation step calls the network; whole: and not only modules
    inside it."""
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
        f"{_name(validation)}.validation_step does not take the training batches ({described(raw)}), so nothing says "
        f"which images {validation.model_attribute} is to be calibrated on: {failures[0]}. Pass "
        "calibration_dataloader= to the callback (a loader, or a function of the number of images), or give the "
        "datamodule a calibration_dataloader(images), with batches of the form that validation_step takes"
    )


def _parts(raw: Any) -> list[Any]:
    """The batches in a batch of several loaders."""
    values = list(raw.values()) if isinstance(raw, Mapping) else list(raw) if isinstance(raw, list | tuple) else []
    return [value for value in values if isinstance(value, Mapping | list | tuple)]


def _attempt(validation: ModuleValidation, batch: Any) -> Step:
    """Watch a step that may fail behind the network: labels of training may have another form (mixed, or none)."""
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
    """How the network's images are normalized: as stated, or as found out, or as assumed where the images agree.

    given: the callback's argument; of_data: the datamodule's `preprocessing`. raw: a batch as its loader gave it;
    images: what the network got of it. Raises ValueError where nothing fits.
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
            "nothing says how the images are normalized, and they do not tell: no pixels of the loader become what the "
            "network gets by a mean and std per channel, no dataset has a Normalize, and the images are not all of "
            "0 to 255. Pass preprocessing={'mean': (...), 'std': (...)} in [0, 1] units, as the network's images have "
            "it; integers begin at pixels"
        )
    check_fit(images, checked_preprocessing(own), assumed=getattr(network, "preprocessing", None) is None)
    return own


def _before_a_cast(raw: Any, images: Tensor) -> Tensor:
    """The loader's own tensor where the network's is that in another number format, which shows no pixels any more."""
    for leaf in leaves(raw):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape == images.shape:
            on_device = leaf.to(images.device)
            if leaf.dtype != images.dtype and torch.equal(on_device.to(images.dtype), images):
                return on_device
    return images


def _found(raw: Any, images: Tensor, loaders: Sequence[Iterable[Any]]) -> dict[str, Any] | None:
    """mean and std from the loader's pixels, or from a Normalize in a dataset's transforms."""
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
    """What a network says of its images: mean and std, their size, how they are cut; {} where it says nothing."""
    try:
        return find_preprocessing(
            None, getattr(network, "preprocessing", None), getattr(network, "pretrained_cfg", None)
        )
    except ValueError:
        return {}


def _size_of(images: Tensor) -> dict[str, Any]:
    """The size of the images, for networks that do not know it."""
    size = {"height": images.shape[-2], "width": images.shape[-1]}
    return {**size, "time_steps": images.shape[1]} if images.ndim == 5 else size

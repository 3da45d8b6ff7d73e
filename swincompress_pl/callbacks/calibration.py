"""The images for calibration and gradients: what the module's own step gives to its network.

`validation_step` runs on training batches for this, never `training_step`, which makes optimizer steps under manual
optimization. If training batches have a form that it does not take, it runs on their parts (those of a
`CombinedLoader`), or the user says where the images are (`calibration_dataloader`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.callbacks.answers import Step, watched
from swincompress_pl.callbacks.loaders import described, given_loaders, leaves, sampler_over_ranks
from swincompress_pl.callbacks.normalizations import Held, normalizations_in
from swincompress_pl.callbacks.validation import ModuleValidation, on_device
from swincompress_pl.checkpoint.holder import held_by
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks, from_rank_zero, rank, world_size
from swincompress_pl.quant.preprocessing import (
    LOOKED_AT,
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


@dataclass(frozen=True)
class Sample:
    """Some images, to see how they are normalized.

    Attributes:
        images: What the network got, (N, ..., C, H, W).
        raw: Tensors of the same images as the loaders gave them.
    """

    images: Tensor
    raw: tuple[Tensor, ...]


def sample_of_all_ranks(validation: ModuleValidation, loaders: Sequence[Iterable[Any]]) -> Sample | None:
    """The first images of the loaders, the same on all ranks and in a single process; None if there are none.

    If each rank has images of its own, each brings its share of them. Otherwise they are those of rank 0.
    """
    sharded = any(from_all_ranks(any(sampler_over_ranks(each) is not None for each in loaders)))
    share = math.ceil(LOOKED_AT / world_size()) if sharded else LOOKED_AT
    mine = _first_images(validation, loaders, share) if sharded or rank() == 0 else []
    found = [part for parts in from_all_ranks(mine) for part in parts]
    alike = [part for part in found if _form(part) == _form(found[0])]
    if not alike:
        return None
    return Sample(
        torch.cat([part.images for part in alike]),
        tuple(torch.cat(tensors) for tensors in zip(*(part.raw for part in alike), strict=True)),
    )


def _first_images(validation: ModuleValidation, loaders: Sequence[Iterable[Any]], count: int) -> list[Sample]:
    """The first `count` images, one sample per batch."""
    found: list[Sample] = []
    for raw in (raw for loader in loaders for raw in loader):
        part, step = _taken(validation, raw)
        images = _before_a_cast(part, step.calls[0].images)
        tensors = [leaf for leaf in leaves(part) if isinstance(leaf, Tensor) and leaf.ndim >= 4]
        kept = tuple(leaf[:count].cpu() for leaf in tensors if len(leaf) == len(images))
        found.append(Sample(images[:count].detach().cpu(), kept))
        count -= len(images)
        if count <= 0:
            break
    return found


def _form(sample: Sample) -> list[Any]:
    return [(each.dtype, each.shape[1:]) for each in (sample.images, *sample.raw)]


def normalization(
    given: Any, of_data: Any, network: nn.Module, sample: Sample, loaders: Sequence[Any]
) -> dict[str, Any]:
    """How the network's images are normalized: as stated, or as found, or as assumed if the images agree.

    Args:
        given: The callback's argument.
        of_data: The datamodule's `preprocessing`.
        network: The network, which may state a normalization too.
        sample: Images of the loaders.
        loaders: The loaders, which may hold a normalization, in their datasets for example.

    Returns:
        Mean and std per channel, and what else is known of the images.

    Raises:
        ValueError: If nothing fits, or several that a loader holds do.
    """
    images = sample.images
    if given is not None or of_data is not None:
        stated = find_preprocessing(given, of_data)
        check_fit(images, checked_preprocessing(stated), assumed=False)
        return stated
    own = _stated_by(network)
    held = from_rank_zero(normalizations_in(given_loaders(loaders), images.shape[-3]))
    found = _between(sample) or _fitting(images, held)
    if found is None and not (own and fits(images, own)):
        found = normalization_in(images)
    if found is not None:
        return {**_size_of(images), **_framing_of(network, own, found), **found}
    if not own:
        raise ValueError(_nothing_says(loaders, held, len(images)))
    check_fit(images, checked_preprocessing(own), assumed=getattr(network, "preprocessing", None) is None)
    return own


def _between(sample: Sample) -> dict[str, Any] | None:
    """Mean and std that lead from a loader's pixels to what the network gets; None if none do."""
    return next(filter(None, (normalization_between(raw, sample.images) for raw in sample.raw)), None)


def _fitting(images: Tensor, held: Sequence[Held]) -> dict[str, Any] | None:
    """The one of these normalizations that fits the images; None if none does, a ValueError if several do."""
    fitting = [each for each in held if fits(images, each.preprocessing)]
    fitting = fitting or [each for each in held if fits(images, each.preprocessing, resized=True)]
    if len(fitting) > 1:
        raise ValueError(
            f"the images fit several normalizations: {' and '.join(map(str, fitting))}. Pass the right "
            "one as preprocessing={'mean': (...), 'std': (...)} in [0, 1] units"
        )
    return fitting[0].preprocessing if fitting else None


def _nothing_says(loaders: Sequence[Any], held: Sequence[Held], count: int) -> str:
    datasets = [type(getattr(loader, "dataset", loader)).__name__ for loader in given_loaders(loaders)]
    names = ", ".join(dict.fromkeys(datasets))
    seen = f" ({', '.join(map(str, held[:4]))} do not fit)" if held else ""
    return (
        "nothing says how the images are normalized, and they do not tell: no mean and std per channel leads from the "
        f"loader's pixels to what the network gets, no attribute of the dataset ({names}), its "
        f" transforms or its loader is a mean and std that fit{seen}, and the first {count} images do not cover the "
        "values 0 to 255. Pass preprocessing={'mean': (...), 'std': (...)} in [0, 1] units, as the images have it; the "
        "integer network reads raw pixels"
    )


def _before_a_cast(raw: Any, images: Tensor) -> Tensor:
    """The loader's own tensor if `images` are a cast of it, which may no longer show pixels; else `images`."""
    for leaf in leaves(raw):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape == images.shape:
            on_device = leaf.to(images.device)
            if leaf.dtype != images.dtype and torch.equal(on_device.to(images.dtype), images):
                return on_device
    return images


def _stated_by(network: nn.Module) -> dict[str, Any]:
    """What a network states about its images: mean and std, size, crop; {} if it states nothing."""
    try:
        return find_preprocessing(
            None, getattr(network, "preprocessing", None), getattr(network, "pretrained_cfg", None)
        )
    except ValueError:
        return {}


def _framing_of(network: nn.Module, own: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What a network states of size and crop; timm's, which are assumed, only if its mean and std are those found."""
    if getattr(network, "preprocessing", None) is not None:
        return own
    same = own and all(
        len(own[key]) == len(found[key])
        and all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(own[key], found[key], strict=True))
        for key in ("mean", "std")
    )
    return own if same else {}


def _size_of(images: Tensor) -> dict[str, Any]:
    """The size of the images, for networks that do not state it."""
    size = {"height": images.shape[-2], "width": images.shape[-1]}
    return {**size, "time_steps": images.shape[1]} if images.ndim == 5 else size

"""`to_timm`: the network of timm that computes what a network of torchvision or transformers computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.arguments import integer
from swincompress_pl.history import set_creation
from swincompress_pl.layer_types import full_name
from swincompress_pl.models.changes import changes_since_creation
from swincompress_pl.models.conversion import torchvision, transformers_swin, transformers_vit
from swincompress_pl.models.conversion.description import Images, class_names, images_of_processor, images_of_weights
from swincompress_pl.models.conversion.family import Family, Size
from swincompress_pl.models.factory import create_model
from swincompress_pl.registry import UnsupportedNetworkError, register_conversions

_FAMILIES = {
    name: family
    for family in (*torchvision.FAMILIES, *transformers_vit.FAMILIES, *transformers_swin.FAMILIES)
    for name in family.classes
}
_REFUSED: dict[str, Callable[[type], ValueError]] = {
    f"transformers:{name}ForImageClassification": transformers_vit.refuse_dinov2_head
    for name in ("Dinov2", "Dinov2WithRegisters")
}
_BOUND = 1e-4  # of the largest output
_SEED = 0
register_conversions(_FAMILIES)


def to_timm(
    network: nn.Module, *, processor: Any = None, weights: Any = None, image_size: int | Size | None = None
) -> nn.Module:
    """Converts a network of torchvision or Hugging Face transformers into one of timm that computes the same.

    The classes are torchvision's `VisionTransformer` and `SwinTransformer` (version 1 and 2), and `ViT...`, `DeiT...`,
    `Dinov2...`, `Swin...` and `Swinv2...` of transformers, with a head for classification or as `...Model`. The latter
    has no classes and returns the class token, or for Swin the mean of the patch tokens. So does DINOv2, of which the
    head for classification has no equal.

    Both networks run on two random images, in float32 and evaluation. The result is returned only if the outputs
    differ by less than 1e-4 of the largest one. The given network stays as it is.

    Args:
        network: The network.
        processor: Image processor of transformers, or its dictionary, which says how images are prepared.
        weights: The same for torchvision: a weights enum, such as `Swin_T_Weights.IMAGENET1K_V1`, whose categories name
            the classes, or transforms.
        image_size: Pixels, or (height, width), for a network that takes any size: Swin of torchvision and DINOv2. None
            for the size of `processor` or `weights`, or else the network's own.

    Returns:
        The network in float32, on the device and in the mode of the given one. Its `creation` are the name and
        arguments of timm's class, so checkpoints and artifacts build it without fetching anything. `class_names` is a
        tuple if the names are known, of `config.id2label` or `weights`. With `processor` or `weights`,
        `preprocessing_for` describes its images.

    Raises:
        UnsupportedNetworkError: If there is no conversion for the class. The message lists those that have one.
        ValueError: If timm has no equal variant, a tensor is left over or missing, the outputs differ, there is not one
            name per class, or the image sizes do not fit.
        TypeError: If `processor` or `weights` is something else.
    """
    network = getattr(network, "_orig_mod", network)
    family = family_of(type(network))
    images, asked = _images(processor, weights), None if image_size is None else _asked(image_size)
    original = copy.deepcopy(network).to("cpu", torch.float32).eval()
    try:
        size = _size(original, family, images, asked)
        name, arguments = family.architecture(original, size)
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{type(network).__name__}: it is not built as its class builds it ({error}); undo changes of its "
            "layers first"
        ) from error
    labels = class_names(original, weights, arguments["num_classes"])
    converted = create_model(name, **arguments).eval()
    converted.load_state_dict(family.tensors(original, size, converted.state_dict()))
    family.copy_epsilons(original, converted)
    _check_outputs(original, converted, family, (arguments["in_chans"], *size))
    changes_since_creation(converted)
    described: Any = converted
    if labels:
        described.class_names = labels
    if images is not None:
        described.pretrained_cfg = images.pretrained_cfg() | {"num_classes": arguments["num_classes"]}
        set_creation(converted, name, {**described.creation["kwargs"], "pretrained_cfg": described.pretrained_cfg})
    device = next(network.parameters()).device
    return converted.to(device).train(network.training)


def family_of(kind: type) -> Family:
    """The family of a class; an UnsupportedNetworkError for one without conversion, or one that is refused."""
    names = [f"{base.__module__.partition('.')[0]}:{base.__qualname__}" for base in kind.__mro__]
    for name in names:
        if name in _REFUSED:
            raise _REFUSED[name](kind)
        if name in _FAMILIES:
            return _FAMILIES[name]
    known: dict[str, list[str]] = {}
    for name in _FAMILIES:
        library, _, convertible = name.partition(":")
        known.setdefault(library, []).append(convertible)
    lists = "; ".join(f"{library}: {', '.join(kinds)}" for library, kinds in known.items())
    hint = "it is a network of timm already. " if any(name.startswith("timm:") for name in names) else ""
    raise UnsupportedNetworkError(
        f"{full_name(kind)}: to_timm has no conversion for this class; {hint}It converts {lists}"
    )


def _images(processor: Any, weights: Any) -> Images | None:
    if processor is not None and weights is not None:
        raise ValueError("processor and weights are both given; choose one")
    if processor is not None:
        return images_of_processor(processor)
    return None if weights is None else images_of_weights(weights)


def _asked(image_size: Any) -> Size:
    sides = image_size if isinstance(image_size, list | tuple) and len(image_size) == 2 else [image_size] * 2
    height, width = (integer("image_size", side, least=1) for side in sides)
    return height, width


def _size(network: nn.Module, family: Family, images: Images | None, asked: Size | None) -> Size:
    native = family.native_size(network)
    given = {"image_size": asked, "images": images.size if images else None}
    sizes = {size for size in given.values() if size is not None}
    size = next(iter(sizes), native)
    if len(sizes) > 1 or not (family.any_size or size == native):
        told = ", ".join(f"{source} {each[0]}x{each[1]}" for source, each in given.items() if each is not None)
        own = f"the network's own {native[0]}x{native[1]}"
        raise ValueError(
            f"{type(network).__name__}: the image sizes do not fit: {told}, {own}. Convert it with its own size; "
            "set_input_size of the result changes it"
        )
    return size


def _check_outputs(original: nn.Module, converted: nn.Module, family: Family, shape: tuple[int, int, int]) -> None:
    """Raises a ValueError if the two networks, in evaluation, answer differently to two random images."""
    random = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        expected, found = _answers(original, converted, family, torch.randn(2, *shape, generator=random), random)
    largest, difference = expected.abs().max().item(), (expected - found).abs().max().item()
    if not difference <= _BOUND * largest:  # NaN is refused as well
        raise ValueError(
            f"{type(original).__name__}: the converted network answers differently: by up to {difference:.3g}, and "
            f"{_BOUND:g} of the largest output ({largest:.3g}) is allowed. Something in the network computes other "
            "than its class does (a patched forward, hooks, a replaced layer), or its weights are not finite"
        )


def _answers(
    original: nn.Module, converted: nn.Module, family: Family, images: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Both answers; a head of zeros, as torchvision makes one, is replaced in both, since it would hide differences."""
    heads = {name: value for name, value in converted.named_parameters() if name in ("head.weight", "head.fc.weight")}
    zero = {name: torch.randn(value.shape, generator=random) for name, value in heads.items() if not value.any()}
    for key, value in original.named_parameters():
        if family.renamed(key) in zero:
            value.copy_(zero[str(family.renamed(key))])
    found: Tensor = torch.func.functional_call(converted, zero, (images,))
    return family.answer(original, images), found

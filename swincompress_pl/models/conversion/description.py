"""What comes along with a network of another library: the names of its classes, and how its images are prepared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from swincompress_pl.arguments import shown
from swincompress_pl.models.conversion.family import Size, pair

_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_PIXEL_LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class Images:
    """How images are prepared.

    Attributes:
        size: Size of the images that the network gets.
        resized: Size before the center crop.
        squashed: Whether resizing ignores the aspect ratio; otherwise the short side gets `resized`.
        interpolation: Pillow's name, such as "bicubic".
        mean: Per channel, for pixels in [0, 1].
        std: The same.
    """

    size: Size
    resized: Size
    squashed: bool
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pretrained_cfg(self) -> dict[str, Any]:
        """The same in the words of timm."""
        return {
            "input_size": [len(self.mean), *self.size],
            "interpolation": self.interpolation,
            "crop_pct": _share(max(self.size), max(self.resized)),
            "crop_mode": "squash" if self.squashed else "center",
            "mean": list(self.mean),
            "std": list(self.std),
        }


def _share(crop: int, resized: int) -> float:
    """`crop_pct`, of which timm makes `resized` again by floor(crop / crop_pct)."""
    share = crop / resized
    while math.floor(crop / share) < resized:
        share = math.nextafter(share, 0)
    return share


def images_of_processor(processor: Any) -> Images:
    """Reads an image processor of transformers, or its dictionary; a ValueError names what cannot be taken along."""
    told = processor.to_dict() if hasattr(processor, "to_dict") else processor
    if not isinstance(told, Mapping):
        raise TypeError(f"processor is {shown(processor)}; it must be an image processor of transformers or its dict")
    crop, size = told.get("crop_size") if told.get("do_center_crop") else None, told.get("size")
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    resized = pair(shortest) if shortest else _sides("size", size)
    if not told.get("do_resize", True) or (shortest and not crop) or told.get("crop_pct"):
        raise ValueError(
            f"processor: do_resize={told.get('do_resize', True)}, size={size}, do_center_crop="
            f"{told.get('do_center_crop')}, crop_pct={told.get('crop_pct')} does not give images of one size by "
            "resizing and a center crop; leave it out, and pass a preprocessing where one is needed"
        )
    factor = told.get("rescale_factor", 1 / _PIXEL_LEVELS)
    if not told.get("do_rescale", True) or not math.isclose(factor, 1 / _PIXEL_LEVELS, rel_tol=1e-6):
        raise ValueError(f"processor: rescale_factor={factor} with do_rescale={told.get('do_rescale')} is not 1/255")
    normalized = told.get("do_normalize", True)
    return Images(
        size=_sides("crop_size", crop) if crop else resized,
        resized=resized,
        squashed=not shortest,
        interpolation=_RESAMPLING.get(int(told.get("resample", 2)), "unknown"),
        mean=_per_channel("image_mean", told) if normalized else (0.0,) * 3,
        std=_per_channel("image_std", told) if normalized else (1.0,) * 3,
    )


def _sides(name: str, value: Any) -> Size:
    if not isinstance(value, Mapping) or not value.get("height") or not value.get("width"):
        raise ValueError(
            f"processor: {name} is {shown(value)}; it must be {{'height': pixels, 'width': pixels}}"
            + (" or {'shortest_edge': pixels}" if name == "size" else "")
        )
    return int(value["height"]), int(value["width"])


def _per_channel(name: str, told: Mapping[str, Any]) -> tuple[float, ...]:
    values = told.get(name)
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"processor: {name} is {shown(values)}; it must list one number per channel")
    return tuple(float(value) for value in values)


def images_of_weights(weights: Any) -> Images:
    """Reads the transforms of a torchvision weights enum, or the transforms themselves."""
    transforms = weights.transforms() if hasattr(weights, "transforms") else weights
    fields = ("crop_size", "resize_size", "mean", "std", "interpolation")
    if not all(hasattr(transforms, field) for field in fields):
        raise TypeError(
            f"weights is {shown(weights)}; it must be a weights enum of torchvision, such as "
            "Swin_T_Weights.IMAGENET1K_V1, or its transforms()"
        )
    return Images(
        size=pair(_single(transforms.crop_size)),
        resized=pair(_single(transforms.resize_size)),
        squashed=False,
        interpolation=str(getattr(transforms.interpolation, "value", transforms.interpolation)),
        mean=tuple(float(value) for value in transforms.mean),
        std=tuple(float(value) for value in transforms.std),
    )


def _single(sizes: Any) -> Any:
    return sizes[0] if isinstance(sizes, list | tuple) and len(sizes) == 1 else sizes


def class_names(network: nn.Module, weights: Any, num_classes: int) -> tuple[str, ...]:
    """The names of the classes in their order, of `id2label` or the weights' categories; empty if nothing says them.

    Raises a ValueError if there is another number of names than of classes.
    """
    labels = getattr(getattr(network, "config", None), "id2label", None)
    if weights is not None:
        source, names = "weights", list(getattr(weights, "meta", {}).get("categories", []))
    elif isinstance(labels, Mapping):
        source, names = "config.id2label", [str(labels[key]) for key in sorted(labels, key=int)]
    else:
        return ()
    if num_classes == 0 or not names or names == [f"LABEL_{number}" for number in range(len(names))]:
        return ()
    if len(names) != num_classes:
        raise ValueError(
            f"{type(network).__name__}: {source} has {len(names)} names ({', '.join(names[:3])}, ...) for "
            f"{num_classes} classes; give it one name per class"
        )
    return tuple(names)

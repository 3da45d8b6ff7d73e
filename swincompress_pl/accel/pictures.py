"""From a picture to the pixels that an engine takes, and from logits to names, without torch. Pillow reads pictures."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl.accel.outputs import EngineOutput
from swincompress_pl.pictures import GEOMETRY, Framing, read_picture, resolved, upright

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = str | os.PathLike[str] | bytes | Image

_TOGETHER = 64  # pictures whose pixels are in memory at once
_MEAN_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Preprocess(Framing):
    """From pictures to pixels, equal to timm's transform for evaluation before it normalizes.

    The engine normalizes, as mean and std are in its first layer.

    Attributes:
        height: Height of the crop, in pixels.
        width: Width of the crop, in pixels.
        resize: What a picture is resized to before the crop, in pixels: one length for both sides, or (height, width);
            None for no resize.
        crop_mode: "center" scales the picture to cover `resize` (with one length, this is the length of the shorter
            side). "squash" stretches it to exactly `resize`. "border" scales it to fit into `resize`, and pads with the
            mean color. All crop the center.
        interpolation: "bicubic", "bilinear", "lanczos", "box", "hamming" or "nearest", antialiased as in Pillow.
        channels: 3 for RGB, or 1 for gray.
        mean: The mean color per channel, in [0, 1]; only crop mode "border" needs it.
        exif: Whether to turn pictures upright as their EXIF orientation says. timm does not.

    Raises:
        ValueError: If a value is outside its range, or `resize` is smaller than the crop.
    """

    channels: int = 3
    mean: tuple[float, ...] | None = None
    exif: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 3):
            raise ValueError(f"Preprocess.channels is {self.channels!r}; pictures have 3 (RGB) or 1 (gray).")
        if self.mean is not None:
            mean = tuple(self.mean)
            fits = all(isinstance(value, int | float) and 0 <= value <= 1 for value in mean)
            if len(mean) != self.channels or not fits:
                raise ValueError(f"Preprocess.mean is {self.mean!r}; give {self.channels} numbers in [0, 1].")
            object.__setattr__(self, "mean", mean)
        elif self.crop_mode == "border":
            raise ValueError("Preprocess.crop_mode 'border' pads with the mean color; give Preprocess.mean.")

    @classmethod
    def of(cls, engine: Takes, *, exif: bool = False) -> Preprocess:
        """Makes what an artifact says.

        Args:
            engine: An engine or a `spec.Program`.
            exif: Whether to turn pictures upright as their EXIF orientation says. timm does not.

        Returns:
            The preprocessing.

        Raises:
            ValueError: If the artifact does not say all of it, or the engine takes events; the message names what is
                missing and says how to give it.
        """
        return _preprocess_for(engine.input, None, exif=exif)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that an artifact holds, as plain data; `accel.export(preprocessing=...)` takes them."""
        fields = {key: getattr(self, key) for key in GEOMETRY} | ({} if self.mean is None else {"mean": self.mean})
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    def __call__(self, source: Picture | Sequence[Picture]) -> npt.NDArray[np.uint8]:
        """Makes the pixels of pictures.

        Args:
            source: A file, the bytes of one, a PIL image, or a list or tuple of them.

        Returns:
            uint8 (N, height, width, channels), which an engine takes.

        Raises:
            ImportError: If Pillow is not installed.
            OSError: If a file cannot be opened.
            TypeError: If a source is none of these.
            ValueError: If a picture is damaged, has no 8-bit form, or is smaller than the crop and there is no resize;
                the message names it.
        """
        pictures = source if isinstance(source, list | tuple) else [source]
        pixels = [self._pixels(picture, number) for number, picture in enumerate(pictures)]
        shape = (self.height, self.width, self.channels)
        return np.stack(pixels) if pixels else np.zeros((0, *shape), dtype=np.uint8)

    def _pixels(self, picture: Any, number: int) -> npt.NDArray[np.uint8]:
        if isinstance(picture, str | os.PathLike | bytes):
            image = read_picture(picture, exif=self.exif)
            name = f"picture {number}" if isinstance(picture, bytes) else str(picture)
        elif _is_image(picture):
            image, name = upright(picture) if self.exif else picture, f"picture {number}"
        else:
            raise TypeError(
                f"picture {number} is {type(picture).__name__}; give a path, the bytes of a file or a PIL image "
                "(an engine takes arrays of pixels in a call: engine(pixels))"
            )
        try:
            return self.framed(image, channels=self.channels, mean=self.mean or ())
        except (ValueError, OSError) as error:  # Pillow reads a PIL image of an open file only here
            raise ValueError(f"{name}: {error}") from error


def _is_image(picture: Any) -> bool:
    """Whether this is an image of PIL, which is not imported here."""
    names = (f"{kind.__module__}.{kind.__name__}" for kind in type(picture).__mro__)
    return "PIL.Image.Image" in names


@dataclass(frozen=True)
class Prediction:
    """A class that an engine gives to a picture.

    Attributes:
        label: Number of the class, from 0, in the order of the logits.
        name: Its name; None if neither the artifact nor the caller names the classes.
        probability: Softmax of the logits, from 0 to 1.
    """

    label: int
    name: str | None
    probability: float


class Takes(Protocol):
    """What an engine and a Program have in common."""

    @property
    def input(self) -> spec.InputDescription:
        """What it takes."""
        ...


class Classifies(Takes, Protocol):
    """What `classify` needs of an engine."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names."""
        ...

    @property
    def num_classes(self) -> int:
        """The number of logits."""
        ...

    @property
    def outputs(self) -> tuple[EngineOutput, ...]:
        """What it gives."""
        ...

    def __call__(self, images: Any) -> Any:
        """The logits."""
        ...


def classify(
    engine: Classifies, source: Any, top: int, preprocess: Any, classes: Sequence[str] | None
) -> list[Prediction] | list[list[Prediction]]:
    """The likeliest classes of a picture, or of each picture in a list."""
    if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
        raise ValueError(f"top is {top!r}; give the number of classes to return, at least 1")
    if engine.num_classes == 0:
        listed = ", ".join(output.name for output in engine.outputs)
        raise ValueError(f"the engine gives the outputs {listed}, and no logits; call it on pixels: engine(images)")
    if engine.outputs[0].name != "logits":
        raise ValueError(
            f"the network has no classes: the engine gives {engine.num_classes} features per picture, for a head "
            "outside it. engine(pixels) computes them"
        )
    names = engine.classes if classes is None else tuple(classes)
    if names is not None and len(names) != engine.num_classes:
        raise ValueError(f"classes has {len(names)} names, and the engine has {engine.num_classes} classes; name each")
    prepared = _preprocess_for(engine.input, preprocess)
    single = not isinstance(source, list | tuple)
    pictures = [source] if single else list(source)
    found: list[list[Prediction]] = []
    for start in range(0, len(pictures), _TOGETHER):
        logits = engine(prepared(pictures[start : start + _TOGETHER])).astype(np.float64)
        found += [_likeliest(row, int(top), names) for row in logits]
    return found[0] if single else found


def _likeliest(logits: npt.NDArray[np.float64], top: int, names: tuple[str, ...] | None) -> list[Prediction]:
    weights = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")[:top]
    return [
        Prediction(int(label), None if names is None else names[label], float(weights[label] / weights.sum()))
        for label in order
    ]


def _preprocess_for(taken: spec.InputDescription, given: Any, *, exif: bool = False) -> Preprocess:
    """What makes the pixels that an engine takes: what is given, and for the rest what the artifact says."""
    if taken.time_steps is not None:
        raise ValueError(
            f"the engine takes events {taken.value.shape}, which are no pictures; pass counts of events as an array: "
            "engine(events)"
        )
    made = given if isinstance(given, Preprocess) else _from_fields(taken, _fields(taken, given), exif)
    if (made.height, made.width, made.channels) != (taken.height, taken.width, taken.channels):
        raise ValueError(
            f"the preprocessing makes pixels {(made.height, made.width, made.channels)}, and the engine takes "
            f"{taken.value.shape}; give preprocess=accel.Preprocess(height={taken.height}, width={taken.width}, "
            f"channels={taken.channels}, ...)"
        )
    return made


def _fields(taken: spec.InputDescription, given: Any) -> dict[str, Any]:
    plain = given.to_dict() if hasattr(given, "to_dict") else given
    if plain is not None and not isinstance(plain, Mapping):
        raise TypeError(
            f"preprocess is {type(given).__name__}; give an accel.Preprocess, a data.Preprocessing or a mapping of its "
            "fields"
        )
    size = {"height": taken.height, "width": taken.width}
    return size | resolved(taken.preprocessing, **size) | resolved(plain or {}, **size)


def _from_fields(taken: spec.InputDescription, fields: Mapping[str, Any], exif: bool) -> Preprocess:
    missing = [key for key in ("resize", "interpolation") if key not in fields]
    if missing:
        example = ", ".join(f"'{key}': {value}" for key, value in _example(taken).items() if key in missing)
        raise ValueError(
            f"the artifact does not say how a picture becomes pixels: {' and '.join(missing)} missing. Give "
            f"what training did, e.g. engine.classify(..., preprocess={{{example}}}), or write it into the artifact: "
            f"accel.export(model, path, preprocessing={{{example}}})"
        )
    known = {key: fields[key] for key in GEOMETRY if key in fields}
    mean = fields.get("mean")
    return Preprocess(
        **known, channels=taken.channels, mean=tuple(mean) if isinstance(mean, list | tuple) else None, exif=exif
    )


def _example(taken: spec.InputDescription) -> dict[str, Any]:
    return {"resize": math.floor(max(taken.height, taken.width) / 0.875), "interpolation": "'bicubic'"}


def with_preprocessing(program: spec.Program, given: Any) -> spec.Program:
    """The Program with what is given in its description, in place of what was there.

    A ValueError is raised if mean and std are others than those of its first layer, or the sizes are not its own.
    """
    taken = program.input
    fields = _fields(taken, given)
    for key in ("mean", "std"):
        stored = taken.preprocessing.get(key)
        if stored is None or key not in fields:
            continue
        if len(stored) != len(fields[key]) or not np.allclose(stored, fields[key], rtol=0, atol=_MEAN_TOLERANCE):
            raise ValueError(
                f"preprocessing[{key!r}] is {list(fields[key])}, and the network was quantized with {list(stored)}, "
                "which is in its first layer; leave it out, or quantize again"
            )
        fields[key] = stored
    _preprocess_for(taken, fields)
    return dataclasses.replace(program, input=dataclasses.replace(taken, preprocessing=fields))

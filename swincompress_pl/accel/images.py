"""What an engine takes for images: an array of uint8, and whatever is one beyond doubt."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec

Images = npt.NDArray[np.uint8]


def as_images(taken: spec.InputDescription, images: Any) -> Images:
    """(N, *shape) uint8 from an array, from a torch tensor on the CPU, or from a list or tuple of them, one per image.

    A TypeError for other types and a ValueError for another shape name the remedy.
    """
    array = _stacked(taken, images) if isinstance(images, list | tuple) else _array(taken, images, "images are")
    if _is_picture(images):
        raise ValueError(f"images are one PIL image of {images.mode}, {images.size}; {_picture_remedy(taken, images)}")
    spec.reference.check_images(taken, array)
    return array


def _is_picture(images: Any) -> bool:
    """Whether this is an image of PIL, which is not imported here."""
    return type(images).__module__.partition(".")[0] == "PIL" and hasattr(images, "mode")


def _picture_remedy(taken: spec.InputDescription, picture: Any) -> str:
    """What to pass instead of a picture; events have none."""
    if taken.time_steps is not None:
        return f"pass events (N, {_listed(taken)})"
    mode = {1: "L", 3: "RGB"}.get(taken.channels)
    converted = "picture" if picture.mode == mode else f"picture.convert({mode!r})"
    size = (taken.width, taken.height)
    resized = converted if picture.size == size else f"{converted}.resize({size})"
    return f"pass a list: [{resized}]"


def _stacked(taken: spec.InputDescription, images: list[Any] | tuple[Any, ...]) -> Images:
    arrays = [_array(taken, image, f"images[{number}] is") for number, image in enumerate(images)]
    shapes: dict[tuple[int, ...], int] = {}
    for number, array in enumerate(arrays):
        shapes.setdefault(array.shape, number)
    if not arrays:
        raise ValueError(f"images are an empty {type(images).__name__}; pass an array (0, {_listed(taken)})")
    if len(shapes) > 1:
        differing = ", ".join(f"images[{number}] {shape}" for shape, number in list(shapes.items())[:2])
        raise ValueError(f"images have different shapes: {differing}; resize them to ({_listed(taken)})")
    return np.stack(arrays)


def _array(taken: spec.InputDescription, images: Any, subject: str) -> Images:
    if isinstance(images, np.ndarray):
        array = images
    elif hasattr(images, "__array__") or hasattr(images, "__array_interface__"):
        try:
            array = np.asarray(images)
        except (TypeError, ValueError, RuntimeError) as error:
            place = f" on {images.device}" if hasattr(images, "device") else ""
            raise TypeError(
                f"{subject} a {_type(images)}{place}, which NumPy cannot read ({error}); pass an array of uint8 in the "
                "CPU's memory, e.g. images.detach().cpu().numpy()"
            ) from error
    else:
        raise TypeError(f"{subject} {_type(images)}; pass an array of uint8, (N, {_listed(taken)}) in all")
    if array.dtype != np.uint8:
        given = "" if array is images else f" ({_type(images)})"
        raise TypeError(f"{subject} {array.dtype}{given}; {_remedy(taken, array)}")
    return array


def _remedy(taken: spec.InputDescription, array: npt.NDArray[Any]) -> str:
    what = "raw uint8 pixels" if taken.time_steps is None else "uint8 counts of events"
    wanted = f"pass {what} (N, {_listed(taken)})"
    if array.dtype == object:
        return f"{wanted}; it holds objects, such as images of different sizes: stack images of one size"
    if array.size and array.dtype.kind in "iuf" and np.isfinite(array).all():
        low, high = array.min(), array.max()
        if low >= 0 and high <= 255 and (array == np.rint(array)).all() and high > 1:
            return f"{wanted}; these are whole numbers from {low:g} to {high:g}: images.astype(np.uint8)"
        return f"{wanted}, not normalized: these reach from {low:.3g} to {high:.3g}"
    return f"{wanted}, not normalized floats"


def _type(value: Any) -> str:
    kind = type(value)
    return (
        "None"
        if value is None
        else kind.__name__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__name__}"
    )


def _listed(taken: spec.InputDescription) -> str:
    return ", ".join(map(str, taken.value.shape))

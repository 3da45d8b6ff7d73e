"""Preprocessing: the float input is a function of the uint8 pixels, and these are torchvision's and timm's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from swincompress_pl.data import Preprocessing

CHANNELS = st.tuples(*[st.floats(0, 1)] * 3)
DEVIATIONS = st.tuples(*[st.floats(0.05, 1)] * 3)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(mean=CHANNELS, std=DEVIATIONS)
@settings(max_examples=30)
def test_denormalize_gives_every_pixel_back(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    preprocessing = Preprocessing(height=16, width=16, mean=mean, std=std)  # type: ignore[arg-type]
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(preprocessing.denormalize(preprocessing.normalize(pixels)), pixels)


@given(width=st.integers(20, 90), height=st.integers(20, 90), resize=st.integers(16, 48), bicubic=st.booleans())
@settings(max_examples=40)
def test_pixels_are_torchvisions(width: int, height: int, resize: int, bicubic: bool) -> None:
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    image = random_image(width, height)
    ours = Preprocessing(height=16, width=12, resize=resize, interpolation=mode.value).image_to_uint8(image)
    theirs = v2.CenterCrop((16, 12))(v2.Resize(resize, interpolation=mode)(image))
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_crop_pct_is_timms(crop_pct: float) -> None:
    from timm.data.transforms_factory import transforms_imagenet_eval

    image = random_image(300, 260)
    preprocessing = Preprocessing.from_crop_pct(size=224, crop_pct=crop_pct)
    theirs = transforms_imagenet_eval(224, crop_pct=crop_pct, interpolation="bicubic")(image)
    ours = preprocessing.normalize(torch.from_numpy(preprocessing.image_to_uint8(image)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_normalize_of_a_batch_is_that_of_its_images() -> None:
    preprocessing = Preprocessing(height=4, width=5)
    pixels = torch.randint(0, 256, (3, 4, 5, 3), dtype=torch.uint8)
    batch = preprocessing.normalize(pixels)
    assert batch.shape == (3, 3, 4, 5)
    assert torch.equal(batch, torch.stack([preprocessing.normalize(image) for image in pixels]))


def test_gray_images_become_rgb() -> None:
    gray = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    pixels = Preprocessing(height=4, width=4).image_to_uint8(gray)
    assert np.array_equal(pixels, np.arange(16).reshape(4, 4, 1).repeat(3, -1))


@given(resize=st.none() | st.integers(64, 80), mean=CHANNELS, std=DEVIATIONS)
def test_dict_round_trip_through_json(resize: int | None, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    preprocessing = Preprocessing(height=64, width=48, resize=resize, mean=mean, std=std)  # type: ignore[arg-type]
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 0}, "height is 0"),
        ({"resize": 200}, "shorter than the crop"),
        (
            {"resize": (300, 200)},
            r"resize is 300 x 200, smaller than the crop of 224 x 224; give at least \(224, 224\)",
        ),
        ({"resize": (300, 300, 3)}, r"resize is \(300, 300, 3\); give pixels: a length, \(height, width\) or None"),
        ({"crop_mode": "squash"}, "crop_mode 'squash' needs a resize"),
        ({"crop_mode": "middle"}, "'middle'; choose from center, squash, border"),
        ({"interpolation": "cubic"}, "'cubic'; choose from bicubic, bilinear"),
        ({"mean": (124.0, 116.0, 104.0)}, "not for pixels in 0..255"),
        (
            {"std": (0.5, 0.5)},
            "give 3 numbers.*Images of other than 3 channels, as events are, are described by a mapping",
        ),
        ({"std": (0.5, 0.0, 0.5)}, "above 0"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)  # type: ignore[arg-type]


def test_a_dict_of_an_earlier_version_has_no_crop_mode() -> None:
    fields = Preprocessing(resize=256).to_dict()
    assert fields.pop("crop_mode") == "center"
    assert Preprocessing.from_dict(fields) == Preprocessing(resize=256)


def test_unknown_and_missing_fields_of_a_dict_are_named() -> None:
    fields = Preprocessing().to_dict()
    del fields["std"]
    with pytest.raises(ValueError, match=r"unknown fields \['crop'\], missing fields \['std'\]"):
        Preprocessing.from_dict({**fields, "crop": 3})


def test_too_small_an_image_and_a_wrong_crop_pct_raise() -> None:
    with pytest.raises(ValueError, match="smaller than the crop"):
        Preprocessing(height=32, width=32).image_to_uint8(random_image(31, 40))
    with pytest.raises(ValueError, match="crop_pct is 0"):
        Preprocessing.from_crop_pct(size=224, crop_pct=0)


def test_normalize_refuses_anything_but_uint8_pixels() -> None:
    for pixels in (torch.zeros(4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            Preprocessing().normalize(pixels)

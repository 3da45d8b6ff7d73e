"""How images are normalized: found out from them, and compared with what is stated or assumed."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from swincompress_pl.data import Preprocessing
from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize
from swincompress_pl.quant.preprocessing import (
    check_fit,
    checked_preprocessing,
    described_preprocessing,
    fits,
    normalization_between,
    normalization_in,
    pixels_of,
    preprocessing_of,
)

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 3}


def pixels(count: int = 4, size: int = 16, seed: int = 0) -> Tensor:
    """uint8 (N, 3, size, size) from black to white."""
    made = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed))
    made[0, :, 0, 0], made[0, :, 0, 1] = 0, 255
    return made.to(torch.uint8)


def normalized(raw: Tensor, preprocessing: dict[str, list[float]]) -> Tensor:
    mean, std = (torch.tensor(preprocessing[key])[:, None, None] for key in ("mean", "std"))
    return (raw / 255 - mean) / std


fractions = st.integers(1, 1000).map(lambda n: n / 1000)
channels = st.lists(fractions, min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(mean=channels, std=channels, form=st.sampled_from(["uint8", "last", "0..255", "0..1"]))
def test_the_way_from_pixels_to_the_network_is_found(mean: list[float], std: list[float], form: str) -> None:
    raw = pixels()
    images = normalized(raw, {"mean": mean, "std": std})
    given = {"uint8": raw, "last": raw.movedim(1, -1), "0..255": raw.float(), "0..1": raw / 255}[form]
    found = normalization_between(given, images)
    assert found is not None
    assert found["mean"] == pytest.approx(mean, abs=2e-5)
    assert found["std"] == pytest.approx(std, abs=2e-5)
    assert torch.equal(pixels_of(images, found), raw.movedim(1, -1))


@settings(max_examples=40, deadline=None)
@given(mean=channels, std=channels)
def test_images_from_black_to_white_tell_how_they_are_normalized(mean: list[float], std: list[float]) -> None:
    raw = pixels()
    images = normalized(raw, {"mean": mean, "std": std})
    found = normalization_in(images)
    assert found is not None
    assert torch.equal(pixels_of(images, found), raw.movedim(1, -1))
    assert fits(images, found)


@pytest.mark.parametrize(
    "images",
    [
        normalized(pixels().clamp(10, 255), IMAGENET),  # nothing is black
        normalized((pixels() > 127).to(torch.uint8) * 255, IMAGENET),  # two values: any step would do
        torch.rand(4, 3, 16, 16),
        torch.full((4, 3, 16, 16), torch.nan),
        torch.zeros(4, 3, 16, 16),
    ],
)
def test_images_that_do_not_tell(images: Tensor) -> None:
    assert normalization_in(images) is None


def test_no_way_between_other_images() -> None:
    raw = pixels()
    assert normalization_between(raw, normalized(raw.flip(-1), HALF)) is None
    assert normalization_between(raw, normalized(raw, HALF) ** 2) is None
    assert normalization_between(raw[:2], normalized(raw, HALF)) is None
    assert normalization_between(torch.randn(4, 3, 16, 16), normalized(raw, HALF)) is None


def test_what_was_assumed_and_does_not_fit_is_refused() -> None:
    """Each is a way in which real images came to be other than the network's defaults say."""
    raw = pixels()
    wrong = {
        "never normalized": raw / 255,
        "a part of the range": (raw / 255 - 0.5) / 4,
        "another mean and std": normalized(raw, {"mean": [0.45] * 3, "std": [0.55] * 3}),
    }
    for images in wrong.values():
        with pytest.raises(ValueError, match=r"assumed, and the images do not fit.*pass preprocessing="):
            check_fit(images, HALF, assumed=True)
        with pytest.warns(UserWarning, match=r"do not look normalized as preprocessing says"):
            check_fit(images, HALF, assumed=False)
    with pytest.raises(ValueError, match=r"they look like preprocessing=.*'mean': \[0.0, 0.0, 0.0\]"):
        check_fit(raw / 255, HALF, assumed=True)


def test_what_fits_says_nothing() -> None:
    raw = pixels()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for preprocessing in (HALF, IMAGENET, {"mean": [0.0] * 3, "std": [1 / 255] * 3}):
            check_fit(normalized(raw, preprocessing), preprocessing, assumed=True)
        check_fit(normalized(raw, IMAGENET).half().float(), IMAGENET, assumed=True)
        check_fit(normalized(raw, IMAGENET).bfloat16(), IMAGENET, assumed=True)  # cannot tell


def test_resized_images_are_no_error() -> None:
    """Bicubic resizing gives values between the pixels', and some beyond black and white."""
    large = normalized(pixels(size=24), HALF)
    images = functional.interpolate(large, (16, 16), mode="bicubic", antialias=True)
    images = functional.interpolate(images, (32, 32), mode="bicubic")
    assert (images.min(), images.max()) < (-1, 1)
    with pytest.warns(UserWarning, match="changed after they were normalized"):
        check_fit(images, HALF, assumed=True)
    sharp = torch.full((1, 3, 64, 64), -1.0)
    sharp[..., 30:34] = 1.25  # 287 pixels, in 6 of 100 values
    assert int(pixels_of(sharp[..., :31], HALF).max()) == 255  # 3 of 100
    with pytest.raises(ValueError, match="in pixel steps"):
        pixels_of(sharp, HALF)
    with pytest.raises(ValueError, match="in pixel steps"):
        pixels_of(torch.full((1, 3, 8, 8), torch.nan), HALF)


def test_counts_of_events_that_eight_bits_do_not_hold() -> None:
    counts = torch.zeros(2, 3, 2, 8, 8)
    counts[0, 0, 0, 0, 0] = 300
    with pytest.raises(ValueError, match=r"event counts reach from 0.0 to 300.0.*0 to 255.*clamp"):
        pixels_of(counts, {"mean": [0.0] * 2, "std": [1 / 255] * 2}, events=True)


def test_quantize_looks_at_its_images() -> None:
    network: Any = create_model("VisionTransformer", **VIT)
    network.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert preprocessing_of(network) == ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, True)
    with pytest.raises(ValueError, match="assumed, and the images do not fit"):
        quantize(network, [pixels() / 255], method="max")
    with pytest.warns(UserWarning, match="do not look normalized"):
        quantize(network, [pixels() / 255], method="max", preprocessing=HALF)
    network.preprocessing = {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert preprocessing_of(network)[1] is False
    assert quantize(network, [pixels() / 255], method="max").preprocessing["std"] == [1.0] * 3


@pytest.mark.parametrize("stated", [5, "imagenet", (0.5, 0.25), [{"mean": 0.5}]])
def test_what_is_no_mapping_is_refused_beside_the_networks_own(stated: Any) -> None:
    class Network:
        pretrained_cfg: ClassVar[dict[str, Any]] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}

    with pytest.raises(ValueError, match="must be a mapping with 'mean' and 'std'"):
        preprocessing_of(Network(), stated)
    assert preprocessing_of(Network()) == (Network.pretrained_cfg, True)


def test_the_error_shows_the_form_for_events() -> None:
    with pytest.raises(
        ValueError, match=r"'mean'\] is 0; .* per image channel; counts of events.*'mean': \[0.0, 0.0\]"
    ):
        checked_preprocessing({"mean": 0, "std": [1 / 255]})
    events = {"mean": [0.0, 0.0], "std": [1 / 255, 1 / 255], "time_steps": 4}
    assert checked_preprocessing(events) == events


# What is stored


OF_TIMM = {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic", **IMAGENET}
RESOLVED = {"height": 16, "width": 16, "resize": 17, "crop_mode": "center", "interpolation": "bicubic", **IMAGENET}


def stored(network: torch.nn.Module, given: Any) -> dict[str, Any]:
    quantized = quantize(network, [normalized(pixels(), IMAGENET)], method="max", preprocessing=given).eval()
    described = dict(quantized.to_program().input.preprocessing)
    assert quantized.compression_history[-1]["quantize"]["preprocessing"] == described
    return described


def test_the_program_has_our_names_whatever_was_given() -> None:
    network = create_model("vit", **VIT)
    assert stored(network, OF_TIMM) == RESOLVED
    assert stored(network, RESOLVED) == RESOLVED
    of_data = Preprocessing(height=16, width=16, resize=17, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert stored(network, of_data) == RESOLVED
    assert stored(network, dataclasses.replace(of_data, resize=None)) == {**RESOLVED, "resize": None}
    assert stored(network, IMAGENET) == IMAGENET  # what is unknown stays unknown
    network.pretrained_cfg = {**OF_TIMM, "url": "https://x", "architecture": "vit", "pool_size": None}
    assert stored(network, None) == RESOLVED


def test_a_datamodule_may_describe_a_crop_as_timm_does() -> None:
    assert described_preprocessing(OF_TIMM) == {**RESOLVED, "height": 224, "width": 224, "resize": 248}
    wide = {**IMAGENET, "height": 16, "width": 20, "resize": (18, 24), "crop_mode": "squash", "interpolation": "box"}
    assert described_preprocessing(wide) == {**wide, "resize": [18, 24]}
    with pytest.raises(
        ValueError, match=r"preprocessing\['input_size'\] is 224; it must list channels, height and width"
    ):
        described_preprocessing({**OF_TIMM, "input_size": 224})
    with pytest.raises(ValueError, match=r"preprocessing\['crop_mode'\]=3"):
        described_preprocessing({**IMAGENET, "crop_mode": 3})
    with pytest.raises(ValueError, match=r"preprocessing\['resize'\]='18'"):
        described_preprocessing({**IMAGENET, "resize": [18, "18"]})
    with pytest.raises(ValueError, match="unknown keys: 'crop_pct'"):
        described_preprocessing({**IMAGENET, "crop_pct": 0.9})

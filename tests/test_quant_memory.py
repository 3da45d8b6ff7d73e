"""Calibration sees a few images at a time, whatever the caller's batches are, and finds the same."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.quant_cases import PREPROCESSING, network_and_images
from torch import Tensor, nn

from swincompress_pl.quant import calibration as module
from swincompress_pl.quant import measure_sensitivity, quantize
from swincompress_pl.quant.calibration import bytes_of_backward
from swincompress_pl.registry import adapter_for

LEARNED = {"search": {"rounding": "learned", "learning": {"iterations": 1, "batch_images": 4, "sensitive": True}}}
OPTIONS: dict[str, dict[str, Any]] = {
    "searched": {},
    "affine": {"method": "affine"},
    "percentile": {"method": "max", "percentile": 99.5},
    "learned": LEARNED,
}


def many(name: str = "vit", count: int = 27) -> tuple[nn.Module, Tensor]:
    network, _, images = network_and_images(name, count)
    return network, images


class Watched:
    """The largest batch that a network's patch embedding sees."""

    def __init__(self, network: nn.Module) -> None:
        self.largest = 0
        network.get_submodule("norm").register_forward_pre_hook(self._look)

    def _look(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.largest = max(self.largest, len(inputs[0]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("together", [8, 3])
def test_no_more_images_at_a_time_than_memory_allows(
    options: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = many()
    watched = Watched(network)
    if together != 8:
        graph = adapter_for(network).graph(network, PREPROCESSING)
        monkeypatch.setattr(module, "_BYTES_TOGETHER", (together + 0.5) * bytes_of_backward(graph, network, images[:1]))
        monkeypatch.setattr(module, "_BYTES_TOGETHER", int(module._BYTES_TOGETHER))
    watched.largest = 0
    quantize(network, [images], preprocessing=PREPROCESSING, **options)
    assert watched.largest == max(together, 4 if "search" in options else 0)


def test_one_image_that_is_too_large_is_taken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = many()
    watched = Watched(network)
    monkeypatch.setattr(module, "_BYTES_TOGETHER", 1)
    measure_sensitivity(network, [images], preprocessing=PREPROCESSING, widths=(8,))
    assert watched.largest == 2  # the two that are compared for their memory


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_callers_batches_change_nothing(options: dict[str, Any]) -> None:
    network, images = many("vit", 17)

    def state(batches: Iterable[Tensor]) -> dict[str, Tensor]:
        found = quantize(copy.deepcopy(network), batches, preprocessing=PREPROCESSING, **options)
        return dict(found.state_dict())

    expected = state([images])
    for size in (1, 7):
        found = state(images.split(size))
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_memory_of_an_image_is_what_its_batch_keeps() -> None:
    network, images = many()
    graph = adapter_for(network).graph(network, PREPROCESSING)
    network.requires_grad_(True)
    each = bytes_of_backward(graph, network, images[:1])
    residual = 17 * 16 * 4  # tokens x channels x bytes
    assert 10 * residual < each < 200 * residual
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_images_of_several_sizes_are_refused() -> None:
    network, images = many()
    with pytest.raises(ValueError, match=r"\(3, 16, 14\) and \(3, 16, 16\); give images of one size"):
        quantize(network, [images[:4], images[:4, :, :, :14]], preprocessing=PREPROCESSING)

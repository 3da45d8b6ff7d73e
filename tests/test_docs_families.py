"""docs/reference/families.md: a tiny network of each row does what its row says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.spiking_cases import lively
from torch import nn

from swincompress_pl import quantize
from swincompress_pl.models import create_model
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.pruning.space import prunable_weights
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

PAGE = Path(__file__).resolve().parent.parent / "docs/reference/families.md"
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 3}
HYBRID = {key: value for key, value in VIT.items() if key != "patch_size"}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 3}
SPIKING: dict[str, dict[str, Any]] = {
    "Spikformer": {
        "T": 2,
        "img_size_h": 32,
        "img_size_w": 32,
        "patch_size": 4,
        "embed_dims": 16,
        "num_heads": 2,
        "depths": 2,
    },
    "SpikeDrivenTransformer": {"T": 2, "embed_dims": 16, "num_heads": 2, "depths": 2, "pooling_stat": "0011"},
    "QKFormer": {"T": 2, "embed_dims": 32, "num_heads": (2, 2, 4), "depths": (1, 1, 1)},
    "MaxFormer": {"T": 2, "embed_dims": 32, "depths": (1, 1, 2)},
    "MetaSpikeFormer": {"T": 2, "embed_dims": (8, 16, 32, 48), "depths": (1, 1, 1, 1, 1), "num_heads": 4},
    "ESpikeFormer": {"embed_dims": (8, 16, 32, 48), "depths": (1, 1, 1, 1, 1), "num_heads": 4},
}
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| [^|]+ \| `(\w+)` \| ([\w, ]+) \| (yes|no) \|", TEXT, flags=re.MULTILINE)


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A tiny network under that name, and normalized images of mean and std 0.5."""
    if name in SPIKING:
        network, _ = lively(lambda: create_model(name, num_classes=3, **SPIKING[name]), 0, trained_statistics=True)
        network = network.float()
    else:
        options = HYBRID if "resnet" in name else SWIN if name.startswith("swin") else VIT
        torch.manual_seed(0)
        network = create_model(name, **options).eval()
    return network, (torch.randint(0, 256, (8, 3, 32, 32)) / 255 - 0.5) / 0.5


def test_the_rows_are_found() -> None:
    assert len(ROWS) == TEXT.count("| yes |") + TEXT.count("| no |") > 15
    assert set(SPIKING) <= {name for name, _, _ in ROWS}


@pytest.mark.parametrize(("name", "units", "integers"), ROWS, ids=[name for name, _, _ in ROWS])
def test_a_row_is_true(name: str, units: str, integers: str) -> None:
    network, images = built(name)
    adapter = adapter_for(network)
    assert prunable_weights(network)  # which masks take
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "height": 32, "width": 32}
    if integers == "yes":
        quantized = quantize(network, [images], method="max", preprocessing=half, calibration_images=8).eval()
        assert quantized.to_program()
    else:
        with pytest.raises(UnsupportedNetworkError):
            quantize(network, [images], method="max", preprocessing=half, calibration_images=8)
    if units == "none":
        with pytest.raises(UnsupportedNetworkError):
            adapter.groups(network)
        return
    groups = adapter.groups(network)
    assert ", ".join(sorted({group.kind for group in groups})) == units
    first = {group.kind: group for group in reversed(groups)}["mlp"]
    apply_plan(network, PruningPlan.removing([first], {first.name: [0]}))
    with torch.no_grad():
        assert network(images).shape == (8, 3)


@pytest.mark.parametrize(
    "name",
    re.findall(r"`(\w+)`", re.search(r"These have no adapter.*?and other", TEXT, flags=re.DOTALL)[0]),  # type: ignore[index]
)
def test_what_has_no_adapter(name: str) -> None:
    with torch.device("meta"), pytest.raises(UnsupportedNetworkError, match="no adapter for this network"):
        adapter_for(create_model(name))

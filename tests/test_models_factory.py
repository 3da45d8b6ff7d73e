"""create_model: every supported kind of name, what it records, and weights that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from swincompress_pl.data import Preprocessing
from swincompress_pl.models.factory import create_model, load_weights, preprocessing_for, recreate_model

TINY_SWIN = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (2, 4),
    "num_classes": 10,
}
SPIKING = [
    "spikformer_ti",
    "spikformer_s",
    "spikformer_cifar10",
    "qkformer_10_384",
    "sdt_8_384",
    "maxformer_10_384",
    "maxformer_cifar",
    "meta_spikeformer_8_256",
]


def tiny_swin() -> nn.Module:
    return create_model("SwinTransformer", **TINY_SWIN)


@pytest.mark.parametrize("name", ["SwinTransformer", "swintransformer", "swin"])
def test_swin_by_class_name(name: str) -> None:
    network = create_model(name, **TINY_SWIN)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["VisionTransformer", "vit"])
def test_vit_by_class_name(name: str) -> None:
    network = create_model(name, img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"])
def test_timm_names(name: str) -> None:
    network = create_model(name, num_classes=7)
    assert network.num_classes == 7
    assert network.creation == {"name": name, "kwargs": {"num_classes": 7}}


@pytest.mark.parametrize("name", SPIKING)
def test_spiking_builders(name: str) -> None:
    network = create_model(name, num_classes=7, T=2)
    assert network.creation == {"name": name, "kwargs": {"num_classes": 7, "T": 2}}
    assert sum(parameter.numel() for parameter in network.parameters()) > 1e6


def test_creation_survives_json_and_rebuilds_the_network() -> None:
    network = tiny_swin()
    again = recreate_model(json.loads(json.dumps(network.creation)))
    again.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(images), again.eval()(images))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swin_tiny_pach4_window7_224", "did you mean swin_tiny_patch4_window7_224"),
        ("spikformer_tiny", "spikformer_ti"),
        ("SwinTransfomer", "did you mean SwinTransformer"),
        ("???", "examples: swin_tiny_patch4_window7_224"),
    ],
)
def test_unknown_names_get_close_matches(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        create_model(name)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"argument norm_layer=.* is not JSON data"):
        create_model("SwinTransformer", **TINY_SWIN, norm_layer=nn.LayerNorm)
    with pytest.raises(ValueError, match="no published weights"):
        create_model("SwinTransformer", pretrained=True, **TINY_SWIN)
    with pytest.raises(ValueError, match="both given"):
        create_model("deit_tiny_patch16_224", pretrained=True, checkpoint_path="weights.safetensors")
    with pytest.raises(TypeError, match="deepths"):
        create_model("SwinTransformer", deepths=(1, 1))


@pytest.mark.parametrize("layout", ["safetensors", "plain", "state_dict", "model", "lightning"])
def test_weights_from_every_layout(tmp_path: Path, layout: str) -> None:
    saved = tiny_swin()
    state = saved.state_dict()
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pt")
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "plain":
        torch.save(state, path)
    elif layout == "lightning":
        beside = {"teacher.head.fc.bias": torch.zeros(1)}
        torch.save({"state_dict": {**{f"net.{key}": value for key, value in state.items()}, **beside}}, path)
    else:
        torch.save({layout: state, "epoch": 3}, path)
    loaded = create_model("SwinTransformer", checkpoint_path=path, **TINY_SWIN)
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    assert loaded.creation == saved.creation


def test_buffers_that_timm_computes_may_be_left_over(tmp_path: Path) -> None:
    state = tiny_swin().state_dict()
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    torch.save(state, tmp_path / "weights.pt")
    create_model("SwinTransformer", checkpoint_path=tmp_path / "weights.pt", **TINY_SWIN)


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    network = tiny_swin()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = tiny_swin().state_dict()
    bias, weight = "head.fc.bias", "head.fc.weight"
    nan = state[weight].clone()
    nan[3, 3] = torch.nan
    cases = {
        f"1 missing \\({bias}\\)": {key: tensor for key, tensor in state.items() if key != bias},
        "1 unexpected \\(more\\)": {**state, "more": torch.zeros(1)},
        f"1 of another shape \\({bias} \\(4,\\) instead of \\(10,\\)\\)": {**state, bias: torch.zeros(4)},
        f"1 with NaN or infinity \\({weight}\\)": {**state, weight: nan},
    }
    for message, content in cases.items():
        save_file(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights(network, path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_weights(tiny_swin(), tmp_path / "none.pt")
    for name in ("broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=f"{name}: not a"):
            load_weights(tiny_swin(), tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(tiny_swin(), tmp_path / "other.pt")
    torch.save(tiny_swin(), tmp_path / "pickled.pt")  # a whole module: unpickling it could run anything
    with pytest.raises(ValueError, match="not a torch file of plain tensors"):
        load_weights(tiny_swin(), tmp_path / "pickled.pt")


def test_preprocessing_of_a_timm_network_is_a_preprocessing() -> None:
    fields = preprocessing_for(create_model("swin_tiny_patch4_window7_224"))
    assert Preprocessing.from_dict(fields).to_dict() == fields
    assert fields["resize"] == 248
    with pytest.raises(ValueError, match="SwinTransformer: has no preprocessing"):
        preprocessing_for(tiny_swin())
    squashed = create_model("vit_tiny_patch16_224")
    squashed.pretrained_cfg = {**squashed.pretrained_cfg, "crop_mode": "squash"}  # type: ignore[dict-item,assignment]
    assert preprocessing_for(squashed)["crop_mode"] == "squash"
    squashed.pretrained_cfg = {**squashed.pretrained_cfg, "interpolation": "random"}  # type: ignore[dict-item,assignment]
    with pytest.raises(ValueError, match="interpolation 'random' is not supported, only bicubic"):
        preprocessing_for(squashed)


def test_real_weights_load(shared_data: Path) -> None:
    arch = {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 48,
        "depths": [2, 4, 2],
        "num_heads": [3, 6, 12],
    }
    create_model("swin", num_classes=10, checkpoint_path=shared_data / "swin_cifar10.safetensors", **arch)
    with pytest.raises(ValueError, match=r"2 of another shape \(head\.fc\.weight \(10, 192\) instead of \(9, 192\)"):
        create_model("swin", num_classes=9, checkpoint_path=shared_data / "swin_cifar10.safetensors", **arch)

"""Files of the published E-SpikeFormers: those of up to 19 M parameters load, and the larger ones are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swincompress_pl.models import create_model
from swincompress_pl.models.e_spikeformer.network import block_paths

TINY: dict[str, Any] = {"num_classes": 5, "embed_dims": [8, 12, 16, 24], "depths": [1, 1, 2, 6, 2], "num_heads": 4}
Shapes = dict[str, tuple[int, ...]]


def norm(name: str, width: int) -> Shapes:
    one = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {**one, f"{name}.num_batches_tracked": ()}


def downsample(inputs: int, outputs: int, kernel: int) -> Shapes:
    """As `MS_DownSampling` is published."""
    return {
        "encode_conv.weight": (outputs, inputs, kernel, kernel),
        "encode_conv.bias": (outputs,),
        **norm("encode_bn", outputs),
    }


def separable(name: str, width: int, kernel: int) -> Shapes:
    """As `SepConv_Spike` is published."""
    return {
        f"{name}.pwconv1.0.weight": (2 * width, width, 1, 1),
        **norm(f"{name}.pwconv1.1", 2 * width),
        f"{name}.dwconv.0.weight": (2 * width, 1, kernel, kernel),
        **norm(f"{name}.dwconv.1", 2 * width),
        f"{name}.pwconv2.0.weight": (width, 2 * width, 1, 1),
        **norm(f"{name}.pwconv2.1", width),
    }


def conv_block(width: int) -> Shapes:
    """As `MS_ConvBlock_spike_SepConv` is published."""
    return {
        **separable("Conv", width, 7),
        "conv1.weight": (4 * width, width, 3, 3),
        **norm("bn1", 4 * width),
        "conv2.weight": (width, 4 * width, 3, 3),
        **norm("bn2", width),
    }


def transformer_block(width: int) -> Shapes:
    """As `MS_Block_Spike_SepConv` is published."""
    return {
        **separable("conv", width, 3),
        "attn.q_conv.0.weight": (width, width, 1, 1),
        **norm("attn.q_conv.1", width),
        "attn.k_conv.0.weight": (width, width, 1, 1),
        **norm("attn.k_conv.1", width),
        "attn.v_conv.0.weight": (4 * width, width, 1, 1),
        **norm("attn.v_conv.1", 4 * width),
        "attn.proj_conv.0.weight": (width, 4 * width, 1, 1),
        **norm("attn.proj_conv.1", width),
        "mlp.fc1_conv.weight": (4 * width, width, 1),
        "mlp.fc1_conv.bias": (4 * width,),
        **norm("mlp.fc1_bn", 4 * width),
        "mlp.fc2_conv.weight": (width, 4 * width, 1),
        "mlp.fc2_conv.bias": (width,),
        **norm("mlp.fc2_bn", width),
    }


def published() -> Shapes:
    """The names and shapes of a published model with the widths of TINY."""
    parts: dict[str, Shapes] = {
        "downsample1_1": downsample(3, 4, 7),
        "ConvBlock1_1.0": conv_block(4),
        "downsample1_2": downsample(4, 8, 3),
        "ConvBlock1_2.0": conv_block(8),
        "downsample2": downsample(8, 12, 3),
        "ConvBlock2_1.0": conv_block(12),
        "ConvBlock2_2.0": conv_block(12),
        "downsample3": downsample(12, 16, 3),
        **{f"block3.{number}": transformer_block(16) for number in range(6)},
        "downsample4": downsample(16, 24, 3),
        **{f"block4.{number}": transformer_block(24) for number in range(2)},
        "head": {"weight": (5, 24), "bias": (5,)},
    }
    return {f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}


def filled(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) + 0.1 if shape else torch.tensor(7)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("place", [None, "model"])
def test_a_file_with_the_published_names_and_shapes_loads(tmp_path: Path, place: str | None) -> None:
    weights, file = filled(published()), tmp_path / "published.pth"
    torch.save(weights if place is None else {place: weights, "epoch": 200}, file)
    network = create_model("ESpikeFormer", **TINY, checkpoint_path=file)
    state = network.state_dict()
    assert list(state) == list(weights), "in the published order, too"
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        assert network.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    assert sum(len(blocks) for _, blocks in block_paths(network)) == 12


LARGER: Shapes = {
    "downsample1_1.encode_conv.weight": (4, 3, 7, 7),
    "ConvBlock1_1.0.conv1.0.0.weight": (8, 4, 1, 1),
    "downsample1_2.encode_conv.weight": (8, 4, 3, 3),
    "ConvBlock1_2.0.conv1.0.0.weight": (16, 8, 1, 1),
    "downsample2.encode_conv.weight": (12, 8, 3, 3),
    "downsample3.encode_conv.weight": (16, 12, 3, 3),
    "block3.0.attn.q_conv.0.conv1.weight": (16, 16, 1, 1),
    "block3.0.layer_scale1": (16,),
    "head.weight": (5, 16),
    "head_kd.weight": (5, 16),
}


@pytest.mark.parametrize("left_out", [None, "head_kd.weight", "block3.0.layer_scale1"])
@pytest.mark.parametrize("place", [None, "model", "module"])
def test_a_file_of_a_larger_published_model_is_named(tmp_path: Path, place: str | None, left_out: str | None) -> None:
    weights, file = filled({name: shape for name, shape in LARGER.items() if name != left_out}), tmp_path / "171M.pth"
    if place == "module":  # of DistributedDataParallel
        weights, place = {f"module.{name}": tensor for name, tensor in weights.items()}, None
    torch.save(weights if place is None else {place: weights}, file)
    message = r"171M.pth: its tensors.* do not fit ESpikeFormer: .* larger published E-SpikeFormer \(83 M or 173 M .*"
    with pytest.raises(ValueError, match=message + "layer scales .* not supported; .* e_spikeformer_large"):
        create_model("ESpikeFormer", **TINY, checkpoint_path=file)


def test_other_files_are_refused_as_everywhere(tmp_path: Path) -> None:
    weights, file = filled(published()), tmp_path / "other.pth"
    del weights["block3.0.attn.q_conv.0.weight"]
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"1 missing \(block3.0.attn.q_conv.0.weight\).* Check the model's name"):
        create_model("ESpikeFormer", **TINY, checkpoint_path=file)
    torch.save(filled(published()), file)
    with pytest.raises(ValueError, match="pass num_classes=5"):
        create_model("ESpikeFormer", **{**TINY, "num_classes": 7}, checkpoint_path=file)

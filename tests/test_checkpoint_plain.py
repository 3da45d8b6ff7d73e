"""Saving and loading without Lightning: the same answers in a fresh network, or a refusal that names the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.callback_cases import Restorable
from support.prime_cases import network_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import swincompress_pl
from swincompress_pl import load_network, primesvt, prune, quantize, save_network
from swincompress_pl.models import create_model
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, PrimeSVTConfig, PruningPlan, apply_plan
from swincompress_pl.quant import QuantizedNetwork

HALF = {"mean": [0.5] * 3, "std": [0.25] * 3}
IMAGES = (torch.randint(0, 256, (16, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255 - 0.5) / 0.25
LABELS = torch.arange(16) % 3


def vit(**options: Any) -> nn.Module:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return create_model("vit", **(arguments | options))


def searched(network: nn.Module, **options: Any) -> nn.Module:
    config = AdaptivePruningConfig(tolerance=100.0, step=0.5, max_rounds=1, **options)
    prune(network, HoldOut(IMAGES, LABELS), config)
    return network


def quantized(network: nn.Module) -> nn.Module:
    return quantize(network, [IMAGES], method="max", preprocessing=HALF)


def cut(network: Any) -> nn.Module:
    applied = apply_plan(network.network, PruningPlan(kept={"blocks.0.mlp.channels": range(3)}))
    network.follow({each.name: dict(each.kept) for each in applied.tensors})
    return network


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda network: network,
    "pruned": lambda network: searched(network, round_to=1),
    "masked": lambda network: searched(network, granularity="weight"),
    "2:4": lambda network: searched(network, granularity="2:4"),
    "quantized": quantized,
    "pruned and quantized": lambda network: quantized(searched(network, round_to=1)),
    "masked and quantized": lambda network: quantized(searched(network, granularity="weight")),
    "quantized, then pruned": lambda network: cut(quantized(network)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_network_answers_as_the_saved_one(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = WAYS[way](vit()).eval()
    file = save_network(network, tmp_path / "network.ckpt")
    loaded = load_network(vit(), file).eval()
    assert isinstance(loaded, QuantizedNetwork) == isinstance(network, QuantizedNetwork)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), network(IMAGES))
    again = save_network(loaded, tmp_path / "again.ckpt")
    saved, twice = (torch.load(each, weights_only=True) for each in (file, again))
    assert saved["swincompress_pl"] == twice["swincompress_pl"]
    assert list(saved["state_dict"]) == list(twice["state_dict"])


@pytest.mark.parametrize("way", ["pruned", "masked", "quantized"])
def test_a_compiled_network_is_saved_and_loaded_as_the_plain_one(way: str, tmp_path: Path) -> None:
    network = WAYS[way](vit()).eval()
    compiled: Any = torch.compile(network, backend="eager")
    file = save_network(compiled, tmp_path / "network.ckpt")
    assert not any("_orig_mod" in name for name in torch.load(file, weights_only=True)["state_dict"])
    loaded = load_network(torch.compile(vit(), backend="eager"), file).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), network(IMAGES))


def test_compiled_blocks_do_not_change_the_names(tmp_path: Path) -> None:
    network, fresh = WAYS["masked"](vit()).eval(), vit().eval()
    blocks: Any = network.blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    loaded = load_network(fresh, save_network(network, tmp_path / "network.ckpt"))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), network(IMAGES))


def test_a_spiking_network_comes_back(tmp_path: Path) -> None:
    network = network_of("spikformer").eval()
    images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2
    config = PrimeSVTConfig(tolerance=100.0, min_memory_saving=0.0, rates=(0.3,), kinds=("mlp",), round_to=1)
    primesvt(network, HoldOut(images, labels), config)
    loaded = load_network(network_of("spikformer").eval(), save_network(network, tmp_path / "network.ckpt"))
    sizes = [sum(p.numel() for p in each.parameters()) for each in (loaded, network, network_of("spikformer"))]
    assert sizes[0] == sizes[1] < sizes[2]
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))


def test_a_changed_attribute_comes_back_or_is_refused(tmp_path: Path) -> None:
    network: Any = vit()
    network.set_input_size(img_size=32)
    network.norm.eps = 0.5
    file = save_network(network, tmp_path / "network.ckpt")
    loaded: Any = load_network(vit(img_size=32), file)
    assert loaded.norm.eps == 0.5

    network = vit()
    network.blocks[0].mlp.act = nn.ReLU()
    file = save_network(network, tmp_path / "relu.ckpt")
    fresh = vit()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=r"relu.ckpt computes something else .*blocks\.0\.mlp\.act"):
        load_network(fresh, file)
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items()), "left as it was"


def test_the_network_of_a_lightning_checkpoint(tmp_path: Path) -> None:
    module = Restorable(lambda: searched(vit(), round_to=1))
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    loaded = load_network(vit(), tmp_path / "module.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), module.net.eval()(IMAGES))


def test_files_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    network = searched(vit(), round_to=1)
    file = save_network(network, tmp_path / "network.ckpt")
    with pytest.raises(FileNotFoundError, match="gone"):
        load_network(vit(), tmp_path / "gone.ckpt")
    with pytest.raises(ValueError, match=r"do not fit the given VisionTransformer: .* as it was when it was saved"):
        load_network(vit(num_classes=4), file)
    with pytest.raises(ValueError, match=r"'blocks.1.attn.heads' is no pruning group of this network"):
        load_network(vit(depth=1), file)
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"plain.pt has no compression record; .* load plain weights"):
        load_network(vit(), tmp_path / "plain.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt has no compression record"):
        load_network(vit(), tmp_path / "list.pt")
    records = {"version": 2, "networks": {"a": {"history": []}, "b": {"history": []}}}
    torch.save({"state_dict": {}, "swincompress_pl": records}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"two.pt has records of 2 networks, a, b; .* its LightningModule"):
        load_network(vit(), tmp_path / "two.pt")
    data = file.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.ckpt").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut.ckpt"):
            load_network(vit(), tmp_path / "cut.ckpt")


def test_the_top_level_names_are_these() -> None:
    assert swincompress_pl.save_network is save_network
    assert {"save_network", "load_network"} <= set(dir(swincompress_pl))

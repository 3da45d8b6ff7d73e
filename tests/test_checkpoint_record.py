"""The compression record: what was done to a network is replayed, once, and never guessed."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from timm.models import VisionTransformer
from torch import nn

import swincompress_pl
from swincompress_pl.checkpoint.hooks import CompressionMixin, keep_record, restore_from_checkpoint, save_to_checkpoint
from swincompress_pl.checkpoint.record import (
    CHECKPOINT_KEY,
    INPUT_KEY,
    TEACHER_TAKEN_KEY,
    histories_in,
    read_checkpoint,
)
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.history import history_of, summarize
from swincompress_pl.models import rebuild
from swincompress_pl.models.classifier import CompressibleClassifier
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.pruning.structure.patterns import parse_granularity
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, register_masks, remove_masks, set_mask
from swincompress_pl.quant import Bits, QuantizedNetwork
from swincompress_pl.registry import adapter_for


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=4, num_classes=3)


def _prune(module: Module, removed: dict[str, Any]) -> None:
    groups = adapter_for(module.backbone).groups(module.backbone)
    apply_plan(module.backbone, PruningPlan.removing(groups, removed))


def _pruned() -> Module:
    module = Module()
    _prune(module, {"blocks.0.attn.heads": [2], "blocks.0.mlp.channels": range(20)})
    _prune(module, {"blocks.0.attn.heads": [0]})
    return module


def test_saved_and_restored_any_number_of_times(tmp_path: Any) -> None:
    module, fresh = _pruned(), Module()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    for _ in range(2):
        save_to_checkpoint(module, checkpoint, "backbone")
    torch.save(checkpoint, tmp_path / "a.ckpt")
    for _ in range(2):
        restore_from_checkpoint(fresh, tmp_path / "a.ckpt", "backbone")
    fresh.load_state_dict(checkpoint["state_dict"])
    assert history_of(fresh.backbone) == history_of(module.backbone)
    assert fresh.backbone.blocks[0].attn.num_heads == 2


def test_the_saved_history_is_a_copy() -> None:
    module = _pruned()
    checkpoint: dict[str, Any] = {}
    save_to_checkpoint(module, checkpoint, "backbone")
    checkpoint[CHECKPOINT_KEY]["history"][0]["prune"]["groups"].clear()
    assert history_of(module.backbone)[0]["prune"]["groups"]


def test_what_differs_is_undone_and_the_rest_replayed() -> None:
    one, other = _pruned(), Module()
    _prune(other, {"blocks.0.mlp.channels": [1, 5]})
    restore_from_history(other.backbone, history_of(one.backbone))
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in one.state_dict().items()}
    restore_from_history(other.backbone, [])
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in Module().state_dict().items()}


class OwnHook(Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads_seen: list[int] = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.heads_seen.append(self.backbone.blocks[0].attn.num_heads)


def test_restoring_runs_once_before_the_modules_own_hook() -> None:
    checkpoint: dict[str, Any] = {}
    save_to_checkpoint(_pruned(), checkpoint, "backbone")
    module = OwnHook()
    for _ in range(2):
        keep_record(module, "backbone")
    twin = copy.deepcopy(module)
    module.on_load_checkpoint(checkpoint)
    assert module.heads_seen == [2]
    assert (twin.backbone.blocks[0].attn.num_heads, twin.heads_seen) == (4, [])
    twin.on_load_checkpoint(checkpoint)
    assert twin.heads_seen == [2]


def test_a_module_without_the_mixin_writes_the_record_with_its_weights(tmp_path: Any) -> None:
    module = _pruned()
    keep_record(module, "backbone")
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert histories_in(read_checkpoint(tmp_path / "a.ckpt")) == {"backbone": history_of(module.backbone)}


class WithMixin(CompressionMixin, Module):
    model_attribute = "backbone"


def test_a_module_without_the_mixin_is_told_how_its_checkpoints_load(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    module = _pruned()
    with caplog.at_level("INFO"):
        keep_record(module, "backbone")
        keep_record(module, "backbone")
    assert [record.message.split(":")[0] for record in caplog.records] == ["Module has no CompressionMixin"]
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.5.0"}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        Module.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    loaded = WithMixin.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)  # as the message promises
    assert history_of(loaded.backbone) == history_of(module.backbone)
    caplog.clear()
    with caplog.at_level("INFO"):
        keep_record(loaded, "backbone")
    assert not caplog.records


def test_rebuild_from_an_origin() -> None:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 3}
    module = _pruned()
    history = [*history_of(module.backbone), {"quantize": {"method": "searched"}}]
    network = rebuild({"network": {"name": "VisionTransformer", "kwargs": arguments}, "history": history})
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in module.backbone.state_dict().items()
    }
    with pytest.raises(ValueError, match="does not say how its network was created"):
        rebuild({"history": history})


def test_a_checkpoint_without_a_record_is_uncompressed() -> None:
    assert histories_in({"state_dict": {}}) == {}


def test_another_version_and_unknown_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="compression record has version 3, this package reads 1 and 2"):
        histories_in({CHECKPOINT_KEY: {"version": 3, "history": []}})
    module = Module()
    with pytest.raises(ValueError, match=r"an entry \['melt'\], this package knows"):
        restore_from_history(module.backbone, [{"melt": {}}])


def test_a_checkpoint_with_foreign_objects_is_refused_with_the_remedy(tmp_path: Any) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Module()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors and plain data"):
        restore_from_checkpoint(Module(), tmp_path / "a.ckpt", "backbone")


def test_a_missing_attribute_lists_those_there_are() -> None:
    with pytest.raises(
        AttributeError, match="model_attribute='net': Module has no module of that name; it holds backbone"
    ):
        save_to_checkpoint(Module(), {}, "net")


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"mask": ["a", "b"]}, "mask 2 weights: a, b"),
        ({"unmask": list("abcde")}, "unmask 5 weights: a, b, c, d, ..."),
        ({"prune": {"groups": {"mlp": {"kept": [0, 2], "units": 3}}}}, "prune 1 groups: mlp 3 -> 2"),
        ({"quantize": {"method": "max"}}, "quantize, method max"),
        ({"melt": {}}, "melt (unknown to this version)"),
    ],
)
def test_an_entry_in_a_line(entry: dict[str, Any], text: str) -> None:
    assert summarize(entry) == text


def test_one_place_knows_the_keys_and_one_the_history() -> None:
    package = Path(swincompress_pl.__file__).parent
    keys, writers = set(), set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = str(file.relative_to(package))
            if isinstance(node, ast.Constant) and node.value in (INPUT_KEY, TEACHER_TAKEN_KEY):
                keys.add(name)
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "network.compression_history":
                writers.add(name)
    assert (keys, writers) == ({"checkpoint/record.py"}, {"history.py"})


# ---------------------------------------------------------------- masks of weights

FC1, PROJ = "blocks.0.mlp.fc1.weight", "blocks.0.attn.proj.weight"


def _half(network: nn.Module, name: str) -> None:
    register_masks(network, [name])
    weight = network.get_parameter(name)
    set_mask(network, name, parse_granularity("weight").keep_mask(weight.detach().abs(), weight.numel() // 2))


def test_a_masked_network_is_restored_with_masks_and_weights(tmp_path: Any) -> None:
    module, fresh = _pruned(), Module()
    _half(module.backbone, FC1)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    save_to_checkpoint(module, checkpoint, "backbone")
    torch.save(checkpoint, tmp_path / "a.ckpt")
    for _ in range(2):
        restore_from_checkpoint(fresh, tmp_path / "a.ckpt", "backbone")
    fresh.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert history_of(fresh.backbone) == history_of(module.backbone)
    assert [list(entry) for entry in history_of(fresh.backbone)] == [["prune"], ["prune"], ["mask"]]
    weight, mask = masked_parameters(fresh.backbone)[FC1]
    assert torch.equal(mask, module.backbone.get_buffer(f"{FC1}_mask"))
    assert int(weight.count_nonzero()) == int(mask.sum()) == weight.numel() // 2


def test_masks_are_undone_and_replayed_to_reach_another_checkpoint() -> None:
    one, other = Module(), Module()
    _half(one.backbone, FC1)
    _half(one.backbone, PROJ)
    remove_masks(one.backbone, [FC1])
    _half(other.backbone, FC1)
    _prune(other, {"blocks.0.attn.heads": [1]})
    third = Module()
    _half(third.backbone, PROJ)
    _prune(third, {"blocks.0.attn.heads": [1, 3], "blocks.0.mlp.channels": [7]})
    histories = [history_of(module.backbone) for module in (one, other, third, Module(), one)]
    for history in histories:
        restore_from_history(other.backbone, history)
        assert history_of(other.backbone) == history
        expected = Module()
        restore_from_history(expected.backbone, history)
        assert _shapes(other) == _shapes(expected)
    assert set(masked_parameters(other.backbone)) == {PROJ}


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def test_a_quantized_masked_network_is_reached_and_left() -> None:
    module = Module()
    _half(module.backbone, FC1)
    quantized = {"method": "max", "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}, "classes": None}
    quantized |= {"bits": Bits().to_dict(), "unsigned": []}
    history = [*history_of(module.backbone), {"quantize": quantized}]
    network = restore_from_history(Module().backbone, history)
    assert isinstance(network, QuantizedNetwork)
    assert network.compression_history == history
    assert set(masked_parameters(network)) == {f"network.{FC1}"}
    plain = [{"quantize": quantized}]
    network = restore_from_history(network, plain)
    assert isinstance(network, QuantizedNetwork)
    assert (history_of(network), masked_parameters(network)) == (plain, {})
    assert not isinstance(restore_from_history(network, history_of(module.backbone)), QuantizedNetwork)


def test_load_from_checkpoint_of_a_masked_classifier(tmp_path: Any) -> None:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4}
    classifier = CompressibleClassifier("VisionTransformer", num_classes=3, model_kwargs=arguments)
    _half(classifier.net, FC1)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)[CHECKPOINT_KEY]["history"] == [{"mask": [FC1]}]
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    assert history_of(loaded.net) == [{"mask": [FC1]}]
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in classifier.state_dict().items())
    assert loaded.net.get_parameter(FC1).count_nonzero() == loaded.net.get_parameter(FC1).numel() // 2


def test_an_origin_with_masks_is_rebuilt() -> None:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 3}
    network = rebuild({"network": {"name": "VisionTransformer", "kwargs": arguments}, "history": [{"mask": [FC1]}]})
    assert set(masked_parameters(network)) == {FC1}

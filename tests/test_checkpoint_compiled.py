"""Checkpoints of compiled networks load into plain ones, and the reverse, wherever the network is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.checkpoint.compiled_keys import follow_compilation
from swincompress_pl.models import CompressibleClassifier, CompressionMixin, DistillationConfig, create_model
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, register_masks

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
PIXELS = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(1))
IMAGES = (PIXELS / 255 - 0.5) / 0.25
LOADER = DataLoader(TensorDataset(IMAGES, torch.arange(16) % 3), batch_size=8)


class Bare(LightningModule):
    """The network at a path, with a head outside; only the callback makes a record in its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.ModuleDict({"backbone": create_model("vit", num_classes=8, **VIT)})])
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.head(self.parts[0]["backbone"](images))
        return features

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Nested(CompressionMixin, Bare):
    """The same with the mixin."""

    model_attribute = "parts.0.backbone"


def classifier(**arguments: Any) -> CompressibleClassifier:
    return CompressibleClassifier("vit", 3, model_kwargs=VIT, **arguments)


def compile_network(module: Any) -> None:
    if isinstance(module, CompressibleClassifier):
        module.net = torch.compile(module.net, backend="eager")
    else:
        module.parts[0]["backbone"] = torch.compile(module.parts[0]["backbone"], backend="eager")


def compile_nothing(module: Any) -> None:
    pass


def fit(module: LightningModule, folder: Path, epochs: int = 1, path: Path | None = None, **quantize: Any) -> Trainer:
    attribute = getattr(module, "model_attribute", "parts.0.backbone")
    callbacks: list[Any] = [
        AdaptiveIterativePruning(tolerance=99.0, round_to=1, step=0.25, max_rounds=1, model_attribute=attribute)
    ]
    if quantize:
        callbacks.append(QuantizationAwareTraining(model_attribute=attribute, calibration_images=16, **quantize))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=epochs, default_root_dir=folder, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, LOADER, LOADER, ckpt_path=path, weights_only=True)
    return trainer


Compile = Callable[[Any], None]


@pytest.mark.slow
@pytest.mark.parametrize("make", [classifier, Nested, Bare])
@pytest.mark.parametrize("saved", [compile_network, compile_nothing], ids=["compiled", "plain"])
def test_a_fit_resumes_on_the_other_side(tmp_path: Path, make: Callable[[], Any], saved: Compile) -> None:
    torch.manual_seed(0)
    module = make()
    saved(module)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    other = make()
    if saved is compile_nothing:
        compile_network(other)
    resumed = fit(other, tmp_path, path=tmp_path / "c.ckpt")
    assert resumed.global_step == trainer.global_step
    assert torch.equal(other.eval()(IMAGES), module.eval()(IMAGES))
    if make is classifier:  # the optimizer's state fits as well
        fit(other, tmp_path, epochs=2, path=tmp_path / "c.ckpt")
    elif make is Nested and saved is compile_network:
        assert torch.equal(Nested.load_from_checkpoint(tmp_path / "c.ckpt").eval()(IMAGES), module(IMAGES))


@pytest.mark.parametrize("saved", [True, False], ids=["compiled", "plain"])
def test_masks_of_a_compiled_block_follow(tmp_path: Path, saved: bool) -> None:
    module, other = classifier(), classifier()
    compiled: Any = module if saved else other
    compiled.net.blocks[0] = torch.compile(compiled.net.blocks[0], backend="eager")
    name = f"blocks.0.{'_orig_mod.' if saved else ''}attn.qkv.weight"
    register_masks(module.net, [name])
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(other.eval()(IMAGES), module.eval()(IMAGES))
    assert len(masked_parameters(other.net)) == 1


@pytest.mark.slow
def test_a_quantized_one_loads(tmp_path: Path) -> None:
    module = classifier()
    compile_network(module)
    trainer = fit(
        module, tmp_path, epochs=2, start_epoch=1, method="max", preprocessing={"mean": [0.5] * 3, "std": [0.25] * 3}
    )
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert torch.equal(
        CompressibleClassifier.load_from_checkpoint(tmp_path / "c.ckpt").eval()(IMAGES), module.eval()(IMAGES)
    )


def test_a_compiled_teacher_loads(tmp_path: Path) -> None:
    module = classifier(distillation=DistillationConfig(start_epoch=1))
    assert module.teacher is not None
    compile_network(module)
    module.teacher = torch.compile(module.teacher, backend="eager")
    fit(module, tmp_path).save_checkpoint(tmp_path / "c.ckpt")
    back = CompressibleClassifier.load_from_checkpoint(tmp_path / "c.ckpt")
    assert back.teacher is not None
    assert torch.equal(back.teacher(IMAGES), module.teacher.eval()(IMAGES))
    CompressibleClassifier.load_from_checkpoint(tmp_path / "c.ckpt", distillation=None)


def test_every_wrapper_of_a_module_is_followed() -> None:
    plain = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    wrapped = nn.Sequential(nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2))), nn.Linear(2, 2))
    wrapped[0] = torch.compile(wrapped[0])
    for source, target in ((plain, wrapped), (wrapped, plain)):
        checkpoint = {"state_dict": source.state_dict()}
        names = list(checkpoint["state_dict"])
        follow_compilation(target, checkpoint)
        target.load_state_dict(checkpoint["state_dict"])
        assert list(source.state_dict()) == names
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_other_names_are_left_to_the_load() -> None:
    module = nn.Linear(2, 2)
    for state in ({}, {"more": 1}, {"weight": 1, "_orig_mod.weight": 2}, {"weight": 1, "bias": 2}):
        checkpoint: dict[str, Any] = {"state_dict": dict(state)}
        follow_compilation(module, checkpoint)
        assert checkpoint == {"state_dict": state}
    follow_compilation(module, {})

"""Quantization-aware training inside a real, tiny fit: pruning before it, resume, reload, export, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.qat_cases import VIT, Plain, Restorable, fit, loader, pixels_and_labels, pruning, qat, trainer
from torch import Tensor

from swincompress_pl import accel
from swincompress_pl.callbacks import AdaptiveIterativePruning, CompressedCheckpoint
from swincompress_pl.models import CompressibleClassifier, create_model
from swincompress_pl.models.training import DistillationConfig, OptimizationConfig
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.registry import UnsupportedNetworkError

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def test_prune_then_quantize_in_one_fit_reports_the_engines_accuracy(tmp_path: Path) -> None:
    module = Restorable()
    optimizer_parameters = {id(parameter) for parameter in module.backbone.parameters()}
    run = fit(module, tmp_path, 3, pruning(), qat())
    quantized = module.backbone
    assert isinstance(quantized, QuantizedNetwork)
    assert quantized.network.blocks[0].mlp.fc1.out_features < 128  # type: ignore[index,union-attr]
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in quantized.parameters()} != optimizer_parameters

    file = accel.export(quantized, tmp_path / "model.safetensors")
    pixels, labels = pixels_and_labels()
    logits = accel.load(file, threads=1).run_integer(pixels.numpy())
    assert np.array_equal(logits, accel.reference(file).run_integer(pixels.numpy()))
    assert np.array_equal(logits, quantized.integer_logits(pixels).numpy())
    assert float(run.callback_metrics["val/top1"]) == pytest.approx((logits.argmax(1) == labels.numpy()).mean())


def test_training_goes_on_after_quantization(tmp_path: Path) -> None:
    module = Plain()
    weights: list[Tensor] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            weights.append(next(iter(module.backbone.parameters())).detach().clone())

    fit(module, tmp_path, 3, qat(), Watch())
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_load_from_checkpoint_needs_nothing_else(tmp_path: Path) -> None:
    module = Restorable()
    fit(module, tmp_path, 2, pruning(), qat()).save_checkpoint(tmp_path / "a.ckpt")
    again = Restorable.load_from_checkpoint(tmp_path / "a.ckpt")
    pixels, _ = pixels_and_labels()
    assert isinstance(module.backbone, QuantizedNetwork)
    assert torch.equal(again.backbone.integer_logits(pixels), module.backbone.integer_logits(pixels))  # type: ignore[operator]
    assert (
        torch.load(tmp_path / "a.ckpt", weights_only=True)["swincompress_pl"]["history"][-1]["quantize"]["method"]
        == "max"
    )


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("kind", [Plain, Restorable])
def test_resume_at_an_epochs_end_gives_the_same_weights(tmp_path: Path, kind: type[Plain], stop: int) -> None:
    """Stopped before the quantization and after it; the module with and without the mixin."""
    whole = kind()
    fit(whole, tmp_path, 3, pruning(), qat())
    fit(kind(), tmp_path, stop, pruning(), qat(), ModelCheckpoint(dirpath=tmp_path, filename="stop", save_last=False))
    resumed = kind()
    run = trainer(tmp_path, 3, pruning(), qat())
    run.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "stop.ckpt")
    expected, state = whole.state_dict(), resumed.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_test_with_a_checkpoint_path_sees_the_integers(tmp_path: Path) -> None:
    module = Plain()
    run = fit(module, tmp_path, 2, qat())
    run.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Plain()
    later = trainer(tmp_path, 2, qat())
    later.test(fresh, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert isinstance(fresh.backbone, QuantizedNetwork)
    assert float(later.callback_metrics["test/top1"]) == float(run.callback_metrics["val/top1"])


def test_best_checkpoint_is_a_compressed_one(tmp_path: Path) -> None:
    best = CompressedCheckpoint(
        dirpath=tmp_path, filename="{epoch}", monitor="val/top1", mode="max", save_top_k=-1, model_attribute="backbone"
    )
    fit(Plain(), tmp_path, 4, qat(start_epoch=2), best)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=2.ckpt", "epoch=3.ckpt"]


def test_classifier_with_distillation_accumulation_and_clipping(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    torch.save(create_model("VisionTransformer", **VIT).state_dict(), weights)
    kwargs = {key: value for key, value in VIT.items() if key != "num_classes"}
    module = CompressibleClassifier(
        "VisionTransformer", 3, kwargs, weights, OptimizationConfig(warmup_epochs=0), distillation=DistillationConfig()
    )
    callbacks = (
        AdaptiveIterativePruning(tolerance=100.0, step=0.25, max_rounds=1),
        qat(model_attribute="net"),
    )
    run = fit(module, tmp_path, 3, *callbacks, accumulate_grad_batches=2, gradient_clip_val=1.0)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert not isinstance(module.teacher, QuantizedNetwork)
    again = CompressibleClassifier.load_from_checkpoint(tmp_path / "a.ckpt", distillation=None)
    pixels, _ = pixels_and_labels()
    assert torch.equal(again.net.integer_logits(pixels), module.net.integer_logits(pixels))  # type: ignore[operator]


def test_bf16_autocast_validates_in_the_same_integers(tmp_path: Path) -> None:
    module = Plain()
    run = fit(module, tmp_path, 2, qat(), precision="bf16-mixed")
    pixels, labels = pixels_and_labels()
    logits = module.backbone.integer_logits(pixels)  # type: ignore[operator]
    assert float(run.callback_metrics["val/top1"]) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_epoch": -1}, "start_epoch=-1"),
        ({"calibration_images": 0}, "calibration_images=0"),
        ({"method": "magic"}, "method='magic'.*'searched'"),
        ({"bits": 3}, "bits is 3.*'W4A8'"),
        ({"bits": "W1A8"}, "weights is 1 bits"),
        ({"search": {"equalize": False}}, "search options go with method 'searched', not 'max'"),
        ({"search": {"row": 3}, "method": "searched"}, "search has no option row; there are equalize"),
        ({"percentile": 40}, "percentile=40"),
        ({"percentile": 99, "method": "affine"}, "percentile=99"),
        ({"learn_scales": True, "method": "affine"}, "zero-points"),
        ({"scale_lr_factor": 0.0}, r"scale_lr_factor=0\.0.*learn_scales=False"),
        ({"freeze_epoch": 1}, "freeze_epoch=1 is not after start_epoch=1"),
        ({"freeze_epoch": 2, "learn_scales": False}, "freeze_epoch=2 goes with learned scales"),
        ({"distillation": 1.5}, r"distillation=1\.5"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qat(**options)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="rounding"):
        qat(rounding="learned")


def test_wrong_attribute_is_named(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"model_attribute='net'.*backbone"):
        fit(Plain(), tmp_path, 1, qat(model_attribute="net"))


def test_unknown_normalization_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="how the images are normalized"):
        fit(Plain(), tmp_path, 1, qat(preprocessing=None))


def test_unsupported_network_is_refused_before_training(tmp_path: Path) -> None:
    module = Plain()
    module.backbone = create_model("VisionTransformer", **VIT, qk_norm=True)
    with pytest.raises(UnsupportedNetworkError, match=r"blocks\.0\.attn"):
        fit(module, tmp_path, 1, qat(start_epoch=5))


def test_a_start_after_the_end_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="start_epoch=7 is not reached"):
        fit(Plain(), tmp_path, 1, qat(start_epoch=7))

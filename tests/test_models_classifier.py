"""CompressibleClassifier: it learns, its checkpoints need nothing else, its schedule and losses are what they say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn

from swincompress_pl.data import Digits, Preprocessing
from swincompress_pl.models.classifier import CompressibleClassifier
from swincompress_pl.models.factory import create_model
from swincompress_pl.models.training import (
    DistillationConfig,
    MixingConfig,
    OptimizationConfig,
    decay_groups,
    distillation_loss,
    warmup_cosine,
)

SWIN = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 24,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "drop_path_rate": 0.0,  # its choices come from the global generator, which a resume does not restore
}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def classifier(**options: Any) -> CompressibleClassifier:
    torch.manual_seed(0)
    return CompressibleClassifier(**{"model": "SwinTransformer", "num_classes": 10, "model_kwargs": SWIN, **options})


def trainer(epochs: int = 1, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "callbacks": list(callbacks),
            **quiet,
            **options,
        }
    )


def digits() -> Digits:
    return Digits(batch_size=32, augmentation=None)


def logits_of(module: CompressibleClassifier) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(IMAGES)


pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class LossPerStep(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.slow
def test_it_learns_the_digits_and_its_checkpoint_needs_nothing_else(tmp_path: Path) -> None:
    module = classifier(optimization=OptimizationConfig(lr=4e-3, warmup_epochs=0.3))
    steps = LossPerStep()
    fitting = trainer(3, steps)
    fitting.fit(module, datamodule=digits())
    assert np.mean(steps.losses[-10:]) < 0.8 * np.mean(steps.losses[:5])
    metrics = fitting.callback_metrics
    assert {"train/loss", "val/loss", "val/top1", "val/top5"} <= metrics.keys()
    assert metrics["val/top1"] > 0.3  # chance: 0.1
    assert metrics["val/top5"] >= metrics["val/top1"]

    tested = fitting.test(module, datamodule=digits(), verbose=False)[0]
    assert tested.keys() == {"test/loss", "test/top1", "test/top5"}
    assert tested["test/top1"] > 0.3

    fitting.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(logits_of(loaded), logits_of(module))
    assert loaded.optimization == module.optimization
    assert Preprocessing.from_dict(loaded.input_description["preprocessing"]) == digits().preprocessing
    assert loaded.input_description["class_names"] == [str(digit) for digit in range(10)]


def test_accuracy_is_counted_right() -> None:
    module = classifier()
    fitting = trainer()
    reported = fitting.validate(module, datamodule=digits(), verbose=False)[0]
    right = total = 0
    with torch.no_grad():
        for images, labels in digits().val_dataloader():
            right += int((module.eval()(images).argmax(-1) == labels).sum())
            total += len(labels)
    assert reported["val/top1"] == pytest.approx(right / total)
    assert total == 180


def test_no_top5_with_five_classes() -> None:
    assert set(classifier(num_classes=5).val_metrics.keys()) == {"val/top1"}


def test_a_checkpoint_does_not_look_for_the_initial_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(classifier().net.state_dict(), weights)
    module = classifier(checkpoint_path=weights)
    fitting = trainer(limit_train_batches=1, limit_val_batches=0)
    fitting.fit(module, datamodule=digits())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    weights.unlink()
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(logits_of(loaded), logits_of(module))
    # plain data and tensors only
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["checkpoint_path"] is None
    assert content["hyper_parameters"]["optimization"]["lr"] == 1e-3


def test_a_resume_goes_on_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit_train_batches": 4, "limit_val_batches": 0}
    mixing = MixingConfig(mixup_alpha=0.4, cutmix_alpha=1.0)
    through = LossPerStep()
    trainer(2, through, **options).fit(classifier(mixing=mixing), datamodule=digits())

    class StopAfterFirst(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "first.ckpt")
            trainer.should_stop = True

    trainer(2, StopAfterFirst(), **options).fit(classifier(mixing=mixing), datamodule=digits())
    resumed = LossPerStep()
    trainer(2, resumed, **options).fit(
        classifier(mixing=mixing), datamodule=digits(), ckpt_path=tmp_path / "first.ckpt"
    )
    assert resumed.losses == through.losses[4:]
    assert resumed.rates == through.rates[4:]


# Schedule and parameter groups


@given(steps=st.integers(1, 200), data=st.data(), floor=st.floats(0, 1))
def test_schedule_rises_to_one_and_falls_to_the_floor(steps: int, data: st.DataObject, floor: float) -> None:
    warmup = data.draw(st.integers(0, steps))
    factors = [warmup_cosine(step, steps, warmup, floor=floor) for step in range(steps)]
    assert all(0 < factor <= 1 or floor == 0 for factor in factors)
    assert all(a < b for a, b in pairwise(factors[:warmup]))
    assert all(a >= b for a, b in pairwise(factors[warmup:]))
    if warmup < steps:
        assert factors[warmup] == 1
    if warmup + 1 < steps:
        assert factors[-1] == pytest.approx(floor)


def test_rates_follow_the_schedule_per_step() -> None:
    steps = LossPerStep()
    module = classifier(optimization=OptimizationConfig(lr=1e-2, min_lr=1e-4, warmup_epochs=1))
    trainer(3, steps, limit_train_batches=4, limit_val_batches=0).fit(module, datamodule=digits())
    expected = [1e-2 * warmup_cosine(step, 12, 4, floor=1e-2) for step in range(1, 13)]  # read after the step
    assert steps.rates == pytest.approx(expected)


def test_a_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="give the Trainer max_epochs"):
        trainer(-1).fit(classifier(), datamodule=digits())


@pytest.mark.parametrize("name", ["SwinTransformer", "VisionTransformer"])
def test_what_is_decayed(name: str) -> None:
    arguments = SWIN if name == "SwinTransformer" else {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    network = create_model(name, **arguments, **({} if name == "SwinTransformer" else {"num_heads": 2}))
    network.head.register_parameter("weight_scale", nn.Parameter(torch.ones(10, 1)))  # type: ignore[union-attr]
    network.head.register_parameter("frozen", nn.Parameter(torch.ones(3, 3), False))  # type: ignore[union-attr]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, plain = ([names[id(parameter)] for parameter in group["params"]] for group in decay_groups(network, 0.1))
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert set(decayed) | set(plain) == trainable
    assert "head.weight_scale" in plain
    assert not [name for name in decayed if "relative_position" in name or "embed" in name.split(".")[-1]]
    spared = "cls_token" if name == "VisionTransformer" else "layers.0.blocks.0.attn.relative_position_bias_table"
    assert spared in plain


def test_the_optimizer_follows_a_network_that_has_changed() -> None:
    class Shrink(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
            if trainer.current_epoch == 1:
                mlp = module.net.layers[0].blocks[0].mlp
                mlp.fc1.weight = nn.Parameter(mlp.fc1.weight[:10].detach().clone())
                mlp.fc1.bias = nn.Parameter(mlp.fc1.bias[:10].detach().clone())
                mlp.fc2.weight = nn.Parameter(mlp.fc2.weight[:, :10].detach().clone())
                trainer.strategy.setup_optimizers(trainer)
                self.before = mlp.fc1.weight.detach().clone()

    shrink = Shrink()
    module = classifier()
    trainer(2, shrink, limit_train_batches=2).fit(module, datamodule=digits())
    weight = module.net.layers[0].blocks[0].mlp.fc1.weight
    assert weight.shape == (10, 24)
    assert not torch.equal(weight, shrink.before)


# Mixing


def test_mixing_is_a_function_of_seed_epoch_and_batch() -> None:
    module = classifier(mixing=MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0), label_smoothing=0.1)
    labels = torch.tensor([0, 1, 2, 3])
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    first, targets = module._mix(IMAGES, labels, 5)
    again, _ = module._mix(IMAGES, labels, 5)
    other, _ = module._mix(IMAGES, labels, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.allclose(targets.sum(-1), torch.ones(4))
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_an_odd_batch_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a batch of 3 images"):
        classifier(mixing=MixingConfig(mixup_alpha=1.0))._mix(IMAGES[:3], torch.zeros(3, dtype=torch.int64), 0)


# Distillation


def test_distillation_loss_is_zero_only_for_the_teacher_and_scales_with_t() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(8, 10, generator=generator) for _ in range(2))
    assert distillation_loss(teacher, teacher, 2.0) == pytest.approx(0, abs=1e-6)
    p, q = (torch.softmax(logits / 2, -1) for logits in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(student, teacher, 2.0) == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.manual_seed(5)
    torch.save(create_model("SwinTransformer", num_classes=10, **SWIN).state_dict(), path)
    return path


def teacher_state(module: CompressibleClassifier) -> dict[str, torch.Tensor]:
    assert module.teacher is not None
    return {key: tensor.clone() for key, tensor in module.teacher.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_teacher_is_the_initial_network_through_training_and_resume(tmp_path: Path, weights: Path) -> None:
    options: dict[str, Any] = {"limit_train_batches": 3, "limit_val_batches": 0}
    module = classifier(checkpoint_path=weights, distillation=DistillationConfig(temperature=2.0))
    initial = {key: tensor.clone() for key, tensor in module.net.state_dict().items()}

    class TeacherIsFrozen(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            assert not module.teacher.training
            optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert not optimized & {id(parameter) for parameter in module.teacher.parameters()}

    fitting = trainer(1, TeacherIsFrozen(), **options)
    fitting.fit(module, datamodule=digits())
    assert same(teacher_state(module), initial)
    assert not same(module.net.state_dict(), initial)
    fitting.save_checkpoint(tmp_path / "first.ckpt")

    # resumed without the weights at hand: random at first, then all from the checkpoint
    resumed = classifier(distillation=DistillationConfig(temperature=2.0))
    trainer(2, **options).fit(resumed, datamodule=digits(), ckpt_path=tmp_path / "first.ckpt")
    assert same(teacher_state(resumed), initial)

    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "first.ckpt")
    assert loaded.teacher_taken
    assert same(teacher_state(loaded), initial)
    without = CompressibleClassifier.load_from_checkpoint(tmp_path / "first.ckpt", distillation=None)
    assert without.teacher is None
    assert torch.equal(logits_of(without), logits_of(module))


def test_distillation_can_be_added_to_a_checkpoint(tmp_path: Path, weights: Path) -> None:
    module = classifier(checkpoint_path=weights)
    fitting = trainer(1, limit_train_batches=2, limit_val_batches=0)
    fitting.fit(module, datamodule=digits())
    fitting.save_checkpoint(tmp_path / "plain.ckpt")
    student = CompressibleClassifier.load_from_checkpoint(tmp_path / "plain.ckpt", distillation={"weight": 1.0})
    assert not student.teacher_taken
    trainer(1, limit_train_batches=1, limit_val_batches=0).fit(student, datamodule=digits())
    assert same(teacher_state(student), dict(module.net.state_dict()))


def test_a_later_start_takes_the_trained_network() -> None:
    taken: list[bool] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            taken.append(module.teacher_taken)
            self.net = {key: tensor.clone() for key, tensor in module.net.state_dict().items()}
            if trainer.current_epoch == 0:
                self.after_first = self.net

    watch = Watch()
    module = classifier(distillation=DistillationConfig(start_epoch=1))
    trainer(2, watch, limit_train_batches=2, limit_val_batches=0).fit(module, datamodule=digits())
    assert taken == [False, True]
    assert same(teacher_state(module), watch.after_first)


def test_a_useless_teacher_is_refused() -> None:
    class Epochs(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            raise AssertionError("training has begun")

    with pytest.raises(ValueError, match="random initial weights"):
        trainer(1, Epochs()).fit(classifier(distillation=DistillationConfig()), datamodule=digits())
    with pytest.raises(ValueError, match="there is no teacher"):
        classifier().take_teacher()
    cut = classifier(distillation=DistillationConfig())
    cut.net.head.fc = nn.Linear(48, 9)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="compressed already"):
        cut.take_teacher()


# Options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizationConfig(lr=0), r"OptimizationConfig\.lr=0: it has to be a finite"),
        (lambda: OptimizationConfig(weight_decay=-1), "weight_decay=-1"),
        (lambda: OptimizationConfig(warmup_epochs=-1), "warmup_epochs=-1"),
        (lambda: OptimizationConfig(lr=1e-3, min_lr=1e-2), r"min_lr=0\.01: it has to be 0 to lr"),
        (lambda: OptimizationConfig(betas=(0.9, 1.0)), r"betas=\(0\.9, 1\.0\)"),
        (lambda: MixingConfig(mixup_alpha=-0.1), r"MixingConfig\.mixup_alpha"),
        (lambda: MixingConfig(probability=1.1), r"MixingConfig\.probability"),
        (lambda: DistillationConfig(weight=0), r"DistillationConfig\.weight"),
        (lambda: DistillationConfig(temperature=0), r"DistillationConfig\.temperature"),
        (lambda: DistillationConfig(start_epoch=-1), r"DistillationConfig\.start_epoch"),
        (lambda: classifier(num_classes=1), "num_classes=1: it has to be 2 or more"),
        (lambda: classifier(label_smoothing=1.0), "label_smoothing=1.0"),
        (lambda: classifier(model_kwargs={"num_classes": 3}), "model_kwargs holds num_classes"),
        (lambda: classifier(optimization={"learning_rate": 1}), "unknown option learning_rate; it has lr"),
        (lambda: classifier(model="swine"), "unknown model 'swine'"),
    ],
)
def test_bad_options_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_data_with_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="the data has 10 classes, the model num_classes=4"):
        trainer().validate(classifier(num_classes=4), datamodule=digits(), verbose=False)


@pytest.fixture
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where it is given `args` beside the arguments of pytest."""
    monkeypatch.setattr("sys.argv", ["pytest"])


@pytest.mark.usefixtures("_no_arguments")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, for what LightningCLI calls
def test_it_runs_from_a_command_line(tmp_path: Path) -> None:
    model = {"--model.model": "SwinTransformer", "--model.num_classes": "10", "--model.optimization.lr": "0.002"}
    model |= {f"--model.model_kwargs.{key}": str(value) for key, value in SWIN.items()}
    model |= {"--model.distillation.start_epoch": "1", "--model.mixing.mixup_alpha": "0.2"}
    quiet = ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
    run = {"max_epochs": "1", "limit_train_batches": "1", "limit_val_batches": "1", "accelerator": "cpu"}
    run |= dict.fromkeys(quiet, "false")
    options = {**model, **{f"--trainer.{key}": value for key, value in run.items()}}
    options |= {"--data.augmentation.shift_px": "1", "--data.preprocessing.resize": "32"}
    options |= {"--data.preprocessing.height": "32", "--data.preprocessing.width": "32"}
    arguments = ["fit", *(f"{key}={value}" for key, value in options.items())]
    cli = LightningCLI(
        CompressibleClassifier, Digits, args=arguments, save_config_callback=None, seed_everything_default=0
    )
    assert cli.datamodule.augmentation.shift_px == 1
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "cli.ckpt")
    assert loaded.optimization == dataclasses.replace(OptimizationConfig(), lr=0.002)
    assert loaded.distillation == DistillationConfig(start_epoch=1)
    assert torch.equal(logits_of(loaded), logits_of(cli.model))


@pytest.mark.usefixtures("_no_arguments")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bad_option_on_the_command_line_is_named() -> None:
    arguments = ["fit", "--model.model=SwinTransformer", "--model.num_classes=10", "--model.optimization.lr=-1"]
    with pytest.raises(ValueError, match=r"OptimizationConfig\.lr=-1"):
        LightningCLI(
            CompressibleClassifier, Digits, args=arguments, save_config_callback=None, seed_everything_default=0
        )

"""One network, one path, one record: modules with several networks, hooks of one's own, averages beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from support.callback_cases import greedy, make_trainer, vit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.checkpoint.hooks import CompressionMixin, keep_record, restore_from_checkpoint
from swincompress_pl.checkpoint.record import CHECKPOINT_KEY
from swincompress_pl.cli import main
from swincompress_pl.history import history_of
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.pruning.structure.weight_masks import register_masks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FC1 = "blocks.0.mlp.fc1.weight"


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (16, 3, 16, 16), generator=generator)
    return DataLoader(TensorDataset((pixels / 255 - 0.5) / 0.25, torch.arange(16) % 3), 8)


class Own(LightningModule):
    """A user's own module: all its networks answer together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make()

    def make(self) -> None:
        self.net = vit()

    def networks(self) -> list[nn.Module]:
        return [self.net]

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in self.networks()]).sum(0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Two(Own):
    def make(self) -> None:
        self.a, self.b = vit(), vit()

    def networks(self) -> list[nn.Module]:
        return [self.a, self.b]


class Listed(Own):
    def make(self) -> None:
        self.nets = nn.ModuleList([vit(), vit()])

    def networks(self) -> list[nn.Module]:
        return list(self.nets)


class Mixed(CompressionMixin, Two):
    model_attribute = "a"


class Unnamed(CompressionMixin, Two):
    """Its model_attribute is "net", which it does not hold."""


class Dotted(CompressionMixin, Own):
    model_attribute = "model.backbone"

    def make(self) -> None:
        self.model = nn.ModuleDict({"backbone": vit()})

    def networks(self) -> list[nn.Module]:
        return [self.model["backbone"]]


def qat(**options: Any) -> QuantizationAwareTraining:
    preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3}
    arguments = {"start_epoch": 0, "method": "max", "calibration_images": 8, "preprocessing": preprocessing}
    return QuantizationAwareTraining(**arguments | options)


def fit(module: LightningModule, path: Path, *callbacks: Callback, epochs: int = 1, **options: Any) -> Path:
    """The checkpoint of a fit."""
    keep = ModelCheckpoint(path.parent, path.stem, enable_version_counter=False, **options)
    make_trainer(path.parent, epochs, *callbacks, keep).fit(module, loader(), loader())
    return path


def validated(module: LightningModule, path: Path, *callbacks: Callback) -> LightningModule:
    """`module` as a trainer loads it."""
    make_trainer(path.parent, 1, *callbacks).validate(module, loader(), ckpt_path=path, verbose=False)
    return module


def written(module: LightningModule, path: Path, **options: Any) -> Path:
    """A checkpoint of `module` as a trainer writes it outside of a fit."""
    trainer = make_trainer(path.parent, 1)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, **options)
    return path


def equal(one: LightningModule, other: LightningModule) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("kind", "callbacks"),
    [
        (Two, lambda: [greedy(model_attribute="a"), qat(model_attribute="b")]),
        (Mixed, lambda: [greedy(model_attribute="a"), qat(model_attribute="b")]),
        (Unnamed, lambda: [greedy(model_attribute="a"), qat(model_attribute="b")]),
        (Listed, lambda: [greedy(model_attribute="nets.0"), qat(model_attribute="nets.1")]),
        (Dotted, lambda: [greedy(model_attribute="model.backbone"), qat(model_attribute="model.backbone")]),
    ],
)
def test_each_network_comes_back(tmp_path: Path, kind: Any, callbacks: Callable[[], list[Any]]) -> None:
    module = kind()
    path = fit(module, tmp_path / "x.ckpt", *callbacks())
    assert equal(validated(kind(), path, *callbacks()), module)
    if issubclass(kind, CompressionMixin):
        assert equal(kind.load_from_checkpoint(path), module)


def test_a_file_of_one_network_reads_as_before_and_one_of_version_0_1_loads(tmp_path: Path) -> None:
    module = Mixed()
    checkpoint = torch.load(fit(module, tmp_path / "x.ckpt", greedy(model_attribute="a")), weights_only=True)
    record = checkpoint[CHECKPOINT_KEY]
    assert (record["version"], record["network"]) == (1, "a")
    assert record["history"] == history_of(module.a)
    old = tmp_path / "old.ckpt"
    torch.save(checkpoint | {CHECKPOINT_KEY: {"version": 1, "history": record["history"]}}, old)
    assert equal(Mixed.load_from_checkpoint(old), module)
    assert equal(validated(Two(), old, greedy(model_attribute="a")), module)
    with pytest.raises(ValueError, match=r"does not say which network.*'a', 'b' to choose from"):
        validated(Two(), old, greedy(model_attribute="a"), qat(model_attribute="b"))


def test_what_was_compressed_by_hand_is_recorded_where_it_is(tmp_path: Path) -> None:
    module = Mixed()
    register_masks(module.b, [FC1])
    loaded = Mixed.load_from_checkpoint(written(module, tmp_path / "x.ckpt"))
    assert equal(loaded, module)
    assert history_of(loaded.b) == [{"mask": [FC1]}]
    loaded.on_load_checkpoint(torch.load(written(Mixed(), tmp_path / "plain.ckpt"), weights_only=True))
    assert history_of(loaded.b) == []  # and is undone where it is not


def test_a_record_of_a_network_that_is_not_there_is_refused(tmp_path: Path) -> None:
    module = Mixed()
    register_masks(module.a, [FC1])
    path = written(module, tmp_path / "x.ckpt")

    class Other(CompressionMixin, Own):
        pass

    with pytest.raises(ValueError, match=r"record is of a network at 'a', and Other holds none there; it holds net"):
        Other.load_from_checkpoint(path)


@pytest.mark.parametrize(
    "record", [{"version": 2, "networks": []}, {"version": 1}, {"version": 2, "networks": {3: {}}}]
)
def test_a_damaged_record_is_refused(record: Any) -> None:
    with pytest.raises(ValueError, match="the compression record"):
        Mixed().on_load_checkpoint({"state_dict": {}, CHECKPOINT_KEY: record})


@pytest.mark.parametrize("places", [("b", "b.0"), ("a", "b"), ("b.0", "b")])
def test_two_names_of_one_network_or_a_part_of_it_are_refused(tmp_path: Path, places: tuple[str, str]) -> None:
    class Overlapping(Two):
        def make(self) -> None:
            self.a = vit()
            self.b = nn.Sequential(vit()) if "b.0" in places else self.a

    first, second = places
    trainer = make_trainer(tmp_path, 1, greedy(model_attribute=first), qat(model_attribute=second))
    with pytest.raises(ValueError, match="both are to be compressed"):
        trainer.fit(Overlapping(), loader(), loader())


# What a user's own hooks do to the checkpoint


class Forgets(CompressionMixin, Own):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["mine"] == 1


class Replaces(CompressionMixin, Own):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        kept = {key: checkpoint[key] for key in ("state_dict", "pytorch-lightning_version")}
        checkpoint.clear()
        checkpoint.update(kept)


class Foreign:
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["foreign"] = 1


class Shadowed(Foreign, CompressionMixin, Own):
    pass


class Inherits(Forgets):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        assert history_of(self.net) == [{"mask": [FC1]}]


class Removes(Own):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.pop(CHECKPOINT_KEY, None)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", [Forgets, Replaces, Shadowed, Inherits, Removes])
def test_no_hook_of_one_s_own_loses_the_record(tmp_path: Path, kind: Any, weights_only: bool) -> None:
    module = kind()
    register_masks(module.net, [FC1])
    keep_record(module)
    path = written(module, tmp_path / "x.ckpt", weights_only=weights_only)
    if issubclass(kind, CompressionMixin):
        assert equal(kind.load_from_checkpoint(path), module)
    fresh = kind()
    keep_record(fresh)
    checkpoint = torch.load(path, weights_only=True)
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert equal(fresh, module)


def test_a_classifier_with_hooks_that_forget_keeps_its_teacher_and_its_input() -> None:
    class Mine(CompressibleClassifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            pass

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            pass

    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4}
    module, other = (Mine("vit", 3, model_kwargs=arguments) for _ in range(2))
    module.input_description = {"class_names": ["a", "b", "c"]}
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert other.input_description == module.input_description


@pytest.mark.parametrize("base", [LightningModule, Own])
def test_the_mixin_behind_lightning_s_module_is_refused(base: Any) -> None:
    with pytest.raises(TypeError, match=r"write class Wrong\(CompressionMixin, \.\.\.\)"):
        type("Wrong", (base, CompressionMixin), {})


def test_a_network_restored_by_hand_is_recorded_again(tmp_path: Path) -> None:
    module, other = Own(), Own()
    register_masks(module.net, [FC1])
    keep_record(module)
    restore_from_checkpoint(other, written(module, tmp_path / "x.ckpt"))
    again = torch.load(written(other, tmp_path / "again.ckpt"), weights_only=True)
    assert again[CHECKPOINT_KEY]["history"] == [{"mask": [FC1]}]


# Averages


class Restorable(CompressionMixin, Own):
    pass


class Seen(Callback):
    """The module's tensors when training goes on."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}


@pytest.mark.parametrize(("average", "compress"), [(EMAWeightAveraging, greedy), (WeightAveraging, qat)])
def test_averaged_files_load_with_and_without_the_average(tmp_path: Path, average: Any, compress: Any) -> None:
    """Also where no callback of ours is in the fit: the average takes the form of what the record brought."""
    before = fit(Restorable(), tmp_path / "before.ckpt", compress())
    path = fit(Restorable.load_from_checkpoint(before), tmp_path / "averaged.ckpt", average(), epochs=1)
    saved = torch.load(path, weights_only=True)
    loaded = Restorable.load_from_checkpoint(path)
    for place, callbacks in (("current_model_state", [average()]), ("state_dict", [])):
        seen = Seen()
        trainer = make_trainer(tmp_path, 2, *callbacks, seen)
        trainer.fit(Restorable(), loader(), loader(), ckpt_path=path)
        assert seen.state.keys() == saved[place].keys()
        assert all(torch.equal(seen.state[key], value) for key, value in saved[place].items())
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in saved["state_dict"].items())


def test_averages_of_a_compiled_network_go_on_uncompiled(tmp_path: Path) -> None:
    module = Restorable()
    module.net = torch.compile(module.net, backend="eager")
    path = fit(module, tmp_path / "x.ckpt", EMAWeightAveraging())
    make_trainer(tmp_path, 2, EMAWeightAveraging()).fit(Restorable(), loader(), loader(), ckpt_path=path)


# The command line


class Exported(CompressionMixin, Two):
    """For --model-class."""


def test_the_network_to_export_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [greedy(model_attribute="a"), qat(model_attribute="b")]
    one = fit(Exported(), tmp_path / "one.ckpt", *callbacks)
    module = Exported.load_from_checkpoint(one)
    output = str(tmp_path / "x.safetensors")
    mine = ["-o", output, "--model-class", f"{__name__}.Exported", "--reference-check", "0"]
    assert main(["export", str(one), *mine]) == 0  # one is quantized
    assert main(["export", str(one), *mine, "--model-attribute", "c"]) != 0
    assert "--model-attribute c: Exported has no network there" in capsys.readouterr().err
    assert main(["export", str(one), *mine, "--model-attribute", "a"]) != 0
    assert "is not quantized" in capsys.readouterr().err
    two = fit(module, tmp_path / "two.ckpt", qat(model_attribute="a"))
    assert main(["export", str(two), *mine]) != 0
    assert "holds the networks" in capsys.readouterr().err
    assert main(["export", str(two), *mine, "--model-attribute", "a"]) == 0
    assert main(["inspect", str(two)]) == 0
    shown = capsys.readouterr().out
    assert "compression of a:" in shown
    assert "compression of b:" in shown

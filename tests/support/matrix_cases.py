"""Modules, loaders and ways to compress, each with each: fitted, resumed, loaded, tested, predicted and exported.

A cell is right when the numbers of right answers agree to the image: what the trainer validated, and what the network
(or, where it is quantized, the engine on raw pixels) gives for the validation images, computed here without the module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

from swincompress_pl import accel
from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.models import CompressibleClassifier, CompressionMixin, create_model
from swincompress_pl.quant import QuantizedNetwork

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
CLASSES, TRAINING_IMAGES, VALIDATION_IMAGES = 4, 32, 40
FORMS = ("tuple", "dict", "combined", "uint8", "stream")
COMPRESSIONS = ("structured", "weights", "qat", "both")
ACTIONS = ("fit", "resume", "load_from_checkpoint", "test", "predict", "export")


def pixels_and_labels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, 16, 16) and labels: a coarse pattern per class and so much noise that some are taken for others."""
    labels = torch.arange(count) % CLASSES
    pattern = torch.randint(0, 256, (CLASSES, 3, 4, 4), generator=torch.Generator().manual_seed(9)).float()
    images = functional.interpolate(pattern, (16, 16))[labels]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) * 250
    return (images + noise).round().clamp(0, 255).to(torch.uint8), labels


def normalized(images: Tensor) -> Tensor:
    """Of uint8 pixels, or of values in [0, 1]."""
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return (unit - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# Networks that have learned something, made once


@functools.cache
def trained_state(num_classes: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network: nn.Module = create_model("vit", num_classes=num_classes, **VIT)
    head = nn.Linear(32, CLASSES) if num_classes == 0 else nn.Identity()
    both = nn.Sequential(network, head)
    pixels, labels = pixels_and_labels(256, seed=1)
    optimizer = torch.optim.Adam(both.parameters(), lr=3e-3)
    for start in range(0, 256 * 6, 64):
        part = slice(start % 256, start % 256 + 64)
        optimizer.zero_grad()
        functional.cross_entropy(both(normalized(pixels[part])), labels[part]).backward()
        optimizer.step()
    return {key: value.detach() for key, value in both.state_dict().items()}


def network(num_classes: int = CLASSES) -> nn.Module:
    made: nn.Module = create_model("vit", num_classes=num_classes, **VIT)
    state = trained_state(num_classes)
    made.load_state_dict({key[2:]: value for key, value in state.items() if key.startswith("0.")})
    return made


# Modules


class _Module(CompressionMixin, LightningModule):
    """What the modules of a user have in common. Where images are normalized is what they differ in."""

    normalizes = False  # the module does, so its loaders give pixels in [0, 1]

    def __init__(self, form: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.form = form
        self.make()

    def make(self) -> None:
        self.net = network()

    def logits(self, images: Tensor) -> Tensor:
        result: Tensor = network_of(self, self.model_attribute)(images)
        return result

    def unpacked(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, dict):
            return (batch["image"], batch["label"]) if "image" in batch else tuple(batch["first"][:2])  # type: ignore[return-value]
        return batch[0], batch[1]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.form != "uint8" or self.normalizes:
            return batch
        return [normalized(batch[0]), batch[1]]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self.unpacked(batch)
        return functional.cross_entropy(self.logits(images), labels)

    def _right(self, batch: Any) -> tuple[Tensor, int]:
        images, labels = self.unpacked(batch)
        return (self.logits(images).argmax(1) == labels).float().mean(), len(labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        right, count = self._right(batch)
        self.log("val/top1", right, batch_size=count)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        right, count = self._right(batch)
        self.log("test/top1", right, batch_size=count)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.logits(self.unpacked(batch)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Own(_Module):
    pass


class InForward(_Module):
    normalizes = True

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.net(normalized(images))
        return result

    def logits(self, images: Tensor) -> Tensor:
        result: Tensor = self(images)
        return result


class OnDevice(_Module):
    normalizes = True

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict) and "image" not in batch:  # of a CombinedLoader
            return {key: [normalized(images), labels] for key, (images, labels) in batch.items()}
        images, labels = self.unpacked(batch)
        return (
            {"image": normalized(images), "label": labels} if isinstance(batch, dict) else [normalized(images), labels]
        )


class InStep(_Module):
    normalizes = True

    def unpacked(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = super().unpacked(batch)
        return normalized(images), labels


class HeadOutside(_Module):
    def make(self) -> None:
        self.net, self.head = network(0), nn.Linear(32, CLASSES)
        self.head.load_state_dict({k[2:]: v for k, v in trained_state(0).items() if k.startswith("1.")})

    def logits(self, images: Tensor) -> Tensor:
        result: Tensor = self.head(super().logits(images))
        return result


class Nested(_Module):
    model_attribute = "model.backbone"

    def make(self) -> None:
        self.model = nn.Module()
        self.model.backbone = network()


class InList(_Module):
    model_attribute = "nets.0"

    def make(self) -> None:
        self.nets = nn.ModuleList([network()])


class Configured(_Module):
    def make(self) -> None:
        pass

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network()


class Classifier(CompressibleClassifier):
    normalizes = False

    def __init__(self, form: str, **kwargs: Any) -> None:
        super().__init__("vit", CLASSES, model_kwargs=VIT)
        self.hparams.clear()
        self.save_hyperparameters({"form": form})
        self.form = form
        self.net.load_state_dict(network().state_dict())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict) and "image" in batch:
            return [batch["image"], batch["label"]]
        return [normalized(batch[0]), batch[1]] if self.form == "uint8" else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["first"] if isinstance(batch, dict) else batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        result: Tensor = self(batch[0])
        return result

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


MODULES: dict[str, type[Any]] = {
    "CompressibleClassifier": Classifier,
    "own module": Own,
    "normalizing in forward": InForward,
    "normalizing on the device": OnDevice,
    "normalizing in the step": InStep,
    "head outside": HeadOutside,
    "nested": Nested,
    "in a list": InList,
    "configure_model": Configured,
}


# Loaders


class _Images(Dataset[Any]):
    def __init__(self, count: int, seed: int, form: str, normalizes: bool) -> None:
        pixels, self.labels = pixels_and_labels(count, seed)
        self.form = form
        unit = pixels.float() / 255
        self.images = pixels if form == "uint8" else unit if normalizes else normalized(pixels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        pair = self.images[index], self.labels[index]
        return dict(zip(("image", "label"), pair, strict=True)) if self.form == "dict" else pair


class _Stream(IterableDataset[Any]):
    def __init__(self, images: _Images) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Any]:
        return (self.images[index] for index in range(len(self.images)))


def loaders(form: str, normalizes: bool) -> tuple[Any, DataLoader[Any]]:
    """For training and validation."""
    images, validation = (
        _Images(count, seed, form, normalizes) for count, seed in ((TRAINING_IMAGES, 2), (VALIDATION_IMAGES, 3))
    )
    if form == "stream":
        return DataLoader(_Stream(images), 8), DataLoader(_Stream(validation), 16)
    training: Any = DataLoader(images, 8)
    if form == "combined":
        training = CombinedLoader({"first": training, "second": DataLoader(images, 8)}, "min_size")
    return training, DataLoader(validation, 16)


# Fits


def callbacks(compression: str, model_attribute: str) -> list[Callback]:
    searches: dict[str, Callable[[], Callback]] = {
        "structured": lambda: _pruning(model_attribute, kinds=("mlp",)),
        "weights": lambda: _pruning(model_attribute, granularity="weight"),
        "qat": lambda: _qat(model_attribute),
    }
    names = ("structured", "qat") if compression == "both" else (compression,)
    return [searches[name]() for name in names]


def _pruning(model_attribute: str, **options: Any) -> AdaptiveIterativePruning:
    return AdaptiveIterativePruning(
        tolerance=30.0, step=0.25, max_rounds=1, round_to=1, model_attribute=model_attribute, **options
    )


def _qat(model_attribute: str) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(
        start_epoch=1, calibration_images=16, method="max", model_attribute=model_attribute
    )


class Cell:
    """One module, loader and compression, fitted for two epochs with a checkpoint after each."""

    def __init__(self, module: str, compression: str, form: str, folder: Path) -> None:
        self.kind, self.compression, self.form, self.folder = MODULES[module], compression, form, folder
        self.module = self.kind(form)
        self.attribute: str = self.module.model_attribute
        self.trainer = self._trainer("whole")
        self._fit(self.module, self.trainer)
        self.validated = self.count(self.trainer.callback_metrics["val/top1"])

    def _trainer(self, name: str, max_epochs: int = 2) -> Trainer:
        keeper = ModelCheckpoint(self.folder / name, "{epoch}", save_top_k=-1)
        return Trainer(
            max_epochs=max_epochs,
            accelerator="cpu",
            devices=1,
            callbacks=[*callbacks(self.compression, self.attribute), keeper],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=self.folder,
        )

    def _fit(self, module: LightningModule, trainer: Trainer, **options: Any) -> None:
        training, validation = loaders(self.form, self.kind.normalizes)
        trainer.fit(module, training, validation, **options)

    @staticmethod
    def count(share: Any) -> int:
        """Of right answers."""
        return round(float(share) * VALIDATION_IMAGES)

    def right_without_module(self, module: LightningModule) -> tuple[int, Tensor]:
        """Right answers for the raw validation images, and the answers: of the engine where there are integers."""
        pixels, labels = pixels_and_labels(VALIDATION_IMAGES, seed=3)
        compressed = network_of(module, self.attribute)
        if isinstance(compressed, QuantizedNetwork):
            engine = accel.load(accel.export(compressed, self.folder / "engine.safetensors"), threads=1)
            output = torch.from_numpy(engine(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())))
        else:
            with torch.no_grad():
                output = compressed.eval()(normalized(pixels))
        with torch.no_grad():
            logits = module.head(output) if isinstance(module, HeadOutside) else output  # type: ignore[operator]
        return int((logits.argmax(1) == labels).sum()), logits

    def check(self, action: str) -> str:
        """ "right", or what was refused. AssertionError for what is wrong."""
        actions = {
            "fit": self._fit_is_right,
            "resume": self._resume,
            "load_from_checkpoint": self._load_from_checkpoint,
            "test": self._test,
            "predict": self._predict,
            "export": self._export,
        }
        result = actions[action]()
        return "right" if result is None else str(result)

    def _fit_is_right(self) -> None:
        right, _ = self.right_without_module(self.module)
        assert right == self.validated
        assert self.validated > VALIDATION_IMAGES / 2  # of four classes
        self._check_compressed()

    def _check_compressed(self) -> None:
        compressed = network_of(self.module, self.attribute)
        assert isinstance(compressed, QuantizedNetwork) == (self.compression in ("qat", "both"))
        inner: Any = compressed.network if isinstance(compressed, QuantizedNetwork) else compressed
        hidden = inner.blocks[0].mlp.fc1
        assert (hidden.out_features < 128) == (self.compression in ("structured", "both"))
        assert bool((hidden.weight == 0).any()) == (self.compression == "weights")

    def _resume(self) -> None:
        again, trainer = self.kind(self.form), self._trainer("resumed")
        self._fit(again, trainer, ckpt_path=self.folder / "whole" / "epoch=0.ckpt", weights_only=False)
        mine, theirs = self.module.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert self.count(trainer.callback_metrics["val/top1"]) == self.validated

    def _load_from_checkpoint(self) -> None:
        loaded = self.kind.load_from_checkpoint(self.folder / "whole" / "epoch=1.ckpt").eval()
        right, logits = self.right_without_module(loaded)
        assert right == self.validated
        assert torch.equal(logits, self.right_without_module(self.module)[1])

    def _test(self) -> None:
        (found,) = self.trainer.test(self.module, loaders(self.form, self.kind.normalizes)[1], verbose=False)
        assert self.count(found["test/top1"]) == self.validated

    def _predict(self) -> None:
        found = self.trainer.predict(self.module, loaders(self.form, self.kind.normalizes)[1])
        logits = torch.cat(found)  # type: ignore[arg-type]  # of tensors
        assert torch.allclose(logits, self.right_without_module(self.module)[1], atol=1e-4)

    def _export(self) -> str | None:
        try:
            path = accel.export(network_of(self.module, self.attribute), self.folder / "exported.safetensors")
        except TypeError as error:
            return "refused: not quantized" if "not quantized" in str(error) else f"refused: {error}"
        assert self.compression in ("qat", "both")
        engine = accel.load(path, threads=1)
        preprocessing = engine.program.input.preprocessing
        assert np.allclose(preprocessing["mean"], MEAN, atol=1e-4)
        assert np.allclose(preprocessing["std"], STD, atol=1e-4)
        assert self.right_without_module(self.module)[0] == self.validated
        return None

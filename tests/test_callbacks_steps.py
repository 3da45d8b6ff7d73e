"""What a search and calibration see is what the module's own validation step gives to its network, and what they count
is what the step makes of the answer."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from support.callback_cases import make_trainer
from support.matrix_cases import CLASSES, MEAN, STD, Own, network, normalized, pixels_and_labels, trained_state
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.callbacks.answers import watched
from swincompress_pl.callbacks.rows import Rows
from swincompress_pl.callbacks.scoring import images_and_labels
from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.models import create_model
from swincompress_pl.quant import QuantizedNetwork

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The `srun`"),
]
COUNT = 40


def unit_loader(seed: int = 3, batch_size: int = 16, count: int = COUNT) -> DataLoader[Any]:
    """Pixels in [0, 1], which no network here takes."""
    pixels, labels = pixels_and_labels(count, seed)
    return DataLoader(TensorDataset(pixels.float() / 255, labels), batch_size)


class Base(LightningModule):
    """The network alone; what normalizes and what is made of its answer is for the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.build()

    def build(self) -> nn.Module:
        return network()

    def answer(self, images: Tensor) -> Tensor:
        result: Tensor = self.net(normalized(images))
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.answer(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        right = (self.answer(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val/top1", right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class BeforeTransfer(Base):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [normalized(batch[0]), batch[1]]

    def answer(self, images: Tensor) -> Tensor:
        result: Tensor = self.net(images)
        return result


class InTransfer(BeforeTransfer):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [normalized(batch[0]).to(device), batch[1].to(device)]


class BatchStart(BeforeTransfer):
    """Changes the batch in place, before the step."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.answer(normalized(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch[0] = normalized(batch[0])
        super().validation_step(batch, batch_idx)


class InBatchHook(BeforeTransfer):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]  # Lightning allows it
        batch[0] = normalized(batch[0])

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        batch[0] = normalized(batch[0])


class Probabilities(Base):
    def answer(self, images: Tensor) -> Tensor:
        return super().answer(images).softmax(1)


class HeadInTheStep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(32, CLASSES)
        self.classifier.load_state_dict({k[2:]: v for k, v in trained_state(0).items() if k.startswith("1.")})

    def build(self) -> nn.Module:
        return network(0)

    def answer(self, images: Tensor) -> Tensor:
        result: Tensor = self.classifier(super().answer(images))
        return result


class Prior(Base):
    """What it adds decides most images."""

    def answer(self, images: Tensor) -> Tensor:
        return super().answer(images) / 3 + torch.tensor([0.0, 4.0, 0.0, 0.0])


class TwoViews(Base):
    def answer(self, images: Tensor) -> Tensor:
        return super().answer(images).softmax(1) + super().answer(images.flip(-1)).softmax(1)


class Crops(Base):
    def answer(self, images: Tensor) -> Tensor:
        crops = torch.stack([images, images.roll(1, -1), images.roll(-1, -2)], 1)
        return super().answer(crops.flatten(0, 1)).unflatten(0, (len(images), 3)).mean(1)


class Parts(Base):
    def answer(self, images: Tensor) -> Tensor:
        net: Any = self.net
        result: Tensor = net.forward_head(net.forward_features(normalized(images)))
        return result


class WithAMetric(Base):
    """Neither argmax nor a loss of its own: torchmetrics has them."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self.answer(batch[0]), batch[1])
        self.log("val/top1", self.accuracy)


class InHalf(BeforeTransfer):
    """A network in bfloat16, which has the loader's images rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.net.bfloat16()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def answer(self, images: Tensor) -> Tensor:
        result: Tensor = self.net(images.bfloat16())
        return result.float()


class Manual(Base):
    """Its training_step steps by itself; nobody else may call it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]  # Lightning allows it
        self.steps += 1
        optimizer: Any = self.optimizers()
        optimizer.step()


class WithATeacher(Base):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def answer(self, images: Tensor) -> Tensor:
        self.teacher(normalized(images))
        return super().answer(images)


DIRECT = [Base, BeforeTransfer, InTransfer, Probabilities, WithAMetric, Manual, WithATeacher]
REPLAYED = [BatchStart, InBatchHook, HeadInTheStep, Prior, TwoViews, Crops, Parts]


def validated(kind: type[Base], tmp_path: Path) -> float:
    """Points, by the trainer itself."""
    trainer = make_trainer(tmp_path, 1)
    (found,) = trainer.validate(kind(), unit_loader(), verbose=False)
    return 100 * found["val/top1"]


def searched(kind: type[Base], tmp_path: Path, **options: Any) -> tuple[AdaptiveIterativePruning, Base, Trainer]:
    settings: dict[str, Any] = {"tolerance": 5.0, "step": 0.25, "round_to": 1, "max_rounds": 1, "kinds": ("mlp",)}
    callback = AdaptiveIterativePruning(**{**settings, **options})
    module, trainer = kind(), make_trainer(tmp_path, 1, callback)
    trainer.fit(module, unit_loader(2), unit_loader())
    return callback, module, trainer


@pytest.mark.parametrize("kind", [*DIRECT, *REPLAYED])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_the_baseline_is_what_the_trainer_validates(tmp_path: Path, kind: type[Base], criterion: str) -> None:
    """And so is what is left: the search's last score is that of the next validation, with nothing learned between."""
    callback, module, trainer = searched(kind, tmp_path, criterion=criterion)
    state = callback.search_state
    assert state is not None
    assert state.score is not None
    assert state.baseline_score == pytest.approx(validated(kind, tmp_path), abs=1e-3)
    assert state.score == pytest.approx(100 * float(trainer.callback_metrics["val/top1"]), abs=1e-3)
    assert state.score >= state.baseline_score - 5
    assert not isinstance(module, Manual) or module.steps == 3


@pytest.mark.parametrize("kind", [each for each in [*DIRECT, *REPLAYED] if each is not Parts])
def test_integers_validate_as_the_floats_did(tmp_path: Path, kind: type[Base]) -> None:
    """Nobody said how the images are normalized: it was found out, and pixels are what the engine takes."""
    callback = QuantizationAwareTraining(start_epoch=0, calibration_images=32, learn_scales=False)
    module, trainer = kind(), make_trainer(tmp_path, 1, callback)
    trainer.fit(module, unit_loader(2), unit_loader())
    quantized = network_of(module, "net")
    assert isinstance(quantized, QuantizedNetwork)
    assert quantized.preprocessing["mean"] == pytest.approx(MEAN, abs=1e-5)
    assert quantized.preprocessing["std"] == pytest.approx(STD, abs=1e-5)
    assert 100 * float(trainer.callback_metrics["val/top1"]) >= validated(kind, tmp_path) - 5.1  # two images


@pytest.mark.filterwarnings("ignore:.*float32.*:UserWarning")
def test_a_network_in_half_precision(tmp_path: Path) -> None:
    pixels, labels = pixels_and_labels(COUNT, 3)
    loader = DataLoader(TensorDataset(normalized(pixels), labels), 16)
    floats = make_trainer(tmp_path, 1).validate(InHalf(), loader, verbose=False)[0]["val/top1"]
    search = AdaptiveIterativePruning(tolerance=5.0, max_rounds=1, criterion="taylor", kinds=("mlp",))
    module, quantization = InHalf(), QuantizationAwareTraining(start_epoch=0, calibration_images=32)
    trainer = make_trainer(tmp_path, 1, search, quantization)
    trainer.fit(module, loader, loader)
    assert search.search_state is not None
    assert search.search_state.baseline_score == pytest.approx(100 * floats, abs=1e-3)
    quantized = network_of(module, "net")
    assert isinstance(quantized, QuantizedNetwork)
    assert quantized.preprocessing["mean"] == pytest.approx(MEAN, abs=1e-5)
    assert float(trainer.callback_metrics["val/top1"]) >= floats - 0.1


def test_parts_of_a_network_cannot_be_quantized(tmp_path: Path) -> None:
    module = Parts()
    with pytest.raises(ValueError, match=r"Parts calls parts of net .*not net itself.*num_classes=0"):
        make_trainer(tmp_path, 2, QuantizationAwareTraining(start_epoch=1)).fit(module, unit_loader(), unit_loader())
    assert module.trainer.global_step == 0


def test_training_with_another_form_than_validation(tmp_path: Path) -> None:
    """A part of the batch that the validation step takes does; else the error names the argument, which then does."""

    class Named(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(list(batch.values()), batch_idx)

    images, labels = unit_loader(2).dataset.tensors  # type: ignore[attr-defined]
    dictionaries = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    training: DataLoader[Any] = DataLoader(dictionaries, 8)  # type: ignore[arg-type]  # a list will do
    with pytest.raises(
        ValueError, match=r"Named.validation_step does not take .*dict with image, label.*calibration_d"
    ):
        make_trainer(tmp_path, 2, QuantizationAwareTraining(start_epoch=1)).fit(Named(), training, unit_loader())
    asked: list[int] = []

    def source(count: int) -> DataLoader[Any]:
        asked.append(count)
        return unit_loader(2)

    for given in (unit_loader(2), source):
        module = Named()
        callback = QuantizationAwareTraining(start_epoch=0, calibration_images=16, calibration_dataloader=given)
        make_trainer(tmp_path, 1, callback).fit(module, training, unit_loader())
        assert isinstance(module.net, QuantizedNetwork)
    assert set(asked) == {16}
    pruning = AdaptiveIterativePruning(tolerance=5.0, criterion="taylor", max_rounds=1, calibration_dataloader=source)
    make_trainer(tmp_path, 1, pruning).fit(Named(), training, unit_loader())

    class Joint(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["second"], batch_idx)

    module = Joint()
    both = CombinedLoader({"first": [torch.zeros(3)] * 5, "second": unit_loader(2)}, "min_size")
    make_trainer(tmp_path, 1, QuantizationAwareTraining(start_epoch=0)).fit(module, both, unit_loader())
    assert isinstance(module.net, QuantizedNetwork)


def test_hooks_of_a_validation_that_never_runs_are_no_hindrance(tmp_path: Path) -> None:
    class Counts(Base):
        def on_validation_start(self) -> None:
            self.batches = len(self.trainer.val_dataloaders)  # type: ignore[arg-type]  # None without validation

    module = Counts()
    make_trainer(tmp_path, 1, QuantizationAwareTraining(start_epoch=0, method="max")).fit(module, unit_loader(2))
    assert isinstance(module.net, QuantizedNetwork)


def test_images_that_do_not_fit_what_is_said_of_them(tmp_path: Path) -> None:
    """Refused before the first epoch where they cannot be pixels, warned of where they could."""
    module = Base()
    callback = QuantizationAwareTraining(start_epoch=1, preprocessing={"mean": [0.5] * 3, "std": [1.0] * 3})
    with pytest.raises(ValueError, match=r"in pixel steps.*the mean and std that they are normalized with"):
        make_trainer(tmp_path, 2, callback).fit(module, unit_loader(), unit_loader())
    assert module.trainer.global_step == 0
    callback = QuantizationAwareTraining(start_epoch=0, preprocessing={"mean": [0.5] * 3, "std": [0.1] * 3})
    with pytest.warns(
        UserWarning, match=r"do not look normalized as preprocessing says.*mean': \[0.485, 0.456, 0.406\]"
    ):
        make_trainer(tmp_path, 1, callback).fit(Base(), unit_loader(), unit_loader())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda net, images: net(images) + torch.rand(len(images), CLASSES) * 99, "would not score the same"),
        (lambda net, images: net(images).mean(), r"makes no logits \(N, classes\)"),
    ],
)
def test_a_step_that_cannot_be_scored_ends_the_fit_before_it_begins(
    tmp_path: Path, answer: Callable[[nn.Module, Tensor], Tensor], message: str
) -> None:
    class Odd(Base):
        def build(self) -> nn.Module:
            return network(0) if "no logits" in message else network()

        def answer(self, images: Tensor) -> Tensor:
            return answer(self.net, normalized(images))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/x", self.answer(batch[0]).max())
            if self.answer(batch[0]).ndim:
                super().validation_step(batch, batch_idx)

    module = Odd()
    callback = AdaptiveIterativePruning(tolerance=5.0, max_rounds=1)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 1, callback, num_sanity_val_steps=0).fit(module, unit_loader(2), unit_loader())
    assert module.trainer.global_step == 0


def test_one_logit_is_two_classes(tmp_path: Path) -> None:
    class Binary(Base):
        def build(self) -> nn.Module:
            torch.manual_seed(1)
            made: nn.Module = create_model(
                "vit", num_classes=1, img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4
            )
            return made

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logit, target = self.answer(batch[0]).squeeze(1), (batch[1] % 2).float()
            self.log("val/loss", functional.binary_cross_entropy_with_logits(logit, target))
            self.log("val/top1", ((logit > 0) == target.bool()).float().mean(), batch_size=len(target))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return functional.binary_cross_entropy_with_logits(self.answer(batch[0])[:, 0], (batch[1] % 2).float())

    callback, _, _ = searched(Binary, tmp_path, tolerance=50.0)
    assert callback.search_state is not None
    assert callback.search_state.baseline_score == pytest.approx(validated(Binary, tmp_path), abs=1e-3)


def test_labels_that_are_no_classes_name_monitor(tmp_path: Path) -> None:
    pixels, labels = pixels_and_labels(16, 1)
    several = DataLoader(TensorDataset(pixels.float() / 255, functional.one_hot(labels)), 8)

    class Multilabel(Base):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/x", functional.binary_cross_entropy_with_logits(self.answer(batch[0]), batch[1].float()))

        training_step = validation_step  # never reached

    module = Multilabel()
    with pytest.raises(ValueError, match=r"no labels that are one class for each image.*pass monitor="):
        make_trainer(tmp_path, 1, AdaptiveIterativePruning(tolerance=1.0)).fit(module, several, several)
    assert module.trainer.global_step == 0


def test_a_module_without_a_validation_step_is_scored_by_its_forward(tmp_path: Path) -> None:
    class Forward(Own):
        validation_step = LightningModule.validation_step
        normalizes = True

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.net(normalized(images))
            return result

    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return unit_loader(2)

        def holdout_dataloader(self) -> DataLoader[Any]:
            return unit_loader()

    callback = AdaptiveIterativePruning(tolerance=5.0, max_rounds=1, step=0.25)
    make_trainer(tmp_path, 1, callback).fit(Forward("uint8"), datamodule=Data())
    assert callback.search_state is not None
    assert callback.search_state.baseline_score == pytest.approx(validated(Base, tmp_path), abs=1e-3)


# Watching a step


@pytest.mark.parametrize(
    "predict",
    [
        lambda z: z.argmax(1),
        lambda z: z.max(1)[1],
        lambda z: torch.topk(z, 2).indices[:, 0],
        lambda z: z.sort(1, descending=True).indices[:, 0],
        lambda z: z.log_softmax(1).exp().argmax(-1),
    ],
)
def test_predictions_and_labels_of_a_step_are_seen(predict: Callable[[Tensor], Tensor]) -> None:
    module, images, labels = Base(), torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    with watched(module, module.net) as step:
        answer = module.answer(images) * 2
        (predict(answer) == labels).float().mean()
    found = step.answer(6)
    assert found is not None
    assert torch.equal(found.argmax(1), answer.argmax(1))
    seen = step.labels([images, labels, torch.arange(6)])
    assert seen is not None
    assert torch.equal(seen, labels)
    assert len(step.calls) == 1
    assert torch.equal(step.calls[0].images, normalized(images))


@dataclasses.dataclass
class Record:
    images: Tensor
    labels: Tensor
    name: str = "one for all"


@pytest.mark.parametrize("kind", [Base, Prior])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_batches_that_are_dataclasses(tmp_path: Path, kind: type[Base], criterion: str) -> None:
    class Records(kind):  # type: ignore[valid-type,misc]  # one of two
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step([batch.images, batch.labels], batch_idx)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step([batch.images, batch.labels], batch_idx)

    def records(seed: int) -> DataLoader[Any]:
        data: Any = unit_loader(seed).dataset
        return DataLoader(data, 16, collate_fn=lambda rows: Record(*map(torch.stack, zip(*rows, strict=True))))

    callback = AdaptiveIterativePruning(tolerance=5.0, max_rounds=1, criterion=criterion)
    make_trainer(tmp_path, 1, callback).fit(Records(), records(2), records(3))
    assert callback.search_state is not None
    assert callback.search_state.baseline_score == pytest.approx(validated(kind, tmp_path), abs=1e-3)


def test_batches_of_any_form_are_taken_apart_and_joined() -> None:
    def batch(first: int) -> dict[str, Any]:
        rows = torch.arange(first, first + 3)
        return {"x": rows.float()[:, None], "more": [rows, {"name": [f"n{i}" for i in rows.tolist()]}], "scale": 2.0}

    rows = Rows(1 << 20)
    rows.add(batch(0), 3)
    assert rows.add(batch(3), 3).tolist() == [3, 4, 5]
    joined = rows.batch([5, 0, 4])
    assert joined["x"].flatten().tolist() == [5.0, 0.0, 4.0]
    assert joined["more"][0].tolist() == [5, 0, 4]
    assert joined["more"][1]["name"] == ["n5", "n0", "n4"]
    assert joined["scale"] == 2.0
    rows.add({**batch(6), "scale": 3.0}, 3)
    with pytest.raises(ValueError, match=r"batch\['scale'\].*differs from batch to batch.*monitor="):
        rows.batch([0, 7])
    with pytest.raises(ValueError, match="holdout_size_bytes=8"):
        Rows(8).add(batch(0), 3)


@pytest.mark.parametrize("batch", [{"image": torch.zeros(1)}, [torch.zeros(1)], torch.zeros(2, 1), OrderedDict()])
def test_a_batch_that_predict_does_not_take_is_named_by_its_type(batch: Any) -> None:
    with pytest.raises(TypeError, match=rf"a batch of type {type(batch).__name__}; for your own predict\(\), tensors"):
        images_and_labels(batch)

"""Scoring by a metric that the module logs: the accuracy itself, and no trace of it in the module's own logging."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from support.callback_cases import Plain, Unmoved, assert_same_state, data, greedy, loader, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric, MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from swincompress_pl.pruning.structure.weight_masks import masked_parameters

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class _Right(Plain):
    """What all modules here share."""

    def right(self, batch: list[Tensor]) -> Tensor:
        return (self.net(batch[0]).argmax(-1) == batch[1]).float()


class Floats(_Right):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", float(self.right(batch).mean()))


class WithoutIndex(_Right):
    def validation_step(self, batch: list[Tensor]) -> None:  # type: ignore[override]  # Lightning allows it
        self.log("val/top1", self.right(batch).mean(), prog_bar=True, batch_size=len(batch[0]))


class Dictionary(_Right):
    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log_dict({"val/top1": self.right(batch).mean(), "val/other": torch.tensor(7.0)}, on_epoch=True)


class AtTheEnd(_Right):
    def on_validation_epoch_start(self) -> None:
        self.answers: list[Tensor] = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.answers.append(self.right(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val/top1", torch.cat(self.answers).mean())


class TorchMetric(_Right):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val/top1", self.accuracy)


class Collection(_Right):
    def __init__(self) -> None:
        super().__init__()
        metrics = {"top1": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3)}
        self.metrics = MetricCollection(metrics, prefix="val/")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.metrics.update(self.net(batch[0]), batch[1])
        self.log_dict(self.metrics)


class ComputedByHand(TorchMetric):
    """Never logged as an object, and reset by hand."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy.update(self.net(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("val/top1", self.accuracy.compute())
        self.accuracy.reset()


MODULES = [
    Floats,
    TorchMetric,
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in (WithoutIndex, Dictionary, AtTheEnd, Collection, ComputedByHand)
    ),
]


def uneven() -> DataLoader[Any]:
    """The last batch is smaller: a mean of the batches' means would not be the mean of the images."""
    return DataLoader(data(11), 4)


@pytest.mark.parametrize("kind", MODULES)
def test_the_metric_that_a_module_logs_decides(tmp_path: Path, kind: type[Plain]) -> None:
    """The search sees the accuracy itself, and validation is logged as it is without the search."""

    def fit(*callbacks: Callback) -> tuple[Plain, list[dict[str, str]]]:
        module, folder = kind(), tmp_path / str(len(callbacks))
        logger = CSVLogger(folder)
        trainer = make_trainer(folder, 2, *callbacks, logger=logger, log_every_n_steps=1)
        trainer.fit(module, loader(), uneven())
        rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        named = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
        return module, [{key: row[key] for key in ("epoch", "val/top1")} for row in named if row["val/top1"]]

    module, rows = fit(greedy(monitor="val/top1", start_epoch=2))  # the search scores nothing: the fits are the same
    plain, expected = fit()
    assert rows == expected
    assert len(rows) == 2
    assert_same_state(dict(module.state_dict()), dict(plain.state_dict()))

    callback = greedy(monitor="val/top1", kinds=("heads",), max_rounds=1, tolerance=1e-3)
    module, rows = fit(callback)
    state = callback.search_state
    assert state is not None
    assert state.baseline_score == pytest.approx(100 * _accuracy(kind(), uneven()), abs=1e-4)
    assert len(rows) == 2
    assert [row["epoch"] for row in rows] == ["0", "1"]
    if not any(step.accepted for step in state.steps):
        assert [row["val/top1"] for row in rows] == [row["val/top1"] for row in expected]


def _accuracy(module: Plain, batches: DataLoader[Any]) -> float:
    module.eval()
    with torch.no_grad():
        right = [module.net(images).argmax(-1) == labels for images, labels in batches]
    return float(torch.cat(right).float().mean())


def test_several_validation_loaders_are_one_holdout(tmp_path: Path) -> None:
    class Two(_Right):
        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
            self.log("val/top1", self.right(batch).mean(), add_dataloader_idx=False)

    callback = greedy(monitor="val/top1", max_rounds=1)
    loaders = [DataLoader(data(8, seed=3), 3), DataLoader(data(16, seed=4), 8)]
    # No validation in this fit: Lightning takes no name for two loaders. So it has not asked for the loaders yet.
    trainer = make_trainer(tmp_path, 1, callback, num_sanity_val_steps=0, check_val_every_n_epoch=2)
    trainer.fit(Two(), loader(), val_dataloaders=loaders)
    assert callback.search_state is not None
    right = sum(_accuracy(Plain(), each) * len(each.dataset) for each in loaders)  # type: ignore[arg-type]  # sized
    assert callback.search_state.baseline_score == pytest.approx(100 * right / 24, abs=1e-4)


def test_the_module_is_validating_and_in_eval_mode(tmp_path: Path) -> None:
    states = set()

    class Watch(_Right):
        def __init__(self) -> None:
            super().__init__()
            self.beside = nn.Dropout(0.5)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            states.add((self.training, self.beside.training, self.trainer.validating, torch.is_grad_enabled()))
            self.log("val/top1", self.right(batch).mean())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert self.training
            assert self.beside.training
            return super().training_step(batch, batch_idx)

    make_trainer(tmp_path, 1, greedy(monitor="val/top1"), num_sanity_val_steps=0, limit_val_batches=2).fit(
        Watch(), loader(), loader()
    )
    assert states == {(False, False, True, False)}


def test_limited_validation_is_a_limited_holdout(tmp_path: Path) -> None:
    """`limit_val_batches` is what makes a trial of a fit quick."""
    for monitor in (None, "val/top1"):
        callback = greedy(monitor=monitor, max_rounds=1)
        module = Floats()
        make_trainer(tmp_path, 1, callback, limit_val_batches=2).fit(module, loader(), DataLoader(data(40), 4))
        assert callback.search_state is not None
        assert callback.search_state.baseline_score == pytest.approx(
            100 * _accuracy(Floats(), DataLoader(TensorDataset(*(t[:8] for t in data(40).tensors)), 4)), abs=1e-4
        )


def test_a_metric_that_is_not_logged_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    module, unmoved = Dictionary(), Unmoved()
    with pytest.raises(ValueError, match=r"monitor='val/acc' is not logged by Dictionary's.*logs val/top1, val/other"):
        make_trainer(tmp_path, 9, greedy(monitor="val/acc", start_epoch=5), unmoved).fit(module, loader(), loader())
    unmoved.check(module)
    assert "train" not in module.stages


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "is nan.*look for NaN weights"),
        (71.25, "is 71.25.*a fraction between 0 and 1"),
        (-0.5, "is -0.5: a fr"),
    ],
)
@pytest.mark.parametrize("granularity", ["structured", "weight"])
def test_a_metric_that_is_no_accuracy_is_refused(tmp_path: Path, value: float, message: str, granularity: str) -> None:
    class Odd(_Right):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            narrower = bool(masked_parameters(self.net)) or any((p == 0).any() for p in self.net.blocks.parameters())
            broken = self.trainer.current_epoch == 1 and narrower
            self.log("val/top1", value if broken else self.right(batch).mean())

    module = Odd()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.01, 0.02)  # only what is masked is 0

    class Late(Unmoved):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_fit_start(trainer, pl_module)

    unmoved = Late()
    callback = greedy(monitor="val/top1", start_epoch=1, granularity=granularity)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 2, unmoved, callback).fit(module, loader(), loader())
    unmoved.check(module)
    assert callback.search_state is None


def test_a_metric_that_is_not_a_mean_is_refused(tmp_path: Path) -> None:
    class Sums(_Right):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val/top1", self.right(batch).mean() / 3, reduce_fx="sum")

    with pytest.raises(
        ValueError, match="val/top1' is logged with reduce_fx='sum', but pruning can only follow a mean"
    ):
        make_trainer(tmp_path, 1, greedy(monitor="val/top1")).fit(Sums(), loader(), loader())


# A validation whole, and without a trace


class Remembers(_Right):
    """The best accuracy so far in five ways, and what a validation leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.best = MulticlassAccuracy(3, average="micro"), MaxMetric()
        self.tracker = MetricTracker(MulticlassAccuracy(3, average="micro"))
        self.best_number, self.history, self.counts = 0.0, list[float](), {"epochs": 0}
        self.register_buffer("best_buffer", torch.zeros(()))
        self.said: list[tuple[float, list[float]]] = []

    def on_validation_epoch_start(self) -> None:
        self.tracker.increment()
        self.counts["epochs"] += 1
        self.started = True

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        assert self.started
        logits = self.net(batch[0])
        self.accuracy.update(logits, batch[1])
        self.tracker.update(logits, batch[1])
        self.log("val/top1", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        now = float(self.accuracy.compute())
        self.best(now)
        self.best_number = max(self.best_number, now)
        self.best_buffer.clamp_(min=now)  # type: ignore[operator]  # a tensor
        self.history.append(now)
        self.log("val/best", self.best.compute())

    def on_train_epoch_end(self) -> None:
        known, best = self.trainer.callback_metrics, self.tracker.best_metric()
        bests = [float(known["val/best"]), self.best_number, float(self.best_buffer), max(self.history), float(best)]  # type: ignore[arg-type]  # numbers
        self.said.append((float(known["val/top1"]), bests))


@pytest.mark.parametrize("monitor", ["val/top1", None])
def test_the_best_so_far_is_the_validations(tmp_path: Path, monitor: str | None) -> None:
    """Trials are no validations: what remembers the best, or all, knows nothing of them."""
    module, callback = Remembers(), greedy(monitor=monitor, step=0.75, start_epoch=1)
    make_trainer(tmp_path, 4, callback, num_sanity_val_steps=0).fit(module, loader(), uneven())
    best = 0.0
    for now, bests in module.said:
        best = max(best, now)
        assert bests == [pytest.approx(best, abs=1e-6)] * 5
    assert module.history == [pytest.approx(now, abs=1e-6) for now, _ in module.said]
    assert module.counts == {"epochs": 4}
    assert module.tracker.n_steps == 4


def test_a_trial_leaves_no_attributes_behind(tmp_path: Path) -> None:
    class Leaves(_Right):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val/top1", self.right(batch).mean())
            if not self.trainer.sanity_checking and self.trainer.current_epoch == 0 and not self.trainer.global_step:
                self.latest = batch
                self.probe = nn.Linear(1, 1)

    module = Leaves()
    callback = greedy(monitor="val/top1", max_rounds=1)
    make_trainer(tmp_path, 1, callback, num_sanity_val_steps=0).fit(module, loader(), uneven())
    assert callback.search_state is not None
    assert not hasattr(module, "latest")
    assert not hasattr(module, "probe")


class _Meter:
    """As timm's AverageMeter."""

    def __init__(self) -> None:
        self.sum, self.count, self.seen = 0.0, 0, list[float]()


def test_meters_and_loggers_know_nothing_of_trials(tmp_path: Path) -> None:
    """A metric outside of the module tree, an object with a sum, a deque; and what a module writes by itself."""

    class Meters(_Right):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = {"a": [MulticlassAccuracy(3, average="micro")]}
            self.meter, self.latest = _Meter(), deque[float](maxlen=3)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.metrics["a"][0].update(self.net(batch[0]), batch[1])
            self.meter.sum += float(self.right(batch).sum())
            self.meter.count += len(batch[0])
            self.meter.seen.append(self.meter.sum)
            self.latest.append(self.meter.sum)
            assert self.logger is not None
            self.logger.log_metrics({"by_hand": 1.0}, step=self.meter.count)

        def on_validation_epoch_end(self) -> None:
            self.log("val/top1", self.meter.sum / self.meter.count)

    for monitor in ("val/top1", None):
        module, logger = Meters(), CSVLogger(tmp_path / str(monitor))
        callback = greedy(monitor=monitor, max_rounds=1)
        trainer = make_trainer(tmp_path, 1, callback, logger=logger, num_sanity_val_steps=0)
        trainer.fit(module, loader(), uneven())
        assert trainer.logger is logger
        assert (module.meter.count, len(module.meter.seen), len(module.latest)) == (11, 3, 3)
        assert module.metrics["a"][0].update_count == 3
        rows = (Path(logger.log_dir) / "metrics.csv").read_text()
        assert rows.count("1.0") == 3


def test_callback_metrics_are_there_at_the_end_of_a_trial_and_gone_after_it(tmp_path: Path) -> None:
    class Reads(_Right):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(3, average="micro")

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.accuracy(self.net(batch[0]), batch[1])
            self.log("val/metric", self.accuracy)
            self.log("val/top1", self.right(batch).mean(), batch_size=len(batch[1]))

        def on_validation_epoch_end(self) -> None:
            known = self.trainer.callback_metrics
            assert float(known["val/metric"]) == pytest.approx(float(known["val/top1"]), abs=1e-6)
            self.log("val/right", known["val/top1"])

    class Looks(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            assert "val/top1" not in trainer.callback_metrics

    callback = greedy(monitor="val/right", max_rounds=1)
    make_trainer(tmp_path, 1, callback, Looks(), num_sanity_val_steps=0).fit(Reads(), loader(), uneven())
    assert callback.search_state is not None
    right = 100 * _accuracy(Reads(), uneven())
    assert callback.search_state.baseline_score == pytest.approx(right, abs=1e-4)


def test_the_hooks_around_the_steps_run(tmp_path: Path) -> None:
    class Hooks(_Right):
        def on_validation_start(self) -> None:
            self.order = ["start"]

        def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.order.append("batch")

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
            return {"right": self.right(batch)}

        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            assert self.order.pop() == "batch"
            self.log("val/top1", outputs["right"].mean(), batch_size=len(batch[0]))

    callback = greedy(monitor="val/top1", max_rounds=1)
    make_trainer(tmp_path, 1, callback, num_sanity_val_steps=0).fit(Hooks(), loader(), uneven())
    assert callback.search_state is not None
    assert callback.search_state.baseline_score == pytest.approx(100 * _accuracy(Hooks(), uneven()), abs=1e-4)


@pytest.mark.parametrize("monitor", ["val/top1/dataloader_idx_1", "val/top1"])
def test_one_of_several_loaders_is_named_as_lightning_does(tmp_path: Path, monitor: str) -> None:
    class Two(_Right):
        def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val/top1", self.right(batch).mean(), batch_size=len(batch[1]))

    callback, loaders = greedy(monitor=monitor, max_rounds=1), [DataLoader(data(8, seed=3), 3), uneven()]
    make_trainer(tmp_path, 1, callback, num_sanity_val_steps=0).fit(Two(), loader(), val_dataloaders=loaders)
    sizes = [8, 11]
    right = [_accuracy(Plain(), each) for each in loaders]
    expected = right[1] if "idx" in monitor else sum(a * n for a, n in zip(right, sizes, strict=True)) / 19
    assert callback.search_state is not None
    assert callback.search_state.baseline_score == pytest.approx(100 * expected, abs=1e-4)


def test_a_metric_of_chance_or_per_class_is_refused(tmp_path: Path) -> None:
    class Chance(_Right):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val/top1", torch.rand(()))

    class PerClass(_Right):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(3, average=None)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.accuracy.update(self.net(batch[0]), batch[1])

        def on_validation_epoch_end(self) -> None:
            self.log("val/top1", self.accuracy)

    for kind, message in ((Chance, "would follow chance"), (PerClass, r"shape \(3,\).*average='macro'")):
        module = kind()
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, 1, greedy(monitor="val/top1"), num_sanity_val_steps=0).fit(
                module, loader(), uneven()
            )
        assert module.trainer.global_step == 0

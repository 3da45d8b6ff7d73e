"""Pruning beside everything else that a trainer does: optimizers, schedules, precision, compiling, logging, bars."""

from __future__ import annotations

import copy
import csv
import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from support.callback_cases import Plain, data, greedy, loader, make_trainer, shallow_vit, swin, vit
from support.compiling import Counting
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from swincompress_pl.pruning import PruningPlan, Step, apply_plan
from swincompress_pl.pruning.structure.apply import AppliedPlan, history_of
from swincompress_pl.pruning.structure.unit_masks import mask_plan
from swincompress_pl.pruning.structure.weight_masks import masked_parameters

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

# ---------------------------------------------------------------------------------------------------------- optimizers


def _two_groups(network: nn.Module, **options: Any) -> Optimizer:
    parameters = dict(network.named_parameters())
    heads = [p for name, p in parameters.items() if "attn" in name]
    others = [p for name, p in parameters.items() if "attn" not in name]
    return AdamW([{"params": heads, "lr": 2e-3, "weight_decay": 0.1}, {"params": others}], lr=5e-4, **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda n: AdamW(n.parameters(), lr=1e-3, foreach=False),
    "adamw-foreach": lambda n: AdamW(n.parameters(), lr=1e-3, foreach=True),
    "adamw-fused": lambda n: AdamW(n.parameters(), lr=1e-3, fused=True),
    "adam-amsgrad": lambda n: Adam(n.parameters(), lr=1e-3, amsgrad=True),
    "sgd": lambda n: SGD(n.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3, foreach=False),
    "sgd-foreach": lambda n: SGD(n.parameters(), lr=1e-2, momentum=0.9, foreach=True),
    "sgd-fused": lambda n: SGD(n.parameters(), lr=1e-2, momentum=0.9, fused=True),
    "groups": _two_groups,
}


class MaskedTwin(Callback):
    """A dense copy from before the round, trained on the same batches with the removed units masked.

    After each step what the sliced network has must be what is left of the copy, weights and optimizer state: the
    state was cut where the weights were. Stands before the pruning callback.
    """

    def __init__(self, epoch: int, make: Callable[[nn.Module], Optimizer]) -> None:
        self.epoch, self.make, self.compared = epoch, make, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            (optimizer,) = trainer.optimizers
            self.network = copy.deepcopy(pl_module.net)
            self.optimizer = self.make(self.network)
            self.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch != self.epoch:
            return
        plan = PruningPlan.from_dict(history_of(pl_module.net)[-1]["prune"])
        self.optimizer.zero_grad()
        with mask_plan(self.network, plan):
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            loss.backward()
        self.optimizer.step()
        torch.testing.assert_close(loss.detach(), outputs["loss"].detach())
        twin = copy.deepcopy((self.network, self.optimizer))
        slice_like(*twin, apply_plan(twin[0], plan))
        assert_same_training(pl_module.net, trainer.optimizers[0], *twin)
        self.compared += 1


def slice_like(network: nn.Module, optimizer: Optimizer, applied: AppliedPlan) -> None:
    """The state cut by `AppliedPlan` alone, and not by the code under test."""
    for change in applied.tensors:
        state = optimizer.state.pop(change.old, None)
        if state is not None:
            optimizer.state[change.new] = {
                key: change.slice(value) if isinstance(value, Tensor) and value.shape == change.old.shape else value
                for key, value in state.items()
            }


def assert_same_training(network: nn.Module, optimizer: Optimizer, other: nn.Module, its: Optimizer) -> None:
    others = dict(other.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter, others[name], rtol=1e-3, atol=2e-5, msg=name)
        state, expected = optimizer.state[parameter], its.state[others[name]]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("build", [vit, swin])
def test_the_optimizer_goes_on_as_that_of_a_masked_dense_network(tmp_path: Path, name: str, build: Any) -> None:
    if build is swin and name not in {"adamw-fused", "sgd"}:
        pytest.skip("one of each kind is enough for a second family")
    make = OPTIMIZERS[name]

    class Mine(Plain):
        def configure_optimizers(self) -> Optimizer:
            return make(self.net)

    module, twin = Mine(build), MaskedTwin(1, make)
    for part in module.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0  # the twin would draw other paths
    groups = [{k: v for k, v in g.items() if k != "params"} for g in make(module.net).param_groups]
    trainer = make_trainer(tmp_path, 2, twin, greedy(start_epoch=1))
    trainer.fit(module, loader(), loader())
    (optimizer,) = trainer.optimizers
    assert twin.compared == 3
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in module.parameters()}
    assert {float(s["step"]) for s in optimizer.state.values() if "step" in s} <= {6.0}


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    """Manual optimization: both are cut, and both go on."""

    class ByHand(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            heads, others = self.optimizers()
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            heads.zero_grad()
            others.zero_grad()
            self.manual_backward(loss)
            heads.step()
            others.step()

        def configure_optimizers(self) -> list[Optimizer]:
            named = dict(self.net.named_parameters())
            return [
                SGD([p for n, p in named.items() if "attn" in n], lr=1e-2, momentum=0.9),
                AdamW([p for n, p in named.items() if "attn" not in n], lr=1e-3),
            ]

    for granularity in ("structured", "weight"):
        module = ByHand()
        before: dict[str, Tensor] = {}

        class Snapshot(Callback):
            def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                before.update(copy.deepcopy(pl_module.state_dict()))  # noqa: B023  # used within the iteration

        trainer = make_trainer(tmp_path, 2, greedy(granularity=granularity, start_epoch=1), Snapshot())
        trainer.fit(module, loader(), loader())
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                assert all(v.shape == parameter.shape for v in state.values() if isinstance(v, Tensor) and v.ndim)
        for name, parameter in module.named_parameters():
            assert not torch.equal(parameter, before[name]), name
        for parameter, mask in masked_parameters(module.net).values():
            assert not bool(parameter[~mask].any())


def test_masked_weights_stay_zero_and_their_neighbours_train(tmp_path: Path) -> None:
    """Momentum of masked weights must not bring them back, at any step."""
    seen: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            masked = masked_parameters(pl_module.net).values()
            seen.append(max((float(p.detach()[~mask].abs().max()) for p, mask in masked), default=-1.0))

    for precision in ("32-true", "bf16-mixed"):
        seen.clear()
        trainer = make_trainer(tmp_path, 2, greedy(granularity="weight", start_epoch=1), Watch(), precision=precision)
        trainer.fit(Plain(), loader(), loader())
        assert seen == [-1.0] * 3 + [0.0] * 3


# ----------------------------------------------------------------------------------------------------------- schedules


def _one_cycle(optimizer: Optimizer) -> Any:
    return {"scheduler": OneCycleLR(optimizer, 1e-2, total_steps=12, cycle_momentum=True), "interval": "step"}


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "one cycle": _one_cycle,
    "cosine": lambda o: CosineAnnealingLR(o, 4),
    "plateau": lambda o: {"scheduler": ReduceLROnPlateau(o, patience=0, threshold=1e9), "monitor": "steps"},
    "lambda": lambda o: {"scheduler": LambdaLR(o, lambda step: 0.8**step), "interval": "step"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rates_are_those_of_a_fit_without_pruning(tmp_path: Path, name: str) -> None:
    class Mine(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.rates: list[tuple[float, ...]] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            group = self.optimizers().param_groups[0]
            self.rates.append((group["lr"], group["betas"][0]))
            self.log("steps", float(self.global_step))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = AdamW(self.parameters(), lr=1e-3)
            return {"optimizer": optimizer, "lr_scheduler": SCHEDULES[name](optimizer)}

    def rates(*callbacks: Callback) -> list[tuple[float, ...]]:
        module = Mine()
        make_trainer(tmp_path, 4, *callbacks).fit(module, loader(), loader())
        return module.rates

    without = rates()
    assert len(set(without)) > 3
    assert rates(greedy()) == without
    assert rates(greedy(granularity="weight")) == without


# ------------------------------------------------------------------------------------------------ precision, gradients


@pytest.mark.parametrize("granularity", ["structured", "weight"])
@pytest.mark.parametrize("clipping", [{"gradient_clip_val": 0.05}, {"gradient_clip_algorithm": "value"}])
def test_accumulated_and_clipped_gradients(tmp_path: Path, clipping: dict[str, Any], granularity: str) -> None:
    norms, by_value = [], "gradient_clip_algorithm" in clipping

    class Watch(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(max(g.abs().max() for g in gradients) if by_value else _norm(gradients)))

    options = {"gradient_clip_val": 0.001, **clipping, "accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    trainer = make_trainer(tmp_path, 3, greedy(granularity=granularity), Watch(), **options)
    trainer.fit(Plain(), loader(), loader())
    assert trainer.global_step == 3 * 2  # batches 1 + 2, and 3
    assert len(norms) >= 3
    assert max(norms) <= options["gradient_clip_val"] * 1.001


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.stack([g.norm() for g in gradients]).norm()


def test_bf16_true_is_scored_and_cut(tmp_path: Path) -> None:
    module = Plain()
    make_trainer(tmp_path, 2, greedy(), precision="bf16-true").fit(module, loader(), loader())
    assert module.net.blocks[0].attn.num_heads == 2
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("granularity", ["structured", "weight"])
@pytest.mark.parametrize("fused", [False, True])
def test_fp16_keeps_its_scaler(tmp_path: Path, granularity: str, fused: bool) -> None:
    """The scaler skips steps that overflow and halves its scale, before a round and after it."""

    class Overflowing(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 0 else loss  # once an epoch

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.net.parameters(), lr=1e-3, fused=fused)

    module, scaler = Overflowing(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = make_trainer(tmp_path, 2, greedy(granularity=granularity, start_epoch=1), plugins=[precision])
    trainer.fit(module, loader(), loader())
    (optimizer,) = trainer.optimizers
    assert {float(s["step"]) for s in optimizer.state.values()} == {4.0}
    assert scaler.get_scale() == 2.0**8
    assert len(history_of(module.net)) == 1
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    for parameter, mask in masked_parameters(module.net).values():
        assert not bool(parameter.detach()[~mask].any())


def test_a_criterion_with_gradients_leaves_the_training_batches_alone(tmp_path: Path) -> None:
    """A second iterator of a loader with persistent workers is the trainer's own, begun anew."""
    for workers in (0, 1):
        batches: list[int] = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
                batches.append(len(batch[0]))  # noqa: B023  # used within the iteration

        training = DataLoader(data(), 8, num_workers=workers, persistent_workers=workers > 0)
        callback = greedy(criterion="taylor", gradient_batches=2)
        make_trainer(tmp_path, 2, callback, Watch()).fit(Plain(), training, loader())
        assert batches == [8] * 6
        assert callback.search_state is not None
        assert callback.search_state.rounds == 2


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("granularity", ["structured", "weight"])
def test_compiled_once_a_shrink(tmp_path: Path, granularity: str, in_place: bool) -> None:
    """A round compiles the training graph again if it cut something, and no more; weight masks change no graph."""
    backend, graphs = Counting(), []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            graphs.append(backend.graphs)

    torch.compiler.reset()
    module = Plain(shallow_vit)
    if in_place:
        module.net.compile(backend=backend)
    else:
        module.net = torch.compile(module.net, backend=backend)
    pruning = greedy(granularity=granularity, start_epoch=1, max_rounds=2)
    trainer = make_trainer(tmp_path, 4, pruning, Count(), limit_val_batches=0)
    trainer.fit(module, datamodule=_Data())
    training = [after - before for before, after in itertools.pairwise([0, *graphs])]
    assert training[0] > 0
    if granularity == "structured":
        scoring = training[1] - training[0]  # a network that was compiled in place is scored compiled
        assert scoring >= 0 if in_place else scoring == 0
        assert training[2] == training[1]
    assert training[3] == 0


class _Data(LightningDataModule):
    """Training data and a hold-out, no validation."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def holdout_dataloader(self) -> DataLoader[Any]:
        return loader()


@pytest.mark.slow
def test_inductor(tmp_path: Path) -> None:
    torch.compiler.reset()
    module = Plain()
    module.net = torch.compile(module.net)
    make_trainer(tmp_path, 2, greedy(start_epoch=1)).fit(module, loader(), loader())
    assert module.net._orig_mod.blocks[0].attn.num_heads == 3


# ------------------------------------------------------------------------------------------------------------- loggers


class Recording(Logger):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = "recording"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def test_every_logger_gets_every_round_once(tmp_path: Path) -> None:
    recording, table = Recording(), CSVLogger(tmp_path, "csv")
    boards = TensorBoardLogger(tmp_path, "boards")
    callback = greedy(start_epoch=1, max_rounds=2)
    trainer = make_trainer(tmp_path, 4, callback, logger=[recording, table, boards], log_every_n_steps=1)
    trainer.fit(Plain(), loader(), loader())
    assert callback.search_state is not None
    steps = callback.search_state.steps
    last = [max((s for s in steps if s.round == r), key=steps.index) for r in (1, 2)]
    expected = [(5, float(last[0].parameters)), (8, float(last[1].parameters))]  # the last steps of epochs 1 and 2
    named = [(step, row["pruning/parameters"]) for step, row in recording.rows if "pruning/parameters" in row]
    assert named == expected
    with open(Path(table.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["pruning/parameters"]]
    assert [(int(row["step"]), float(row["pruning/parameters"])) for row in rows] == expected
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert boards_of(boards, "pruning/parameters") == expected
    keys = {"score", "baseline", "parameters", "sparsity", "active_targets", "images_scored", "macs"}
    found = {key for _, row in recording.rows for key in row if key.startswith("pruning/")}
    assert found == {f"pruning/{key}" for key in keys}


def boards_of(logger: TensorBoardLogger, tag: str) -> list[tuple[int, float]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(logger.log_dir)
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_a_checkpoint_may_watch_the_search(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="pruning/parameters", mode="min", save_on_train_epoch_end=True)
    make_trainer(tmp_path, 3, greedy(), best).fit(Plain(), loader(), loader())
    assert Path(best.best_model_path).name == "epoch=2.ckpt"


# ---------------------------------------------------------------------------------------------------------------- bars


class Rich(RichProgressBar):
    """On a terminal in memory."""

    def __init__(self, **options: Any) -> None:
        self.screen = io.StringIO()
        super().__init__(**options)

    @contextmanager
    def on_screen(self) -> Iterator[None]:
        import rich

        console = rich.get_console()
        before = console.__dict__
        self._console_kwargs = {"file": self.screen, "force_terminal": True, "width": 200}
        try:
            yield
        finally:
            console.__dict__ = before  # Lightning reconfigures the global one, in place


def test_the_search_has_a_line_in_rich(tmp_path: Path) -> None:
    for leave in (False, True):
        bar, tasks = Rich(leave=leave), []

        class Watch(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                task = bar.train_progress_bar  # noqa: B023  # used within the iteration
                visible = [t.description for t in bar.progress.tasks if t.visible]  # noqa: B023
                tasks.append((task.completed, visible))  # noqa: B023

        with bar.on_screen():
            trainer = make_trainer(tmp_path, 2, bar, greedy(), Watch(), enable_progress_bar=True)
            trainer.fit(Plain(), loader(), loader())
        text = bar.screen.getvalue()
        assert "pruning before epoch 0" in text
        assert "blocks.0.attn.heads 4 -> 3" in text
        assert [completed for completed, _ in tasks] == [1, 2, 3] * 2  # the bar of the epoch is that of the epoch
        assert {len(visible) for _, visible in tasks} == {1}
        assert "Epoch 1" in tasks[-1][1][0]


def test_the_search_has_a_line_in_tqdm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar, seen = TQDMProgressBar(), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append((bar.train_progress_bar.n, len(bar.train_progress_bar._instances)))

    trainer = make_trainer(tmp_path, 2, bar, greedy(), Watch(), enable_progress_bar=True)
    trainer.fit(Plain(), loader(), loader())
    text = "".join(capsys.readouterr())
    assert "pruning before epoch 0" in text
    assert "blocks.0.attn.heads 4 -> 3" in text
    assert [n for n, _ in seen] == [1, 2, 3] * 2
    assert {bars for _, bars in seen} == {1}


@pytest.mark.parametrize("kind", ["rich", "tqdm"])
def test_a_failing_round_takes_its_bar_along(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    bar: Any = Rich() if kind == "rich" else TQDMProgressBar()
    callback = greedy()

    def on_step(trainer: Trainer, step: Step) -> None:
        raise RuntimeError("no display")

    callback.on_step = on_step  # type: ignore[method-assign]  # of this one only
    trainer = make_trainer(tmp_path, 1, bar, callback, enable_progress_bar=True)
    with bar.on_screen() if kind == "rich" else capsys.disabled(), pytest.raises(RuntimeError, match="no display"):
        trainer.fit(Plain(), loader(), loader())
    if kind == "rich":
        assert not [t for t in bar.progress.tasks if t.visible and "pruning" in t.description]
    else:
        assert not [line for line in tqdm._instances if "pruning" in str(line.desc)]


def test_without_a_bar_there_are_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("swincompress_pl.callbacks.progress._EVERY_S", 0.0)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, 1, greedy()).fit(Plain(), loader(), loader())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("pruning before epoch 0")]
    assert [line.split(":")[1].split(";")[0].strip() for line in lines] == [f"{n} of 4" for n in (1, 2, 3, 4)]

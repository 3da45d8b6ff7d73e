"""Pruning inside a real, tiny fit: shapes, optimizer, resume, and refusals."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from support.callback_cases import (
    Plain,
    Restorable,
    assert_same_state,
    data,
    greedy,
    loader,
    make_trainer,
    search_of,
    shallow_vit,
    shapes,
    swin,
    vit,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from swincompress_pl.callbacks.compatibility import PRUNING, refuse_strategy
from swincompress_pl.callbacks.pruning import AdaptiveIterativePruning
from swincompress_pl.pruning import AdaptivePruningConfig, Step
from swincompress_pl.pruning.structure.apply import history_of
from swincompress_pl.pruning.structure.weight_masks import masked_parameters

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("build", [vit, swin])
def test_a_fit_shrinks_and_goes_on_training(tmp_path: Path, build: Any) -> None:
    module, seen = Plain(build), []

    class Watch(_Watch):
        def on_step(self, trainer: Trainer, step: Step) -> None:
            seen.append(step)

    before = sum(p.numel() for p in module.parameters())
    callback = Watch(tolerance=100.0, step=0.25, start_epoch=1)
    trainer = make_trainer(tmp_path, 3, callback)
    trainer.fit(module, loader(), loader())
    state = callback.search_state
    assert state is not None
    assert state.rounds == 2
    assert seen == state.steps
    assert sum(p.numel() for p in module.parameters()) == state.steps[-1].parameters < before
    (optimizer,) = trainer.optimizers
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in module.parameters()}
    assert {float(s["step"]) for s in optimizer.state.values()} == {9.0}  # no step count was lost
    assert trainer.callback_metrics["pruning/parameters"] == state.steps[-1].parameters
    assert trainer.callback_metrics["pruning/macs"] == state.steps[-1].macs
    assert 0 < trainer.callback_metrics["pruning/sparsity"] < 1
    assert trainer.callback_metrics["pruning/score"] == pytest.approx(state.score)
    assert len(history_of(module.net)) == 2


class _Watch(AdaptiveIterativePruning):
    pass


def test_new_parameters_are_trained(tmp_path: Path) -> None:
    class Snapshot(Callback):
        before: dict[str, Tensor]

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.before = copy.deepcopy(pl_module.state_dict())

    module, snapshot = Plain(), Snapshot()
    make_trainer(tmp_path, 1, greedy(max_rounds=1), snapshot).fit(module, loader(), loader())
    assert module.net.blocks[0].attn.num_heads == 3
    assert all(not torch.equal(snapshot.before[key], value) for key, value in module.state_dict().items())


class Stop(Callback):
    """Ends the process' work after an epoch, as a kill between epochs would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.should_stop = True


def to_be_resumed() -> Plain:
    module = Plain()
    module.net.blocks[0].mlp.drop1.p = 0.3
    torch.manual_seed(7)
    return module


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"granularity": "weight"},
        pytest.param({"shrink": "end", "max_rounds": 2}, marks=pytest.mark.slow),
        pytest.param({"criterion": "fisher", "ranking": "global", "gradient_batches": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def uninterrupted(request: Any, tmp_path_factory: Any) -> tuple[dict[str, Any], Plain, AdaptiveIterativePruning]:
    """The options of a search, and a fit with it that nothing interrupts."""
    options = {"tolerance": 30.0, "start_epoch": 1, "max_images": 20, **request.param}
    callback, module = greedy(**options), to_be_resumed()
    make_trainer(tmp_path_factory.mktemp("whole"), 4, callback).fit(module, loader(shuffle=True), loader())
    return options, module, callback


@pytest.mark.parametrize("at_train_end", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_resume_ends_where_an_uninterrupted_fit_ends(
    tmp_path: Path,
    at_train_end: bool,
    stop: int,
    uninterrupted: tuple[dict[str, Any], Plain, AdaptiveIterativePruning],
) -> None:
    """To the bit, with dropout and shuffling; also from a checkpoint that was written after validation."""
    options, whole, callback = uninterrupted
    resumed, first = greedy(**options), to_be_resumed()
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end)
    make_trainer(tmp_path, 4, greedy(**options), save, Stop(stop)).fit(first, loader(shuffle=True), loader())
    second = to_be_resumed()
    torch.manual_seed(99)  # another process begins with other numbers
    trainer = make_trainer(tmp_path, 4, resumed)
    trainer.fit(second, loader(shuffle=True), loader(), ckpt_path=tmp_path / f"epoch={stop}.ckpt")
    assert shapes(second) == shapes(whole) != shapes(Plain())
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert search_of(resumed) == search_of(callback)
    assert history_of(second.net) == history_of(whole.net)


def test_checkpoint_is_plain_and_serves_validate_and_load(tmp_path: Path) -> None:
    module = Restorable(swin)
    save = ModelCheckpoint(tmp_path, "last")
    make_trainer(tmp_path, 2, greedy(), save).fit(module, loader(), loader())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["swincompress_pl"]["version"] == 1
    restored = Restorable.load_from_checkpoint(tmp_path / "last.ckpt", build=swin)
    assert all(torch.equal(restored.state_dict()[k], v) for k, v in checkpoint["state_dict"].items())
    # a user's own module without the mixin, through the callback
    plain = Plain(swin)
    (metrics,) = make_trainer(tmp_path, 1, greedy()).validate(
        plain, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in checkpoint["state_dict"].items())
    assert metrics == make_trainer(tmp_path, 1).validate(restored, loader(), verbose=False)[0]


def test_a_less_pruned_checkpoint_is_tested_after_the_fit(tmp_path: Path) -> None:
    """The best checkpoint is often an earlier one than what is in memory."""
    module = Plain()
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, 3, greedy(), save)
    trainer.fit(module, loader(), loader())
    for epoch, heads in ((0, 3), (2, 1), (1, 2)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        trainer.test(module, loader(), ckpt_path=path, verbose=False)
        assert module.net.blocks[0].attn.num_heads == heads
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())


def test_the_search_leaves_no_trace_when_nothing_is_accepted(tmp_path: Path) -> None:
    """Random numbers, modes and the trainer's progress are those of a fit without the callback."""

    def fit(*callbacks: Callback) -> Plain:
        module = Plain()
        module.net.blocks[0].mlp.drop1.p = 0.3
        torch.manual_seed(5)
        trainer = make_trainer(tmp_path, 3, *callbacks)
        trainer.fit(module, loader(shuffle=True), loader())
        assert trainer.global_step == 9
        assert trainer.state.stage is None or trainer.state.finished
        return module

    class Nothing(AdaptiveIterativePruning):
        calls = 0

        def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
            assert not network.training
            Nothing.calls += 1
            right = nn.functional.one_hot(_labels(images), 3).float()
            return right if Nothing.calls <= 1 else -right  # the baseline is 100, everything else 0

    with_search, without = fit(Nothing(tolerance=1.0, max_rounds=1)), fit()
    assert Nothing.calls > 1
    assert all(torch.equal(with_search.state_dict()[k], v) for k, v in without.state_dict().items())
    assert {s for s in with_search.stages if s != "sanity_check"} == {"train", "validate"}


def _labels(images: Tensor) -> Tensor:
    dataset = data()
    found = [next(i for i, known in enumerate(dataset.tensors[0]) if torch.equal(known, image)) for image in images]
    return dataset.tensors[1][found]


def test_batches_are_scored_in_the_validating_stage(tmp_path: Path) -> None:
    stages = []

    class Watch(AdaptiveIterativePruning):
        def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
            stages.append((module.trainer.validating, torch.is_grad_enabled(), network.training))
            return super().predict(module, network, images)

    module = Plain()
    make_trainer(tmp_path, 1, Watch(tolerance=1.0)).fit(module, loader(), loader())
    assert set(stages) == {(True, False, False)}


def test_the_datamodules_holdout_decides(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        scored = 0

        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

        def holdout_dataloader(self) -> DataLoader[Any]:
            Data.scored += 1
            return DataLoader(data(6, seed=2), batch_size=4)

    class Count(AdaptiveIterativePruning):
        images = 0

        def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
            Count.images += len(images)
            return super().predict(module, network, images)

    callback = Count(tolerance=100.0, kinds=("heads",), max_images=5)
    make_trainer(tmp_path, 1, callback).fit(Plain(), datamodule=Data())
    assert Data.scored > 0
    assert Count.images >= 5 * 2  # the baseline and the sliced network
    assert callback.search_state is not None
    scoring = callback.search_state.scoring
    assert Count.images - 1 == scoring["images_scored"]  # one more to measure the segments
    assert scoring["naive_images"] == 5 * 4  # the baseline, two groups, the sliced network


def test_the_holdout_is_read_once(tmp_path: Path) -> None:
    class Loader:
        passes = 0

        def __iter__(self) -> Any:
            Loader.passes += 1
            return iter(DataLoader(data(), batch_size=8))

    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

        def holdout_dataloader(self) -> Loader:
            return Loader()

    make_trainer(tmp_path, 2, greedy(kinds=("heads",))).fit(Plain(), datamodule=Data())
    assert Loader.passes == 1
    module = Plain()
    with pytest.raises(ValueError, match=r"more than holdout_size_bytes=1000, 3072.*smaller images.*monitor="):
        make_trainer(tmp_path, 1, greedy(holdout_size_bytes=1000)).fit(module, datamodule=Data())
    assert "train" not in module.stages  # refused before the first batch
    with pytest.raises(
        ValueError, match=r"more than holdout_size_bytes=10000, 3072.*Allow more.*max_images=3, or pass"
    ):
        make_trainer(tmp_path, 1, greedy(holdout_size_bytes=10_000)).fit(module, datamodule=Data())
    make_trainer(tmp_path, 1, greedy(holdout_size_bytes=10_000, max_images=3, max_rounds=1)).fit(
        module, datamodule=Data()
    )


def test_a_second_fit_begins_a_new_search(tmp_path: Path) -> None:
    callback = greedy(max_rounds=1)
    for _ in range(2):
        module = Plain()
        make_trainer(tmp_path, 1, callback).fit(module, loader(), loader())
        assert module.net.blocks[0].attn.num_heads == 3


def test_the_command_line_sees_every_option() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    name = "swincompress_pl.callbacks.pruning.AdaptiveIterativePruning"
    options = {"tolerance": 2, "step": 0.1, "kinds": ["mlp"], "target": 0.3, "criterion": "magnitude", "order": "size"}
    parsed = parser.parse_object({"callback": {"class_path": name, "init_args": options}})
    callback = parser.instantiate_classes(parsed)["callback"]
    assert callback.config == AdaptivePruningConfig(tolerance=2, step=0.1, kinds=("mlp",), target=0.3, order="size")
    with pytest.raises(Exception, match="stepp"):
        parser.parse_object({"callback": {"class_path": name, "init_args": {**options, "stepp": 1}}})


def test_gradient_accumulation_and_bf16(tmp_path: Path) -> None:
    module = Plain()
    trainer = make_trainer(
        tmp_path, 3, greedy(), accumulate_grad_batches=2, precision="bf16-mixed", gradient_clip_val=0.5
    )
    trainer.fit(module, loader(), loader())
    assert module.net.blocks[1].attn.num_heads == 1
    assert module.net.blocks[1].attn.qkv.weight.dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_network_is_recompiled(tmp_path: Path) -> None:
    module = Plain(shallow_vit)
    module.net = torch.compile(module.net, backend="eager")
    save = ModelCheckpoint(tmp_path, "last")
    make_trainer(tmp_path, 2, greedy(), save).fit(module, loader(), loader())
    assert module.net._orig_mod.blocks[0].attn.num_heads == 2
    again = Plain(shallow_vit)
    again.net = torch.compile(again.net, backend="eager")
    make_trainer(tmp_path, 3, greedy()).fit(again, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.net._orig_mod.blocks[0].attn.num_heads == 1


def test_frozen_parameters_are_cut_and_stay_frozen(tmp_path: Path) -> None:
    module = Plain()
    module.net.blocks[0].requires_grad_(False)
    make_trainer(tmp_path, 1, greedy()).fit(module, loader(), loader())
    assert module.net.blocks[0].attn.num_heads == 3
    assert not any(p.requires_grad for p in module.net.blocks[0].parameters())


def test_a_failing_round_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    class Fails(AdaptiveIterativePruning):
        calls = 0
        before: dict[str, Tensor]

        def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
            Fails.calls += 1
            if Fails.calls == 1:
                self.before = copy.deepcopy(module.state_dict())
            if Fails.calls == 4:
                raise RuntimeError("out of memory")
            return super().predict(module, network, images)

    module = Plain()
    callback = Fails(tolerance=100.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(tmp_path, 1, callback).fit(module, loader(), loader())
    assert all(torch.equal(callback.before[key], value) for key, value in module.state_dict().items())
    assert callback.search_state is None


def test_an_optimizer_that_cannot_be_sliced_is_refused_and_the_network_restored(tmp_path: Path) -> None:
    class Factored(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adafactor(self.parameters(), lr=1e-3)

    module = Factored()
    before = shapes(module)
    with pytest.raises(ValueError, match="Adafactor: its state 'row_var' of blocks"):
        make_trainer(tmp_path, 2, greedy(start_epoch=1)).fit(module, loader(), loader())
    assert shapes(module) == before


@pytest.mark.parametrize("options", [{}, {"granularity": "weight"}])
def test_an_error_after_the_round_restores_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no memory for the optimizer")

    monkeypatch.setattr("swincompress_pl.callbacks.search.slice_optimizers", fail)
    module, callback = Plain(), greedy(**options)
    before = copy.deepcopy(module.net.state_dict())
    with pytest.raises(MemoryError, match="no memory for the optimizer"):
        make_trainer(tmp_path, 1, callback).fit(module, loader(), loader())
    assert_same_state(dict(module.net.state_dict()), dict(before))
    assert history_of(module.net) == []
    assert callback.search_state is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: EMAWeightAveraging(), "EMAWeightAveraging keeps a copy of the model"),
        (lambda: StochasticWeightAveraging(swa_lrs=1e-3), "StochasticWeightAveraging keeps a copy"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), "ModelPruning replaces weights by masked ones"),
    ],
)
def test_callbacks_that_cannot_share_the_fit_are_refused(tmp_path: Path, other: Any, message: str) -> None:
    for callbacks in ([greedy(), other()], [other(), greedy()]):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, 1, *callbacks).fit(Plain(), loader(), loader())


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_a_strategy_with_shards_is_refused(strategy: str) -> None:
    class Fake:
        strategy: Any

    Fake.strategy = type(strategy, (), {})()
    with pytest.raises(ValueError, match=rf"under {strategy}.*Prune first"):
        refuse_strategy(Fake(), "AdaptiveIterativePruning", PRUNING)  # type: ignore[arg-type]


def test_a_missing_attribute_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        AttributeError, match=r"model_attribute='backbone': Plain has no module of that name; it holds net"
    ):
        make_trainer(tmp_path, 1, greedy(model_attribute="backbone")).fit(Plain(), loader(), loader())


def test_an_unsupported_network_is_refused_before_the_first_epoch(tmp_path: Path) -> None:
    module = Plain(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
    with pytest.raises(TypeError, match="no adapter for this network"):
        make_trainer(tmp_path, 1, greedy()).fit(module, loader(), loader())
    assert module.stages == []


def test_a_parameter_shared_outside_the_network_is_refused(tmp_path: Path) -> None:
    module = Plain()
    module.probe = nn.Linear(32, 96)
    module.probe.weight = module.net.blocks[0].attn.qkv.weight
    with pytest.raises(ValueError, match=r"probe\.weight is shared with net\.blocks\.0\.attn\.qkv\.weight"):
        make_trainer(tmp_path, 1, greedy()).fit(module, loader(), loader())


def test_without_a_holdout_it_stops_before_the_first_batch(tmp_path: Path) -> None:
    module = Plain()
    with pytest.raises(ValueError, match="nothing to score on"):
        make_trainer(tmp_path, 1, greedy()).fit(module, loader())
    assert module.stages == []


def test_a_batch_without_labels_is_refused(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

        def holdout_dataloader(self) -> list[Any]:
            return [[{"images": torch.zeros(1, 3, 16, 16)}]]

    with pytest.raises(ValueError, match=r"does not take the hold-out's batches \(dict with images of float32"):
        make_trainer(tmp_path, 1, greedy()).fit(Plain(), datamodule=Data())


def test_a_start_that_is_never_reached_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="start_epoch=5 is not reached in max_epochs=1"):
        make_trainer(tmp_path, 1, greedy(start_epoch=5)).fit(Plain(), loader(), loader())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"granularity": "row"}, ValueError, "row"),
        ({"tolerance": 0}, ValueError, "tolerance=0: it has to be in points, above 0"),
        ({"start_epoch": -1}, ValueError, "start_epoch=-1: it has to be 0 or more"),
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs=0: it has to be 1 or more"),
        ({"holdout_size_bytes": 0}, ValueError, "holdout_size_bytes=0: it has to be 1"),
        ({"gradient_batches": 0}, ValueError, "gradient_batches=0: it has to be 1"),
        ({"monitor": "val/top1", "max_images": 5}, ValueError, "max_images=5: a monitor"),
        ({"max_images": 0}, ValueError, "max_images=0: it has to be None"),
        ({"steps": 0.1}, TypeError, "unexpected keyword argument 'steps'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaptiveIterativePruning(**{"tolerance": 1.0, **options})


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="state has version 9, 2 is expected"):
        greedy().load_state_dict({"version": 9})


def test_every_n_epochs() -> None:
    callback = greedy(start_epoch=2, every_n_epochs=3)
    assert [epoch for epoch in range(10) if callback.should_prune(epoch)] == [2, 5, 8]


def test_a_fit_that_ends_before_its_search_says_that_nothing_was_sliced(tmp_path: Path) -> None:
    module = Plain()
    with pytest.warns(UserWarning, match="shrink='end': the search did not end in this fit"):
        make_trainer(tmp_path, 1, greedy(shrink="end")).fit(module, loader(), loader())
    assert module.net.blocks[0].attn.num_heads == 4
    assert masked_parameters(module.net)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*did not end in this fit")
        make_trainer(tmp_path, 1, greedy(shrink="end", max_rounds=1)).fit(module := Plain(), loader(), loader())
    assert module.net.blocks[0].attn.num_heads == 3

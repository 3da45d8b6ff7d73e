"""Input and surroundings that cannot work: a clear error, early, and the module as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from support.callback_cases import Plain, Unmoved, greedy, loader, make_trainer, shapes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks.compatibility import PRUNING, refuse_optimizers, refuse_strategy
from swincompress_pl.history import history_of

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("granularity", ["structured", "weight"])
def test_nan_in_the_logits(tmp_path: Path, granularity: str) -> None:
    module, unmoved = Plain(), Unmoved()
    with torch.no_grad():
        module.net.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN logits for image 0 of the hold-out; look for NaN"):
        make_trainer(tmp_path, 1, greedy(granularity=granularity), unmoved).fit(module, loader(), loader())
    assert history_of(module.net) == []
    assert shapes(module) == shapes(Plain())


@pytest.mark.parametrize("monitor", [None, "val/top1"])
def test_an_empty_holdout(tmp_path: Path, monitor: str | None) -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

        def holdout_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.long)))

    module = Plain()
    with pytest.raises(ValueError, match="the hold-out is empty"):
        make_trainer(tmp_path, 9, greedy(monitor=monitor, start_epoch=5)).fit(module, datamodule=Data())
    assert "train" not in module.stages


@pytest.mark.parametrize("options", [{}, {"granularity": "weight"}, {"ranking": "global"}])
def test_names_that_match_nothing_are_refused_before_training(tmp_path: Path, options: dict[str, Any]) -> None:
    module = Plain()
    with pytest.raises(ValueError, match=r"layers: 'stages\.\*' matches nothing.*there is blocks\.0"):
        make_trainer(tmp_path, 1, greedy(layers=("stages.*",), **options)).fit(module, loader(), loader())
    assert module.stages == []


@pytest.mark.parametrize("options", [{}, {"granularity": "weight", "target_of": "parameters"}])
def test_a_target_that_cannot_be_met_is_reported(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    callback, module = greedy(target=0.95, step=0.5, max_sparsity=0.5, **options), Plain()
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, 3, callback).fit(module, loader(), loader())
    assert callback.search_state is not None
    assert callback.search_state.stopped is not None
    assert "the target of 95.0% is not met" in callback.search_state.stopped
    assert callback.search_state.rounds < 3
    assert callback.search_state.stopped in caplog.text


@pytest.mark.parametrize("options", [{}, {"granularity": "weight"}, {"ranking": "global"}, {"shrink": "end"}])
def test_shared_parameters_are_refused_before_training(tmp_path: Path, options: dict[str, Any]) -> None:
    tied = Plain()
    tied.net.blocks[1].mlp.fc1.weight = tied.net.blocks[0].mlp.fc1.weight
    twice = Plain()
    twice.net.blocks[1].mlp = twice.net.blocks[0].mlp
    outside = Plain()
    outside.probe = nn.Linear(32, 96)
    outside.probe.weight = outside.net.blocks[0].attn.qkv.weight
    for module, message in (
        (tied, r"net\.blocks\.1\.mlp\.fc1\.weight is shared with net\.blocks\.0\.mlp\.fc1\.weight"),
        (twice, r"net\.blocks\.1\.mlp\.fc\d\.\w+ is shared with net\.blocks\.0\.mlp\.fc\d\.\w+"),
        (outside, r"probe\.weight is shared with net\.blocks\.0\.attn\.qkv\.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, 1, greedy(**options)).fit(module, loader(), loader())
        assert module.stages == []


def test_sharing_that_pruning_does_not_touch_is_fine(tmp_path: Path) -> None:
    module = Plain()
    module.backbone = module.net  # held twice
    module.probe = nn.Linear(32, 3)
    module.probe.weight = module.net.head.weight
    make_trainer(tmp_path, 1, greedy()).fit(module, loader(), loader())
    assert module.net.blocks[0].attn.num_heads == 3


@pytest.mark.parametrize("granularity", ["structured", "weight"])
@pytest.mark.parametrize(
    "make",
    [
        EMAWeightAveraging,
        WeightAveraging,
        lambda: StochasticWeightAveraging(swa_lrs=1e-3),
        lambda: ModelPruning("l1_unstructured", amount=0.5),
    ],
)
def test_copies_of_the_weights_are_refused_by_name(tmp_path: Path, make: Any, granularity: str) -> None:
    module, other = Plain(), make()
    with pytest.raises(ValueError, match=f"{type(other).__name__} .*AdaptiveIterativePruning"):
        make_trainer(tmp_path, 1, greedy(granularity=granularity), other).fit(module, loader(), loader())
    assert module.stages == []


@pytest.mark.parametrize("strategy", [FSDPStrategy, lambda: ModelParallelStrategy()])
def test_strategies_with_shards_are_refused(strategy: Any) -> None:
    made = strategy()
    with pytest.raises(ValueError, match=rf"under {type(made).__name__}, which holds shards.*Prune first"):
        refuse_strategy(SimpleNamespace(strategy=made), "AdaptiveIterativePruning", PRUNING)  # type: ignore[arg-type]


def test_a_distributed_state_with_old_shapes_is_refused() -> None:
    made = DDPStrategy(ddp_comm_state={})
    with pytest.raises(ValueError, match=r"DDPStrategy has a ddp_comm_state \(dict\)"):
        refuse_strategy(SimpleNamespace(strategy=made), "AdaptiveIterativePruning", PRUNING)  # type: ignore[arg-type]


def test_weights_that_come_back_from_other_processes_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1, strategy="ddp_fork", devices=2)
    trainer.strategy._configure_launcher()
    with pytest.raises(ValueError, match="DDPStrategy's spawned or forked processes"):
        refuse_strategy(trainer, "AdaptiveIterativePruning", PRUNING)


def test_optimizers_with_a_joint_state_are_refused_before_training(tmp_path: Path) -> None:
    class Joint(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    module = Joint()
    with pytest.raises(ValueError, match="LBFGS keeps its own lists of parameters"):
        make_trainer(tmp_path, 3, greedy(start_epoch=2)).fit(module, loader(), loader())
    assert "train" not in module.stages
    refuse_optimizers([torch.optim.AdamW(module.parameters())], module.net, {"blocks.0.mlp.fc1.weight"})


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    """No hooks on optimizers and no hold-out in memory: Lightning calls no teardown then."""

    class Fails(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.global_step == 1:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    callback = greedy(granularity="weight")
    trainer = make_trainer(tmp_path, 1, callback)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(Fails(), loader(), loader())
    assert callback._scorer is None
    assert not trainer.optimizers[0]._optimizer_step_post_hooks

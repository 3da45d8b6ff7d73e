"""Pruning and quantization in one fit: a search that goes on, or begins, on a quantized network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.callback_cases import assert_same_state, search_of
from support.ddp_cases import StepDigests, ddp
from support.qat_cases import PREPROCESSING, Plain, Restorable, fit, loader, pixels_and_labels, qat, trainer
from support.rank_cases import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from swincompress_pl import accel, spec
from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.callbacks.searched_network import CoupledScales
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, Step
from swincompress_pl.pruning.adaptive.search import SearchSession
from swincompress_pl.pruning.structure.apply import history_of
from swincompress_pl.pruning.structure.weight_masks import masked_parameters
from swincompress_pl.quant import QuantizedNetwork, quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def pruning(**options: Any) -> AdaptiveIterativePruning:
    """Accepts every step, so that what is cut does not hang on the accuracy of a toy."""
    return AdaptiveIterativePruning(
        **{"tolerance": 100.0, "step": 0.125, "max_sparsity": 0.75, "model_attribute": "backbone", **options}
    )


def images_and_labels() -> tuple[Tensor, Tensor]:
    pixels, labels = pixels_and_labels()
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25, labels


def prequantized(kind: type[Plain] = Plain) -> Plain:
    module = kind()
    made = quantize(module.backbone, [images_and_labels()[0]], method="max", preprocessing=PREPROCESSING)
    module.backbone = made.train()
    return module


def quantized_of(module: Any) -> QuantizedNetwork:
    assert isinstance(module.backbone, QuantizedNetwork)
    return module.backbone


def entries(module: Any) -> list[str]:
    return [next(iter(entry)) for entry in history_of(module.backbone)]


def check_integers(module: Any, folder: Path) -> None:
    """The engine, the specification and the twin give the same."""
    network, (pixels, _) = quantized_of(module), pixels_and_labels()
    expected = spec.run(network.to_program(), pixels.numpy())
    assert np.array_equal(network.integer_logits(pixels).numpy(), expected)
    file = accel.export(network, folder / "model.safetensors")
    assert np.array_equal(accel.load(file, threads=1).run_integer(pixels.numpy()), expected)


class Widths(Callback):
    """Parameters that count at the end of each epoch."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found.append(sum(int(p.count_nonzero()) for n, p in pl_module.named_parameters() if "adjustment" not in n))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({}, "prune"),
        ({"granularity": "weight"}, None),
        ({"granularity": "2:4", "step": 0.25}, None),
        ({"granularity": "block", "block_shape": (4, 4)}, None),
        ({"kinds": ("heads", "mlp", "head_dim", "embed"), "round_to": 4}, "prune"),
        ({"ranking": "global", "step": 0.1}, "prune"),
        ({"criterion": "taylor", "gradient_batches": 1}, "prune"),
        ({"monitor": "val/top1"}, "prune"),
    ],
    ids=["structured", "weight", "2:4", "block", "all kinds", "global", "taylor", "monitor"],
)
def test_a_search_goes_on_on_the_quantized_network(tmp_path: Path, options: dict[str, Any], after: str | None) -> None:
    module, search, widths = Restorable(), pruning(**options), Widths()
    run = fit(module, tmp_path, 3, qat(start_epoch=1), search, widths)
    assert search.search_state is not None
    assert search.search_state.rounds >= 2
    assert widths.found[1] < widths.found[0]
    kinds = entries(module)
    assert kinds.count("quantize") == 1
    if after is not None:
        assert kinds[-1] == after
        assert kinds[0] == "prune"
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.backbone.parameters()}
    assert all(bool((weight[~mask] == 0).all()) for weight, mask in masked_parameters(module.backbone).values())
    check_integers(module, tmp_path)

    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Restorable.load_from_checkpoint(tmp_path / "a.ckpt")
    assert history_of(again.backbone) == history_of(module.backbone)
    pixels, _ = pixels_and_labels()
    assert torch.equal(quantized_of(again).integer_logits(pixels), quantized_of(module).integer_logits(pixels))


def test_slicing_at_the_end_cuts_the_scales_too(tmp_path: Path) -> None:
    module, search = Restorable(), pruning(shrink="end", max_rounds=4)
    fit(module, tmp_path, 5, search, qat(start_epoch=2))
    assert entries(module) == ["mask", "quantize", "unmask", "prune"]
    assert quantized_of(module).network.blocks[0].mlp.fc1.out_features < 128  # type: ignore[index,union-attr]
    check_integers(module, tmp_path)


@pytest.mark.parametrize("late_first", [False, True])
def test_a_search_may_begin_with_the_quantization(tmp_path: Path, late_first: bool) -> None:
    """The callbacks' order decides which comes first in their common epoch."""
    module, callbacks = Restorable(), [pruning(start_epoch=1), qat(start_epoch=1)]
    fit(module, tmp_path, 3, *(reversed(callbacks) if late_first else callbacks))
    assert entries(module) == (["quantize", "prune", "prune"] if late_first else ["prune", "quantize", "prune"])
    check_integers(module, tmp_path)


def test_a_network_quantized_before_the_fit_is_pruned(tmp_path: Path) -> None:
    module = prequantized(Restorable)
    fit(module, tmp_path, 2, pruning())
    assert entries(module) == ["quantize", "prune", "prune"]
    check_integers(module, tmp_path)


# What is scored


@pytest.mark.parametrize("start_epoch", [0, 2])
def test_the_baseline_is_that_of_the_network_before_the_first_round(tmp_path: Path, start_epoch: int) -> None:
    """And what is scored after quantization is what rounded values answer."""
    module = Plain()
    images, labels = images_and_labels()
    accuracies: list[tuple[float, float]] = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            network = copy.deepcopy(module.backbone).eval()
            with torch.no_grad():
                rounded = network.fake_quantized(images) if isinstance(network, QuantizedNetwork) else network(images)
            accuracies.append((float((rounded.argmax(1) == labels).float().mean()) * 100, trainer.current_epoch))

    search = pruning(start_epoch=start_epoch, max_rounds=1)
    fit(module, tmp_path, 3, qat(start_epoch=1, bits="W2A4", learn_scales=False), Watch(), search)
    assert search.search_state is not None
    assert search.search_state.baseline_score == pytest.approx(accuracies[start_epoch][0])


def test_predict_is_given_the_rounded_network(tmp_path: Path) -> None:
    module, seen = prequantized(), []

    class Mine(AdaptiveIterativePruning):
        def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
            assert not network.training
            logits: Tensor = network(images)
            seen.append(torch.equal(logits, quantized_of(module).fake_quantized(images)))
            return logits

    search = Mine(tolerance=100.0, step=0.25, max_rounds=1, model_attribute="backbone")
    fit(module, tmp_path, 1, search)
    assert seen
    assert all(seen)


def test_no_activations_are_kept_for_a_quantized_network() -> None:
    network, (images, labels) = quantized_of(prequantized()).eval(), images_and_labels()
    holdout = HoldOut(images, labels, predict=lambda _, batch: network.fake_quantized(batch))
    holdout.begin_round(network.network)
    assert holdout._cache is not None
    assert holdout._cache.off == "a pass does not run every segment"


def test_what_a_round_takes_back_comes_back_with_its_scales() -> None:
    """Candidates pass while they are masked and fail once they are cut: every step is given up in the end."""
    module = prequantized()
    network = quantized_of(module)
    network.learn_scales()
    before, adjustment = copy.deepcopy(dict(network.state_dict())), network.scales.adjustment
    widths: list[int] = []

    def evaluate(inner: nn.Module) -> float:
        network.eval().fake_quantized(images_and_labels()[0])  # fits at any width
        widths.append(len(network.scales.adjustment))  # type: ignore[arg-type]
        return 100.0 if widths[-1] == widths[0] else 0.0

    config = AdaptivePruningConfig(tolerance=1.0, step=0.25)
    coupled = CoupledScales(module, "backbone")
    outcome = SearchSession(network.network, evaluate, config).round(coupled=coupled)
    assert outcome.change.applied.plan.kept == {}
    assert len(set(widths)) > 2
    assert network.scales.adjustment is adjustment
    assert_same_state(dict(network.state_dict()), before)
    assert coupled.with_scales(outcome.applied) is outcome.applied


def test_an_exception_in_a_round_leaves_network_and_scales_alone(tmp_path: Path) -> None:
    module = prequantized()
    before: dict[str, Any] = {}

    class Broken(AdaptiveIterativePruning):
        def predict(self, module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
            before.setdefault("state", copy.deepcopy(dict(module.state_dict())))
            if quantized_of(module).network.blocks[0].mlp.fc1.out_features < 128:  # type: ignore[index,union-attr]
                raise MemoryError("cut")
            logits: Tensor = network(images)
            return logits

    with pytest.raises(MemoryError, match="cut"):
        fit(module, tmp_path, 1, Broken(tolerance=100.0, step=0.25, model_attribute="backbone"))
    assert_same_state(dict(module.state_dict()), before["state"])
    assert entries(module) == ["quantize"]


def test_the_scales_momentum_is_cut_with_them(tmp_path: Path) -> None:
    module, found = Plain(), {}

    def adjustment_and_momentum(run: Trainer) -> tuple[Any, Tensor]:
        adjustment = quantized_of(module).scales.adjustment
        assert adjustment is not None
        return adjustment, run.optimizers[0].state[adjustment]["exp_avg"].clone()

    class Watched(AdaptiveIterativePruning):
        def on_step(self, trainer: Trainer, step: Step) -> None:
            found["before"] = adjustment_and_momentum(trainer)

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if "before" in found:
                found.setdefault("after", adjustment_and_momentum(trainer))

    search = Watched(tolerance=100.0, step=0.25, start_epoch=2, max_rounds=1, model_attribute="backbone")
    run = fit(module, tmp_path, 3, qat(start_epoch=1), search)
    (old, before), (new, after) = found["before"], found["after"]
    assert len(after) == len(new) < len(old) == len(before)
    assert bool(torch.isin(after, before).all())
    own = [group for group in run.optimizers[0].param_groups if any(p is new for p in group["params"])]
    assert len(own) == 1
    assert own[0]["weight_decay"] == 0
    assert quantized_of(module).scales.adjustment is new
    assert not torch.equal(adjustment_and_momentum(run)[1], after)  # it trains on


# Resume


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stop", "options"), [(Plain, 3, {}), (Restorable, 2, {}), (Plain, 2, {"granularity": "weight"})]
)
def test_resume_gives_the_same(tmp_path: Path, kind: type[Plain], stop: int, options: dict[str, Any]) -> None:
    """Stopped after the quantization and after the cut that followed it; the teacher is as wide as it was."""

    def run_to(epochs: int, ckpt: Path | None = None) -> Any:
        module, search = kind(), pruning(**options)
        save = ModelCheckpoint(tmp_path / str(epochs), "stop", save_on_train_epoch_end=True)
        run = trainer(tmp_path, epochs, qat(start_epoch=1, distillation=0.5), search, save)
        run.fit(module, loader(), loader(), ckpt_path=ckpt)
        return {
            "weights": dict(module.state_dict()),
            "optimizer": run.optimizers[0].state_dict(),
            "search": search_of(search),
            "history": history_of(module.backbone),
        }

    whole = run_to(4)
    run_to(stop)
    assert_same_state(run_to(4, tmp_path / str(stop) / "stop.ckpt"), whole)


# DDP


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"granularity": "weight"}], ids=["structured", "weight"])
def test_ranks_are_equal_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    def work(rank: int) -> Any:
        torch.manual_seed(rank)  # what a rank draws by itself must not matter
        module, digests = Plain(), StepDigests()
        sampler: Any = DistributedSampler(loader().dataset, 2, rank, shuffle=False)
        data = DataLoader(loader().dataset, 4, sampler=sampler)
        run = trainer(tmp_path, 4, qat(start_epoch=2), pruning(**options), digests, strategy=ddp(), devices=2)
        run.fit(module, data, loader())
        return [digests.found, dict(module.state_dict()), history_of(module.backbone)]

    first, second = on_ranks(tmp_path / "ranks", 2, work)
    assert_same_state(first, second)
    assert len(set(first[0])) == len(first[0])
    assert any("quantize" in entry for entry in first[2])


# Refusals


def test_averages_beside_a_search_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EMAWeightAveraging keeps a copy of the model.*average in a later one"):
        fit(Plain(), tmp_path, 2, pruning(), qat(), EMAWeightAveraging(decay=0.9))


@pytest.mark.parametrize("beside", [True, False])
def test_integers_of_masked_norms_are_refused(tmp_path: Path, beside: bool) -> None:
    search = pruning(monitor="val/top1", kinds=("mlp", "embed"))
    with pytest.raises(ValueError, match=r"monitor='val/top1' with kinds=\('mlp', 'embed'\).*Leave monitor out"):
        fit(Plain() if beside else prequantized(), tmp_path, 3, *([qat()] if beside else []), search)

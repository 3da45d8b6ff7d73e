"""Fits that are resumed by a script with other arguments: each takes effect, or is refused by name with both values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule
from support.callback_cases import Plain, Restorable, greedy, loader, make_trainer
from support.qat_cases import Plain as Backboned
from support.qat_cases import Restorable as Recorded
from support.qat_cases import fit as fit_qat
from support.qat_cases import loader as qat_loader
from support.qat_cases import qat
from support.qat_cases import trainer as qat_trainer
from support.spiking_cases import small_spikformer
from torch import nn

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT, QuantizationAwareTraining
from swincompress_pl.callbacks.qat_options import RESUMED_ARGUMENTS
from swincompress_pl.history import history_of
from swincompress_pl.pruning import AdaptivePruningConfig, SearchState
from swincompress_pl.pruning.adaptive.limits import LIMITS, NARROW, NO_SMALLER_STEP, take_up_limits
from swincompress_pl.quant import Bits, QuantizedNetwork, quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:PrimeSVT. no candidate keeps both"),
    pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out"),
]
MLP: dict[str, Any] = {"kinds": ("mlp",), "round_to": 1}


@pytest.mark.parametrize(
    ("callback", "table", "kept"),
    [
        (AdaptiveIterativePruning, AdaptiveIterativePruning.resumed_arguments, {"config"}),
        (PrimeSVT, PrimeSVT.resumed_arguments, {"config", "evaluation_cache"}),
        (QuantizationAwareTraining, RESUMED_ARGUMENTS, {"preprocessing"}),
    ],
)
def test_every_argument_is_settled_or_free(callback: Any, table: Any, kept: set[str]) -> None:
    """kept: stands for others, is a place of a file, or is compared with the network itself."""
    arguments = set(inspect.signature(callback.__init__).parameters) - {"self"}
    reading = {"calibration_dataloader", "holdout_size_bytes"}
    assert set(table.settled) | set(table.free) == arguments - kept - reading
    assert not set(table.settled) & set(table.free)


# Rounds


def rounds(folder: Path, epochs: int, callback: Callback, *, resume: bool = False, module: Any = None) -> Plain:
    """A fit of so many epochs that leaves a checkpoint, and goes on from the one there is."""
    module = module or Plain()
    path = folder / "last.ckpt"
    trainer = make_trainer(folder, epochs, callback)
    trainer.fit(module, loader(), loader(), ckpt_path=path if resume else None, weights_only=resume or None)
    trainer.save_checkpoint(path)
    return module


def test_what_has_shaped_the_search_is_refused(tmp_path: Path) -> None:
    rounds(tmp_path, 1, greedy(**MLP))
    others: dict[str, Any] = {
        "granularity": "weight", "kinds": ("heads", "mlp"), "layers": ("blocks.0.*",), "order": "size",
        "ranking": "global", "shrink": "end", "monitor": "val/top1", "max_images": 8, "audit": 0.5,
        "score": "agreement",
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(ValueError, match=rf"AdaptiveIterativePruning: {name}=.*had {name}=.*search has begun"):
            rounds(tmp_path, 2, greedy(**{**MLP, name: value}), resume=True)


def test_blocks_of_another_shape_are_refused_where_there_are_blocks(tmp_path: Path) -> None:
    rounds(tmp_path, 1, greedy(granularity="block", block_shape=(4, 4)))
    with pytest.raises(ValueError, match=r"block_shape=\[8, 4\].*had block_shape=\[4, 4\]"):
        rounds(tmp_path, 2, greedy(granularity="block", block_shape=(8, 4)), resume=True)
    rounds(tmp_path, 1, greedy(**MLP))
    rounds(tmp_path, 2, greedy(**MLP, block_shape=(4, 4)), resume=True)


@pytest.mark.parametrize("other", [{"kinds": ("heads",)}, {"granularity": "weight"}, {"monitor": "val/top1"}])
def test_before_the_first_round_every_argument_may_change(tmp_path: Path, other: dict[str, Any]) -> None:
    rounds(tmp_path, 1, greedy(**MLP, start_epoch=1))
    callback = greedy(**{**MLP, **other}, start_epoch=1)
    rounds(tmp_path, 2, callback, resume=True)
    assert callback.search_state is not None
    assert callback.search_state.granularity == callback.config.granularity


def test_a_test_with_other_arguments_is_no_resume(tmp_path: Path) -> None:
    rounds(tmp_path, 1, greedy(**MLP))
    make_trainer(tmp_path, 1, greedy(kinds=("heads",))).test(
        Plain(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ended_by", "wider"),
    [
        ({"max_rounds": 1}, {"max_rounds": 2}),
        ({"max_rounds": 1}, {}),
        ({"target": 0.02, "target_of": "parameters"}, {"target": 0.3, "target_of": "parameters"}),
        ({"target": 0.02, "target_of": "parameters"}, {"target": 0.3, "target_of": "bytes"}),
        ({"time_budget_s": 1e-9}, {"time_budget_s": 600.0}),
        ({"max_sparsity": 0.1}, {"max_sparsity": 0.5}),
    ],
)
def test_a_search_that_is_over_goes_on_with_wider_limits(
    tmp_path: Path, ended_by: dict[str, Any], wider: dict[str, Any]
) -> None:
    first, second = greedy(**{**MLP, **ended_by}), greedy(**{**MLP, **wider})
    before = rounds(tmp_path, 2, first)
    assert first.search_state is not None
    assert first.search_state.stopped is not None
    after = rounds(tmp_path, 4, second, resume=True)
    assert second.search_state is not None
    assert second.search_state.rounds > first.search_state.rounds
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())


@pytest.mark.parametrize("limits", [{"max_rounds": 1}, {"target": 0.01, "target_of": "parameters"}])
def test_a_search_beyond_its_new_limits_ends_without_another_step(tmp_path: Path, limits: dict[str, Any]) -> None:
    rounds(tmp_path, 2, greedy(**MLP))
    callback = greedy(**MLP, **limits)
    module = rounds(tmp_path, 3, callback, resume=True)
    state = callback.search_state
    assert state is not None
    assert state.stopped is not None
    assert not [step for step in state.steps if step.round > 2]
    assert history_of(module.net) == history_of(rounds(tmp_path / "whole", 2, greedy(**MLP)).net)


def test_a_search_that_masks_to_its_end_goes_on_after_that(tmp_path: Path) -> None:
    options = {**MLP, "shrink": "end"}
    before = rounds(tmp_path, 2, greedy(**options, max_rounds=1))
    after = rounds(tmp_path, 4, greedy(**options, max_rounds=3), resume=True)
    hidden = [module.net.blocks[0].mlp.fc1.out_features for module in (before, after)]  # type: ignore[union-attr]
    assert hidden == [96, 32]


def test_limits_below_what_is_gone_end_in_words(tmp_path: Path) -> None:
    """A max_sparsity below what is gone (it ended in an AssertionError), a tolerance below what is lost."""
    rounds(tmp_path, 2, greedy(**MLP, max_sparsity=0.6))
    callback = greedy(**MLP, max_sparsity=0.2)
    rounds(tmp_path, 3, callback, resume=True)
    assert callback.search_state is not None
    assert {entry.locked for entry in callback.search_state.targets.values()} == {NARROW}


def test_a_tolerance_below_what_is_lost_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rounds(tmp_path, 2, greedy(**MLP))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["callbacks"]["AdaptiveIterativePruning"]["search"]["baseline_score"] = 110.0
    torch.save(checkpoint, tmp_path / "last.ckpt")
    callback = greedy(**MLP, tolerance=1.0)
    with caplog.at_level("INFO"):
        rounds(tmp_path, 3, callback, resume=True)
    state = callback.search_state
    assert state is not None
    assert (state.tolerance, state.rounds) == (1.0, 3)
    assert not [step for step in state.steps if step.round == 3]
    assert "tolerance=1.0 (it was 100.0)" in caplog.text
    assert "the score is below the tolerance already, so nothing was tried" in caplog.text


def test_epochs_take_effect(tmp_path: Path) -> None:
    rounds(tmp_path, 1, greedy(**MLP))
    callback = greedy(**MLP, start_epoch=2, every_n_epochs=2)
    rounds(tmp_path, 5, callback, resume=True)
    assert callback.search_state is not None
    assert callback.search_state.rounds == 3  # before the epochs 0, 2 and 4


@pytest.mark.parametrize("kind", [Plain, Restorable])
def test_a_state_without_arguments_goes_on_as_it_was(tmp_path: Path, kind: Callable[[], Any]) -> None:
    rounds(tmp_path, 2, greedy(**MLP, max_rounds=1), module=kind())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["callbacks"]["AdaptiveIterativePruning"]["arguments"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    callback = greedy(**MLP, max_rounds=5)
    rounds(tmp_path, 3, callback, resume=True, module=kind())
    assert callback.search_state is not None
    assert callback.search_state.rounds == 1


# The limits of a search, by themselves


def a_state(**fields: Any) -> SearchState:
    names = {"free": None, "rejected": NO_SMALLER_STEP, "narrow": NARROW}
    targets = {
        name: {"kind": "mlp", "initial_units": 64, "units": 32, "step": 0.02, "locked": locked}
        for name, locked in names.items()
    }
    plain: dict[str, Any] = {
        "granularity": "structured", "baseline_score": 90.0, "baseline_parameters": 100, "baseline_prunable": 80,
        "baseline_bytes": 400, "baseline_macs": 1000, "tolerance": 2.0, "targets": targets, "initial_units": {},
        "sensitivity": {}, "rounds": 3, "steps": [],
    }  # fmt: skip
    return SearchState.from_dict({"version": 2, **plain, **fields})


BEFORE = AdaptivePruningConfig(tolerance=2.0, step=0.1, min_step=0.05)


@pytest.mark.parametrize(
    ("changes", "opened"),
    [
        ({}, set()),
        ({"tolerance": 3.0}, {"rejected"}),
        ({"tolerance": 1.0}, set()),
        ({"min_step": 0.01}, {"rejected"}),
        ({"max_sparsity": 0.95}, {"narrow"}),
        ({"round_to": 4}, {"narrow"}),
        ({"overshoot": "keep"}, {"rejected"}),
        ({"criterion": "taylor"}, set()),
        ({"max_rounds": 9}, set()),
    ],
)
def test_what_an_old_limit_had_locked_is_open_again(changes: dict[str, Any], opened: set[str]) -> None:
    state, config = a_state(), replace(BEFORE, **changes)
    take_up_limits(state, vars(BEFORE), config)
    assert {name for name, entry in state.targets.items() if entry.locked is None} == opened | {"free"}
    assert state.tolerance == config.tolerance


@pytest.mark.parametrize(
    ("now", "before", "changes", "then"),
    [
        (0.5, {"first_tolerance": 0.5}, {"tolerance": 4.0}, 0.5),  # still being doubled
        (1.0, {"first_tolerance": 0.5}, {"tolerance": 0.8}, 0.8),
        (2.0, {"first_tolerance": 0.5}, {"tolerance": 4.0}, 4.0),
        (2.0, {}, {"first_tolerance": 0.5}, 0.5),
        (0.5, {"first_tolerance": 0.5}, {"first_tolerance": None}, 2.0),
    ],
)
def test_the_next_rounds_tolerance(now: float, before: dict[str, Any], changes: dict[str, Any], then: float) -> None:
    earlier = replace(BEFORE, **before)
    state = a_state(tolerance=now)
    take_up_limits(state, vars(earlier), replace(earlier, **changes))
    assert state.tolerance == then


def test_a_step_takes_effect_where_something_is_left() -> None:
    state = a_state()
    take_up_limits(state, vars(BEFORE), replace(BEFORE, step=0.3))
    assert {name: entry.step for name, entry in state.targets.items()} == {
        "free": 0.3,
        "rejected": 0.02,
        "narrow": 0.02,
    }
    take_up_limits(state, vars(BEFORE) | {"step": 0.3}, replace(BEFORE, step=0.6, min_step=0.5))
    assert state.targets["free"].step == 0.6
    assert set(LIMITS) <= set(vars(BEFORE))


# PrimeSVT


def shot(folder: Path, epochs: int, *, resume: bool = False, **options: Any) -> PrimeSVT:
    module = Plain(small_spikformer)
    for part in module.net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(part.bias, 2.0)  # it fires from the start
    usual: dict[str, Any] = {
        "tolerance": 100.0, "min_memory_saving": 0.05, "rates": (0.25,), "max_sparsity": 0.6, "round_to": 1,
    }  # fmt: skip
    callback = PrimeSVT(**{**usual, **options})
    trainer = make_trainer(folder, epochs, callback)
    trainer.fit(module, loader(), loader(), ckpt_path=folder / "last.ckpt" if resume else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    return callback


def test_a_single_shot_that_is_over_refuses_other_arguments(tmp_path: Path) -> None:
    shot(tmp_path, 1)
    for name, value in {"tolerance": 50.0, "granularity": "filter", "policy": "prioritized", "rates": (0.1,),
                        "start_epoch": 3, "max_images": 12}.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"PrimeSVT: {name}=.*had {name}=.*search is over"):
            shot(tmp_path, 2, resume=True, **{name: value})
    assert shot(tmp_path, 2, resume=True, holdout_size_bytes=1 << 20).result is not None


def test_a_single_shot_to_come_takes_other_arguments(tmp_path: Path) -> None:
    shot(tmp_path, 1, start_epoch=1)
    result = shot(tmp_path, 2, resume=True, start_epoch=1, granularity="filter", tolerance=90.0).result
    assert result is not None
    assert (result.config["granularity"], result.config["tolerance"]) == ("filter", 90.0)


# Quantization


def integers(folder: Path, epochs: int, *, resume: bool = False, **options: Any) -> Any:
    module, path = Backboned(), folder / "last.ckpt"
    trainer = qat_trainer(folder, epochs, qat(**{"calibration_images": 8, **options}))
    trainer.fit(module, qat_loader(), qat_loader(), ckpt_path=path if resume else None, weights_only=resume or None)
    trainer.save_checkpoint(path)
    return module.backbone, trainer


def test_what_has_shaped_the_integers_is_refused(tmp_path: Path) -> None:
    integers(tmp_path, 2)
    others: dict[str, tuple[Any, str]] = {
        "bits": ("W4A8", "'weights': 4"), "method": ("searched", "'searched'"), "calibration_images": (16, "16"),
        "learn_scales": (False, "False"), "start_epoch": (0, "0"),
        "preprocessing": ({"mean": [0.4] * 3, "std": [0.25] * 3}, "0.4"),
    }  # fmt: skip
    for name, (value, told) in others.items():
        with pytest.raises(ValueError, match=rf"QuantizationAwareTraining: .*{name}") as refusal:
            integers(tmp_path, 3, resume=True, **{name: value})
        assert told in str(refusal.value)
        assert "quantized already" in str(refusal.value)


def test_before_quantization_every_argument_may_change(tmp_path: Path) -> None:
    integers(tmp_path, 1)
    network, _ = integers(tmp_path, 3, resume=True, bits="W4A8", learn_scales=False)
    assert network.bits == Bits.of("W4A8")
    assert network.scales.adjustment is None


def test_rates_and_freezes_take_effect(tmp_path: Path) -> None:
    integers(tmp_path, 2)
    network, trainer = integers(tmp_path, 3, resume=True, scale_lr_factor=5.0)
    model, own = trainer.optimizers[0].param_groups
    assert own["lr"] == 5.0 * model["lr"]
    before = network.scales.adjustment.detach().clone()
    network, _ = integers(tmp_path, 4, resume=True, freeze_epoch=2)
    assert torch.equal(network.scales.adjustment, before)
    network, _ = integers(tmp_path, 5, resume=True, freeze_epoch=9)
    assert not torch.equal(network.scales.adjustment, before)


def test_a_teacher_takes_effect_or_names_both_values(tmp_path: Path) -> None:
    integers(tmp_path, 2, distillation=0.5)
    for options in ({"distillation": 0.9, "temperature": 3.0}, {"distillation": 0.2}, {}):
        integers(tmp_path, 3, resume=True, **options)
    with pytest.raises(ValueError, match=r"distillation=0\.3, but the fit that is resumed had distillation=0"):
        integers(tmp_path, 4, resume=True, distillation=0.3)


def quantized(**options: Any) -> LightningModule:
    module = Backboned()
    images = next(iter(qat_loader()))[0]
    usual: dict[str, Any] = {"method": "max", "calibration_images": 8}
    preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3}
    module.backbone = quantize(module.backbone, [images], preprocessing=preprocessing, **{**usual, **options})
    return module


def test_a_network_of_other_bits_or_pixels_is_refused_in_a_fresh_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"with bits=Bits\(weights=8, .*bits=Bits\(weights=4, .*asked"):
        fit_qat(quantized(), tmp_path, 1, qat(bits="W4A8"))
    with pytest.raises(ValueError, match=r"preprocessing\['std'\]"):
        fit_qat(quantized(), tmp_path, 1, qat(preprocessing={"mean": [0.5] * 3, "std": [0.2] * 3}))


def test_another_method_than_the_networks_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"with method='max', which stays; method='searched' changes nothing"):
        fit_qat(quantized(), tmp_path, 1, qat(method="searched"))


def test_a_default_beside_a_network_of_other_bits_is_said(tmp_path: Path) -> None:
    module = quantized(bits="W4A8")
    with pytest.warns(UserWarning, match=r"quantized already, with bits=.*stays; bits=.*changes nothing"):
        fit_qat(module, tmp_path, 1, qat())
    assert isinstance(module.backbone, QuantizedNetwork)
    assert module.backbone.bits == Bits.of("W4A8")


# Other callbacks than before


def both(folder: Path, epochs: int, *callbacks: Callback, resume: bool = False) -> Any:
    module = Recorded()
    trainer = qat_trainer(folder, epochs, *callbacks)
    path = folder / "last.ckpt"
    trainer.fit(module, qat_loader(), qat_loader(), ckpt_path=path if resume else None)
    trainer.save_checkpoint(path)
    return module.backbone


def pruner(**options: Any) -> AdaptiveIterativePruning:
    return greedy(**MLP, model_attribute="backbone", **options)


def test_callbacks_may_be_added(tmp_path: Path) -> None:
    both(tmp_path, 1)
    added = pruner()
    network = both(tmp_path, 3, added, qat(start_epoch=2), resume=True)
    assert added.search_state is not None
    assert added.search_state.rounds == 2
    assert [next(iter(entry)) for entry in history_of(network)] == ["prune", "prune", "quantize"]


def test_callbacks_may_go_and_stand_in_another_order(tmp_path: Path) -> None:
    """What they had made of the network stays. (Learned scales need the callback that trains them.)"""
    both(tmp_path, 2, pruner(max_rounds=1), qat(learn_scales=False))
    again = both(tmp_path, 3, qat(learn_scales=False), pruner(max_rounds=1), resume=True)
    alone = both(tmp_path, 4, resume=True)
    assert history_of(alone) == history_of(again)
    assert isinstance(alone, QuantizedNetwork)

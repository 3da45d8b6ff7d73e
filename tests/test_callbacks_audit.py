"""An audit and scores without labels inside a fit: logged, stored, resumed, and refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callback_cases import Plain, greedy, loader, make_trainer, search_of
from support.ddp_cases import fit
from support.rank_cases import on_ranks
from support.spiking_cases import small_spikformer
from torch import nn

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:PrimeSVT. no candidate keeps both"),
    pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out"),
    pytest.mark.filterwarnings("ignore:.*cannot resolve a tolerance"),
]


class Logged(Callback):
    """What was logged at the end of each epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize(
    "options",
    [{"score": "accuracy"}, {"score": "agreement"}, {"score": "kl"}],
    ids=str,
)
def test_a_fit_audits_its_rounds_and_a_resumed_one_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"tolerance": 40.0, "audit": 0.4, "kinds": ("mlp",), **options}
    whole, save, logged = greedy(**options), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), Logged()
    module = Plain()
    make_trainer(tmp_path, 3, whole, save, logged).fit(module, loader(), loader())
    state = whole.search_state
    assert state is not None
    assert state.score_kind == options["score"]
    assert bool(state.first_answers) == (options["score"] != "accuracy")
    assert [audit.images for audit in state.audits] == [10] * 3
    for audit, row in zip(state.audits, logged.rows, strict=True):
        assert row["pruning/audit_lost"] == pytest.approx(audit.lost_points, abs=1e-4)
        assert row["pruning/optimism"] == pytest.approx(audit.optimism_points, abs=1e-4)
    json.dumps(state.to_dict())
    resumed, second = greedy(**options), Plain()
    make_trainer(tmp_path, 3, resumed).fit(
        second, loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    assert search_of(resumed) == search_of(whole)
    for key, value in module.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_a_search_that_began_without_an_audit_gets_none(tmp_path: Path) -> None:
    make = {"tolerance": 40.0, "kinds": ("mlp",)}
    save = ModelCheckpoint(tmp_path, "last")
    make_trainer(tmp_path, 1, greedy(**make), save).fit(Plain(), loader(), loader())
    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError, match=r"audit=0\.4, but the fit that is resumed had audit=0\.0"):
        make_trainer(tmp_path, 2, greedy(**make, audit=0.4)).fit(Plain(), loader(), loader(), ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        state.get("arguments", {}).pop("audit", None)  # as of a version that had no audit
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="the search was begun without an audit"):
        make_trainer(tmp_path, 2, greedy(**make, audit=0.4)).fit(Plain(), loader(), loader(), ckpt_path=path)


@pytest.mark.parametrize("kind", [AdaptiveIterativePruning, PrimeSVT])
def test_a_metric_has_no_audit_and_no_other_score(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"audit=0\.3: a monitor \('val/top1'\)"):
        kind(monitor="val/top1", audit=0.3)
    with pytest.raises(ValueError, match=r"score='kl': a monitor \('val/top1'\)"):
        kind(monitor="val/top1", score="kl")
    with pytest.raises(ValueError, match="score='top-5'"):
        kind(score="top-5")


def _spiking() -> Plain:
    """Fires from the start: BatchNorm's shift lifts the membranes."""
    module = Plain(small_spikformer)
    for part in module.net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(part.bias, 2.0)
    return module


def test_primesvt_audits_in_a_fit(tmp_path: Path) -> None:
    logged = Logged()
    callback = PrimeSVT(
        tolerance=50.0, min_memory_saving=0.01, rates=(0.3,), granularity="filter", audit=0.4, score="agreement"
    )
    make_trainer(tmp_path, 1, callback, logged).fit(_spiking(), loader(), loader())
    assert callback.result is not None
    assert callback.result.audit is not None
    assert callback.result.score_kind == "agreement"
    assert logged.rows[0]["pruning/audit_lost"] == pytest.approx(callback.result.audit.lost_points, abs=1e-4)
    again = PrimeSVT(
        tolerance=50.0, min_memory_saving=0.01, rates=(0.3,), granularity="filter", audit=0.4, score="agreement"
    )
    again.load_state_dict(callback.state_dict())
    assert again.result is not None
    assert again.result.audit == callback.result.audit


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_ranks_audit_together_and_go_on_together(tmp_path: Path) -> None:
    options = {"audit": 0.4, "tolerance": 50.0, "score": "agreement"}

    def work(rank: int) -> Any:
        whole = fit(tmp_path / "whole", rank, 2, **options)
        resumed = fit(tmp_path / "resumed", rank, 2, ckpt=tmp_path / "whole" / "epoch=0.ckpt", **options)
        try:
            fit(tmp_path / "other", rank, 2, ckpt=tmp_path / "alone" / "epoch=0.ckpt", **options)
        except (RuntimeError, ValueError) as error:
            return {"whole": whole, "resumed": resumed, "other": str(error)}

    fit(tmp_path / "alone", **options)
    first, second = on_ranks(tmp_path / "ranks", 2, work)
    for name in ("whole", "resumed"):
        assert first[name]["search"] == second[name]["search"]
        assert first[name]["digests"] == second[name]["digests"]
    assert first["whole"]["search"] == first["resumed"]["search"]
    assert len(first["whole"]["search"]["audits"]) == 2
    assert "the number of processes was 1 when the search began and is 2" in first["other"]

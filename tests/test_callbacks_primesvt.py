"""PrimeSVT in a fit: once, with optimizer, checkpoint, resume, ranks and masks following it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from support.callback_cases import Plain, Unmoved, loader, make_trainer, shapes
from support.ddp_cases import HoldOutData, ddp
from support.loggers import Calls, Recording
from support.rank_cases import digest, on_ranks
from support.spiking_cases import no_membranes, small_spikformer
from torch import nn

from swincompress_pl.callbacks import PrimeSVT
from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.history import history_of
from swincompress_pl.pruning import PrimeProgress, prune
from swincompress_pl.pruning.structure.weight_masks import masked_parameters
from swincompress_pl.report.callback import PruningFigures

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:PrimeSVT. no candidate keeps both"),
    pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out"),
]
# A toy of 24 images: what is cut does not hang on its accuracy.
OPTIONS: dict[str, Any] = {
    "tolerance": 100.0,
    "min_memory_saving": 0.05,
    "rates": (0.1, 0.25),
    "max_sparsity": 0.6,
    "round_to": 1,
}


def shooter(**options: Any) -> PrimeSVT:
    return PrimeSVT(**{**OPTIONS, **options})


def spiking() -> Plain:
    """Fires from the start: BatchNorm's shift lifts the membranes."""
    module = Plain(small_spikformer)
    for part in module.net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(part.bias, 2.0)
    torch.manual_seed(7)
    return module


class Restorable(CompressionMixin, Plain):
    def __init__(self) -> None:
        super().__init__(small_spikformer)


class Stop(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def found_by(callback: PrimeSVT) -> dict[str, Any]:
    assert callback.result is not None
    return {**callback.result.to_dict(), "elapsed_s": 0.0, "scoring": {}}


@pytest.mark.parametrize("granularity", ["structured", "filter"])
def test_a_fit_prunes_once_and_trains_what_is_left(tmp_path: Path, granularity: str) -> None:
    callback, module, logger = shooter(granularity=granularity, start_epoch=1), spiking(), CSVLogger(tmp_path)
    before = sum(p.numel() for p in module.parameters())
    trainer = make_trainer(tmp_path, 3, callback, logger=logger)
    trainer.fit(module, loader(), loader())
    result = callback.result
    assert result is not None
    assert result.met
    assert no_membranes(module.net)
    parameters = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert parameters == set(module.net.parameters())
    if granularity == "structured":
        assert sum(p.numel() for p in module.parameters()) == result.parameters_after < before
        assert len(history_of(module.net)) == 1
        assert all(
            trainer.optimizers[0].state[p]["exp_avg"].shape == p.shape
            for p in module.net.parameters()
            if p.grad is not None
        )
    else:
        masks = masked_parameters(module.net)
        assert masks
        for weight, mask in masks.values():
            assert not bool(weight[~mask].any()), "zeros stay zeros while the others train"
    rows = (Path(logger.log_dir) / "metrics.csv").read_text(encoding="utf-8").splitlines()
    for name in ("score", "baseline", "saving", "parameters", "images_scored", "macs"):
        assert f"pruning/{name}" in rows[0]
    metrics = trainer.callback_metrics
    assert float(metrics["pruning/saving"]) == pytest.approx(result.saving)
    assert float(metrics["pruning/parameters"]) == pytest.approx(before * (1 - result.saving))


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_network_is_pruned_and_trained_as_a_plain_one(tmp_path: Path, in_place: bool) -> None:
    torch.compiler.reset()
    plain, compiled, found = spiking(), spiking(), []
    network = compiled.net
    if in_place:
        compiled.net.compile(backend="eager")
    else:
        compiled.net = torch.compile(compiled.net, backend="eager")
    for module in (plain, compiled):
        callback = shooter(start_epoch=1)
        make_trainer(tmp_path, 3, callback).fit(module, loader(), loader())
        found.append(found_by(callback))
    assert found[0] == found[1]
    assert shapes(network) == shapes(plain.net)
    assert all(torch.equal(value, plain.net.state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("granularity", ["structured", "filter"])
def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(tmp_path: Path, granularity: str) -> None:
    callback, resumed = shooter(granularity=granularity), shooter(granularity=granularity)
    whole = spiking()
    make_trainer(tmp_path, 3, callback).fit(whole, loader(shuffle=True), loader())
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    make_trainer(tmp_path, 3, shooter(granularity=granularity), save, Stop(1)).fit(
        spiking(), loader(shuffle=True), loader()
    )
    second = spiking()
    torch.manual_seed(99)  # another process begins with other numbers
    make_trainer(tmp_path, 3, resumed).fit(second, loader(shuffle=True), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert shapes(second) == shapes(whole) != shapes(Plain(small_spikformer))
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert json.loads(json.dumps(found_by(resumed))) == json.loads(json.dumps(found_by(callback)))
    assert history_of(second.net) == history_of(whole.net)


@pytest.mark.parametrize("granularity", ["structured", "filter"])
def test_a_checkpoint_rebuilds_the_network(tmp_path: Path, granularity: str) -> None:
    module = Restorable()
    module.load_state_dict(spiking().state_dict())
    trainer = make_trainer(tmp_path, 1, shooter(granularity=granularity))
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Restorable.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.net(images), module.eval().net(images))
    assert shapes(loaded) == shapes(module)


@pytest.mark.parametrize(
    "options",
    [{"monitor": "val/top1"}, {"criterion": "taylor"}, {"batchnorm": "correct", "gradient_batches": 2}],
    ids=str,
)
def test_other_ways_to_score(tmp_path: Path, options: dict[str, Any]) -> None:
    callback, module = shooter(**options), spiking()
    make_trainer(tmp_path, 1, callback, precision="bf16-mixed").fit(module, loader(), loader())
    assert callback.result is not None
    assert callback.result.met
    assert (callback.result.scoring["batchnorm_passes"] > 0) == ("batchnorm" in options)


class KilledError(Exception):
    pass


class Killed(PrimeSVT):
    """Dies at its sixth candidate."""

    seen = 0

    def on_progress(self, trainer: Trainer, progress: PrimeProgress) -> None:
        self.seen += 1
        if self.seen == 6:
            raise KilledError


def test_a_search_that_dies_leaves_no_trace_and_goes_on_from_its_memo(tmp_path: Path) -> None:
    memo, unmoved, module = tmp_path / "memo.jsonl", Unmoved(), spiking()
    killed = Killed(**OPTIONS, evaluation_cache=memo)
    with pytest.raises(KilledError):
        make_trainer(tmp_path, 1, killed, unmoved).fit(module, loader(), loader())
    unmoved.check(module)
    assert (killed.result, killed._scorer) == (None, None)
    callback = shooter(evaluation_cache=memo)
    make_trainer(tmp_path, 1, callback).fit(spiking(), loader(), loader())
    assert callback.result is not None
    assert callback.result.scoring["remembered"] >= 6


def test_the_search_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, 1, shooter(), TQDMProgressBar(), enable_progress_bar=True)
    trainer.fit(spiking(), loader(), loader())
    shown = capsys.readouterr()
    assert "PrimeSVT before epoch 0" in shown.out + shown.err
    assert "saved at" in shown.out + shown.err
    assert "s left in this phase" in shown.out + shown.err


@pytest.mark.parametrize(("policy", "first"), [("allocated", "curves"), ("prioritized", "robustness")])
def test_its_figures_are_logged_and_written(tmp_path: Path, policy: str, first: str) -> None:
    experiment = Calls("add_figure")
    figures = PruningFigures(tmp_path / "page")
    trainer = make_trainer(tmp_path, 2, shooter(policy=policy), figures, logger=Recording(experiment))
    trainer.fit(spiking(), loader(), loader())
    tags = [arguments[0] for arguments, _ in experiment.calls]
    assert tags == [f"pruning/{first}", "pruning/accuracy_memory", "pruning/spike_rates"], "once"
    names = {file.name for file in (tmp_path / "page").iterdir()}
    assert names == {f"primesvt-{name}.png" for name in (first, "accuracy_memory", "spike_rates")}


def test_it_refuses_what_it_cannot_prune(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"VisionTransformer: a .* is not a spiking network; PrimeSVT prunes spiking"):
        make_trainer(tmp_path, 1, shooter()).fit(Plain(), loader(), loader())
    with pytest.raises(ValueError, match="PrimeSVT has nothing to score on: give the datamodule a holdout_dataloader"):
        make_trainer(tmp_path, 1, shooter()).fit(spiking(), loader())
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop'"):
        shooter(drop=1.0)
    with pytest.raises(ValueError, match="start_epoch=-1: it has to be 0 or more"):
        shooter(start_epoch=-1)
    with pytest.raises(ValueError, match="granularity='both': it has to be one of structured, filter"):
        shooter(granularity="both")
    with pytest.raises(ValueError, match="max_images=8: a monitor"):
        shooter(max_images=8, monitor="val/top1")
    with pytest.raises(ValueError, match="the pruning callback's state has version 1, 2 is expected"):
        shooter().load_state_dict({"version": 1})


def test_one_search_may_follow_the_other(tmp_path: Path) -> None:
    module = spiking()
    make_trainer(tmp_path, 1, shooter()).fit(module, loader(), loader())
    after_first = shapes(module)
    prune(module.net, lambda network: 90.0, input_shape=(1, 3, 16, 16))
    make_trainer(tmp_path, 1, shooter(min_memory_saving=0.0)).fit(module, loader(), loader())
    assert shapes(module) != after_first
    assert len(history_of(module.net)) >= 2


def _fit_on(folder: Path, rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    module, callback = spiking(), shooter(tolerance=60.0, min_memory_saving=0.0)
    torch.manual_seed(rank)
    trainer = make_trainer(folder, 2, callback, devices=2, strategy=ddp())
    trainer.fit(module, datamodule=HoldOutData(rank, 2))
    parameters = [p.detach() for p in module.net.parameters()]
    return {"found": json.dumps(found_by(callback)), "weights": digest([parameters]), "history": history_of(module.net)}


@pytest.mark.slow
def test_ranks_stay_equal(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, lambda rank: _fit_on(tmp_path / "fit", rank))
    assert first == second
    assert first["history"]

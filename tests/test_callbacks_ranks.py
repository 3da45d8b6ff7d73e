"""Callbacks under DDP (gloo): what fails on one rank ends all, and a rank without a hold-out image takes part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule
from support.callback_cases import data, greedy, make_trainer, vit
from support.ddp_cases import Momentum, ddp, train_loader
from support.qat_cases import Plain as Quantizable
from support.qat_cases import loader as quantizable_loader
from support.qat_cases import qat
from support.rank_cases import digest, on_ranks
from support.spiking_cases import small_spikformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT
from swincompress_pl.callbacks import quantization as quantization_module
from swincompress_pl.callbacks import search as search_module
from swincompress_pl.pruning.prime.batchnorm import StatisticsCorrection
from swincompress_pl.pruning.prime.evaluation_cache import EvaluationCache

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out"),
]
MINE = "ValueError: mine alone"


class Source(LightningDataModule):
    """Its hold-out and calibration images are those that this rank is given."""

    def __init__(self, rank: int, holdout: Any = None, calibration: Any = None) -> None:
        super().__init__()
        self.rank, self.holdout, self.calibration = rank, holdout, calibration

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader(self.rank, 2)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), 8)

    def holdout_dataloader(self) -> Any:
        return self.holdout if self.holdout is not None else DataLoader(data(10, seed=2), 4)

    def calibration_dataloader(self, images: int) -> Any:
        return self.calibration if self.calibration is not None else DataLoader(data(), 8)


class Broken(IterableDataset[Any]):
    """Gives `count` images and then fails, as a file on one machine may."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        yield from TensorDataset(*data(self.count).tensors)
        raise ValueError("mine alone")


def broken(count: int = 5) -> DataLoader[Any]:
    return DataLoader(Broken(count), 4)


def fit(folder: Path, rank: int, callback: Any, *, module: Any = None, source: Any = None, epochs: int = 1) -> Any:
    """What a fit on this rank raises, and whether it left the network as it was."""
    module = module or Momentum(vit)
    before = digest(dict(module.state_dict()))
    trainer = make_trainer(folder, epochs, callback, devices=2, strategy=ddp(), num_sanity_val_steps=0)
    try:
        trainer.fit(module, datamodule=source or Source(rank))
    except BaseException as error:
        return [f"{type(error).__name__}: {error}", before == digest(dict(module.state_dict()))]
    return ["nothing was raised", False]


def spiking() -> Momentum:
    module = Momentum(small_spikformer)
    for part in module.net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(part.bias, 2.0)
    return module


def raising(*_: Any, **__: Any) -> Any:
    raise ValueError("mine alone")


def only_on(failing: int, rank: int, place: Any, name: str, run: Callable[[], Any]) -> Any:
    """`run()`, with a function in our code that raises on one rank."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == failing:
            patch.setattr(place, name, raising)
        return run()


class OnStep(AdaptiveIterativePruning):
    def __init__(self, error: BaseException | None) -> None:
        super().__init__(tolerance=100.0, step=0.25, max_sparsity=0.75)
        self.error = error

    def on_step(self, trainer: Any, step: Any) -> None:
        if self.error is not None:
            raise self.error


class StepFails(Momentum):
    """Its validation step fails on one rank."""

    def __init__(self, failing: bool) -> None:
        super().__init__(vit)
        self.failing = failing

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.failing and batch_idx:
            raise ValueError("mine alone")
        super().validation_step(batch, batch_idx)


def pruning_failures(folder: Path, rank: int) -> dict[str, Any]:
    """Of pruning callbacks: by name what each rank raises; rank 1 fails, or rank 0 where that alone does something."""
    mine = rank == 1
    shooter: dict[str, Any] = {"tolerance": 100.0, "min_memory_saving": 0.0, "rates": (0.25,), "round_to": 1}
    cache = folder / "cache.jsonl"
    return {
        "setup": only_on(1, rank, search_module, "refuse_neighbours", lambda: fit(folder, rank, greedy())),
        "trial": only_on(1, rank, search_module, "check_on_trial", lambda: fit(folder, rank, greedy())),
        "hold-out": fit(folder, rank, greedy(), source=Source(rank, holdout=broken() if mine else None)),
        "gradients": fit(
            folder, rank, greedy(criterion="taylor"), source=Source(rank, calibration=broken() if mine else None)
        ),
        "a user's display": fit(folder, rank, OnStep(ValueError("mine alone") if mine else None)),
        "an interrupt": fit(folder, rank, OnStep(KeyError("stop") if mine else None)),
        "the step": fit(folder, rank, greedy(monitor="val/top1"), module=StepFails(mine)),
        "calibration": fit(
            folder,
            rank,
            PrimeSVT(**shooter, batchnorm="correct"),
            module=spiking(),
            source=Source(rank, calibration=broken() if mine else None),
        ),
        "the cache": only_on(
            0,
            rank,
            EvaluationCache,
            "put",
            lambda: fit(folder, rank, PrimeSVT(**shooter, evaluation_cache=cache), module=spiking()),
        ),
    }


def test_a_pruning_rank_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, lambda rank: pruning_failures(tmp_path / "fits", rank))
    for name in first:
        told, mine = (second, first) if name == "the cache" else (first, second)
        number = 0 if name == "the cache" else 1
        assert told[name][0].startswith(f"RankFailedError: rank {number} failed while "), name
        assert "mine alone" in told[name][0] or "stop" in told[name][0], name
        assert "mine alone" in mine[name][0] or "stop" in mine[name][0], name
        assert told[name][1], name
        assert mine[name][1], name


class QuantizableSource(Source):
    """In pixels that the network of `qat_cases` was made for."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(quantizable_loader().dataset, 4, sampler=DistributedSampler(quantizable_loader().dataset))

    def val_dataloader(self) -> DataLoader[Any]:
        return quantizable_loader()

    def holdout_dataloader(self) -> Any:
        return quantizable_loader() if self.holdout is None else self.holdout

    def calibration_dataloader(self, images: int) -> Any:
        return quantizable_loader() if self.calibration is None else self.calibration


class BrokenLater(IterableDataset[Any]):
    """A first batch is there when the fit begins; the second, when it is calibrated, is not."""

    def __iter__(self) -> Iterator[Any]:
        yield from TensorDataset(*quantizable_loader().dataset[:8])  # type: ignore[misc]
        raise ValueError("mine alone")


def quantization_failures(folder: Path, rank: int) -> dict[str, Any]:
    def run(calibration: Any = None) -> Any:
        source = QuantizableSource(rank, calibration=calibration if rank == 1 else None)
        return fit(folder, rank, qat(start_epoch=1), module=Quantizable(), source=source, epochs=2)

    return {
        "setup": only_on(1, rank, quantization_module, "refuse_precision", run),
        "calibration": run(DataLoader(BrokenLater(), 8)),
        "the exchange": only_on(1, rank, quantization_module, "put_network", run),
        "the scales": only_on(1, rank, quantization_module.ScaleGroup, "join", run),
        "the search": only_on(0, rank, quantization_module, "quantize", run),
    }


def test_a_quantizing_rank_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, lambda rank: quantization_failures(tmp_path / "fits", rank))
    for name in first:
        told, mine = (second, first) if name == "the search" else (first, second)
        number = 0 if name == "the search" else 1
        assert told[name][0].startswith(f"RankFailedError: rank {number} failed while "), name
        assert told[name][0].endswith(MINE), name
        assert mine[name][0] == MINE, name


def test_policies_that_differ_do_as_rank_zero_says(tmp_path: Path) -> None:
    """A policy may look at a metric that every rank has another value of."""

    class Undecided(AdaptiveIterativePruning):
        def should_prune(self, epoch: int) -> bool:
            return bool(self.answer)

    def work(rank: int) -> Any:
        found = []
        for yes in (0, 1):
            callback, module = Undecided(tolerance=100.0), Momentum(vit)
            callback.answer = rank == yes  # type: ignore[attr-defined]
            make_trainer(tmp_path, 1, callback, devices=2, strategy=ddp()).fit(module, datamodule=Source(rank))
            found.append([callback.search_state is not None, digest(dict(module.state_dict()))])
        return found

    first, second = on_ranks(tmp_path, 2, work)
    assert first == second
    assert [pruned for pruned, _ in first] == [True, False]


# A rank without an image of the hold-out


def none() -> DataLoader[Any]:
    """No batch at all."""
    return DataLoader(TensorDataset(*data()[:0]), batch_size=4)


class Flipped(Momentum):
    """Its step predicts with two views, so that it is run again for each candidate."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0]) + self.net(batch[0].flip(-1))
        self.log("val/top1", (logits.argmax(-1) == batch[1]).float().mean())


def pruned(folder: Path, rank: int, callback: Any, module: Any = None, source: Any = None) -> Any:
    """What a search found on this rank; the fit's network."""
    module = module or Momentum(vit)
    trainer = make_trainer(folder, 2, callback, devices=2, strategy=ddp(), num_sanity_val_steps=0)
    trainer.fit(module, datamodule=source or Source(rank))
    state = callback.search_state if isinstance(callback, AdaptiveIterativePruning) else callback.result
    assert state is not None
    scores = [step.score for step in state.steps] if isinstance(callback, AdaptiveIterativePruning) else [state.saving]
    return [state.baseline_score, scores, digest([p.detach() for p in module.parameters()])]


def few_images(folder: Path, rank: int) -> dict[str, Any]:
    class OneImage(Source):
        """Lightning's own sampler gives rank 1 the image of rank 0 once more, which does not count."""

        holdout_dataloader = None  # type: ignore[assignment]

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(data(1), 4)

    def empty() -> Source:
        return Source(rank, holdout=none() if rank == 1 else None)

    shooter = PrimeSVT(tolerance=100.0, min_memory_saving=0.0, rates=(0.25,), round_to=1)
    return {
        "max_images": pruned(folder, rank, greedy(max_images=1)),
        "max_images of a shard": pruned(folder, rank, greedy(max_images=1), source=ShardedSource(rank)),
        "a step": pruned(folder, rank, greedy(max_images=1), Flipped(vit), ShardedSource(rank)),
        "padding": pruned(folder, rank, greedy(), source=OneImage(rank)),
        "PrimeSVT": pruned(folder, rank, shooter, spiking(), OneImage(rank)),
        "an empty loader": fit(folder, rank, greedy(), source=empty())[0],
        "an empty loader and a metric": fit(folder, rank, greedy(monitor="val/top1"), source=empty())[0],
        "quantization": fit(
            folder,
            rank,
            qat(start_epoch=0),
            module=Quantizable(),
            source=QuantizableSource(rank, holdout=none() if rank == 1 else None),
        )[0],
    }


class ShardedSource(Source):
    """Each rank has images of its own."""

    def holdout_dataloader(self) -> Any:
        return DataLoader(data(10, seed=2), 4, sampler=DistributedSampler(data(10), shuffle=False))


@pytest.mark.slow
def test_a_rank_without_an_image_takes_part(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, lambda rank: few_images(tmp_path / "fits", rank))
    for name in ("max_images", "max_images of a shard", "a step", "padding", "PrimeSVT"):
        assert first[name] == second[name], name
        assert first[name][0] in (0.0, 100.0), name  # of one image
        assert first[name][1] != [], name
    assert first["an empty loader"] == second["an empty loader"] == "nothing was raised"
    assert first["an empty loader and a metric"] == second["an empty loader and a metric"]
    assert first["an empty loader and a metric"].startswith("ValueError: rank 1 has no images of the hold-out")
    assert first["quantization"] == second["quantization"] == "nothing was raised"


# Statistics that every rank has of its own


class Statistics(AdaptiveIterativePruning):
    """A hash of all buffers as each candidate is scored."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tolerance=100.0, step=0.5, start_epoch=1, max_rounds=1, **options)
        self.found: list[str] = []

    def on_step(self, trainer: Any, step: Any) -> None:
        self.found.append(digest(list(trainer.lightning_module.net.buffers())))


def test_candidates_are_the_same_network_on_every_rank(tmp_path: Path) -> None:
    """A BatchNorm's running statistics are those of the rank's own last batch, until rank 0's are shared."""

    def work(rank: int) -> Any:
        callback, module, after = Statistics(granularity="weight"), spiking(), StatisticsAfterBatch()
        trainer = make_trainer(
            tmp_path, 2, callback, after, devices=2, strategy=ddp(), limit_val_batches=0, limit_train_batches=2
        )
        trainer.fit(module, datamodule=Source(rank))
        return [after.found[1], callback.found]

    first, second = on_ranks(tmp_path, 2, work)
    assert first[0] != second[0]  # before the search
    assert first[1] == second[1] != []


class StatisticsAfterBatch(Callback):
    """A hash of all buffers behind each step."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.found.append(digest(list(pl_module.net.buffers())))


def test_statistics_are_corrected_by_rank_zeros_images(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        network = spiking().net
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
        correction = StatisticsCorrection(network, [images])
        own = digest(list(network.buffers()))
        with torch.no_grad():
            next(network.parameters()).mul_(2.0)
        correction.correct()
        return [own, digest(list(network.buffers()))]

    first, second = on_ranks(tmp_path / "ranks", 2, work)
    assert first == second
    assert first[0] != first[1]

"""Pruning under DDP (gloo): one decision for all ranks, bit-equal ranks, and training as on one device."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from support.callback_cases import data, greedy, loader, make_trainer, swin, vit
from support.ddp_cases import Digests, Momentum, ddp, fit, train_loader
from support.rank_cases import digest, on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from swincompress_pl.pruning.structure.apply import history_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
STRUCTURED: dict[str, Any] = {}
MASKS = {"granularity": "weight"}


def assert_ranks_agree(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]
    for other in ranks[1:]:
        assert other["digests"] == first["digests"]
        assert other["search"] == first["search"]
        assert other["metrics"] == first["metrics"]
    assert len(set(first["steps"])) == len(first["steps"])  # each changed something


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same decisions, and states that are equal but for sums taken in another order."""
    assert one["history"] == other["history"]
    assert one["state"].keys() == other["state"].keys()
    for key, value in one["state"].items():
        torch.testing.assert_close(value, other["state"][key], rtol=1e-4, atol=1e-5, msg=key)
    for index, state in one["optimizer"]["state"].items():
        torch.testing.assert_close(
            state["momentum_buffer"], other["optimizer"]["state"][index]["momentum_buffer"], rtol=1e-3, atol=1e-5
        )


def test_two_ranks_train_as_one_device(tmp_path: Path) -> None:
    """Also across a resume: from two ranks on one device, and from one device on two ranks."""

    def work(rank: int) -> Any:
        return {
            "structured": fit(tmp_path / "two", rank, 2, **STRUCTURED),
            "masks": fit(tmp_path / "two-masks", rank, 2, sharded=False, **MASKS),
            "resumed": fit(tmp_path / "two-resumed", rank, 2, ckpt=tmp_path / "one" / "epoch=0.ckpt", **STRUCTURED),
        }

    one = fit(tmp_path / "one", **STRUCTURED)
    one_masks = fit(tmp_path / "one-masks", sharded=False, **MASKS)
    ranks = on_ranks(tmp_path / "ranks", 2, work)
    for name, alone in (("structured", one), ("masks", one_masks), ("resumed", one)):
        assert_ranks_agree([rank[name] for rank in ranks])
        assert_close(ranks[0][name], alone)
        assert ranks[0][name]["images"] == alone["images"]
    assert one["history"] != []
    back = fit(tmp_path / "one-resumed", ckpt=tmp_path / "two" / "epoch=0.ckpt", **STRUCTURED)
    assert_close(back, one)


class TwoHeaded(Momentum):
    """With parameters that no loss reaches: DDP has to look for them."""

    def __init__(self, build: Any = vit) -> None:
        super().__init__(build)
        self.unused = nn.Linear(4, 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Wrappers(Callback):
    """Watches the DDP wrappers of a fit; stands after the pruning callback."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[DistributedDataParallel]] = []
        self.options: list[tuple[bool, bool, bool]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wrapper = trainer.strategy.model
        assert isinstance(wrapper, DistributedDataParallel)
        assert wrapper.module is pl_module
        if not any(reference() is wrapper for reference in self.seen):
            self.seen.append(weakref.ref(wrapper))
            static = bool(getattr(wrapper, "static_graph", False))
            self.options.append((wrapper.find_unused_parameters, wrapper.gradient_as_bucket_view, static))


def _alive(watch: Wrappers) -> list[bool]:
    return [reference() is not None for reference in watch.seen]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
        {"static_graph": True},
    ],
)
def test_the_wrapper_is_made_anew_with_its_options(tmp_path: Path, options: dict[str, bool]) -> None:
    """And the old one is gone at once, without waiting for the garbage collector: its reducer hooks parameters."""

    def work(rank: int) -> Any:
        module, watch, digests = TwoHeaded(), Wrappers(), Digests()
        gc.collect()
        gc.disable()
        trainer = make_trainer(tmp_path, 3, greedy(), watch, digests, strategy=ddp(**options), devices=2)
        trainer.fit(module, DataLoader(data(), 4, shuffle=True), loader())
        return {"alive": _alive(watch), "options": watch.options, "digests": digests.found}

    ranks = on_ranks(tmp_path, 2, work)
    expected = [options.get(key, False) for key in ("find_unused_parameters", "gradient_as_bucket_view")]
    for rank in ranks:
        assert rank["options"] == [(*expected, options.get("static_graph", False))] * 3
        assert not any(rank["alive"][:-1])
        assert rank["digests"] == ranks[0]["digests"]


def test_nothing_is_wrapped_anew_where_nothing_was_cut(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        watch = Wrappers()
        trainer = make_trainer(tmp_path, 4, greedy(max_rounds=1), watch, strategy=ddp(), devices=2)
        trainer.fit(Momentum(), train_loader(rank, 2), loader())
        return len(watch.seen)

    assert on_ranks(tmp_path, 2, work) == [1, 1]


@pytest.mark.parametrize("monitor", [None, "val/top1"])
def test_every_image_of_a_sharded_holdout_counts_once(tmp_path: Path, monitor: str | None) -> None:
    """23 images on 2 ranks: the sampler repeats one, which must not decide. A monitored metric is Lightning's own."""

    def work(rank: int) -> Any:
        callback = greedy(monitor=monitor, max_rounds=1)
        trainer = make_trainer(tmp_path, 1, callback, strategy=ddp(), devices=2)
        trainer.fit(Momentum(), train_loader(rank, 2), DataLoader(data(23), 5))
        assert callback.search_state is not None
        return [callback.search_state.baseline_score, float(trainer.callback_metrics["pruning/baseline"])]

    ranks = on_ranks(tmp_path, 2, work)
    assert ranks[0] == ranks[1]
    module = Momentum().eval()
    images, labels = data(23).tensors
    with torch.no_grad():
        right = (module.net(images).argmax(-1) == labels).float()
    count, total = (23, right.sum()) if monitor is None else (24, right.sum() + right[0])
    assert ranks[0][0] == pytest.approx(100 * float(total) / count, abs=1e-4)


def test_a_rank_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    """None waits for ever for an answer, and the networks are as they were."""

    def work(rank: int) -> Any:
        module, callback = Momentum(), greedy(start_epoch=1)
        before: list[str] = []

        def predict(module: LightningModule, network: nn.Module, images: Tensor) -> Tensor:
            if not before:
                before.append(digest(dict(module.state_dict())))
            if rank == 1 and bool((network.blocks[0].attn.proj.weight == 0).all(dim=0).any()):
                raise MemoryError("rank 1 has no memory left")
            logits: Tensor = network(images)
            return logits

        callback.predict = predict  # type: ignore[method-assign]  # of this one only
        trainer = make_trainer(tmp_path, 2, callback, strategy=ddp(), devices=2)
        try:
            trainer.fit(module, train_loader(rank, 2), loader())
        except (RuntimeError, MemoryError) as error:
            return [str(error), before[0] == digest(dict(module.state_dict())), history_of(module.net)]
        return ["nothing was raised", False, []]

    first, second = on_ranks(tmp_path, 2, work)
    assert first == ["rank 1 failed while scoring: MemoryError: rank 1 has no memory left", True, []]
    assert second == ["rank 1 has no memory left", True, []]


@pytest.mark.slow
@pytest.mark.parametrize("build", [vit, swin])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "2:4"},
        {"sharded": False, "criterion": "taylor", "gradient_batches": 2},
        {"ranking": "global", "order": "sensitivity"},
        {"shrink": "end", "max_rounds": 2},
        {"kinds": ("heads", "mlp", "head_dim", "embed"), "round_to": 4},
    ],
)
def test_ranks_stay_equal(tmp_path: Path, options: dict[str, Any], world_size: int, build: Any) -> None:
    def work(rank: int) -> Any:
        torch.manual_seed(rank)  # what a rank draws by itself must not matter
        return fit(tmp_path / "fit", rank, world_size, epochs=3, build=build, max_images=9, **options)

    assert_ranks_agree(on_ranks(tmp_path, world_size, work))


SCRIPT = """
import sys
from pathlib import Path
from support import ddp_cases as cases
from lightning.pytorch.utilities import rank_zero_only
found = cases.fit(Path(sys.argv[1]), rank_zero_only.rank or 0, 2, strategy={})
import torch
torch.save(found["digests"], Path(sys.argv[1]) / f"digests-{rank_zero_only.rank}.pt")
"""


@pytest.mark.slow
def test_the_launcher_of_a_script(tmp_path: Path) -> None:
    """The way that users start it: `python train.py`, which starts its own other ranks."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path], check=True, env=environment, timeout=300, cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"digests-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    assert len(first) == 8

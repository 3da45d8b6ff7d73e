"""The pruning benchmark on a tiny network and random images: every kind of job, from the job to the report."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import Mlp
from torch import nn

from benchmarks import pages, runner
from benchmarks.pruning import __main__ as pruning_main
from benchmarks.pruning import batches, compensation, images, jobs, peers, report, subjects, tables, training, work
from benchmarks.pruning.jobs import Job
from swincompress_pl.data import Preprocessing
from swincompress_pl.models import create_model
from swincompress_pl.pruning import count_macs

ARGUMENTS = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
RECIPE = subjects.Recipe(epochs=2, batch_size=8, lr=1e-3, weight_decay=0.0, holdout=20, max_rounds=1, step=0.25)


def random_splits(*_: Any, holdout: int, seed: int, **__: Any) -> images.Splits:
    rng = np.random.default_rng(seed)

    def some(count: int) -> images.Images:
        return images.Images(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), rng.integers(0, 4, count))

    return images.Splits(some(24), some(holdout), some(30))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> subjects.Subject:
    """A subject that stands for swin_cifar10, and is what `subject` gives."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(create_model("SwinTransformer", num_classes=4, **ARGUMENTS).state_dict(), weights)
    found = subjects.Subject(
        name="swin_cifar10", recipe=RECIPE, seed=0, place=subjects.Place(data=tmp_path, cache=tmp_path),
        model="SwinTransformer", classes=4, arguments=ARGUMENTS, weights=weights,
        preprocessing=Preprocessing(height=16, width=16), data_set="cifar10", augment=batches.pad_crop_flip,
        test_data="random images",
    )  # fmt: skip
    monkeypatch.setattr(subjects, "load_splits", random_splits)
    monkeypatch.setattr(work, "subject", lambda *_: found)
    return found


def job(kind: str, **fields: Any) -> Job:
    return Job(kind=kind, model="swin_cifar10", seed=0, **fields)


def do(one: Job, folder: Path, tiny: subjects.Subject) -> dict[str, Any]:
    work.do(one, folder, tiny.place, {})
    return runner.read_result(folder, one.name)


@pytest.mark.slow
def test_every_kind_of_job_writes_results_that_the_report_reads(tmp_path: Path, tiny: subjects.Subject) -> None:
    folder = tmp_path / "results"
    do(job("control"), folder, tiny)
    for granularity in ("weight", "structured"):
        ours = job("prune", granularity=granularity, tolerance=100.0, target=0.1, recovery=True)
        done = do(ours, folder, tiny)
        assert done["search"]["rollback_held"]
        assert done["search"]["rounds"] == len(done["search"]["rounds_log"]) == 1
        for method in jobs.PEERS[granularity][:2]:
            do(job("peer", granularity=granularity, recovery=True, method=method, reference=ours.name), folder, tiny)
        alone = job("prune", granularity=granularity, tolerance=5.0)
        assert do(alone, folder, tiny)["after"]["test"]["images"] == 30
    data = report.write(folder, tmp_path / "report")
    text = "\n".join(report.sections(*report.read(data)))
    assert "one shot, all layers ranked together" in text
    assert "structured, no recovery" in text
    before = json.loads(data.read_text())
    other = tmp_path / "other"
    do(job("control"), other, tiny)
    assert report.write(other, tmp_path / "report") == data
    assert json.loads(data.read_text())["jobs"].keys() == before["jobs"].keys()  # what is no longer at hand stays
    row = next(r for r in json.loads(data.read_text())["comparison"] if r["method"] == "oneshot_uniform")
    assert row["behind_ours"]["images"] == 30


def test_lightnings_callback_reaches_the_sparsity_it_is_asked_for(tmp_path: Path, tiny: subjects.Subject) -> None:
    for method in ("lightning_once", "lightning_iterative"):
        one = job("peer", granularity="weight", method=method, reference="ours", recovery=True)
        done = peers.peer(tiny, one, {"after": {"prunable": {"removed": 0.5}}})
        assert done["after"]["prunable"]["removed"] == pytest.approx(0.5, abs=0.001)


def test_a_network_that_another_package_cut_is_fine_tuned(
    tiny: subjects.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrowed(network: nn.Module, *_: object) -> nn.Module:
        for mlp in (module for module in network.modules() if isinstance(module, Mlp)):
            mlp.fc1, mlp.fc2 = nn.Linear(mlp.fc1.in_features, 8), nn.Linear(8, mlp.fc2.out_features)
        return network

    monkeypatch.setattr(peers, "structured", narrowed)
    one = job("peer", granularity="structured", method="torch_pruning_mlp", reference="ours", recovery=True)
    done = peers.peer(tiny, one, {"after": {"macs": 1}})
    assert done["after"]["macs"] < done["after"]["macs_before"]


def test_what_is_compensated_is_cut_in_one_round_and_recovers(tmp_path: Path, tiny: subjects.Subject) -> None:
    one = job("prune", granularity="structured", tolerance=100.0, target=0.3, recovery=True, compensated=True)
    done = do(one, tmp_path / "r", tiny)
    assert done["search"]["rounds"] == 1
    assert done["search"]["stopped"] is not None
    assert 0.3 <= 1 - done["after"]["macs"] / done["after"]["macs_before"] < 0.4


@pytest.mark.slow
def test_the_same_decisions_are_found_by_both_scorers(tmp_path: Path, tiny: subjects.Subject) -> None:
    for recovery in (False, True):
        done = do(job("scoring", granularity="structured", tolerance=5.0, recovery=recovery), tmp_path / "r", tiny)
        assert done["equal"], done["lists"]
        assert done["naive_images"] % 20 == 0
        assert done["scoring"]["images_scored"] <= done["naive_images"]


def test_overhead_leaves_the_scorer_out(
    tmp_path: Path, tiny: subjects.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.pruning import overhead
    from swincompress_pl.pruning import HoldOut
    from swincompress_pl.pruning.structure import weight_masks

    watched = (HoldOut.full, HoldOut.judge, weight_masks.enforce_masks)
    monkeypatch.setattr(overhead, "_BATCHES", 3)
    done = do(job("overhead", granularity="weight", tolerance=50.0), tmp_path / "r", tiny)
    assert done["epochs"][0]["scorer_s"] > 0
    assert 0 < done["epochs"][0]["own_s"] < done["epochs"][0]["callback_s"] + 1
    assert watched == (HoldOut.full, HoldOut.judge, weight_masks.enforce_masks)  # the watches are gone


def test_the_jobs_have_unique_names_and_their_references_come_before_them() -> None:
    found = jobs.all_jobs()
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    for number, one in enumerate(found):
        assert one.reference is None or one.reference in names[:number]


def test_a_filter_that_matches_nothing_is_an_error() -> None:
    assert runner.chosen(jobs.all_jobs(), ["control-*-s1"])[0].name == "control-swin_cifar10-s1"
    with pytest.raises(ValueError, match="'contrl' matches no job"):
        runner.chosen(jobs.all_jobs(), ["contrl"])


def test_the_runner_skips_results_and_waits_for_references(tmp_path: Path) -> None:
    ready, waiting = job("control"), job("peer", reference="prune-swin_cifar10-weight-t2-recovery-free-s0", method="x")
    jobs.write_result(tmp_path, ready, {"figure": 1})
    outcome = runner.run([ready, waiting], tmp_path, {}, work="benchmarks.pruning.work", parallel=2, budget_s=5)
    assert outcome == runner.Outcome(waiting=[waiting.name])


def test_packed_results_come_back_and_do_not_replace_any(tmp_path: Path) -> None:
    for seed in (0, 1):
        jobs.write_result(tmp_path / "a", Job(kind="control", model="m", seed=seed), {"figure": seed})
    jobs.write_result(tmp_path / "b", Job(kind="control", model="m", seed=1), {"figure": 5})
    assert runner.pack(tmp_path / "a", tmp_path / "all.jsonl") == 2
    assert runner.unpack(tmp_path / "all.jsonl", tmp_path / "b") == 1
    assert [entry["figure"] for entry in jobs.read_results(tmp_path / "b").values()] == [0, 5]


def test_right_images_survive_and_pair() -> None:
    one, other = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)

    def entry(right: np.ndarray[Any, Any]) -> dict[str, Any]:
        import base64

        return {"images": len(right), "right": base64.b64encode(np.packbits(right).tobytes()).decode()}

    assert training.right_images(entry(one)).tolist() == one.tolist()
    pair = tables.paired(entry(one), entry(other))
    assert (pair.both_right, pair.right_to_wrong, pair.wrong_to_right, pair.both_wrong) == (1, 2, 1, 1)
    loss = tables.Loss((pair,))
    assert loss.points.values == (20.0,)
    assert loss.widest_interval[0] < 20.0 < loss.widest_interval[1]


def test_one_shot_reaches_the_macs_as_nearly_as_whole_units_allow() -> None:
    for together in (False, True):
        network = create_model("SwinTransformer", num_classes=4, **ARGUMENTS)
        shape = (1, 3, 16, 16)
        asked = int(0.7 * count_macs(network, shape))
        peers.one_shot(network, together, asked, shape, kinds=("heads", "mlp"), round_to=8)
        assert 0.5 * asked < count_macs(network, shape) <= asked
    with pytest.raises(peers.UnreachableError, match="are asked for"):
        peers.one_shot(network, False, 10, shape, kinds=("mlp",), round_to=8)


def test_smallest_part_is_the_smallest() -> None:
    assert peers.smallest_part(lambda part: round(1000 * (1 - part)), 700) == 0.3
    assert peers.smallest_part(lambda part: 5, 5) == 0.0


def test_crops_are_of_the_same_image_and_a_function_of_the_generator() -> None:
    pictures = torch.rand(6, 3, 8, 8)

    def crops() -> torch.Tensor:
        return batches.pad_crop_flip(pictures, torch.Generator().manual_seed(3), padding_px=2)

    assert torch.equal(crops(), crops())
    for before, after in zip(pictures, crops(), strict=True):
        kept = set(after.flatten().tolist()) - {0.0}
        assert kept <= set(before.flatten().tolist())
        assert len(kept) >= 3 * 6 * 6
    whole = batches.pad_crop_flip(pictures, torch.Generator().manual_seed(0), padding_px=0)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(whole, pictures, strict=True))


@pytest.mark.parametrize("augment", [batches.random_resized_crop, batches.shift_rotate])
def test_warps_keep_the_range(augment: Any) -> None:
    pictures = torch.rand(5, 3, 32, 32)
    warped = augment(pictures, torch.Generator().manual_seed(0))
    assert warped.shape[:2] == (5, 3)
    assert 0 <= warped.min() <= warped.max() <= 1 + 1e-6


def test_memory_data_cuts_the_centre_and_shuffles_each_epoch() -> None:
    data = batches.MemoryData(
        random_splits(holdout=10, seed=0), device="cpu", size_px=12, mean=(0.0,) * 3, std=(1.0,) * 3,
        augment=lambda pictures, _: pictures, batch_size=5, seed=0,
    )  # fmt: skip
    pictures, labels = next(iter(data.batches("test", batch_size=7)))
    pixels, expected = data.parts["test"]
    assert torch.equal(pictures, pixels[:7, 2:14, 2:14].movedim(-1, 1) / 255)
    assert torch.equal(labels, expected[:7])
    loader = data.train_dataloader()
    epochs = [torch.cat([images for images, _ in loader]) for _ in range(2)]
    assert len(loader) == 4
    assert epochs[0].shape[0] == 20
    assert not torch.equal(*epochs)
    assert sum(len(labels) for _, labels in data.holdout_dataloader()) == 10


def test_an_archive_is_decoded_once(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cifar10_jpeg.tar.xz", "w:xz") as tar:
        for split, name, grey in (("train", "cat", 10), ("train", "airplane", 200), ("test", "dog", 90)):
            content = io.BytesIO()
            Image.new("RGB", (32, 32), (grey,) * 3).save(content, "JPEG")
            info = tarfile.TarInfo(f"{split}/{name}/0.jpg")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)
    file = images.prepare("cifar10", tmp_path, tmp_path / "cache")
    stored = np.load(file)
    assert stored["train_labels"].tolist() == [0, 3]
    assert stored["train_pixels"][0].shape == (32, 32, 3)
    assert abs(int(stored["train_pixels"][0, 0, 0, 0]) - 200) < 3
    assert stored["test_labels"].tolist() == [5]
    before = os.stat(file).st_mtime_ns
    assert os.stat(images.prepare("cifar10", tmp_path, tmp_path / "cache")).st_mtime_ns == before


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar10_jpeg\.tar\.xz"):
        images.prepare("cifar10", tmp_path, tmp_path / "cache")


def test_the_report_of_compensation_keeps_rows_that_were_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (job.name for job in compensation.all_jobs()[:2])
    results, folder = tmp_path / "results", tmp_path / "runs"
    results.mkdir()
    (results / "compensation.json").write_text(json.dumps({second: {"old": 1}, "gone": {"old": 2}}))
    runner.result_file(folder, first).parent.mkdir(parents=True, exist_ok=True)
    runner.result_file(folder, first).write_text(json.dumps({"new": 3}))
    monkeypatch.setattr(pruning_main, "_RESULTS", results)
    monkeypatch.setattr(pages, "write_pages", lambda _: [])
    monkeypatch.setattr(sys, "argv", ["pruning", "compensation-report", "--out", str(folder)])
    assert pruning_main.main() == 0
    rows = json.loads((results / "compensation.json").read_text())
    assert list(rows.items()) == [(first, {"new": 3}), (second, {"old": 1}), ("gone", {"old": 2})]

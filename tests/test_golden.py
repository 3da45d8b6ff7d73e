"""Files that earlier versions wrote load, give the same bits, and are written again as they were."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.make import SGDClassifier, fits, lively, loader, logits_of, make_trainer, pixels
from lightning import Callback, LightningModule, Trainer

from swincompress_pl import accel
from swincompress_pl.models import create_model
from swincompress_pl.pruning import HoldOut, PrimeSVTConfig, primesvt
from swincompress_pl.report import RunRecord, render_report

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/expected.json"))
EXPECTED: dict[Path, Any] = {folder: json.loads((folder / "expected.json").read_text()) for folder in FOLDERS}

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*neurons never spike on the hold-out"),
    pytest.mark.filterwarnings("ignore:.*weights_only"),
]


def named(kind: str) -> list[Any]:
    """Every golden file of a kind, with the integer logits that it gave."""
    return [
        pytest.param(folder, name.removeprefix(f"{kind}/"), np.array(logits), id=f"{folder.name}-{name}")
        for folder, expected in EXPECTED.items()
        for name, logits in expected["integer_logits"].items()
        if name.startswith(f"{kind}/")
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_files_are_those_that_were_written(folder: Path) -> None:
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in EXPECTED[folder]["sha256"]}
    assert found == EXPECTED[folder]["sha256"]


@pytest.mark.parametrize(("folder", "name", "logits"), named("artifact"))
def test_an_artifact_gives_the_same_logits(folder: Path, name: str, logits: Any) -> None:
    path = folder / f"{name}.safetensors"
    images = pixels(accel.load(path).input_shape[0])
    assert len(np.unique(logits)) > 8
    np.testing.assert_array_equal(accel.reference(path).run_integer(images), logits)
    for implementation in accel.implementations():
        np.testing.assert_array_equal(accel.load(path, implementation=implementation).run_integer(images), logits)


@pytest.mark.parametrize(("folder", "name", "logits"), named("artifact"))
def test_an_artifact_written_again_has_the_same_bytes(folder: Path, name: str, logits: Any, tmp_path: Path) -> None:
    path = folder / f"{name}.safetensors"
    compression = "lzma" if name.endswith("lzma") else None
    again = accel.export(accel.load(path).program, tmp_path / "again.safetensors", compression)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("folder", "name", "logits"), named("checkpoint"))
def test_a_checkpoint_gives_the_same_logits(folder: Path, name: str, logits: Any) -> None:
    assert len(np.unique(logits)) > 8
    np.testing.assert_array_equal(logits_of(folder / f"{name}.ckpt"), logits)


@pytest.mark.parametrize(("folder", "name", "logits"), named("checkpoint"))
def test_a_checkpoint_written_again_has_the_same_record(folder: Path, name: str, logits: Any, tmp_path: Path) -> None:
    before = torch.load(folder / f"{name}.ckpt", weights_only=True)
    module = SGDClassifier.load_from_checkpoint(folder / f"{name}.ckpt", map_location="cpu")
    trainer = make_trainer([], epochs=1)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    after = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert after["swincompress_pl"] | before["swincompress_pl"] == after["swincompress_pl"]  # it says more by now
    assert after["hyper_parameters"] == before["hyper_parameters"]
    expected = {present_key(key): value for key, value in before["state_dict"].items()}
    assert after["state_dict"].keys() == expected.keys()
    assert all(torch.equal(after["state_dict"][key], value) for key, value in expected.items())


# What is called otherwise in a state dict since version 0.1, as patterns.
RENAMED_KEYS = {
    r"(\.scales)\.sites(\..*)\.balance$": r"\1.activations\2.equalization",
    r"(\.scales)\.sites(\..*)\.shift$": r"\1.activations\2.centering",
    r"(\.scales)\.sites(\..*\.(?:scale|signed|zero_point))$": r"\1.activations\2",
    r"(\.scales)\.drift$": r"\1.adjustment",
}


def present_key(key: str) -> str:
    """A state dict's key of version 0.1 as this version writes it."""
    for old, new in RENAMED_KEYS.items():
        key = re.sub(old, new, key)
    return key


def as_then(now: Any, then: Any) -> Any:
    """`now` without the fields that plain data of `then` did not have."""
    if isinstance(now, dict) and isinstance(then, dict):
        return {key: as_then(value, then[key]) for key, value in now.items() if key in then}
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        return [as_then(one, other) for one, other in zip(now, then, strict=True)]
    return now


class Resumed(Callback):
    """What the callbacks knew when a resumed fit began."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch = trainer.current_epoch
        searches = [getattr(callback, "search_state", None) for callback in trainer.callbacks]
        results = [getattr(callback, "result", None) for callback in trainer.callbacks]
        self.found = [each.to_dict() for each in (*searches, *results) if each is not None]


@pytest.mark.parametrize(("folder", "name", "logits"), named("checkpoint"))
def test_a_fit_goes_on_from_a_checkpoint(folder: Path, name: str, logits: Any) -> None:
    stored = torch.load(folder / f"{name}.ckpt", weights_only=True)["callbacks"]
    (model, kwargs), callbacks = fits(None)[name]
    module, resumed = SGDClassifier(model, logits.shape[1], model_kwargs=kwargs), Resumed()
    size = kwargs.get("img_size_h", 16) if model == "Spikformer" else kwargs["img_size"]
    trainer = make_trainer([*callbacks, resumed], epochs=3)
    trainer.fit(module, loader(size), loader(size), ckpt_path=folder / f"{name}.ckpt", weights_only=True)
    assert resumed.epoch == 2
    searched = [key for key in ("AdaptiveIterativePruning", "PrimeSVT") if key in stored]
    assert len(resumed.found) == len(searched)
    for key, found in zip(searched, resumed.found, strict=True):
        before = stored[key].get("search") or stored[key]["result"]
        for part in ("steps", "rounds", "baseline_score", "candidates", "blocks", "spike_rates"):
            assert as_then(found.get(part), before.get(part)) == before.get(part), part


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_memo_is_taken_up(folder: Path, tmp_path: Path) -> None:
    (model, kwargs), (shot, _) = fits(None)["primesvt"]
    memo = tmp_path / "memo.jsonl"
    memo.write_bytes((folder / "primesvt_memo.jsonl").read_bytes())
    torch.manual_seed(0)
    network = lively(create_model(model, num_classes=4, **kwargs))
    images, labels = (torch.cat(parts) for parts in zip(*loader(32), strict=True))
    assert isinstance(shot.config, PrimeSVTConfig)
    result = primesvt(network, HoldOut(images, labels), shot.config, evaluation_cache=memo)
    assert result.scoring["evaluations"] == 0
    assert result.scoring["remembered"] == len(result.candidates) > 0


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ["report.json", "report_steps.json"])
def test_a_record_is_read_and_written_again_as_it_was(folder: Path, name: str, tmp_path: Path) -> None:
    record = RunRecord.load(folder / name)
    assert record.save(tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert len(record.all_steps()) > 0


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_record_is_rendered(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "report.json", tmp_path)
    text = render_report(tmp_path).read_text(encoding="utf-8")
    record = RunRecord.load(tmp_path)
    assert record.pruning is not None
    assert record.quantization is not None
    names = [*record.pruning["targets"], *(layer["name"] for layer in record.quantization["layers"])]
    assert [name for name in names if f"| {name} " not in text] == []
    assert {path.stem for path in tmp_path.glob("*.png")} >= {"pruning_sparsity", "quantization_bits", "before_after"}

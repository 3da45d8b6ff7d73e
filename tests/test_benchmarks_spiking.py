"""The benchmark of spiking networks in integers, on tiny networks and random images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from spiking_cases import FAMILIES
from test_benchmarks_primesvt import place  # noqa: F401  # a fixture

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.primesvt import baselines, subjects
from benchmarks.pruning.subjects import Place
from benchmarks.spiking import __main__ as main
from benchmarks.spiking import accuracy, exact, report


def test_every_builder_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BUILDERS", {"tiny": 32})
    monkeypatch.setattr(exact, "create_model", lambda name, T: FAMILIES["qkformer"](T=T))  # noqa: N803  # spikingjelly's
    given = SimpleNamespace(models="tiny", steps="1,2", batches="1,2", out=tmp_path, commit="abc", threads=1)
    main._exact(given)
    found = json.loads((tmp_path / "exact-tiny-2.json").read_text())
    assert found["differ"] == 0
    assert found["neurons"] > found["silent_neurons"]
    written = (tmp_path / "exact-tiny-1.json").stat().st_mtime_ns
    main._exact(given)
    assert (tmp_path / "exact-tiny-1.json").stat().st_mtime_ns == written, "what there is is not made again"
    text = report.write(tmp_path, tmp_path / "results")[0].read_text()
    assert "| tiny" in text


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BUILDERS", {"tiny": 32})
    monkeypatch.setattr(exact, "create_model", lambda name, T: FAMILIES["spikformer"](T=T))  # noqa: N803  # spikingjelly's
    whole = exact.run_operation

    def wrong(op: Any, *rest: Any) -> Any:
        result = whole(op, *rest)
        return 1 - result if op.kind == "lif" else result

    monkeypatch.setattr(exact, "run_operation", wrong)
    assert exact.compare("tiny", 1, [1])["differ"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* neurons never spike")
def test_accuracy_before_and_after_fine_tuning(
    place: Place,  # noqa: F811  # the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    baselines.train(subjects.SUBJECTS["maxformer"], place, tmp_path / "checkpoints", "abc")
    monkeypatch.setattr(accuracy, "SUBJECTS", subjects.SUBJECTS)
    monkeypatch.setattr(accuracy, "FINE_TUNING", subjects.Recipe(epochs=1, batch_size=4))
    out = tmp_path / "out"
    for tuned, bits in ((False, "W8A8"), (True, "float,W4A8")):
        given = SimpleNamespace(
            models="maxformer", bits=bits, tuned=tuned, data=tmp_path, cache=tmp_path, out=out, commit="abc", threads=1
        )
        main._accuracy(given)
    found = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    assert set(found) == {"maxformer-W8A8", "maxformer-float-tuned", "maxformer-W4A8-tuned"}
    assert found["maxformer-W4A8-tuned"]["file_bytes"] < found["maxformer-W8A8"]["file_bytes"]
    report.write(out, tmp_path / "results")
    kept = json.loads((tmp_path / "results" / "spiking.json").read_text())
    assert kept["maxformer-W4A8-tuned"]["against"] == found["maxformer-float-tuned"]["integer"]["test"]["percent"]
    assert "right" not in kept["maxformer-W8A8"]["integer"]["test"]
    assert report.page(kept).count("| maxformer") == 3

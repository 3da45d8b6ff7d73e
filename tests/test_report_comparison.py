"""Comparisons between processes: what runs, what is missing and what fails all stand in the result."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swincompress_pl import accel, models
from swincompress_pl.report.comparison import runtimes, worker
from swincompress_pl.report.comparison.bench import bench_artifact
from swincompress_pl.report.comparison.compare import Runner, compare, process_environment
from swincompress_pl.report.comparison.kernels import bench_linear, linear_program
from swincompress_pl.report.comparison.runtimes import RUNTIMES, parse_runtimes, prepare
from swincompress_pl.report.comparison.worker import SEED, load, normalized, turn_ms

SHAPE = (4, 1, 8)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    module = SimpleNamespace(weight=rng.standard_normal((16, 8)), bias=rng.standard_normal(16))
    program = linear_program(accel.export_layer(module, 1.0, 10.0).tensors, rows=4)
    return accel.export(program, tmp_path / "model.safetensors")


def runner(name: str, file: str | None, unavailable: str | None = None) -> Runner:
    return Runner(
        name=name, runtime="engine", threads=1, batch=2, image_shape=SHAPE, file=file, unavailable=unavailable
    )


def test_a_comparison_reports_everyone(artifact: Path) -> None:
    told: list[tuple[str, int, int]] = []
    results = compare(
        [
            runner("engine", str(artifact)),
            runner("broken", str(artifact.with_name("gone"))),
            runner("absent", None, unavailable="not installed: thing"),
        ],
        rounds=3,
        warm_up=1,
        turn_ms=0.1,
        on_progress=lambda *entry: told.append(entry),
    )
    engine, broken, absent = results
    assert [result.name for result in results] == ["engine", "broken", "absent"]
    assert engine.latency is not None
    assert (len(engine.latency.samples_ms), engine.latency.batch, engine.latency.threads) == (3, 2, 1)
    assert engine.peak_rss_bytes is None or engine.peak_rss_bytes > 2**20
    assert engine.load_ms is not None
    assert engine.load_ms > 0
    assert engine.file_bytes == artifact.stat().st_size
    assert engine.logits is not None
    images = np.random.default_rng(SEED).integers(0, 256, (2, *SHAPE), dtype=np.uint8)
    assert np.array_equal(engine.logits, accel.load(artifact)(images))
    assert "logits" not in engine.to_dict()
    assert (broken.load_ms, broken.file_bytes, broken.logits) == (None, None, None)
    assert broken.latency is None
    assert "FileNotFoundError" in (broken.unavailable or "")
    assert absent.unavailable == "not installed: thing"
    assert told[-1] == ("done", 6, 6)


def test_a_worker_that_dies_does_not_end_the_comparison(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    dying = Runner(name="dying", runtime="no such runtime", threads=1, batch=1, image_shape=SHAPE)
    results = compare([dying, runner("engine", str(artifact))], rounds=1, warm_up=0, turn_ms=0.1)
    assert "KeyError" in (results[0].unavailable or "")
    assert results[1].latency is not None


def test_a_runner_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(3600)\n")  # runs first in its process
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (result,) = compare([runner("hanging", "model.safetensors")], rounds=1, warm_up=0, turn_ms=0.1, limit_s=1)
    assert result.unavailable == "it gave no answer for 1 s, and was ended"
    with pytest.raises(ValueError, match="limit_s more than 0"):
        compare([runner("hanging", None)], limit_s=0)


def test_names_must_differ(artifact: Path) -> None:
    with pytest.raises(ValueError, match="names must differ"):
        compare([runner("a", None, "x"), runner("a", None, "x")])


def test_a_turn_wakes_then_measures() -> None:
    calls: list[None] = []
    assert turn_ms(lambda: calls.append(None), 0.0) > 0
    assert len(calls) == 2


def test_an_artifact_is_measured_and_checked(artifact: Path, tmp_path: Path) -> None:
    bench = bench_artifact(
        artifact,
        threads=1,
        batch=1,
        implementation="scalar",
        rounds=2,
        operations=True,
        directory=tmp_path,
        on_progress=lambda *_: None,
    )
    assert bench.answers_equal
    assert bench.implementation == "scalar"
    assert bench.macs == 4 * 16 * 8 + 16
    assert [result.name for result in bench.results] == ["engine"]
    assert sum(operation.macs for operation in bench.operations) == bench.macs
    assert bench.to_dict()["answers"] == {"images": 2, "equal_to_reference": True}


def test_every_implementation_of_a_kernel_is_compared() -> None:
    outcomes = bench_linear(rows=5, outputs=7, inputs=9, rounds=1)
    assert [outcome.implementation for outcome in outcomes] == list(accel.implementations())
    assert all(outcome.answers_equal for outcome in outcomes)
    assert {outcome.macs for outcome in outcomes} == {5 * 7 * 9}


def test_runtimes_are_named() -> None:
    assert parse_runtimes("torch, onnxruntime,torch") == ("torch", "onnxruntime")
    assert parse_runtimes("") == ()
    with pytest.raises(
        ValueError, match="unknown runtime 'tensorrt'; choose from torch, torch-bf16, torch-compile, onnx"
    ):
        parse_runtimes("torch,tensorrt")


def prepared(origin: dict[str, object] | None, tmp_path: Path) -> list[Runner]:
    by_threads = prepare(
        ["onnxruntime"], origin=origin, image_shape=(32, 32, 3), threads=(1, 2), batch=1, directory=tmp_path
    )
    assert list(by_threads) == [1, 2]
    assert [c.name for c in by_threads[1]] == [variant.name for variant in RUNTIMES["onnxruntime"]]
    return by_threads[2]


def test_a_missing_runtime_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "installed_version", lambda package: None if package == "onnxruntime" else "1")
    assert {c.unavailable for c in prepared({"network": {"name": "x"}}, tmp_path)} == {"not installed: onnxruntime"}


def test_an_artifact_without_origin_has_no_other_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "installed_version", lambda package: "1")
    assert all("which architecture" in (c.unavailable or "") for c in prepared(None, tmp_path))


def test_a_failed_conversion_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "installed_version", lambda package: "1")
    origin: dict[str, object] = {"network": {"name": "no such network", "kwargs": {}}, "history": []}
    assert all("conversion failed: " in (c.unavailable or "") for c in prepared(origin, tmp_path))


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 4, 6, 2)])
def test_channels_go_before_the_sides_of_an_image(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    given = normalized(images)
    assert given.flags.c_contiguous
    for channel in range(shape[-1]):
        assert np.allclose(given[..., channel, :, :], (images[..., channel] / 255 - 0.5) / 0.25, atol=1e-6)


EVENTS_SHAPE = (3, 32, 32, 2)


def events_origin() -> dict[str, object]:
    size = {"T": 3, "in_channels": 2, "embed_dims": 8, "num_heads": 2, "depths": 1, "pooling_stat": "0011"}
    network: Any = models.create_model("SpikeDrivenTransformer", num_classes=5, **size)
    return {"network": network.creation, "history": []}


def test_torch_takes_events(tmp_path: Path) -> None:
    (torch_runner,) = prepare(
        ["torch"], origin=events_origin(), image_shape=EVENTS_SHAPE, threads=(1,), batch=2, directory=tmp_path
    )[1]
    assert torch_runner.unavailable is None
    _, ready = load(torch_runner.task(warm_up=0, turn_ms=1.0))
    assert np.shape(ready["logits"]) == (2, 5)


def test_the_network_of_events_is_converted_with_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion itself takes long, so only what the converter is given is looked at: the network runs on it."""
    answers = []

    def export(network: Any, given: tuple[torch.Tensor], path: Path, **_: Any) -> None:
        assert given[0].shape == (2, 3, 2, 32, 32)
        answers.append(network(*given).shape)

    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(runtimes, "installed_version", lambda package: "1")
    runners = prepare(
        ["openvino"], origin=events_origin(), image_shape=EVENTS_SHAPE, threads=(1,), batch=2, directory=tmp_path
    )[1]
    assert runners[0].unavailable is None
    assert answers == [(2, 5)]


def test_a_runner_may_run_another_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an editable installation answers the package's imports before the path is searched."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"""
import sys
from importlib.machinery import PathFinder

class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "swincompress_pl":
            return PathFinder.find_spec(name, [{str(Path(__file__).parents[1])!r}], target)

sys.meta_path.insert(0, Editable)
""",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    folder = tmp_path / "swincompress_pl" / "report" / "comparison"
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent, folder.parent.parent):
        (parent / "__init__.py").write_text("", encoding="utf-8")
    (folder / "worker.py").write_text(
        """
import json, sys
sys.stdin.readline()
print(json.dumps({"load_ms": 1.0, "file_bytes": 7, "logits": [[0.5]]}), flush=True)
for _ in sys.stdin:
    print(json.dumps({"sample_ms": 2.0, "peak_rss_bytes": 3}), flush=True)
""",
        encoding="utf-8",
    )
    runner = Runner(name="before", runtime="engine", threads=1, batch=1, image_shape=(1, 1, 3), checkout=tmp_path)
    (result,) = compare([runner], rounds=2)
    assert (result.unavailable, result.file_bytes, result.latency and result.latency.samples_ms) == (
        None,
        7,
        (2.0, 2.0),
    )


def test_a_runner_may_have_variables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("KEPT", "1")
    plain = Runner(name="plain", runtime="torch", threads=3, batch=1, image_shape=SHAPE)
    own = Runner(
        name="own", runtime="torch", threads=3, batch=1, image_shape=SHAPE,
        environment={"PYTHONPATH": "/copies", "LIMIT": "AVX2"},
    )  # fmt: skip
    before, after = process_environment(plain), process_environment(own)
    assert (before["OMP_NUM_THREADS"], before["KEPT"], before.get("LIMIT")) == ("3", "1", None)
    assert after["PYTHONPATH"] == f"/copies:{before['PYTHONPATH']}"
    assert before["PYTHONPATH"].endswith(":/ours")
    assert after == before | {"LIMIT": "AVX2", "PYTHONPATH": after["PYTHONPATH"]}


def test_onnxruntime_gets_the_settings_of_its_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[tuple[str, str]] = []
    options = SimpleNamespace(add_session_config_entry=lambda *entry: entries.append(entry))
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="x")], run=lambda *_: [np.zeros((1, 2))])
    module = SimpleNamespace(SessionOptions=lambda: options, InferenceSession=lambda *_, **__: session)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    file = tmp_path / "network.onnx"
    file.write_bytes(b"12345")
    settings = {"session.x64quantprecision": "1"}
    loaded = worker.BUILDERS["onnxruntime"]({"threads": 1, "file": str(file), "settings": settings}, np.zeros(1))
    assert (entries, loaded.file_bytes) == ([("session.x64quantprecision", "1")], 5)

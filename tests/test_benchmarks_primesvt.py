"""The PrimeSVT benchmark on a tiny network and random images: from training to the report."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_cases import tiny_place

from benchmarks.primesvt import __main__ as main
from benchmarks.primesvt import baselines, latency, report, subjects, work
from benchmarks.runner import result_file
from swincompress_pl.models import create_model


def page_of(kept: Path) -> str:
    """The tables of what a report keeps."""
    return "\n\n".join(report.sections(json.loads(kept.read_text(encoding="utf-8"))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out")
def test_from_training_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tiny_place(tmp_path, monkeypatch)
    out, subject = tmp_path / "out", subjects.SUBJECTS["maxformer"]
    out.mkdir()
    trained = baselines.train(subject, place, tmp_path / "checkpoints", "abc")
    assert [point["epoch"] for point in trained["curve"]] == [1, 2, 3, 4]
    assert subject.baseline_record() == trained
    wanted = ("control", "paper", "group", "group-size", "group-layers", "allocated-batchnorm", "naive-group")
    jobs = [job for job in work.all_jobs() if job.name in wanted]
    read: dict[str, dict[str, Any]] = {}
    for job in jobs:
        written = work.do(work.Run(job=job, tune=job.name != "paper"), out, place, "abc")
        read[job.name] = json.loads(written.read_text(encoding="utf-8"))
        assert ("tuned" in read[job.name]) == (job.tuned and job.name != "paper")
    paper = next(job for job in jobs if job.name == "paper")
    before = copy.deepcopy(read["paper"])
    read["paper"] = work.run(paper, place, "later", out, known=read["paper"], tune=True)
    assert {key: read["paper"][key] for key in before if key != "seconds"} == {
        key: value for key, value in before.items() if key != "seconds"
    }
    assert read["paper"]["tuned"]["commit"] == "later"
    assert read["paper"]["tuned"]["cost"]["nonzero"] <= read["paper"]["single_shot"]["cost"]["nonzero"]
    other = copy.deepcopy(before)
    other["search"]["applied"]["saving"] += 0.5
    with pytest.raises(ValueError, match="maxformer-paper was searched with other code or weights; remove"):
        work.run(paper, place, "later", out, known=other, tune=True)
    seeds, data = list[int](), subjects.Subject.data
    monkeypatch.setattr(subjects.Subject, "data", lambda *args: seeds.append(args[-1]) or data(*args))
    for job in jobs:
        result_file(out, job.key).write_text(json.dumps(read[job.name]), encoding="utf-8")
        if job.name in ("control", "paper"):
            same = work.repeat(job, place, "abc", out, known=read[job.name], seed=0)
            assert same["tuned"]["test"] == read[job.name]["tuned"]["test"]
            seeds.clear()
            written = work.do(work.Run(job=job, seed=1), out, place, "abc")
            again = json.loads(written.read_text(encoding="utf-8"))
            assert again["seed"] == 1
            assert seeds == ([1] if job.options is None else [0, 1]), "it searches with 0, and trains with its own"
            assert written == result_file(out, f"{job.key}-seed1")
    with pytest.raises(ValueError, match="maxformer-paper was searched with other code or weights; remove"):
        work.repeat(paper, place, "abc", out, known=other, seed=1)
    assert read["naive-group"]["search"]["scoring"]["images_scored"] >= 40 * len(
        read["naive-group"]["search"]["blocks"]
    )
    monkeypatch.setattr(latency, "_WARM_UP_TURNS", 0)
    (out / "maxformer_latency.json").write_text(
        json.dumps(latency.measure("maxformer", out, "abc", turns=2)), encoding="utf-8"
    )
    files = report.write(out, tmp_path / "report", tmp_path / "docs")
    assert len(files) == len(set(files)), "one job is drawn, not another over it"
    assert {file.name for file in files} >= {"primesvt.json", "primesvt-robustness.png"}
    page = page_of(files[0])
    saved = read["group"]["search"]["applied"]["saving"]
    assert f"| group | {saved:.2%} |" in " ".join(page.split())
    assert "other seeds (1) |" in page
    assert "lost; mean of 2: " in page
    for heading in (
        "Baselines",
        "maxformer",
        "What the searches cost",
        "Ablations",
        "Latency in torch",
        "Where it ran",
    ):
        assert f"## {heading}" in page
    kept = json.loads(files[0].read_text(encoding="utf-8"))
    assert "right" not in files[0].read_text(encoding="utf-8").replace('"right_', "")
    wrong, right = kept["maxformer-group"]["single_shot"]["paired"]
    given, after = (kept["maxformer-group"][state]["test"]["correct"] for state in ("given", "single_shot"))
    assert after - given == right - wrong
    for file in out.glob("*.json"):
        file.unlink()
    assert page_of(report.write(out, tmp_path / "report", tmp_path / "docs")[0]) == page


def test_the_jobs_have_names_of_their_own_and_weights_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = work.all_jobs()
    assert len({job.key for job in jobs}) == len(jobs)
    for subject in subjects.SUBJECTS.values():
        if subject.weights.is_file():
            assert subject.weights.stat().st_size < 8e6
            create_model(subject.model, num_classes=10, checkpoint_path=subject.weights, **subject.arguments)
            assert subject.baseline_record()["test"]["images"] == 10_000


def test_other_seeds_are_compared_with_their_own_controls() -> None:
    def tuned(percent: float, seed: int, **more: Any) -> dict[str, Any]:
        return {"seed": seed, "tuned": {"test": {"percent": percent}, "epochs": 4}} | more

    results = {
        "maxformer-control": tuned(77.0, 0),
        "maxformer-control-seed1": tuned(76.0, 1),
        "maxformer-paper": tuned(76.5, 0, search={"applied": {"saving": 0.3}}),
        "maxformer-paper-seed1": tuned(76.1, 1),
        "maxformer-paper-seed2": tuned(70.0, 2),
        "maxformer-paper-strict": tuned(76.8, 0, search={"applied": {"saving": 0.2}}),
    }
    shown = " ".join(report._tuned(results, "maxformer").split())
    assert "| control, unpruned | | 77.00 | 76.00 |" in shown
    assert "| other seeds (1) |" in shown
    assert "| paper | 30.00% | 76.50, +0.50 lost | -0.10 lost; mean of 2: +0.20 |" in shown
    assert "| paper, 1.5 points allowed | 20.00% | 76.80, +0.20 lost | |" in shown
    alone = report._tuned({"maxformer-control": results["maxformer-control"]}, "maxformer")
    assert "seeds" not in alone


def test_the_largest_saving_within_each_bar_is_found() -> None:
    def searched(mode: str, saving: float, score: float, percent: float | None = None) -> dict[str, Any]:
        applied = {"saving": saving, "score": score}
        search = {
            "config": {"granularity": {"paper": "filter", "group": "structured"}[mode]},
            "applied": applied,
            "baseline_score": 77.0,
        }
        tuned = {} if percent is None else {"tuned": {"test": {"percent": percent}}}
        return {"seed": 0, "search": search} | tuned

    results = {
        "maxformer-control": {"seed": 0, "tuned": {"test": {"percent": 77.0}}},
        "maxformer-paper": searched("paper", 0.4, 74.0, 76.5),  # exactly 3 points, and 0.5
        "maxformer-paper-strict": searched("paper", 0.3, 75.5, 76.7),
        "maxformer-deep-6.0": searched("group", 0.5, 71.0, 76.1),
        "maxformer-group": {"search": {"applied": None}},
    }
    shown = " ".join(report._largest_savings(results).split())
    paper = "40.0%, +3.00 lost: paper | 30.0%, +0.30 lost: paper-strict"
    assert f"| maxformer | {paper} | | 50.0%, +0.90 lost: deep-6.0 |" in shown
    results["maxformer-control-seed1"] = {"seed": 1, "tuned": {"test": {"percent": 77.0}}}
    results["maxformer-deep-6.0-seed1"] = {"seed": 1, "tuned": {"test": {"percent": 75.7}}}
    assert "deep-6.0" not in report._largest_savings(results), "1.1 points, mean of 0.9 and 1.3"
    assert report._largest_savings({}) == ""


def test_contradictory_options_of_a_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [f"--{name}={tmp_path}" for name in ("data", "cache", "out")]
    monkeypatch.setattr(sys, "argv", ["primesvt", "run", *folders, "--seed=1", "--single-shot"])
    with pytest.raises(SystemExit, match="--seed 1 is of the fine-tuning, which --single-shot leaves out"):
        main.main()


def test_only_what_was_fine_tuned_is_repeated_with_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "maxformer-control.json").write_text(json.dumps({"tuned": {}}), encoding="utf-8")
    (tmp_path / "maxformer-paper.json").write_text(json.dumps({"search": {}}), encoding="utf-8")
    folders = [f"--{name}={tmp_path}" for name in ("data", "cache", "out")]
    wanted = "--filter=maxformer-control,maxformer-paper,maxformer-group"
    monkeypatch.setattr(sys, "argv", ["primesvt", "run", *folders, wanted, "--seed=1", "--list"])
    main.main()
    assert capsys.readouterr().out.splitlines() == [
        "maxformer-control-seed1: to do",
        "maxformer-paper-seed1: nothing to do here",
        "maxformer-group-seed1: nothing to do here",
    ]


def test_a_search_that_went_on_from_a_memo_claims_no_cost() -> None:
    scoring = {
        "evaluations": 20,
        "plans": 20,
        "candidates": 22,
        "image_forwards": 1e4,
        "naive_image_forwards": 1e5,
        "naive_image_forwards_distinct": 9e4,
    }
    whole = {"search": {"scoring": scoring, "elapsed_s": 5.0}}
    resumed = {"search": {"scoring": scoring | {"evaluations": 19}, "elapsed_s": 5.0}}
    shown = report._costs({"maxformer-whole": whole, "maxformer-resumed": resumed})
    assert "| maxformer-whole | 22 | 20 | 10 k | 10.0x | 9.0x | 5 |" in " ".join(shown.split())
    assert "resumed" not in shown


def test_a_report_of_nothing_says_how_to_get_something(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no results; `python -m benchmarks\.primesvt run --out"):
        report.write(tmp_path, tmp_path, tmp_path)


def _searched(saving: float, **scoring: float) -> dict[str, Any]:
    return {"search": {"applied": {"saving": saving}, "scoring": scoring}}


def test_the_allocated_search_stands_beside_the_plain_algorithm_under_the_same_constraint() -> None:
    plain = _searched(0.2, evaluations=5, plans=9, naive_image_forwards=5e5)
    whole = _searched(0.3, evaluations=9, plans=9, image_forwards=5e4)
    resumed = _searched(0.3, evaluations=1, plans=9, image_forwards=1e4)
    shown = report._against_the_plain_algorithm(
        {
            "maxformer-paper-strict": plain,
            "maxformer-paper-allocated-1.5": whole,
            "maxformer-group-layers": plain,
            "maxformer-allocated-3.0": resumed,
        }
    )
    assert "| maxformer, paper, 1.5 points allowed | 20.00% | 500 k | 30.00% | 50 k | 10.0x |" in " ".join(
        shown.split()
    )
    assert "each layer alone" not in shown, "what a memo knew was not counted"
    assert report._against_the_plain_algorithm({"maxformer-group-layers": plain}) == ""


def test_what_many_jobs_begin_with_is_made_once_a_network_and_machine(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"accuracy": len(made)}

    file = tmp_path / "memo" / "given.json"
    of = [{"weights": "a", "where": "here"}, {"weights": "a", "where": "here"}, {"weights": "b", "where": "here"}]
    assert [work._once(file, each, make)["accuracy"] for each in of] == [1, 1, 2]
    assert [path.name for path in file.parent.iterdir()] == ["given.json"]

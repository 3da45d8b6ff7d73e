"""The results as a page and as data; what is committed stays where its results are no longer at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from swincompress_pl.pruning import PrimeSVTResult
from swincompress_pl.pruning.prime.config import current_settings
from swincompress_pl.report.content.numbers import count
from swincompress_pl.report.markdown import table
from swincompress_pl.report.plain import write_text
from swincompress_pl.report.plots.primesvt import save_primesvt_figures

from ..pruning.training import right_images
from .subjects import BINARY, SUBJECTS

Results = Mapping[str, dict[str, Any]]

_STATES = ("given", "single_shot", "batchnorm_anew", "tuned")
_PLOTTED = "group"
_INTRODUCTION = (
    "The networks are small ones of each family, trained and fine-tuned on 45,000 images of CIFAR-10 (JPEG copy), T = "
    "2, and E-SpikeFormer without time steps. The search decides on 5,000 held-out training images. Accuracies are "
    "top-1 on the 10,000 test images, which decide nothing. Pairs in brackets are images that change from right to "
    "wrong / from wrong to right. Unless a row says otherwise, at most 3 points may be lost on the hold-out and at "
    "least 25 % of the parameters have to go. "
    "Widths are multiples of 4.\n\n"
    'Rows `paper` zero filters (`granularity="filter"`); rows `group` remove whole groups physically '
    '(`granularity="structured"`). The seed is 0. Other seeds are of the fine-tuning, for network and control alike: '
    "they change the order of the images, the crops and which images are mirrored.\n\n"
    'Rows `compensated` solve the layers that read what goes again (`compensation="ridge"`, '
    '`criterion="second_order"`), from 512 unlabelled training images and without any training, and correct the '
    'statistics of BatchNorm (`batchnorm="correct"`). The divergence of the answers on 128 of these images gives the '
    "order of the steps. Half of the held-out images decide, and the other half audits. Of the heads of an attention "
    "the width together is a multiple of 4. The row `paper, compensated` is the paper's search, whose zeros the "
    "weights that stay make up for. Brackets after pairs are 95 % intervals of the points lost."
)
_METHODS = {
    "paper": "paper",
    "paper-size": "paper, by size",
    "paper-strict": "paper, 1.5 points allowed",
    "paper-2.25": "paper, 2.25 points allowed",
    "group": "group",
    "group-size": "group, by size",
    "group-layers": "group, each layer alone",
    "group-strict": "group, each layer alone, 1.5 points allowed",
    "deep-6.0": "group, each layer alone, 6 points allowed",
    "deep-12.0": "group, each layer alone, 12 points allowed",
    "paper-allocated-0.75": "paper, allocated, 0.75 points allowed",
    "paper-allocated-1.5": "paper, allocated, 1.5 points allowed",
    "paper-allocated-3.0": "paper, allocated",
    "allocated-batchnorm": "group, allocated, statistics corrected",
    "allocated-1.5": "group, allocated, 1.5 points allowed",
    "allocated-3.0": "group, allocated",
    "allocated-6.0": "group, allocated, 6 points allowed",
    "allocated-12.0": "group, allocated, 12 points allowed",
    "paper-compensated": "paper, compensated",
    "compensated-1.0": "group, compensated, 1 point allowed",
    "compensated-3.0": "group, compensated",
}
_SINGLE_SHOT_BAR = 3.0  # points lost on the hold-out
_BARS = {"paper": 0.4, "group": 1.0}  # points lost against the control after fine-tuning
_GRANULARITIES = {"paper": "filter", "group": "structured"}
_SAME_CONSTRAINT = {
    "group-layers": "allocated-3.0",
    "paper": "paper-allocated-3.0",
    "paper-strict": "paper-allocated-1.5",
}


def write(folder: Path, to: Path, plots: Path) -> list[Path]:
    """primesvt.json in `to`, from the results in `folder` and those that it keeps already; plots of the searches in
    `folder` in `plots`."""
    kept = to / "primesvt.json"
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    new = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    results = dict(sorted((results | {key: _kept(entry, new) for key, entry in new.items()}).items()))
    if not results:
        raise ValueError(f"{folder} has no results; `python -m benchmarks.primesvt run --out {folder}` makes them")
    files = [write_text(kept, json.dumps(results, allow_nan=False, indent=1) + "\n")]
    for entry in new.values():
        if entry.get("job", {}).get("name") == _PLOTTED:
            drawn = save_primesvt_figures(
                PrimeSVTResult.from_dict(entry["search"]),
                plots / "primesvt" / entry["job"]["subject"],
                rates_after=entry["single_shot"]["cost"]["spike_rates"],
            )
            files += drawn
    return files


def _kept(entry: dict[str, Any], results: Results) -> dict[str, Any]:
    """Without answers and candidates, which would fill megabytes, but with what was counted of both."""
    if "job" not in entry:
        return entry
    control = results.get(f"{entry['job']['subject']}-control{_seeded(entry['seed'])}")
    slim = dict(entry)
    for state in _STATES:
        if state not in entry:
            continue
        slim[state] = {key: _without_answers(value) for key, value in entry[state].items()}
        before = control and control.get("tuned") if state == "tuned" else entry.get("given")
        if before and state != "given":
            slim[state]["paired"] = _pairs(before["test"], entry[state]["test"])
    if "integer" in entry:
        slim["integer"] = {key: _without_answers(value) for key, value in entry["integer"].items()}
        slim["integer"]["paired"] = _pairs(entry["single_shot"]["test"], entry["integer"]["test"])
    if "search" in entry:
        slim["search"] = {key: value for key, value in entry["search"].items() if key != "candidates"}
        slim["search"]["uniform"] = _best_uniform(entry["search"]["candidates"])
    return slim


def _seeded(seed: int) -> str:
    """What the names of results end in."""
    return f"-seed{seed}" if seed else ""


def _without_answers(value: Any) -> Any:
    return {key: each for key, each in value.items() if key != "right"} if isinstance(value, dict) else value


def _pairs(before: dict[str, Any], after: dict[str, Any]) -> list[int]:
    was, now = right_images(before), right_images(after)
    return [int((was & ~now).sum()), int((~was & now).sum())]


def _best_uniform(candidates: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The largest saving that a uniform rate reaches within the constraint."""
    uniform = [each for each in candidates if each["phase"] == "target set" and each["accepted"]]
    best = max(uniform, key=lambda each: each["saving"], default=None)
    return best and {key: best[key] for key in ("label", "saving", "score", "error_points", "images")}


def sections(results: Results) -> list[str]:
    """How it was measured, the largest savings, each network, the costs, and where it ran."""
    parts = ["## How it was measured", _INTRODUCTION]
    if largest := _largest_savings(results):
        parts += ["## The largest savings", largest]
    parts += ["## Baselines", _baselines(results)]
    for subject in SUBJECTS:
        rows = [key for key in results if key.startswith(f"{subject}-") and "search" in results[key]]
        if not rows:
            continue
        parts += [f"## {subject}", _single_shots(results, subject)]
        more = (_tuned(results, subject), _integers(results, subject), _operations(results, subject))
        parts += [text for text in more if text]
    parts += [
        text
        for text in (_costs(results), _against_the_plain_algorithm(results), _ablations(results), _latencies(results))
        if text
    ]
    places = sorted({f"commit {entry['commit']}, {entry['precision']}" for entry in results.values() if "job" in entry})
    places += sorted({entry["where"] for entry in results.values() if "where" in entry})
    return [*parts, "## Where it ran", "\n".join(f"- {place}" for place in places)]


def _largest_savings(results: Results) -> str:
    """Of each network the most that each mode saves within the bars."""
    rows = []
    for subject in BINARY:
        named = {name: results.get(f"{subject}-{name}", {}).get("search") for name in _METHODS}
        searches = {name: search for name, search in named.items() if search and search["applied"]}
        row = [subject]
        for mode, bar in _BARS.items():
            of_mode = {
                name: search
                for name, search in searches.items()
                if current_settings(search["config"])["granularity"] == _GRANULARITIES[mode]
            }
            single = {name: search["baseline_score"] - search["applied"]["score"] for name, search in of_mode.items()}
            tuned = {name: fmean(lost.values()) for name in of_mode if (lost := _lost_by_seed(results, subject, name))}
            row += [_largest(of_mode, single, _SINGLE_SHOT_BAR), _largest(of_mode, tuned, bar)]
        rows.append(row)
    tuned_bars = ", ".join(f"{bar:g} ({mode})" for mode, bar in _BARS.items())
    text = (
        f"The rows below that save most. In a single shot they lose at most {_SINGLE_SHOT_BAR:g} points on the "
        f"hold-out. After fine-tuning they stay within {tuned_bars} points of the control on the test images, as a "
        "mean over the seeds there are. Each cell names its job. The paper saves 26.68 %."
    )
    header = ["", *(f"{mode}, {state}" for mode in _BARS for state in ("single shot", "fine-tuned"))]
    return f"{text}\n\n{table(header, rows)}" if any(any(row[1:]) for row in rows) else ""


def _largest(searches: Results, lost: Mapping[str, float], bar: float) -> str:
    # A hold-out of thousands of images makes 3 points 2.9999999999999996 or 3.0000000000000004.
    within = [name for name, points in lost.items() if points <= bar + 1e-9]
    if not within:
        return ""
    best = max(within, key=lambda name: float(searches[name]["applied"]["saving"]))
    return f"{searches[best]['applied']['saving']:.1%}, {lost[best]:+.2f} lost: {best}"


def _baselines(results: Results) -> str:
    rows = []
    for subject in SUBJECTS.values():
        if not subject.weights.is_file():
            rows.append([subject.name, "not trained", "", "", ""])
            continue
        record = subject.baseline_record()
        given = next((entry["given"] for entry in results.values() if _is_of(entry, subject.name, "cost")), None)
        rows.append(
            [
                subject.name,
                count(given["cost"]["parameters"]) if given else "",
                str(record["subject"]["baseline"]["epochs"]),
                f"{record['holdout']['percent']:.2f}",
                f"{record['test']['percent']:.2f}",
            ]
        )
    text = (
        "`python -m benchmarks.primesvt train` trains them. Recipe and curve are in the metadata of "
        "`benchmarks/primesvt/weights`."
    )
    return f"{text}\n\n{table(['network', 'parameters', 'epochs', 'hold-out, %', 'test, %'], rows)}"


def _is_of(entry: Mapping[str, Any], subject: str, figure: str) -> bool:
    """Whether it is a job of `subject` that has `figure` of the network as it was given."""
    return entry.get("job", {}).get("subject") == subject and figure in entry.get("given", {})


def _points(entry: dict[str, Any], state: str, before: float) -> str:
    """Test accuracy, points lost, pairs."""
    found = entry[state]
    wrong, right = found.get("paired", (None, None))
    pairs = "" if wrong is None else f" ({wrong} / {right})"
    if wrong is not None and "compensated" in entry.get("job", {}).get("name", ""):
        low, high = _interval(wrong, right, found["test"]["images"])
        pairs += f" [{low:.2f}, {high:.2f}]"
    return f"{found['test']['percent']:.2f}, {before - found['test']['percent']:+.2f} lost{pairs}"


def _interval(wrong: int, right: int, images: int) -> tuple[float, float]:
    """The 95 % interval of the points lost, of paired answers of which `wrong` became wrong, and `right` right."""
    lost, spread = wrong - right, 1.96 * math.sqrt(wrong + right - (wrong - right) ** 2 / images)
    return 100 * (lost - spread) / images, 100 * (lost + spread) / images


def _single_shots(results: Results, subject: str) -> str:
    rows = []
    for name, title in _METHODS.items():
        entry = results.get(f"{subject}-{name}")
        if entry is None:
            continue
        search, given = entry["search"], entry["given"]["test"]["percent"]
        applied = search["applied"]
        rows.append(
            [
                title,
                "none" if applied is None else f"{applied['saving']:.2%}",
                "yes" if search["met"] else "no",
                "" if applied is None else f"{search['baseline_score'] - applied['score']:+.2f}",
                _points(entry, "single_shot", given),
                _points(entry, "batchnorm_anew", given) if "batchnorm_anew" in entry else "as searched",
            ]
        )
        uniform = search.get("uniform")
        if name in ("paper", "group") and uniform:
            lost = f"{search['baseline_score'] - uniform['score']:+.2f} ± {uniform['error_points']:.2f}"
            rows.append([f"{title}, uniform ({uniform['label']})", f"{uniform['saving']:.2%}", "", lost, "", ""])
    header = [
        "single shot", "saved", "both constraints met", "lost on the hold-out", "test, %",
        "test after correcting the statistics, %",
    ]  # fmt: skip
    return table(header, rows)


def _tuned(results: Results, subject: str) -> str:
    control = results.get(f"{subject}-control")
    if control is None:
        return ""
    reached = control["tuned"]["test"]["percent"]
    controls = _by_seed(results, f"{subject}-control")
    others = ", ".join(f"{percent:.2f}" for seed, percent in controls.items() if seed)
    rows = [["control, unpruned", "", f"{reached:.2f}", others]]
    for name, title in _METHODS.items():
        entry = results.get(f"{subject}-{name}", {})
        if "tuned" in entry and entry["search"]["applied"]:
            saved = f"{entry['search']['applied']['saving']:.2%}"
            lost = _lost_by_seed(results, subject, name)
            others = ", ".join(f"{points:+.2f}" for seed, points in lost.items() if seed)
            others = f"{others} lost; mean of {len(lost)}: {fmean(lost.values()):+.2f}" if others else ""
            rows.append([title, saved, _points(entry, "tuned", reached), others])
    header = [
        f"fine-tuned, {control['tuned']['epochs']} epochs each",
        "parameters saved",
        "test, % against the control",
    ]
    seeds = ", ".join(str(seed) for seed in controls if seed)
    if not seeds:
        return table(header, [row[:-1] for row in rows])
    return table([*header, f"other seeds ({seeds})"], rows)


def _integers(results: Results, subject: str) -> str:
    """What pruned networks lose in integers, without training, against themselves in floats."""
    rows = []
    for name, title in _METHODS.items():
        entry = results.get(f"{subject}-{name}", {})
        if "integer" in entry:
            reached = entry["single_shot"]["test"]["percent"]
            rows.append([title, f"{reached:.2f}", _points(entry, "integer", reached)])
    return table(["in integers (W8A8), no training", "floats, test, %", "integers, test, %"], rows) if rows else ""


def _by_seed(results: Results, key: str) -> dict[int, float]:
    """Test accuracy in percent after fine-tuning with each seed."""
    entries = [entry for name, entry in results.items() if name == key or name.startswith(f"{key}-seed")]
    found = {entry["seed"]: entry["tuned"]["test"]["percent"] for entry in entries if "tuned" in entry}
    return dict(sorted(found.items()))


def _lost_by_seed(results: Results, subject: str, name: str) -> dict[int, float]:
    """Points lost after fine-tuning with each seed, each against the control of that seed."""
    controls = _by_seed(results, f"{subject}-control")
    found = _by_seed(results, f"{subject}-{name}")
    return {seed: controls[seed] - percent for seed, percent in found.items() if seed in controls}


def _operations(results: Results, subject: str) -> str:
    rows: list[list[str]] = []
    for name, title in _METHODS.items():
        entry = results.get(f"{subject}-{name}")
        if entry is None:
            continue
        if not rows:
            rows.append(["unpruned", *_cost_cells(entry["given"]["cost"])])
        rows.append([title, *_cost_cells(entry["single_shot"]["cost"])])
    header = [
        "per image, single shot", "parameters", "non-zero", "MACs of the shapes", "MACs", "ACs", "SOPs",
        "energy of these, µJ", "spike rate, %",
    ]  # fmt: skip
    return table(header, rows)


def _cost_cells(cost: dict[str, Any]) -> list[str]:
    rates = cost["spike_rates"].values()
    counts = [count(round(cost[key])) for key in ("parameters", "nonzero", "dense_macs", "macs", "acs", "sops")]
    return [*counts, f"{cost['energy_compute_pj'] / 1e6:.2f}", f"{100 * sum(rates) / len(rates):.1f}"]


def _against_the_plain_algorithm(results: Results) -> str:
    """The allocated search beside the paper's policy under the same constraint, that with a whole pass a candidate."""
    rows = []
    for subject in BINARY:
        for papers, ours in _SAME_CONSTRAINT.items():
            plain, found = (results.get(f"{subject}-{name}", {}).get("search") for name in (papers, ours))
            if not plain or not found or not _counted(found):
                continue
            naive, passes = plain["scoring"]["naive_image_forwards"], found["scoring"]["image_forwards"]
            saved = [f"{each['applied']['saving']:.2%}" if each["applied"] else "none" for each in (plain, found)]
            title = f"{subject}, {_METHODS[papers]}"
            rows.append([title, saved[0], count(naive), saved[1], count(round(passes)), f"{naive / passes:.1f}x"])
    text = (
        "### Allocated rates against the plain algorithm\n\nBoth search under the same constraints: the paper's policy "
        'with each candidate scored on the whole hold-out, and `policy="allocated"` as it is.'
    )
    header = ["constraints and mode", "policy: saved", "its passes, plain", "allocated: saved", "passes", "fewer"]
    return f"{text}\n\n{table(header, rows)}" if rows else ""


def _counted(search: dict[str, Any]) -> bool:
    """Whether its counts are of the whole search: no memo of an earlier process knew some candidates."""
    scoring = search.get("scoring") or {"evaluations": 0, "plans": 1}
    return bool(scoring["evaluations"] >= scoring["plans"])


def _costs(results: Results) -> str:
    rows = []
    for key, entry in results.items():
        search = entry.get("search", {})
        if not _counted(search):
            continue
        scoring = search["scoring"]
        forwards = scoring["image_forwards"]
        naive, distinct = scoring["naive_image_forwards"], scoring["naive_image_forwards_distinct"]
        rows.append(
            [
                key,
                count(scoring["candidates"]),
                count(scoring["evaluations"]),
                count(round(forwards)),
                f"{naive / forwards:.1f}x",
                f"{distinct / forwards:.1f}x",
                f"{search['elapsed_s']:.0f}",
            ]
        )
    text = (
        "## What the searches cost\n\nA pass is one image through the network; a pass from halfway counts half. Passes "
        "are compared with a whole pass over the hold-out for each candidate, and for each different plan. Rows "
        "`naive` score every candidate on all images. Other work ran beside the searches while they were timed. "
        "Searches that continued from an evaluation cache are left out."
    )
    header = ["job", "candidates", "evaluations", "passes", "fewer than naive", "than distinct plans", "s"]
    return f"{text}\n\n{table(header, rows)}" if rows else ""


def _ablations(results: Results) -> str:
    rows = []
    for key, entry in results.items():
        job, search = entry.get("job", {}), entry.get("search")
        if search is None or job["name"] in _METHODS:
            continue
        applied = search["applied"]
        rows.append(
            [
                key,
                ", ".join(f"{name}={value}" for name, value in job["options"].items()),
                f"{search['initial_rate']:.0%}",
                "none" if applied is None else f"{applied['saving']:.2%}",
                "" if applied is None else f"{search['baseline_score'] - applied['score']:+.2f}",
                _points(entry, "single_shot", entry["given"]["test"]["percent"]),
            ]
        )
    header = ["job", "options", "initial rate", "parameters saved", "lost on the hold-out", "test, %"]
    return f"## Ablations, and the plain algorithm\n\n{table(header, rows)}" if rows else ""


def _latencies(results: Results) -> str:
    rows = []
    for key, entry in results.items():
        for each in entry.get("latencies", []):
            rows.append([key, each["name"], f"{each['macs_removed']:.1%}", each["milliseconds"], each["ratio"]])
    text = (
        "## Latency in torch against MACs removed\n\nOne thread. The networks take turns of one batch. The figures are "
        "medians and quartiles; ratios are taken turn by turn against the unpruned network."
    )
    return f"{text}\n\n{table(['', 'network', 'MACs removed', 'ms', 'times as fast'], rows)}" if rows else ""

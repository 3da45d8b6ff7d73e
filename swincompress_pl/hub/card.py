"""The model card: what the network is, what it cost and gave, how it was made and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]

from swincompress_pl.history import summarize
from swincompress_pl.hub.contents import ARTIFACT, LIBRARY
from swincompress_pl.report.content.numbers import count, megabytes
from swincompress_pl.report.markdown import escaped, table
from swincompress_pl.report.record import RunRecord, Stage

_UNKNOWN_LICENSE = {"license": "other", "license_name": "not-chosen-yet"}
_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a card is made of.

    Attributes:
        name: Name of the network.
        license: Its license; None if nobody said it.
        base_model: Repository of the network that was compressed.
        architecture: Name for `create_model`.
        num_classes: Number of classes; 0 for features.
        class_names: Their names; empty for unknown.
        preprocessing: How images are prepared; empty for unknown.
        history: What was done to the network.
        quantization: {"method", "bits"}; None for a float network.
        report: The record of the run; None if there is none.
    """

    name: str
    license: str | None
    base_model: str | None
    architecture: str
    num_classes: int
    class_names: Sequence[str]
    preprocessing: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    quantization: Mapping[str, Any] | None
    report: RunRecord | None

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json says of the network."""
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "label_names": list(self.class_names) or None,
            "preprocessing": dict(self.preprocessing) or None,
            "quantization": self.quantization,
            "base_model": self.base_model,
        }


def model_card(network: Described) -> str:
    """The text of README.md: YAML front matter as the Hub reads it, and Markdown."""
    front = yaml.safe_dump(_front(network), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {escaped(network.name)}",
        _summary(network),
        *_figures(network.report),
        "## Input",
        _input(network),
        "## How it was made",
        "\n".join(f"- {escaped(summarize(entry))}" for entry in network.history) or "It was not compressed.",
        "## Use it",
        _usage(network),
        "## License",
        _license(network),
    ]
    return "\n\n".join(parts) + "\n"


def _front(network: Described) -> dict[str, Any]:
    kinds = {"prune": "pruning", "mask": "pruning", "quantize": "quantization"}
    done = [kinds[kind] for entry in network.history for kind in entry if kind in kinds]
    task = "image-classification" if network.num_classes else "image-feature-extraction"
    license = _UNKNOWN_LICENSE if network.license is None else {"license": network.license}
    base = {} if network.base_model is None else {"base_model": network.base_model}
    found = {
        "library_name": LIBRARY,
        "pipeline_tag": task,
        **license,
        **base,
        "tags": [LIBRARY, "vision-transformer", *dict.fromkeys(done)],
    }
    last = next((stage for stage in reversed(_stages(network.report)) if stage.accuracy is not None), None)
    if network.report is None or last is None or last.accuracy is None:
        return found
    data = network.report.data or "unknown"
    result = {
        "task": {"type": task},
        "dataset": {"name": data, "type": "-".join("".join(c if c.isalnum() else " " for c in data.lower()).split())},
        "metrics": [{"type": "accuracy", "value": round(last.accuracy.percent, 2), "name": f"top-1, {last.name}"}],
    }
    return found | {"model-index": [{"name": network.name, "results": [result]}]}


def _stages(report: RunRecord | None) -> list[Stage]:
    return [] if report is None else report.stages


def _summary(network: Described) -> str:
    task = f"{network.num_classes} classes" if network.num_classes else "features, without classes"
    form = "float32" if network.quantization is None else f"integers ({network.quantization['bits']})"
    named = ", ".join(network.class_names[:_NAMES_SHOWN]) + (", ..." if network.class_names[_NAMES_SHOWN:] else "")
    classes = f" ({escaped(named)})" if named else ""
    return f"{escaped(network.architecture)}, {task}{classes}, in {form}. Compressed with {LIBRARY}."


def _figures(report: RunRecord | None) -> list[str]:
    if report is None or not report.stages:
        return ["## Figures", "Not measured."]
    runtimes = list(dict.fromkeys(runtime for stage in report.stages for runtime in stage.latency_ms))
    header = ["stage", "parameters", "MACs", "file", "top-1 [95 % interval]", *runtimes]
    rows = [
        [
            escaped(stage.name),
            count(stage.parameters),
            count(stage.macs),
            megabytes(stage.size.file_bytes if stage.size else None),
            "-" if stage.accuracy is None else str(stage.accuracy),
            *(str(stage.latency_ms[each]) if each in stage.latency_ms else "-" for each in runtimes),
        ]
        for stage in report.stages
    ]
    lines = [f"Measured on {escaped(report.data)}." if report.data else "", _machine(report, runtimes)]
    compared = [f"- {escaped(each.name)}: {each.paired}" for each in report.comparisons]
    checks = [f"- {escaped(each.name)}: {'held' if each.passed else 'FAILED'}" for each in report.checks]
    notes = [f"- {escaped(each)}" for each in report.notes]
    texts = [" ".join(line for line in lines if line), "\n".join([*compared, *checks, *notes])]
    return ["## Figures", table([*map(escaped, header)], rows), *(text for text in texts if text)]


def _machine(report: RunRecord, runtimes: Sequence[str]) -> str:
    if not runtimes:
        return ""
    found = report.environment
    cores, system = found.get("cores"), found.get("system")
    machine = ", ".join(str(each) for each in (found.get("cpu"), cores and f"{cores} cores", system) if each)
    return f"Times are medians with quartiles, on {escaped(machine or 'an unknown machine')}."


def _input(network: Described) -> str:
    if not network.preprocessing:
        return "How a picture becomes the network's input is not known."
    known = ("height", "width", "resize", "crop_mode", "interpolation", "mean", "std", "time_steps")
    rows = [[key, escaped(str(network.preprocessing.get(key, "unknown")))] for key in known[:-1]]
    rows += [["time_steps", str(network.preprocessing["time_steps"])]] if "time_steps" in network.preprocessing else []
    return table(["field", "value"], rows)


def _usage(network: Described) -> str:
    place = "OWNER/NAME"
    lines = ["```python", "from swincompress_pl import hub", "", f'network = hub.from_pretrained("{place}")', "```"]
    if network.quantization is None:
        return "\n".join(lines)
    call = 'print(engine.classify("cat.jpg", top=5))' if network.num_classes else "features = engine(pixels)"
    engine = [
        "In integers, without torch:", "", "```python", "from swincompress_pl import accel, hub", "",
        f'engine = accel.load(hub.download("{place}") / "{ARTIFACT}")', call, "```",
    ]  # fmt: skip
    return "\n".join([*lines, "", *engine])


def _license(network: Described) -> str:
    if network.license is not None:
        return f"{escaped(network.license)}, as the publisher says."
    return "Not chosen yet. Put the license of the weights here and into the header, with that of what they come from."

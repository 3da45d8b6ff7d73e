"""A quantized network's diagnosis as a report reads it: the plain data of `quant.Diagnosis.to_dict()`, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from swincompress_pl.report.content.sections import Section
    from swincompress_pl.report.record import RunRecord

DIAGNOSIS_VERSION = 1
PLOT_TITLES = {
    "quantization_error": "Signal to noise",
    "quantization_costs": "What each site costs",
    "quantization_ranges": "Ranges and clips",
    "quantization_histograms": "Values of the worst sites",
    "quantization_bits": "Bits a layer",
}


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Against the float network: mean KL divergence in nats, agreement and top-1 in percent."""

    kl: float
    agreement_percent: float
    top1_percent: float | None = None


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """alone: only this site or weight quantized; others: everything but this one. kind: "activation" or "weight"."""

    name: str
    kind: str
    bits: int
    alone: Effect
    others: Effect


@dataclass(frozen=True, kw_only=True)
class SiteError:
    """Errors in dB of signal to noise (None: none to speak of), and how the scale fits (None: nothing to fit)."""

    name: str
    kind: str
    bits: int
    signed: bool
    snr_db: float | None
    own_snr_db: float | None
    clipped_percent: float
    used_codes: int
    codes: int
    clip_to_max: float | None
    clip_to_p9999: float | None


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of float values in equal bins from low to high, in steps; codes reach from clip_low to clip_high."""

    name: str
    kind: str
    low: float
    high: float
    counts: tuple[int, ...]
    clip_low: int
    clip_high: int


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """The bits of a layer's weights and their number."""

    name: str
    bits: int
    weights: int

    @property
    def size_bytes(self) -> int:
        """Of the packed weights."""
        return (self.weights * self.bits + 7) // 8


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """One network's diagnosis. costs: the dearest first; errors and layers: in the network's order."""

    method: str
    bits: str
    images: int
    simulated: Effect
    integer: Effect | None
    paired: Mapping[str, int] | None
    layers: tuple[LayerBits, ...]
    errors: tuple[SiteError, ...]
    costs: tuple[SiteCost, ...]
    histograms: tuple[Histogram, ...]

    @classmethod
    def of(cls, data: Mapping[str, Any] | Quantization) -> Quantization:
        """Reads `Diagnosis.to_dict()`. Raises ValueError for another version and for missing or ill-typed entries."""
        if isinstance(data, Quantization):
            return data
        version = data.get("version") if isinstance(data, Mapping) else type(data).__name__
        if version != DIAGNOSIS_VERSION:
            raise ValueError(
                f"a diagnosis of version {DIAGNOSIS_VERSION} is expected, not {version!r}; pass what quant.diagnose of "
                "this version of swincompress_pl gives"
            )
        try:
            found = cls._read(data)
            found._check()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the diagnosis is incomplete or ill-typed: {error!r}") from error
        return found

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Self:
        plain = {field.name: data[field.name] for field in fields(cls)}
        costs = [
            SiteCost(**{**cost, "alone": Effect(**cost["alone"]), "others": Effect(**cost["others"])})
            for cost in data["costs"]
        ]
        return cls(
            **plain
            | {
                "simulated": Effect(**data["simulated"]),
                "integer": None if data["integer"] is None else Effect(**data["integer"]),
                "layers": tuple(LayerBits(**layer) for layer in data["layers"]),
                "errors": tuple(SiteError(**error) for error in data["errors"]),
                "costs": tuple(costs),
                "histograms": tuple(Histogram(**{**h, "counts": tuple(h["counts"])}) for h in data["histograms"]),
            }
        )

    def _check(self) -> None:
        if self.images < 1:
            raise ValueError(f"a diagnosis on {self.images} images; there must be at least one")
        for histogram in self.histograms:
            if not (histogram.low < histogram.high and sum(histogram.counts) > 0):
                raise ValueError(f"the histogram of {histogram.name!r} is empty")
        bad = [cost.name for cost in self.costs if not math.isfinite(cost.alone.kl)]
        if bad:
            raise ValueError(f"the cost of {bad[0]!r} is no number")

    @property
    def weights_bytes(self) -> int:
        """Of all packed weights."""
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def result(self) -> Effect:
        """Of the integers, or of the simulation where there are none."""
        return self.simulated if self.integer is None else self.integer


def quantization_record(diagnosis: Any, *, name: str = "Quantization", data: str = "") -> RunRecord:
    """A record of nothing but a diagnosis (`quant.Diagnosis` or its plain data); with labels also its accuracies.

    data: what the images are.
    """
    from swincompress_pl.report.accuracy import Accuracy, PairedComparison
    from swincompress_pl.report.environment import describe_environment
    from swincompress_pl.report.record import RunRecord

    plain = diagnosis.to_dict() if hasattr(diagnosis, "to_dict") else diagnosis
    known = Quantization.of(plain)
    record = RunRecord(name=name, environment=describe_environment(), data=data or f"{known.images} images")
    record.add_quantization(plain)
    if known.paired is not None:
        paired = PairedComparison.from_dict(known.paired)
        result = "simulation" if known.integer is None else "integers"
        for stage, right in (("float", paired.right_to_wrong), (result, paired.wrong_to_right)):
            accuracy = Accuracy(correct=paired.both_right + right, images=paired.images)
            record.add_stage(stage, accuracy=accuracy)
        record.add_comparison(f"{result} against float", paired)
    return record


def write_quantization_report(
    diagnosis: Any, directory: str | Path, *, name: str = "Quantization", data: str = ""
) -> Path:
    """Writes report.json, report.md, report.html and the plots of one quantized network; returns the path of report.md.

    diagnosis: `quant.diagnose(quantized, images, labels)`, or its plain data. data: what the images are. Raises
    ValueError for a diagnosis of another version and NotADirectoryError where `directory` is a file.
    """
    from swincompress_pl.report.write import write_report

    return write_report(quantization_record(diagnosis, name=name, data=data), directory)


def quantization_sections(data: Mapping[str, Any] | Quantization) -> list[Section]:
    """What a report says about a diagnosis."""
    known = Quantization.of(data)
    return [_summary(known), *_costs(known), _scales(known), _bits(known)]


def _summary(known: Quantization) -> Section:
    from swincompress_pl.report.content.sections import Item, Section, megabytes

    float_bytes = 4 * sum(layer.weights for layer in known.layers)
    size = f"{megabytes(known.weights_bytes)} packed, {100 * known.weights_bytes / float_bytes:.1f} % of float32"
    lines = [("method", f"{known.method}, {known.bits}"), ("weights", size)]
    if known.integer is not None:
        lines.append(("integers against float", _effect(known.integer, known.images)))
    lines.append(("the float simulation of them", _effect(known.simulated, known.images)))
    if known.costs:
        worst = known.costs[0]
        lines.append(("costliest alone", f"{label(worst)}, KL {worst.alone.kl:.3g}"))
    text = (
        "The signal-to-noise ratio of a site compares its values with the float network's at the same place; its own "
        "one counts what is rounded and clipped there alone."
    )
    items = tuple(Item(lead=lead, text=line) for lead, line in lines)
    return Section(title="Quantization", text=text, items=items, plots=("quantization_error",))


def _costs(known: Quantization) -> list[Section]:
    from swincompress_pl.report.content.sections import Section, Table

    if not known.costs:
        return []
    labelled = known.costs[0].alone.top1_percent is not None
    effect = ["KL", "agreement", *(["top-1"] if labelled else [])]
    header = ["site or weight", "bits", *(f"alone: {e}" for e in effect), *(f"all others: {e}" for e in effect)]
    rows = [[label(c), str(c.bits), *_cells(c.alone, labelled), *_cells(c.others, labelled)] for c in known.costs]
    text = (
        "Each site and weight quantized alone in the float network, and all others without it: what it costs, and what "
        "leaving it in float would give back."
    )
    table = Table(header=tuple(header), rows=tuple(map(tuple, rows)), long=True)
    return [Section(title="What each site costs", text=text, table=table, plots=("quantization_costs",))]


def _scales(known: Quantization) -> Section:
    from swincompress_pl.report.content.sections import Section, Table

    header = ["site or weight", "bits", "SNR, dB", "own SNR, dB", "clipped", "codes used"]
    header += ["clip / maximum", "clip / 99.99 percentile"]
    rows = [
        (
            label(e),
            f"{'' if e.signed else 'u'}{e.bits}",
            _figure(e.snr_db, ".1f"),
            _figure(e.own_snr_db, ".1f"),
            f"{e.clipped_percent:.3f} %",
            f"{e.used_codes:,} of {e.codes:,}",
            _figure(e.clip_to_max, ".3f"),
            _figure(e.clip_to_p9999, ".3f"),
        )
        for e in known.errors
    ]
    text = (
        "The clip is the largest value that a scale can express; below 1 it cuts the largest values off. Of several "
        "scales (q, k and v, the rows of a weight) the most clipped one is shown."
    )
    table = Table(header=tuple(header), rows=tuple(rows), long=True)
    return Section(title="Scales", text=text, table=table, plots=("quantization_ranges", "quantization_histograms"))


def _bits(known: Quantization) -> Section:
    from swincompress_pl.report.content.sections import Section, Table, megabytes

    rows = [(layer.name, str(layer.bits), f"{layer.weights:,}", megabytes(layer.size_bytes)) for layer in known.layers]
    table = Table(header=("layer", "weight bits", "weights", "packed"), rows=tuple(rows), long=True)
    widths = sorted({layer.bits for layer in known.layers})
    counts = [sum(layer.bits == width for layer in known.layers) for width in widths]
    text = ", ".join(f"{count} at {width} bits" for width, count in zip(widths, counts, strict=True))
    return Section(title="Bits a layer", text=f"{len(rows)} layers: {text}.", table=table, plots=("quantization_bits",))


def label(row: SiteCost | SiteError | Histogram) -> str:
    """A name that tells a layer's weight from the site that it writes to."""
    return f"{row.name} (weight)" if row.kind == "weight" else row.name


def _effect(effect: Effect, images: int) -> str:
    same = f"{effect.agreement_percent:.2f} % same predictions of {images:,}, KL {effect.kl:.3g} nats"
    return same if effect.top1_percent is None else f"{same}, top-1 {effect.top1_percent:.2f} %"


def _cells(effect: Effect, labelled: bool) -> list[str]:
    top1 = [_figure(effect.top1_percent, ".2f") + " %"] if labelled else []
    return [f"{effect.kl:.3g}", f"{effect.agreement_percent:.2f} %", *top1]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

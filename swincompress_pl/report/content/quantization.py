"""What a report says about the diagnosis of a quantized network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from swincompress_pl.quant.diagnosis import Diagnosis, Effect
from swincompress_pl.report.content.numbers import figure, megabytes
from swincompress_pl.report.content.parts import Item, Section, Table
from swincompress_pl.report.diagnosis import all_packed_bytes, float_bytes, label, packed_bytes, read_diagnosis


def quantization_sections(data: Mapping[str, Any] | Diagnosis) -> list[Section]:
    """The sections about a diagnosis."""
    known = read_diagnosis(data)
    return [_summary(known), *_costs(known), _scales(known), _bits(known)]


def _summary(known: Diagnosis) -> Section:
    packed = all_packed_bytes(known)
    size = f"{megabytes(packed)} packed, {100 * packed / float_bytes(known):.1f} % of float32"
    lines = [("method", f"{known.method}, {known.bits}"), ("weights", size)]
    if known.integer is not None:
        lines.append(("integers against float", _effect(known.integer, known.images)))
    lines.append(("the float simulation of them", _effect(known.simulated, known.images)))
    if known.costs:
        worst = known.costs[0]
        lines.append(("costliest alone", f"{label(worst)}, KL {worst.alone.kl:.3g}"))
    text = (
        "The signal-to-noise ratio of a quantizer compares its values with those of the float network at the same "
        "place. Its own ratio counts only what this quantizer itself rounds and clips."
    )
    items = tuple(Item(lead=lead, text=line) for lead, line in lines)
    return Section(title="Quantization", text=text, items=items, plots=("quantization_error",))


def _costs(known: Diagnosis) -> list[Section]:
    if not known.costs:
        return []
    labelled = known.costs[0].alone.top1_percent is not None
    effect = ["KL", "agreement", *(["top-1"] if labelled else [])]
    header = ["quantizer", "bits", *(f"alone: {e}" for e in effect), *(f"all others: {e}" for e in effect)]
    rows = [[label(c), str(c.bits), *_cells(c.alone, labelled), *_cells(c.others, labelled)] for c in known.costs]
    text = (
        "In the columns 'alone' only this quantizer is active: what it costs. In the columns 'all others' "
        "everything but this one is quantized: what leaving it in float would give back."
    )
    table = Table.of(header, rows, long=True, names=True)
    return [Section(title="What each quantizer costs", text=text, table=table, plots=("quantization_costs",))]


def _scales(known: Diagnosis) -> Section:
    header = ["quantizer", "bits", "SNR, dB", "own SNR, dB", "clipped", "codes used"]
    header += ["clip / maximum", "clip / 99.99 percentile"]
    rows = [
        (
            label(e),
            f"{'' if e.signed else 'u'}{e.bits}",
            figure(e.snr_db, ".1f"),
            figure(e.own_snr_db, ".1f"),
            f"{e.clipped_percent:.3f} %",
            f"{e.used_codes:,} of {e.codes:,}",
            figure(e.clip_to_max, ".3f"),
            figure(e.clip_to_p9999, ".3f"),
        )
        for e in known.errors
    ]
    text = (
        "The clip is the largest value that a scale can express; a ratio below 1 means that the largest values are cut "
        "off. If a quantizer has several scales (q, k and v, or the rows of a weight), the most clipped one is shown."
    )
    table = Table.of(header, rows, long=True, names=True)
    return Section(title="Scales", text=text, table=table, plots=("quantization_ranges", "quantization_histograms"))


def _bits(known: Diagnosis) -> Section:
    rows = [
        (name, str(bits), f"{weights:,}", megabytes(packed_bytes(bits, weights)))
        for name, (bits, weights) in known.layers.items()
    ]
    table = Table.of(("layer", "weight bits", "weights", "packed"), rows, long=True, names=True)
    layers = Counter(bits for bits, _ in known.layers.values())
    text = ", ".join(f"{number} at {bits} bits" for bits, number in sorted(layers.items()))
    return Section(
        title="Bits per layer", text=f"{len(rows)} layers: {text}.", table=table, plots=("quantization_bits",)
    )


def _effect(effect: Effect, images: int) -> str:
    same = f"{effect.agreement_percent:.2f} % same predictions of {images:,}, KL {effect.kl:.3g} nats"
    return same if effect.top1_percent is None else f"{same}, top-1 {effect.top1_percent:.2f} %"


def _cells(effect: Effect, labelled: bool) -> list[str]:
    top1 = [figure(effect.top1_percent, ".2f") + " %"] if labelled else []
    return [f"{effect.kl:.3g}", f"{effect.agreement_percent:.2f} %", *top1]

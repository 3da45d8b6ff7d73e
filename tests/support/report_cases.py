"""A record with one of everything, and the plain data of a small pruning search."""

from __future__ import annotations

from typing import Any

from swincompress_pl.report import (
    Accuracy,
    Latency,
    LayerSparsity,
    OperationTime,
    PairedComparison,
    PruningStep,
    RunRecord,
    Size,
    describe_environment,
)


def full_record() -> RunRecord:
    record = RunRecord(name="a run", environment=describe_environment(threads=1), data="6 images")
    for name, share in (("float", 1.0), ("pruned", 0.6), ("engine", 0.15)):
        record.add_stage(
            name,
            parameters=1_000_000,
            macs=int(5e6 * share),
            size=Size(nonzero_bytes=10, indexed_bytes=12, index="1 by 1-bit mask", file_bytes=int(4e6 * share)),
            accuracy=Accuracy(correct=5, images=6),
            latency_ms={"torch": Latency(samples_ms=(1.0, 1.5, 2.0), threads=1)},
        )
    record.steps.append(
        PruningStep(
            group="blocks.0.mlp", units_before=96, units_after=88, accepted=True, accuracy_percent=90.0, macs=4_000_000
        )
    )
    record.steps.append(
        PruningStep(
            group="blocks.0.attn", units_before=3, units_after=2, accepted=False, accuracy_percent=80.0, macs=4_000_000
        )
    )
    record.layers.append(LayerSparsity(name="blocks.0.fc1", weights_before=100, nonzeros_after=60))
    record.operations.append(OperationTime(name="blocks.0.fc1", kind="linear", time_ms=0.5, macs=10**6, size_bytes=100))
    record.add_comparison(
        "engine against float",
        PairedComparison(both_right=4, right_to_wrong=1, wrong_to_right=1, both_wrong=0, same_predictions=4),
    )
    record.add_check("engine equals reference", True, "6 of 6 images")
    record.notes.append("a note")
    return record


def search_data() -> dict[str, Any]:
    """Two rounds on two targets of different kinds; five steps, three of them kept. The tolerance is not known."""

    def step(
        number: int, target: str, units: tuple[int, int], score: float, accepted: bool, **left: Any
    ) -> dict[str, Any]:
        kind = target.rsplit(".", 1)[1]
        return {
            "round": number, "target": target, "kind": kind, "units_before": units[0], "units_after": units[1],
            "score": score, "accepted": accepted, "size_bytes": 0, "images": 200, "exact": score == 73.5, **left,
        }  # fmt: skip

    def target(kind: str, initial: int, units: int, locked: str | None) -> dict[str, Any]:
        return {"kind": kind, "initial_units": initial, "units": units, "step": 0.25, "locked": locked}

    return {
        "version": 2,
        "granularity": "structured",
        "tolerance": None,
        "baseline_score": 75.0,
        "baseline_parameters": 1000,
        "baseline_macs": 8000,
        "baseline_prunable": 800,
        "baseline_bytes": 4000,
        "initial_units": {"blocks.0.heads": 4, "blocks.1.mlp": 96},
        "score": 73.5,
        "rounds": 2,
        "stopped": "every target is locked",
        "targets": {
            "blocks.0.heads": target("heads", 4, 3, None),
            "blocks.1.mlp": target("mlp", 96, 48, "the tolerance"),
        },
        "steps": [
            step(1, "blocks.0.heads", (4, 3), 74.5, True, parameters=900, macs=7500),
            step(1, "blocks.1.mlp", (96, 72), 74.0, True, parameters=800, macs=7000),
            step(2, "blocks.0.heads", (3, 2), 70.0, False, parameters=800, macs=7000),
            step(2, "blocks.1.mlp", (72, 48), 73.5, True, parameters=700, macs=6500),
            step(2, "blocks.1.mlp", (48, 24), 12.0, False, parameters=700, macs=6500),
        ],
        "sensitivity": {
            "blocks.0.heads": [[0.0, 75.0], [0.5, 60.0]],
            "blocks.1.mlp": [[0.5, 74.0], [0.0, 75.0], [0.75, 70.0]],
        },
        "scoring": {"images_scored": 1000, "image_forwards": 250.0, "naive_images": 5000, "decisions": 5},
        "elapsed_s": 42.0,
    }


def large_search_data(targets: int, rounds: int) -> dict[str, Any]:
    """One kind, every step kept, long names."""
    names = [f"layers.{i // 48}.blocks.{i // 4 % 12}.mlp.fc{i % 4}.weight" for i in range(targets)]
    steps = [
        {
            "round": number, "target": name, "kind": "weight", "units_before": 110 - 10 * number,
            "units_after": 100 - 10 * number, "score": 75.0 - number, "accepted": True,
            "parameters": 10**6 - 1000 * (number * targets + place), "macs": None, "size_bytes": 0,
            "images": 10, "exact": True,
        }
        for number in range(1, rounds + 1)
        for place, name in enumerate(names)
    ]  # fmt: skip
    target = {"kind": "weight", "initial_units": 100, "units": 100 - 10 * rounds, "step": 0.1, "locked": None}
    return search_data() | {
        "granularity": "weight",
        "baseline_parameters": 10**6,
        "baseline_macs": None,
        "rounds": rounds,
        "initial_units": dict.fromkeys(names, 100),
        "targets": {name: dict(target) for name in names},
        "steps": steps,
        "sensitivity": {name: [[0.0, 75.0], [0.5, 75.0 - 0.1 * place]] for place, name in enumerate(names)},
    }

"""The spiking operations of twin and engine equal the specification, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.spiking_programs import (
    SPIKING_MAKERS,
    SpikingCase,
    layers_of_spikes,
    pictures,
    spiking_cases,
    spiking_program,
)

from swincompress_pl import accel
from swincompress_pl.accel.core import operation_engine
from swincompress_pl.quant.twin import TorchTwin, run_operation
from swincompress_pl.spec import Program, ProgramError, run
from swincompress_pl.spec import steps as program_steps
from swincompress_pl.spec.kinds import check_operation
from swincompress_pl.spec.spiking_kinds import SPIKING_KINDS


def assert_engine_equals(case: SpikingCase, threads: int = 1) -> None:
    expected = case.expected()
    for implementation in accel.implementations():
        engine = operation_engine(
            case.operation, case.values, case.tensors, implementation=implementation, threads=threads
        )
        given = engine.run(case.arrays)
        assert given.dtype == expected.dtype
        assert np.array_equal(given.reshape(expected.shape), expected), f"{implementation}: {case.operation}"


@pytest.mark.parametrize("seed", range(4))
def test_engine_equals_norm(seed: int) -> None:
    for case in spiking_cases(400, seed):
        assert_engine_equals(case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_engine_equals_norm_on_20000_more(seed: int) -> None:
    for case in spiking_cases(1000, seed):
        assert_engine_equals(case)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_nothing(threads: int) -> None:
    for case in spiking_cases(80, threads):
        assert_engine_equals(case, threads)


@pytest.mark.parametrize("seed", range(4))
def test_twin_equals_norm(seed: int) -> None:
    for case in spiking_cases(400, 50 + seed):
        expected = case.expected()
        given = run_operation(
            case.operation,
            [torch.from_numpy(x) for x in case.arrays],
            {role: torch.from_numpy(tensor) for role, tensor in case.tensors.items()},
            case.dtypes,
        ).numpy()
        assert given.dtype == expected.dtype
        assert np.array_equal(given.reshape(expected.shape), expected), case.operation


def test_cases_pass_the_check_keep_their_type_and_reach_both_answers() -> None:
    seen: dict[str, set[bool]] = {maker.__name__: set() for maker in SPIKING_MAKERS}
    rates = []
    for number, case in enumerate(spiking_cases(400, 9)):
        declared = check_operation(case.operation, case.values, case.tensors)
        result = case.expected()
        assert result.reshape(2, -1).shape[1] == declared.rows * declared.channels
        seen[SPIKING_MAKERS[number % len(SPIKING_MAKERS)].__name__] |= {bool(result.any()), bool(not result.all())}
        if case.kind == "lif":
            rates.append(float(result.mean()))
    assert set(SPIKING_KINDS) <= {case.kind for case in spiking_cases(2 * len(SPIKING_MAKERS))}
    assert all(len(found) == 2 or found == {True} for found in seen.values()), seen
    assert 0.1 < np.mean(rates) < 0.9


@pytest.mark.parametrize("weight", [-127, 127])
@pytest.mark.parametrize("depth", [257, 258, 259, 1000])
@pytest.mark.parametrize("largest", [0, 1, 2, 3, 12, 64, 65, 127])
def test_spikes_on_the_largest_weights_pass_no_limit(weight: int, depth: int, largest: int) -> None:
    """Sums are kept in 16 bits for as many as fit: 258 weights of spikes, fewer products of counts."""
    identity = {"mult": np.full(70, 2**21, np.int32), "shift": np.full(70, 21, np.uint8)}
    case = SpikingCase(
        kind="linear",
        dtype="int32",
        dtypes=("uint7",),
        arrays=(np.full((1, 3, depth), largest, np.uint8),),
        attributes={"channels": 70},
        tensors={"weight": np.full((70, depth), weight, np.int8), "bias": np.arange(70, dtype=np.int32), **identity},
        largest=largest,
    )
    assert np.array_equal(case.expected()[0, 0], largest * depth * weight + np.arange(70))
    assert_engine_equals(case)


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_whole_programs_have_one_answer(tmp_path: Path, steps: int, events: bool) -> None:
    """Logits and every spike: reference, twin, and the engine of the file, at batches of 1 and 3."""
    program = spiking_program(1 + steps, steps=steps, events=events)
    assert program.time_steps == steps
    file = tmp_path / "spiking.safetensors"
    accel.export(program, file)
    twin = TorchTwin(program, torch.device("cpu"))
    engines = [accel.load(file, implementation=name, threads=2) for name in accel.implementations()]
    for images in (pictures(np.random.default_rng(n), n, program.input.value.shape) for n in (1, 3, 16)):
        logits = run(program, images)
        assert np.array_equal(twin(torch.from_numpy(images)).numpy(), logits)
        for engine in (*engines, accel.reference(file)):
            assert np.array_equal(engine.run_integer(images), logits)
    rates = [float(out.mean()) for op, out in program_steps(program, images) if op.kind == "lif"]
    assert all(0 < rate < 1 for rate in rates), rates
    assert len({tuple(row) for row in logits}) > 1
    assert np.array_equal(logits, np.concatenate([run(program, image[None]) for image in images]))


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda x: np.moveaxis(x, 1, 0), r"Time steps come second: pass np.moveaxis\(images, 0, 1\)$"),
        (
            lambda x: np.moveaxis(np.moveaxis(x, 1, 0), -1, 2),
            r"Time steps come second: pass np.moveaxis\(images, \(0, 2\), \(1, -1\)\)",
        ),
        (lambda x: np.moveaxis(x, 1, 0)[:, :, :-1], r"pass np.moveaxis\(images, 0, 1\), and resize them"),
        (lambda x: np.moveaxis(x, -1, 2), r"channels first: pass np.moveaxis\(images, -3, -1\)"),
        (lambda x: x[:, :1], "It takes 2 time steps, not 1: quantize and export again for 1"),
        (lambda x: x[:, :1, :-1], "Time steps come second, and it takes 2 of them"),
        (lambda x: x[:, :, :-1], "; resize them"),
    ],
)
def test_events_with_axes_in_another_order_are_refused(change: Any, remedy: str) -> None:
    program = spiking_program(3, steps=2, events=True)
    images = pictures(np.random.default_rng(0), 5, program.input.value.shape)
    for engine in (accel.Engine(program), accel.ReferenceEngine(program)):
        with pytest.raises(ValueError, match=remedy):
            engine(change(images))


def test_the_remedies_for_the_order_of_axes_work() -> None:
    engine = accel.Engine(spiking_program(3, steps=2, events=True))
    images = pictures(np.random.default_rng(0), 5, engine.input_shape)
    swapped = np.moveaxis(images, 1, 0)
    assert np.array_equal(engine(np.moveaxis(swapped, 0, 1)), engine(images))
    assert np.array_equal(engine(np.moveaxis(np.moveaxis(swapped, -1, 2), (0, 2), (1, -1))), engine(images))


@pytest.mark.parametrize("width", [32, 36, 64, 100, 104])
def test_widths_of_pruned_layers_have_one_answer(width: int) -> None:
    """Panels of weights with 64 columns and a last one of 32, neurons eight at a time and the rest one by one."""
    program = spiking_program(width, steps=2, width=width)
    images = pictures(np.random.default_rng(width), 3, program.input.value.shape)
    logits = run(program, images)
    for name in accel.implementations():
        assert np.array_equal(accel.Engine(program, implementation=name, threads=2).run_integer(images), logits), name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("steps", "width"), [(1, 40), (3, 100), (4, 64)])
def test_layers_have_one_answer_however_many_spikes_they_read(steps: int, width: int, threads: int) -> None:
    """Listed spikes where there are few, products where there are many: each image is a call of its own."""
    program = layers_of_spikes(steps, steps=steps, width=width)
    engines = [accel.Engine(program, implementation=name, threads=threads) for name in accel.implementations()]
    assert any(row.kind == "conv2d+lif" for row in engines[0].profile(np.zeros((1, 9, 9, 3), np.uint8), repeats=1))
    assert any(row.kind == "conv2d+add" for row in engines[0].profile(np.zeros((1, 9, 9, 3), np.uint8), repeats=1))
    rng, rates = np.random.default_rng(width), []
    for brightness in (0, 6, 20, 60, 100, 140, 255):
        images = np.clip(brightness + rng.integers(-5, 6, (3, 9, 9, 3)), 0, 255).astype(np.uint8)
        images[:, :, 5:] = np.clip(images[:, :, 5:] * 1.5, 0, 255)  # and not the same everywhere
        for batch in (images[:1], images):
            logits = run(program, batch)
            for engine in engines:
                assert np.array_equal(engine.run_integer(batch), logits), (engine.implementation, brightness)
        rates.append(next(float(y.mean()) for op, y in program_steps(program, images[:1]) if op.name == "lif1"))
    assert rates[0] < 0.02
    assert all(any(low < rate < high for rate in rates) for low, high in ((0.01, 0.1), (0.2, 0.4), (0.5, 1.0)))


@pytest.mark.parametrize(("steps", "fused"), [(32, True), (33, False)])
def test_neurons_run_with_their_layer_for_up_to_32_steps(steps: int, fused: bool) -> None:
    program = spiking_program(steps, steps=steps)
    images = pictures(np.random.default_rng(steps), 2, program.input.value.shape)
    logits = run(program, images)
    for name in accel.implementations():
        engine = accel.Engine(program, implementation=name, threads=2)
        assert np.array_equal(engine.run_integer(images), logits), name
        assert any(row.kind == "linear+lif" for row in engine.profile(images, repeats=1)) == fused, name


@pytest.mark.parametrize("events", [False, True])
def test_the_profile_counts_spikes_and_synaptic_operations(events: bool) -> None:
    """From the engine's own counters, the same in every implementation, and what the reference's values say."""
    program = spiking_program(3, steps=2, events=events)
    images = pictures(np.random.default_rng(0), 3, program.input.value.shape)
    expected = accel.ReferenceEngine(program).profile(images, repeats=1)
    seen = {op.name: output for op, output in program_steps(program, images)}
    by_name = {row.operation: row for row in expected}
    for op in program.operations:
        if op.kind == "lif":
            assert by_name[op.name].spike_rate == pytest.approx(float(seen[op.name].mean()))
            assert by_name[op.name].sops is None
    counted = [row for row in expected if row.sops is not None]
    assert counted
    assert all((row.sops or 0) > 0 for row in counted)
    assert expected.sops == sum(row.sops or 0 for row in counted)
    for name in accel.implementations():
        profile = accel.Engine(program, implementation=name, threads=2).profile(images, repeats=1)
        assert profile.sops == expected.sops
        for row in profile:
            covered = [by_name[operation] for operation in row.operation.split("+")]
            rates = [each.spike_rate for each in covered if each.spike_rate is not None]
            assert row.spike_rate == (rates[0] if rates else None), row.operation
            assert row.sops == covered[0].sops, row.operation
        assert any(row.kind.endswith("+lif") for row in profile), "no neuron runs with its layer"
        assert "MSOP" in str(profile)
        assert profile.to_dict()["sops"] == expected.sops


def test_the_description_says_what_goes_in() -> None:
    events, images = spiking_program(events=True), spiking_program()
    assert events.describe()["input"]["axes"] == "NTHWC"
    assert images.describe()["input"]["axes"] == "NHWC"
    for program in (events, images):
        again = Program.from_description(json.loads(json.dumps(program.describe())), program.tensors)
        assert again.describe() == program.describe()
        assert again.input.value == program.input.value
    with pytest.raises(TypeError, match=r"uint8 counts of events \(N, 3, 8, 8, 2\)"):
        run(events, np.zeros((1, 3, 8, 8, 2), np.float32))
    with pytest.raises(ValueError, match=r"have shape \(1, 8, 8, 2\); expected \(N, 3, 8, 8, 2\)"):
        run(events, np.zeros((1, 8, 8, 2), np.uint8))
    changed = images.describe()
    changed["input"]["axes"] = "NCHW"
    with pytest.raises(ProgramError, match="uint8 NCHW; only uint8 NHWC"):
        Program.from_description(changed, images.tensors)


def test_narrow_results_saturate_unless_they_have_a_sign() -> None:
    program, images = spiking_program(), np.full((1, 8, 8, 3), 255, np.uint8)

    def with_type(dtype: str) -> Program:
        changed = (replace(op, dtype=dtype) if op.kind == "requantize" else op for op in program.operations)
        return replace(program, operations=tuple(changed))

    narrow = with_type("uint4")
    assert np.array_equal(accel.Engine(narrow).run_integer(images), run(narrow, images))
    signed = with_type("int4")
    run(signed, images)
    with pytest.raises(ProgramError, match=r"requantize.*type int4; the C\+\+ engine runs"):
        accel.Engine(signed)

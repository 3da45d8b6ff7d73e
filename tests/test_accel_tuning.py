"""Measured times of layers, and how they choose the way in which a layer runs; the integers are always the same."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spiking_programs import layers_of_spikes, spiking_program
from support.whole_programs import images_of, swin_program

from swincompress_pl import accel, spec
from swincompress_pl.accel import LayerShape, LayerTimes, Tuning, _core, times
from swincompress_pl.accel.core import layer_engine
from swincompress_pl.accel.times import Measured
from swincompress_pl.accel.tuning import _lists_spikes, layer_shapes, tunings
from swincompress_pl.spec.kinds import KINDS

DENSE = LayerShape(
    kind="linear", shape=(50, 24), dtype="int8", largest=127, output="int8", attributes=(("channels", 20),)
)
SPIKES = LayerShape(
    kind="linear", shape=(2, 9, 24), dtype="uint1", largest=1, output="int32", attributes=(("channels", 20),), steps=2
)


@pytest.fixture
def table(tmp_path: Path) -> LayerTimes:
    return LayerTimes(tmp_path / "times.json")


class Given(LayerTimes):
    """A table whose times are decided by the test: {percent, or block bytes: milliseconds}."""

    def __init__(self, file: Path, found: dict[Any, float]) -> None:
        super().__init__(file)
        self.found = found

    def times_ms(self, groups: Sequence[Sequence[Measured]]) -> list[list[float]]:
        def time(each: Measured) -> float:
            if each.density is None:
                return self.found.get(each.tuning.block_bytes, 1.0)
            return self.found[each.tuning.events_max_percent, each.density]

        return [[time(each) for each in group] for group in groups]


@pytest.mark.parametrize("shape", [DENSE, SPIKES], ids=["dense", "spikes"])
def test_a_time_is_measured_once(table: LayerTimes, shape: LayerShape, monkeypatch: pytest.MonkeyPatch) -> None:
    density = 0.2 if shape is SPIKES else None
    found = table.time_ms(shape, density=density)
    assert 0 < found < 1000
    monkeypatch.setattr(times, "_measure", None)
    assert table.time_ms(shape, density=density) == found
    assert LayerTimes(table.file).time_ms(shape, density=density, implementation=accel.implementations()[0]) == found
    assert len(table) == 1


@pytest.mark.parametrize(
    "other", [{"density": 0.5}, {"threads": 2}, {"tuning": Tuning(block_bytes=8192)}, {"implementation": "scalar"}]
)
def test_whatever_changes_a_time_has_one_of_its_own(table: LayerTimes, other: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"density": 0.1, "implementation": accel.implementations()[0]}
    if usual | other == usual:
        pytest.skip("this CPU has the plain implementation only")
    table.time_ms(SPIKES, **usual)
    table.time_ms(SPIKES, **(usual | other))
    assert len(table) == 2


@pytest.mark.parametrize("key", ["cpu", "engine", "format"])
def test_times_of_another_machine_or_build_are_not_used(table: LayerTimes, key: str) -> None:
    table.time_ms(DENSE)
    content = json.loads(table.file.read_text())
    content["facts"][key] = "another"
    table.file.write_text(json.dumps(content))
    assert len(LayerTimes(table.file)) == 0


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_impossible_times_are_not_used(table: LayerTimes, value: float) -> None:
    table.time_ms(DENSE)
    content = json.loads(table.file.read_text())
    content["times"] = dict.fromkeys(content["times"], value)
    table.file.write_text(json.dumps(content))
    assert len(LayerTimes(table.file)) == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"facts": {}}', '{"facts": {}, "times": {"a": "b"}}', "\x00"])
def test_a_damaged_file_is_told_and_replaced(table: LayerTimes, text: str) -> None:
    table.file.write_text(text)
    with pytest.warns(UserWarning, match=r"times\.json has no times that can be read .*; they are measured again"):
        fresh = LayerTimes(table.file)
    with pytest.warns(UserWarning, match="has no times"):
        fresh.time_ms(DENSE)
    assert len(LayerTimes(table.file)) == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the measured times of layers are not kept"):
        assert _quiet(LayerTimes, tmp_path / "file" / "times.json").time_ms(DENSE) > 0


def _quiet(make: Any, *arguments: Any) -> Any:
    with pytest.warns(UserWarning, match="has no times"):  # a file stands where the folder should be
        return make(*arguments)


def test_processes_keep_each_others_times(table: LayerTimes) -> None:
    other = LayerTimes(table.file)
    other.time_ms(SPIKES)
    table.time_ms(DENSE)
    assert len(table) == len(LayerTimes(table.file)) == 2


def test_the_usual_file_is_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWINCOMPRESS_CACHE", str(tmp_path / "cache"))
    found = LayerTimes()
    found.time_ms(DENSE)
    assert found.file.parent == tmp_path / "cache"
    assert found.file.is_file()
    monkeypatch.delenv("SWINCOMPRESS_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert LayerTimes().file.parent == tmp_path / "swincompress_pl"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(ImportError, match=r"pip install platformdirs.*set SWINCOMPRESS_CACHE"):
        LayerTimes()
    assert LayerTimes(tmp_path / "times.json").file == tmp_path / "times.json"


def test_without_proc_the_cpu_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = times._cpu()

    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert times._cpu().endswith(" CPUs")
    assert known.endswith(" CPUs")


def test_wrong_arguments(table: LayerTimes) -> None:
    with pytest.raises(ValueError, match=r"density is 1\.5; it is a part of the inputs, 0 to 1"):
        table.time_ms(SPIKES, density=1.5)
    with pytest.raises(ValueError, match="avx1"):
        table.time_ms(DENSE, implementation="avx1")
    with pytest.raises(ValueError, match="kind is 'attention'; times are measured of linear and conv2d"):
        LayerShape(kind="attention", shape=(4,), dtype="int8", largest=127, output="int8", attributes=())
    with pytest.raises(spec.ProgramError):
        table.time_ms(LayerShape(**{**vars(DENSE), "output": "int4"}))
    with pytest.raises(ValueError, match="tuning is"):
        table.time_ms(DENSE, tuning=Tuning(block_bytes=2**40))
    with pytest.raises(ValueError, match="tuning is"):
        table.time_ms(SPIKES, tuning=Tuning(events_max_percent=1001))
    assert not table.file.exists()


def test_shapes_of_a_program() -> None:
    program = layers_of_spikes(steps=3)
    values = spec.check(program)
    for number, shape in layer_shapes(program).items():
        op = program.operations[number]
        assert shape.weight_shape == program.tensors[op.tensors["weight"]].shape
        assert shape.shape == values[op.inputs[0]].shape
    steps = [shape.steps for shape in layer_shapes(program).values()]
    assert 3 in steps  # neurons that run with their layer
    assert None in steps


LINE = {(1000, 0.04): 1.0, (1000, 0.3): 2.0}


@pytest.mark.parametrize(
    ("found", "percent"),
    [
        (LINE | {(0, 0.15): 1.5}, 17),  # half of the way from 4 to 30 %
        (LINE | {(0, 0.15): 2.0}, 30),
        (LINE | {(0, 0.15): 0.5}, 0),  # products are always faster
        (LINE | {(0, 0.15): 1000.0}, 1000),  # listing is
        ({(1000, 0.04): 1.0, (1000, 0.3): 0.9, (0, 0.15): 1.5}, 1000),  # so noisy that it falls
        ({(1000, 0.04): 1.0, (1000, 0.3): 0.9, (0, 0.15): 0.5}, 0),
    ],
)
def test_spikes_are_listed_up_to_where_products_take_as_long(
    tmp_path: Path, found: dict[Any, float], percent: int
) -> None:
    program = layers_of_spikes()
    chosen = tunings(program, Given(tmp_path / "t", found), implementation=accel.implementations()[0], threads=1)
    spiking = {n for n, s in layer_shapes(program).items() if s.dtype.startswith("uint") and s.largest <= 2}
    assert spiking
    assert {number: chosen[number] for number in spiking} == dict.fromkeys(spiking, Tuning(events_max_percent=percent))


@pytest.mark.parametrize(("other", "taken"), [(0.99, False), (0.9, True), (1.2, False)])
def test_another_block_must_be_clearly_faster(tmp_path: Path, other: float, taken: bool) -> None:
    program = swin_program()
    given = Given(tmp_path / "t", {128 * 1024: other})
    chosen = tunings(program, given, implementation=accel.implementations()[0], threads=1)
    wanted = dict.fromkeys(layer_shapes(program), Tuning(block_bytes=128 * 1024)) if taken else {}
    assert chosen == wanted


def test_a_time_of_microseconds_chooses_nothing(tmp_path: Path) -> None:
    given = Given(tmp_path / "t", {None: 0.01, 128 * 1024: 0.001})
    assert tunings(swin_program(), given, implementation=accel.implementations()[0], threads=1) == {}


@pytest.mark.parametrize("percent", [0, 20, 1000])
@pytest.mark.parametrize("implementation", accel.implementations())
def test_a_tuned_engine_gives_the_same_bits(tmp_path: Path, implementation: str, percent: int) -> None:
    line = {(1000, 0.04): 1.0, (1000, 0.3): 2.0, (0, 0.15): 1 + (percent / 100 - 0.04) / 0.26, 128 * 1024: 0.5}
    table = Given(tmp_path / "t", line)
    for program in (spiking_program(), layers_of_spikes(), swin_program()):
        images = images_of(program, 3)
        expected = spec.run(program, images)
        file = accel.export(program, tmp_path / "program.safetensors")
        for engine in (
            accel.Engine(program, threads=2, implementation=implementation),
            accel.load(file, threads=2, implementation=implementation),
        ):
            chosen = engine.tune(table)
            shapes = layer_shapes(program)
            blocks = [None if _lists_spikes(shape, implementation) else 128 * 1024 for shape in shapes.values()]
            assert [tuning.block_bytes for tuning in chosen.values()] == blocks
            assert np.array_equal(engine.run_integer(images), expected)
            copy = pickle.loads(pickle.dumps(engine))
            assert copy._tunings == engine._tunings
            assert np.array_equal(copy.run_integer(images), expected)


def test_an_empty_table_is_filled(table: LayerTimes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWINCOMPRESS_CACHE", str(table.file.parent / "usual"))
    accel.Engine(layers_of_spikes(), threads=1).tune(table)
    assert len(table) == len(LayerTimes(table.file)) > 0
    assert len(LayerTimes()) == 0


def test_tuning_twice_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWINCOMPRESS_CACHE", str(tmp_path))
    engine = accel.Engine(layers_of_spikes(), threads=1)
    chosen = engine.tune()
    monkeypatch.setattr(times, "_measure", None)
    assert engine.tune() == chosen
    assert accel.Engine(layers_of_spikes(), threads=1).tune() == chosen


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    block_bytes=st.sampled_from([0, 1, 64, 4096, 2**17, 2**26]),
    percent=st.sampled_from([-1, 0, 1, 20, 100, 1000]),
    steps=st.sampled_from([None, 1, 2, 4]),
    implementation=st.sampled_from(accel.implementations()),
    threads=st.integers(1, 3),
)
def test_no_tuning_changes_a_bit(
    seed: int, block_bytes: int, percent: int, steps: int | None, implementation: str, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, depth, channels = int(rng.integers(1, 200)), int(rng.integers(1, 300)), int(rng.integers(1, 100))
    dtype = "uint1" if steps or rng.integers(2) else "int8"
    shape = (rows, depth) if steps is None else (steps, rows, depth)
    reach = 1 if dtype == "uint1" else 127
    x = rng.integers(0 if dtype == "uint1" else -127, reach + 1, (2, *shape)).astype(spec.STORAGE[dtype])
    x *= rng.random(x.shape) < rng.random()
    tensors = {
        "weight": rng.integers(-127, 128, (channels, depth)).astype(np.int8),
        "bias": rng.integers(-1000, 1001, channels).astype(np.int32),
        "mult": np.full(channels, 2**21, np.int32),
        "shift": np.full(channels, 21, np.uint8),
    }
    value, attributes = spec.Value(dtype=dtype, shape=shape), {"channels": channels}
    answers = [
        layer_engine(
            "linear", attributes, tensors, value, "int32", neuron_steps=steps, tuning=tuning,
            implementation=name, threads=count,
        ).run([x])
        for name, count, tuning in ((implementation, threads, (block_bytes, percent)), ("scalar", 1, (0, -1)))
    ]  # fmt: skip
    assert np.array_equal(*answers)
    if steps is None:
        assert np.array_equal(answers[0], KINDS["linear"].run([x], tensors, attributes, "int32"))


@pytest.mark.parametrize("given_tuning", [(-1, -1), (2**26 + 1, -1), (0, -2), (0, 1001)])
def test_the_extension_refuses_other_tunings(tmp_path: Path, given_tuning: tuple[int, int]) -> None:
    content = accel.artifact.to_bytes(swin_program())
    with pytest.raises(ValueError, match="tuning is"):
        _core.load(content, "scalar", 1, False, {0: given_tuning})
    with pytest.raises(ValueError, match="tuning of operation 9999 of"):
        _core.load(content, "scalar", 1, False, {9999: (0, -1)})

"""Whole Programs: the engine equals the reference on a Swin-like and a ViT-like network built by hand."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support.whole_programs import PROGRAMS, ProgramBuilder, images_of, swin_program, vit_program

from swincompress_pl import accel, spec
from swincompress_pl.accel.core import program_engine


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("implementation", accel.implementations())
@pytest.mark.parametrize("family", PROGRAMS)
def test_programs_equal_reference(family: str, implementation: str, threads: int) -> None:
    for seed in range(3):
        program = PROGRAMS[family](seed)
        engine = accel.Engine(program, threads=threads, implementation=implementation)
        assert (engine.implementation, engine.threads) == (implementation, threads)
        expected = spec.run(program, images_of(program, 8))
        assert len(np.unique(expected)) > 30, "the program's values have died; the test would see nothing"
        for count in (1, 3, 8):
            given = engine.run_integer(images_of(program, 8)[:count])
            assert given.dtype == np.int32
            np.testing.assert_array_equal(given, expected[:count])


def test_batches_beyond_a_chunk_equal_single_images() -> None:
    program = vit_program()
    chunk = program_engine(program, implementation=None, threads=1).chunk
    assert chunk > 1
    engine = accel.Engine(program, threads=2)
    images = images_of(program, 2 * chunk + 1)
    together = engine.run_integer(images)
    np.testing.assert_array_equal(together, np.concatenate([engine.run_integer(image[None]) for image in images]))


def test_fused_steps_cover_every_operation_once() -> None:
    program = swin_program()
    steps = program_engine(program, implementation=None, threads=1).steps
    assert [number for step in steps for number in step] == list(range(len(program.operations)))
    kinds = {tuple(program.operations[number].kind for number in step) for step in steps}
    assert ("linear", "table") in kinds
    assert ("linear", "add") in kinds


def test_a_value_read_twice_is_not_fused_away() -> None:
    b = ProgramBuilder(3, 4, 4)
    x = b.conv("images", 3, 16, 4, "int8")
    hidden = b.linear(x, 16, 16)
    both = b.add("add", (hidden, b.gelu(hidden)), "int8", {})
    twice = b.add("add", (both, both), "int8", {})
    program = b.classifier(twice, 16, 5)
    np.testing.assert_array_equal(
        accel.Engine(program, threads=1).run_integer(images_of(program, 4)), spec.run(program, images_of(program, 4))
    )


def test_one_engine_from_several_threads_and_two_side_by_side() -> None:
    program = swin_program()
    images = images_of(program, 6)
    expected = spec.run(program, images)
    engines = [accel.Engine(program, threads=2), accel.Engine(program, threads=1)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            if not np.array_equal(engines[number % 2].run_integer(images), expected):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong

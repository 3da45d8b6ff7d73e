"""The checker refuses every contradiction by name, and the Program survives its description."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from support.program_cases import operation_cases, small_program

from swincompress_pl.spec import LIMITS, STORAGE, Operation, Program, ProgramError, check, costs, run, steps
from swincompress_pl.spec.kinds import check_operation


def changed(program: Program, name: str, **changes: Any) -> Program:
    operations = tuple(dataclasses.replace(op, **changes) if op.name == name else op for op in program.operations)
    return dataclasses.replace(program, operations=operations)


def with_tensor(program: Program, key: str, tensor: np.ndarray) -> Program:
    return dataclasses.replace(program, tensors={**program.tensors, key: tensor})


def with_attribute(program: Program, name: str, **attributes: Any) -> Program:
    op = next(op for op in program.operations if op.name == name)
    return changed(program, name, attributes={**op.attributes, **attributes})


def test_random_operations_pass_the_check_and_keep_their_declared_type() -> None:
    from swincompress_pl.spec.kinds import KINDS

    for op, inputs, tensors, value in operation_cases(300, seed=1):
        declared = check_operation(op, [value] * len(inputs), tensors)
        result = KINDS[op.kind].run(inputs, tensors, op.attributes, op.dtype)
        assert str(result.dtype) == STORAGE[declared.dtype]
        low, high = LIMITS[declared.dtype]
        assert low <= result.min()
        assert result.max() <= high
        assert result.reshape(2, -1).shape[1] == declared.rows * declared.channels


def test_description_round_trip_gives_the_same_program_and_logits() -> None:
    program = small_program()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    again = Program.from_description(json.loads(json.dumps(program.describe())), program.tensors)
    assert again.describe() == program.describe()
    assert np.array_equal(run(again, images), run(program, images))


def test_batch_is_each_image_alone() -> None:
    program = small_program(1)
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    assert np.array_equal(run(program, images), np.concatenate([run(program, image[None]) for image in images]))
    assert run(program, images[:0]).shape == (0, 5)
    assert len({tuple(row) for row in run(program, images)}) == 4  # the logits depend on the image


def test_steps_give_every_operation_in_its_declared_shape() -> None:
    program = small_program()
    values = check(program)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for op, output in steps(program, images):
        assert str(output.dtype) == values[op.output].dtype
        assert output.size == 2 * values[op.output].rows * values[op.output].channels


def test_costs_count_macs_and_bytes() -> None:
    table = {cost.operation.name: cost for cost in costs(small_program())}
    assert table["fc1"].macs == 16 * 12 * 20
    assert table["embed"].macs == 16 * 12 * 12
    assert table["attention"].macs == 16 * 4 * 2 * (4 + 4)
    assert sum(cost.parameter_bytes for cost in table.values()) == small_program().parameter_bytes


def test_costs_tell_how_far_an_accumulator_may_reach() -> None:
    program = small_program()
    weight = np.zeros((20, 12), np.int8)
    weight[3, :2] = (5, -6)
    program = with_tensor(with_tensor(program, "fc1.weight", weight), "fc1.bias", np.arange(20, dtype=np.int32))
    reaches = {cost.operation.name: cost.accumulator_reach for cost in costs(program)}
    assert reaches["fc1"] == 3 + 127 * 11
    assert reaches["norm1"] is None


OP = {"kind": "table", "name": "t", "inputs": ("images",), "output": "t", "dtype": "int8"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: changed(p, "fc1", kind="gemm"), "fc1.*unknown kind 'gemm'"),
        (lambda p: changed(p, "fc1", inputs=("nowhere",)), "fc1.*'nowhere'"),
        (lambda p: changed(p, "fc1", output="norm2"), "fc1.*second time"),
        (lambda p: changed(p, "fc1", inputs=("norm2", "norm2")), "fc1.*takes 1 inputs"),
        (lambda p: changed(p, "fc1", dtype="float32"), "fc1.*float32"),
        (lambda p: changed(p, "fc1", inputs=("add1",)), "fc1.*int16"),
        (lambda p: changed(p, "fc1", tensors={}), "fc1.*'weight' is missing"),
        (lambda p: with_attribute(p, "fc1", channels=21), "fc1.*weight.*shape"),
        (lambda p: with_attribute(p, "fc1", channels=True), "fc1.*channels is True"),
        (lambda p: with_attribute(p, "fc1", rounding="up"), "fc1.*unknown attribute 'rounding'"),
        (lambda p: with_attribute(p, "norm1", shift=53), "norm1.*shift is 53"),
        (lambda p: with_attribute(p, "attention", windows=3), "attention.*3 windows"),
        (lambda p: with_attribute(p, "attention", heads=3), "attention.*channels"),
        (lambda p: with_attribute(p, "embed", padding=[2, 0]), "embed.*padding"),
        (lambda p: with_attribute(p, "embed", stride=[0, 2]), "embed.*stride"),
        (lambda p: with_tensor(p, "fc1.weight", np.full((20, 12), -128, np.int8)), "fc1.*weight.*-128"),
        (lambda p: with_tensor(p, "fc1.weight", np.zeros((20, 12), np.int16)), "fc1.*int16.*int8"),
        (lambda p: with_tensor(p, "fc1.bias", np.full(20, 2**31 - 1, np.int32)), "fc1.*beyond int32"),
        (lambda p: with_tensor(p, "fc1.mult", np.full(20, 2**22, np.int32)), "fc1.*mult"),
        (lambda p: with_tensor(p, "fc1.shift", np.zeros(20, np.uint8)), "fc1.*shift"),
        (lambda p: with_tensor(p, "windows.index", np.full((16, 1), 16, np.int32)), "windows.*index"),
        (lambda p: with_tensor(p, "attention.bias_table", np.full((2, 7), 2**30, np.int32)), "attention.*beyond int32"),
        (lambda p: with_tensor(p, "attention.bias_index", np.full((4, 4), 7, np.int32)), "attention.*bias_index"),
        (lambda p: with_tensor(p, "attention.out_shift", np.full(2, 39, np.uint8)), "attention.*out_shift"),
        (lambda p: with_tensor(p, "norm1.gain", np.full(12, 2**22, np.int32)), "norm1.*gain"),
        (lambda p: dataclasses.replace(p, tensors={}), "embed.*'embed.weight' is not in the program"),
        (lambda p: dataclasses.replace(p, operations=()), "without operations"),
        (lambda p: dataclasses.replace(p, operations=p.operations[:-1]), "must end in int32"),
        (lambda p: dataclasses.replace(p, classes=("one",)), "names 1 classes"),
        (lambda p: dataclasses.replace(p, logit_scale=float("nan")), "logit_scale is nan"),
    ],
)
def test_check_names_what_is_wrong(change: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        check(change(small_program()))


def test_sums_over_too_many_tokens_are_refused() -> None:
    value = dataclasses.replace(check(small_program())["norm"], shape=(2**17, 4))
    op = Operation(kind="mean", name="m", inputs=("x",), output="y", dtype="int8", tensors={})
    with pytest.raises(ProgramError, match="131072 tokens"):
        check_operation(op, [value], {})


def test_wide_layer_norm_is_refused() -> None:
    value = dataclasses.replace(check(small_program())["norm"], shape=(2, 4097))
    op = Operation(kind="layer_norm", name="n", inputs=("x",), output="y", dtype="int8", tensors={})
    with pytest.raises(ProgramError, match="4097 channels"):
        check_operation(op, [value], {})


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), TypeError, "float32.*uint8 pixels"),
        (np.zeros((1, 3, 8, 8), np.uint8), ValueError, r"\(1, 3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"\(8, 8, 3\)"),
        ([[0]], TypeError, "list"),
    ],
)
def test_run_refuses_wrong_images(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(small_program(), images)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm_version", 99, "version 99.*export the model again"),
        ("input", {"dtype": "float32", "axes": "NHWC"}, "float32"),
        ("operations", [{"kind": "linear"}], "incomplete"),
        ("operations", 3, "incomplete"),
        ("logit_scale", 1.0, "incomplete"),
    ],
)
def test_from_description_refuses_what_it_does_not_know(key: str, value: Any, message: str) -> None:
    program = small_program()
    with pytest.raises(ProgramError, match=message):
        Program.from_description({**program.describe(), key: value}, program.tensors)

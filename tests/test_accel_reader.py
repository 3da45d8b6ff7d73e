"""The C++ reader: each of its guards fires, and names the layer; what it accepts, Python reads alike."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.artifact_bytes import Array, container, described, header_of, parts, sealed
from support.program_cases import small_program
from support.spiking_programs import spiking_program
from support.whole_programs import images_of

from swincompress_pl import accel, spec
from swincompress_pl.accel import _core, artifact
from swincompress_pl.accel.core import artifact_engine, program_engine, read_artifact

Change = Callable[[dict[str, Any], dict[str, Array]], Any]


@pytest.fixture(scope="module")
def program() -> spec.Program:
    return small_program(3)


@pytest.fixture(scope="module")
def spiking() -> spec.Program:
    return spiking_program()


def load(content: bytes) -> Any:
    return artifact_engine(content, "", 1)


def operation(description: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [op for op in description["operations"] if op["name"] == name]
    return found


def refused(program: spec.Program, change: Change, message: str) -> None:
    """The artifact of a changed program, its checksum right, is refused with this message."""
    description, tensors = parts(program)
    change(description, tensors)
    with pytest.raises(ValueError, match=message):
        load(sealed(description, tensors))


# --- the container

TENSORS = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.arange(4, dtype=np.int8)}


def test_a_sound_container_gives_its_tensors() -> None:
    description, tensors = read_artifact(sealed({"x": [1, 2.5, "é", None, True]}, TENSORS))
    assert json.loads(description) == {"x": [1, 2.5, "é", None, True]}
    assert {key: tensor.dtype for key, tensor in tensors.items()} == {k: t.dtype for k, t in TENSORS.items()}
    assert all(np.array_equal(tensors[key], tensor) for key, tensor in TENSORS.items())


def entry(key: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[key].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry("b", data_offsets=[11, 15]), "overlap or leave gaps at byte 12"),
        (entry("b", data_offsets=[13, 17]), "overlap or leave gaps at byte 12"),
        (entry("b", data_offsets=[0, 4]), "overlap or leave gaps"),
        (entry("b", data_offsets=[12, 15]), r"takes 4 bytes, not those at \[12, 15\)"),
        (entry("b", data_offsets=[16, 12]), "takes 4 bytes"),
        (entry("b", data_offsets=[12, 2**63]), "an offset that is none"),
        (entry("b", data_offsets=[-1, 3]), "an offset that is none"),
        (entry("b", data_offsets=[12.0, 16.0]), "an offset that is none"),
        (entry("b", data_offsets=[12]), "no shape or no offsets"),
        (entry("b", data_offsets=None), "no shape or no offsets"),
        (entry("b", shape=None), "no shape or no offsets"),
        (entry("b", shape=[5], data_offsets=[12, 17]), "its tensors take 17 bytes, the file has 16"),
        (entry("b", shape=[2**32, 2**32]), "empty, negative or too large"),
        (entry("b", shape=[0], data_offsets=[12, 12]), "empty, negative or too large"),
        (entry("b", shape=[-4]), "a size or an offset that is none"),
        (entry("b", shape=[2**40], data_offsets=[12, 12 + 2**40]), "empty, negative or too large"),
        (entry("b", dtype="F32", shape=[1]), "a type that no artifact has"),
        (entry("b", dtype="I16"), "takes 8 bytes"),
        (lambda header: header.pop("b"), "its tensors take 12 bytes, the file has 16"),
        (lambda header: header.update(b=7), "a type that no artifact has"),
        (lambda header: header.update(__metadata__=7), "not an artifact of swincompress_pl"),
        (lambda header: header["__metadata__"].update(swincompress_pl=7), "not an artifact of swincompress_pl"),
    ],
)
def test_containers_that_lie_are_refused(change: Any, message: str) -> None:
    header, payload = header_of(TENSORS, described({}, TENSORS))
    change(header)
    with pytest.raises(ValueError, match=message):
        read_artifact(container(header, payload))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":1,"a":2}', 'key "a" is given twice'),
        (b'{"a":"\\ud800"}', "half of a surrogate pair"),
        (b'{"a":"\\udc00\\ud800"}', "half of a surrogate pair"),
        (b'{"a":"\xc0\x80"}', "not UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a":"\xf4\x90\x80\x80"}', "not UTF-8"),
        (b'{"a":"\xe2\x82"}', "not UTF-8"),
        (b'{"a":"\n"}', "control character"),
        (b'{"a":"\\x41"}', "unknown escape"),
        (b'{"a":"\\u00g0"}', "no hexadecimal digit"),
        (b'{"a":"', "text without an end"),
        (b'{"a":"\\', "unknown escape"),
        (b'{"a":01}', "no '}'"),
        (b'{"a":NaN}', "no value"),
        (b'{"a":-}', "no value"),
        (b'{"a":1.}', "no value"),
        (b'{"a":1e}', "no value"),
        (b'{"a":[1,]}', "no value"),
        (b'{"a":1,}', "no key"),
        (b'{"a" 1}', "no ':'"),
        (b"{} {}", "more follows the value"),
        (b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper than 64"),
        (b'{"a":[' + b"0," * 2**20 + b"0]}", "more than 1048576 values"),
    ],
)
def test_json_is_strict_and_bounded(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_artifact(container(text))


def test_headers_beyond_the_limit_are_refused_before_they_are_read() -> None:
    with pytest.raises(ValueError, match="its header takes 16777217 bytes; at most 16777216 are read"):
        read_artifact((2**24 + 1).to_bytes(8, "little") + b"{" + bytes(100))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=5))
def test_the_canonical_text_is_that_of_python(description: dict[str, Any]) -> None:
    text, _ = read_artifact(sealed(description, TENSORS))  # the checksum is right only if the texts agree
    assert text == artifact._json(description)


def test_tensors_at_odd_addresses_are_read() -> None:
    tensors = {"a": np.arange(3, dtype=np.int8), "b": np.arange(5, dtype=np.int64)}
    for pad in range(8):
        header, payload = header_of(tensors, described({}, tensors))
        content = container(json.dumps(header).encode() + b" " * pad, payload)
        assert np.array_equal(read_artifact(content)[1]["b"], tensors["b"])


def test_python_refuses_to_write_what_the_reader_would_not_take(program: spec.Program) -> None:
    deep: Any = []
    for _ in range(70):
        deep = [deep]
    for origin in ({"deep": deep}, {"text": "\ud800"}):
        with pytest.raises(accel.ArtifactError, match="could not be read back"):
            artifact.to_bytes(dataclasses.replace(program, origin=origin))


def test_compressed_artifacts_are_left_to_python(program: spec.Program) -> None:
    message = (
        "an entropy-coded artifact, and this library is built without liblzma and zlib; build it with "
        "-DSWINCOMPRESS_LZMA=ON, or export without compression"
    )
    with pytest.raises(_core.CodedError, match=f"^{message}$"):
        load(artifact.to_bytes(program, "lzma"))


# --- the description


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, _: d.update(norm_version=3), "specification version 3; this package runs versions 1 and 2"),
        (lambda d, _: d.pop("norm_version"), "specification version none"),
        (lambda d, _: d.update(input=[]), "incomplete or ill-typed: entry 'input'"),
        (lambda d, _: d["input"].update(dtype="int8"), "program input is int8 NHWC"),
        (lambda d, _: d["input"].update(height=0), "entry 'height' is not a positive integer"),
        (lambda d, _: d["input"].update(height=8.5), "entry 'height' is not a positive integer"),
        (lambda d, _: d["input"].update(height=2**31, width=2**31), "empty, negative or too large"),
        (lambda d, _: d["input"].update(axes="NTHWC"), "entry 'time_steps'"),
        (lambda d, _: d.update(classes=["a", 1, "b", "c", "d"]), "a class name is not a string"),
        (lambda d, _: d.update(classes=["a"]), "5 logits but names 1 classes"),
        (lambda d, _: d.pop("classes"), "entry 'classes'"),
        (lambda d, _: d.pop("origin"), "entry 'origin'"),
        (lambda d, _: d["input"].pop("preprocessing"), "entry 'preprocessing'"),
        (lambda d, _: d.update(operations=[]), "program of 0 operations"),
        (lambda d, _: d.update(operations=d["operations"] * 1000), "program of 19000 operations; .* 1 to 10000"),
        (lambda d, _: d["operations"].pop(), r"ends in int8 of shape \(48,\)"),
        (lambda d, _: operation(d, "fc1").pop("kind"), "entry 'kind'"),
        (lambda d, _: operation(d, "fc1").update(dtype="int64"), "linear 'fc1': value of type 'int64'"),
        (lambda d, _: operation(d, "fc1").update(dtype="int9"), "linear 'fc1': value of type 'int9'"),
        (lambda d, _: operation(d, "fc1").update(inputs=["fc2"]), "linear 'fc1': reads \"fc2\", which no earlier"),
        (lambda d, _: operation(d, "fc1").update(inputs=["fc1"]), "linear 'fc1': reads \"fc1\", which no earlier"),
        (lambda d, _: operation(d, "fc1").update(inputs=[3]), "linear 'fc1': reads 3"),
        (lambda d, _: operation(d, "fc1").update(output="norm2"), "linear 'fc1': writes \"norm2\" a second time"),
        (lambda d, _: operation(d, "fc1").update(output="images"), "linear 'fc1': writes \"images\" a second time"),
        (lambda d, _: operation(d, "fc1").update(kind="nonlinear"), "nonlinear 'fc1': unknown kind"),
        (lambda d, _: operation(d, "fc1")["attributes"].update(channels="20"), "linear 'fc1': attribute channels is"),
        (lambda d, _: operation(d, "fc1")["attributes"].update(channels=[20]), "attribute channels is a list"),
        (lambda d, _: operation(d, "fc1")["attributes"].update(channels=True), "attribute channels is true"),
        (lambda d, _: operation(d, "fc1")["attributes"].update(channels=2**64), "attribute channels is"),
        (lambda d, _: operation(d, "fc1")["attributes"].update(scale=2), "linear 'fc1': unknown attribute 'scale'"),
        (lambda d, _: operation(d, "fc1")["attributes"].pop("channels"), "attribute channels is missing"),
        (lambda d, _: operation(d, "fc1")["tensors"].update(weight="no"), "tensor \"no\" is not in the program"),
        (lambda d, _: operation(d, "fc1")["tensors"].update(w="fc1.bias"), "linear 'fc1': unknown tensor 'w'"),
        (lambda d, _: operation(d, "fc1")["tensors"].pop("bias"), "linear 'fc1': tensor 'bias' is missing"),
        (lambda d, _: operation(d, "add1").update(inputs=["merge"]), "add 'add1': takes 2 inputs, got 1"),
        (lambda d, _: operation(d, "embed")["attributes"].update(stride=[2]), "attribute stride must be two integers"),
    ],
)  # fmt: skip
def test_descriptions_that_lie_are_refused(program: spec.Program, change: Change, message: str) -> None:
    refused(program, change, message)


@pytest.mark.parametrize(
    "scale", ["0x0p+0", "-0x1p+0", "inf", "nan", "0x1p+1024", "0x1p-2000", "1.0", "0x", "0x1", "0x1p", "0x1px",
              "0x1.g8p+0", "0x1..8p+0", "0x.p+0", "0x123456789abcdef0p+0", "0x1p+99999", ""]
)  # fmt: skip
def test_scales_that_are_no_positive_number_are_refused(program: spec.Program, scale: str) -> None:
    refused(program, lambda d, _: d.update(logit_scale=scale), "logit_scale is .*; it must be positive and finite")


@given(st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False))
def test_scales_are_read_to_the_bit(scale: float) -> None:
    program = dataclasses.replace(small_program(3), logit_scale=scale)
    assert load(sealed(*parts(program)))[1]["logit_scale"] == scale


# --- the rules of the specification


def set_tensor(key: str, value: Any, at: Any = ...) -> Change:
    return lambda _, tensors: tensors[key].__setitem__(at, value)


def set_shape(key: str, *shape: int) -> Change:
    return lambda _, tensors: tensors.update({key: np.resize(tensors[key], shape)})


def set_type(key: str, dtype: str) -> Change:
    return lambda _, tensors: tensors.update({key: tensors[key].astype(dtype)})


def set_attribute(name: str, **attributes: Any) -> Change:
    return lambda description, _: operation(description, name)["attributes"].update(attributes)


def set_dtype(name: str, dtype: str) -> Change:
    return lambda description, _: operation(description, name).update(dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_tensor("fc1.weight", -128, (3, 4)), "linear 'fc1': tensor 'weight' holds values in .-128"),
        (set_tensor("fc1.bias", 2**31 - 1), "linear 'fc1': accumulator may reach 2147"),
        (set_tensor("fc1.bias", -(2**31)), "linear 'fc1': accumulator may reach 2147"),
        (set_tensor("embed.bias", 2**31 - 9, (0, 1, 2)), "conv2d 'embed': accumulator may reach"),
        (set_tensor("fc1.mult", 2**22), "linear 'fc1': tensor 'mult' holds values in .4194304"),
        (set_tensor("fc1.mult", -1, 0), "linear 'fc1': tensor 'mult' holds values in .-1"),
        (set_tensor("fc1.shift", 0, 0), "linear 'fc1': tensor 'shift' holds values in .0"),
        (set_tensor("fc1.shift", 53, 0), "tensor 'shift' holds values in .*they must lie in .1, 52"),
        (set_shape("fc1.weight", 20, 11), r"'fc1': tensor 'weight' is int8 \(20, 11\); it must be int8 \(20, 12\)"),
        (set_type("fc1.weight", "uint8"), "linear 'fc1': tensor 'weight' is uint8"),
        (set_type("fc1.bias", "int64"), "linear 'fc1': tensor 'bias' is int64"),
        (set_attribute("fc1", channels=2**21), "attribute channels is 2097152; it must be an integer in .1, 1048576"),
        (set_dtype("fc1", "int4"), r"linear 'fc1': type int4; the C\+\+ engine runs .*accel\.reference\(path\)"),
        (set_attribute("embed", padding=[2, 0]), "conv2d 'embed': padding reaches the kernel"),
        (set_attribute("embed", kernel=[9, 9]), "conv2d 'embed': kernel is larger than the padded input"),
        (set_attribute("embed", kernel=[0, 2]), "attribute kernel must be two integers"),
        (set_attribute("embed", stride=[1, 1]), "conv2d 'embed': tensor 'bias' is int32"),
        (set_attribute("embed", groups=5), "conv2d 'embed': 3 inputs and 12 outputs do not split into 5 groups"),
        (set_tensor("norm1.gain", 2**22), "layer_norm 'norm1': tensor 'gain' holds"),
        (set_tensor("norm1.offset", 2**60 + 1), "layer_norm 'norm1': tensor 'offset' holds"),
        (set_attribute("norm1", epsilon=2**58 + 1), "layer_norm 'norm1': attribute epsilon is"),
        (set_attribute("norm1", shift=53), "layer_norm 'norm1': attribute shift is 53"),
        (set_tensor("gelu.values", -128, 7), "table 'gelu': tensor 'values' holds values in .-128"),
        (set_tensor("position.constant", -32768, (0, 0)), "add_constant 'position': tensor 'constant' holds"),
        (set_tensor("token.rows", -32768), "prepend 'token': tensor 'rows' holds"),
        (set_attribute("token", rows=2**17), "prepend 'token': attribute rows is"),
        (set_tensor("windows.index", 16, 3), "gather 'windows': tensor 'index' holds values in"),
        (set_tensor("windows.index", -2, 3), "gather 'windows': tensor 'index' holds values in .-2"),
        (set_dtype("windows", "int16"), "gather 'windows': output is int16; it must be int8 as the input"),
        (lambda d, _: operation(d, "add1").update(inputs=["position", "attention"]), "add 'add1': adds shapes"),
        (set_dtype("add1", "int8"), "add 'add1': adds int16 and int16 into int8"),
        (set_attribute("attention", windows=3), "attention 'attention': 16 tokens do not split into 3 windows"),
        (set_attribute("attention", heads=3), "attention 'attention': input has 24 channels; 3 heads need 36"),
        (set_tensor("attention.bias_table", 2**30), "attention 'attention': logits may differ by 21476"),
        (set_tensor("attention.bias_index", 7, (0, 0)), "attention 'attention': tensor 'bias_index' holds"),
        (set_tensor("attention.out_shift", 39), "attention 'attention': tensor 'out_shift' holds"),
        (set_tensor("attention.exp_shift", 53), "attention 'attention': tensor 'exp_shift' holds"),
        (set_shape("attention.region", 4, 5), "attention 'attention': tensor 'region' is uint8"),
        (set_shape("pool.mult", 47), "mean 'pool': tensor 'mult' is int32"),
    ],
)  # fmt: skip
def test_operations_that_break_a_rule_are_refused(program: spec.Program, change: Change, message: str) -> None:
    refused(program, change, message)


def named(program: spec.Program, kind: str, number: int = 0) -> str:
    return [op.name for op in program.operations if op.kind == kind][number]


@pytest.mark.parametrize(
    ("kind", "role", "value", "message"),
    [
        ("lif", "threshold", 0, "tensor 'threshold' holds values in .0"),
        ("lif", "threshold", 2**28 + 1, "tensor 'threshold' holds"),
        ("lif", "reset", -(2**28) - 1, "tensor 'reset' holds"),
        ("lif", "bias", 2**27 + 1, "tensor 'bias' holds"),
        ("requantize", "mult", 2**22, "tensor 'mult' holds"),
        ("requantize", "shift", 0, "tensor 'shift' holds"),
    ],
)
def test_spiking_tensors_out_of_range_are_refused(
    spiking: spec.Program, kind: str, role: str, value: int, message: str
) -> None:
    name = named(spiking, kind)
    refused(spiking, set_tensor(f"{name}.{role}", value), f"{kind} '{name}': {message}")


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        ("lif", {"steps": 0}, "attribute steps is 0"),
        ("lif", {"repeated": 2}, "attribute repeated is 2"),
        ("lif", {"decay": 2**16 + 1}, "attribute decay is"),
        ("lif", {"fraction_bits": 16}, "attribute fraction_bits is 16"),
        ("max_pool", {"padding": [3, 1]}, "padding reaches the kernel"),
        ("block_sum", {"rows": 5}, "does not split into 5 x 2 blocks"),
        ("spike_attention", {"heads": 5}, "channels of q and k must agree, and all split into 5 heads"),
        ("spike_attention", {"windows": 5}, "must agree and split into 5 windows"),
    ],
)
def test_spiking_attributes_that_lie_are_refused(
    spiking: spec.Program, kind: str, attributes: dict[str, Any], message: str
) -> None:
    name = named(spiking, kind)
    refused(spiking, set_attribute(name, **attributes), f"{kind} '{name}': .*{message}")


def test_steps_that_do_not_divide_the_rows_are_refused(spiking: spec.Program) -> None:
    name = named(spiking, "lif", 1)
    refused(spiking, set_attribute(name, steps=7), f"lif '{name}': 48 rows do not split into 7 time steps")


def test_counts_beyond_their_type_are_refused(spiking: spec.Program) -> None:
    counted = [op for op in spiking.operations if op.dtype.startswith("uint") and op.kind in ("add", "block_sum")]
    assert counted
    for op in counted:
        refused(spiking, set_dtype(op.name, "uint1"), f"{op.kind} '{op.name}': .* may reach .*, beyond uint1")
    name = named(spiking, "lif")
    refused(spiking, set_dtype(name, "uint2"), f"lif '{name}': output is uint2")
    name = named(spiking, "multiply")
    refused(spiking, set_dtype(name, "int8"), f"multiply '{name}': output is int8")


def count_program(tokens: int, channels: int, kind: str) -> spec.Program:
    """Whole operations of raw pixels: as many and as large counts as a type holds."""
    attributes, inputs, dtype = {
        "spike_attention": ({"windows": 1, "heads": 1}, ("images",) * 3, "int32"),
        "multiply": ({}, ("images",) * 2, "uint8"),
        "block_sum": ({"rows": 1, "channels": 1}, ("images",), "int32"),
    }[kind]
    op = spec.Operation(kind=kind, name="big", inputs=inputs, output="y", dtype=dtype, attributes=attributes)
    taken = spec.InputDescription(height=tokens, width=1, channels=channels)
    return spec.Program(input=taken, operations=(op,), tensors={}, logit_scale=1.0)


@pytest.mark.parametrize(
    ("kind", "tokens", "channels", "message"),
    [
        ("spike_attention", 130, 1, "a count may reach 2155578750, beyond int32"),
        ("multiply", 1, 1, "a product may reach 65025, beyond uint8"),
        ("block_sum", 2**23, 2, "a sum may reach 4278190080, beyond int32"),
    ],
)
def test_sums_that_pass_their_type_are_refused(kind: str, tokens: int, channels: int, message: str) -> None:
    refused(count_program(tokens, channels, kind), lambda *_: None, f"{kind} 'big': {message}")


def test_values_that_take_too_much_memory_are_refused() -> None:
    program = count_program(2**22, 256, "block_sum")
    factors = {"mult": np.full(256, 2**21, np.int32), "shift": np.full(256, 30, np.uint8)}
    last = spec.Operation(
        kind="requantize", name="last", inputs=("y",), output="z", dtype="int32", tensors={k: k for k in factors}
    )
    first = dataclasses.replace(program.operations[0], attributes={"rows": 2**22, "channels": 256})
    large = dataclasses.replace(program, operations=(first, last), tensors=factors)
    refused(large, lambda *_: None, "an image and its results take 5368709120 bytes; only 42949")
    narrow = (first, dataclasses.replace(last, dtype="int8"))
    output = spec.Output(name="z", value="z", scale=1.0, shape=(2**22, 256))
    refused(
        dataclasses.replace(large, operations=narrow, outputs=(output,)),
        lambda *_: None,
        "values between the operations take 4294967296 bytes and every thread 0; only 42949",
    )


def test_biases_that_spread_beyond_the_memory_are_refused() -> None:
    """Every head has its own image of one index over all pairs of tokens."""
    length, heads = 2048, 300
    taken = spec.InputDescription(height=length, width=1, channels=1)
    layer = {
        "weight": np.ones((3 * heads, 1, 1, 1), np.int8),
        "bias": np.zeros(3 * heads, np.int32),
        "mult": np.zeros(3 * heads, np.int32),
        "shift": np.ones(3 * heads, np.uint8),
    }
    window = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0]}
    tables = {
        **{name: np.zeros(heads, np.int32) for name in ("exp_mult", "out_mult")},
        **{name: np.ones(heads, np.uint8) for name in ("exp_shift", "out_shift")},
        "bias_table": np.zeros((heads, 1), np.int32),
        "bias_index": np.zeros((length, length), np.int32),
    }
    conv = spec.Operation(
        kind="conv2d", name="stem", inputs=("images",), output="x", dtype="int8",
        attributes={"channels": 3 * heads, **window}, tensors={role: role for role in layer},
    )  # fmt: skip
    attention = spec.Operation(
        kind="attention", name="wide", inputs=("x",), output="y", dtype="int8",
        attributes={"windows": 1, "heads": heads, "qk_dim": 1, "v_dim": 1, "biases": 1},
        tensors={role: role for role in tables},
    )  # fmt: skip
    program = spec.Program(input=taken, operations=(conv, attention), tensors=layer | tables, logit_scale=1.0)
    refused(program, lambda *_: None, r"its operations make 5\d{9} bytes of their tensors; at most")
    with pytest.raises(spec.ProgramError, match=r"attention 'wide': takes 5033164800 bytes; only 42[0-9]* are left"):
        program_engine(program, implementation=None, threads=1)


def test_values_that_python_gives_are_checked() -> None:
    for value, message in [
        (("uint2", (4,), 4), "a value of uint2 cannot reach 4"),
        (("int9", (4,), 4), "value of type 'int9'"),
        (("int8", (), 4), "at least one axis"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.Engine([value], [], "", 1)


# --- agreement


@pytest.mark.parametrize("make", [small_program, spiking_program])
def test_bounds_are_those_of_the_norm(make: Any) -> None:
    """At the last bias that the specification accepts both accept, one further both refuse."""
    program = make()
    for op in program.operations:
        if op.kind not in ("linear", "conv2d"):
            continue
        description, tensors = parts(program)
        values = spec.check(program)
        key, weight = op.tensors["bias"], tensors[op.tensors["weight"]]
        reach = values[op.inputs[0]].reach * int(np.abs(weight[0].astype(np.int64)).sum())
        tensors[key][..., 0] = 2**31 - 1 - reach
        for beyond in (False, True):
            tensors[key][..., 0] += int(beyond)
            changed = spec.Program.from_description(description, tensors)
            if not beyond:
                spec.check(changed)
                load(sealed(description, tensors))
                continue
            with pytest.raises(spec.ProgramError, match=f"{op.name}.*accumulator may reach 2147483648"):
                spec.check(changed)
            with pytest.raises(ValueError, match=f"{op.name}.*accumulator may reach 2147483648"):
                load(sealed(description, tensors))


@pytest.mark.parametrize("events", [False, True])
def test_the_engine_of_an_artifact_is_that_of_the_program(events: bool) -> None:
    program = spiking_program(events=events)
    engine, facts = load(artifact.to_bytes(program))
    assert facts["input_shape"] == program.input.value.shape
    assert facts["class_count"] == 5
    assert facts["classes"] is None
    assert facts["logit_scale"] == program.logit_scale
    images = images_of(program, 3)
    assert np.array_equal(engine.run([images]).reshape(3, -1), spec.run(program, images))

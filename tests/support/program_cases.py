"""Random operations and Programs of the specification, for the tests of every interpreter.

`operation_cases` draws shapes around powers of two and tensors with corner values; `small_program` is a whole network
with every kind of operation, built by hand so that it depends on no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl.spec import STORAGE, InputDescription, Operation, Output, Program, Value, check, multiplier
from swincompress_pl.spec.integer import LIMITS, SIGNED_BYTES, UNSIGNED_BYTES

Array = npt.NDArray[Any]
Case = tuple[Operation, list[Array], dict[str, Array], Value]
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65)


def integers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], *, corners: bool = False) -> Array:
    """Uniform over the type's range, or only its extremes and zero."""
    low, high = LIMITS[dtype]
    if corners:
        return rng.choice(np.array([low, 0, high]), shape).astype(STORAGE[dtype])
    return rng.integers(low, high + 1, shape).astype(STORAGE[dtype])


def signed(rng: np.random.Generator, *wider: str) -> str:
    """A signed type that fits a byte, int8 half of the time, or one of `wider`."""
    byte = "int8" if rng.random() < 0.5 else str(rng.choice(SIGNED_BYTES))
    return str(rng.choice([byte, *wider]))


def either(rng: np.random.Generator, *wider: str) -> str:
    """A type that fits a byte, or one of `wider`."""
    byte = "uint8" if rng.random() < 0.5 else str(rng.choice(UNSIGNED_BYTES))
    return signed(rng, byte, *wider)


def weights(rng: np.random.Generator, shape: tuple[int, ...], *, corners: bool) -> Array:
    """int8 weights of 2 to 8 bits."""
    return integers(rng, signed(rng), shape, corners=corners)


def requantization(rng: np.random.Generator, channels: int, reach: float) -> dict[str, Array]:
    """Multipliers that bring sums of size `reach` to about an int8 or int16 range, with dead and extreme ones
    between."""
    mult = rng.integers(2**21, 2**22, channels).astype(np.int32)
    target = 2.0 ** rng.uniform(4, 17, channels)
    shift = np.clip(np.round(21 + np.log2(reach / target)), 1, 52).astype(np.uint8)
    kind = rng.random(channels)
    mult[kind < 0.05] = 0
    shift[(kind >= 0.05) & (kind < 0.1)] = 1
    shift[(kind >= 0.1) & (kind < 0.15)] = 52
    return {"mult": mult, "shift": shift}


def operation(
    kind: str, dtype: str, attributes: dict[str, Any], tensors: dict[str, Array], inputs: int = 1
) -> Operation:
    return Operation(
        kind=kind,
        name=f"a {kind}",
        inputs=tuple(f"x{i}" for i in range(inputs)),
        output="y",
        dtype=dtype,
        attributes=attributes,
        tensors={role: role for role in tensors},
    )


def _value(dtype: str, array: Array) -> Value:
    return Value(dtype=dtype, shape=tuple(array.shape[1:]))


def linear_case(rng: np.random.Generator, corners: bool) -> Case:
    rows, k, m = (int(rng.choice(SIZES)) for _ in range(3))
    source = either(rng)
    x = integers(rng, source, (2, rows, k), corners=corners)
    weight = weights(rng, (m, k), corners=corners)
    bias = rng.integers(-(2**20), 2**20, m).astype(np.int32)
    tensors = {"weight": weight, "bias": bias, **requantization(rng, m, LIMITS[source][1] * 127 * k**0.5)}
    dtype = either(rng, "int16", "int32")
    return operation("linear", dtype, {"channels": m}, tensors), [x], tensors, _value(source, x)


def conv_case(rng: np.random.Generator, corners: bool) -> Case:
    kernel = [int(v) for v in rng.integers(1, 5, 2)]
    size = [int(rng.integers(k, k + 9)) for k in kernel]
    stride = [int(v) for v in rng.integers(1, 4, 2)]
    padding = [int(rng.integers(0, k)) for k in kernel]
    channels, m = int(rng.integers(1, 6)), int(rng.choice(SIZES))
    source = either(rng)
    x = integers(rng, source, (2, *size, channels), corners=corners)
    weight = weights(rng, (m, *kernel, channels), corners=corners)
    out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, padding, kernel, stride, strict=True)]
    shape = (*out, m) if rng.random() < 0.5 else (m,)
    tensors = {
        "weight": weight,
        "bias": rng.integers(-(2**20), 2**20, shape).astype(np.int32),
        **requantization(rng, m, LIMITS[source][1] * 127 * (kernel[0] * kernel[1] * channels) ** 0.5),
    }
    attributes = {"channels": m, "kernel": kernel, "stride": stride, "padding": padding}
    return operation("conv2d", either(rng, "int16"), attributes, tensors), [x], tensors, _value(source, x)


def layer_norm_case(rng: np.random.Generator, corners: bool) -> Case:
    rows, channels = int(rng.choice(SIZES)), int(rng.choice(SIZES)) * int(rng.choice([1, 1, 4]))
    source = signed(rng, "int16")
    spread = int(2 ** rng.uniform(0, 15))
    x = integers(rng, source, (2, rows, channels), corners=corners)
    if not corners:
        x = (x.astype(np.int64) * spread // 2**15).astype(x.dtype)
    if rng.random() < 0.2:
        x[:, 0] = x[:, 0, :1]  # a constant row
    shift = int(rng.integers(20, 45))
    tensors = {
        "gain": rng.integers(-(2**22) + 1, 2**22, channels).astype(np.int32),
        "offset": (rng.integers(-(2**7), 2**7, channels) << shift).astype(np.int64),
    }
    attributes = {"epsilon": int(2 ** rng.uniform(0, 40)) - 1, "shift": shift}
    return operation("layer_norm", signed(rng, "int16"), attributes, tensors), [x], tensors, _value(source, x)


def attention_case(rng: np.random.Generator, corners: bool) -> Case:
    windows, length = int(rng.integers(1, 5)), int(rng.choice([1, 2, 4, 9, 16, 17, 49]))
    heads, qk_dim, v_dim = (
        int(rng.integers(1, 5)),
        int(rng.choice([1, 3, 8, 16, 31, 32])),
        int(rng.choice([1, 7, 16, 32, 33])),
    )
    source = signed(rng)
    x = integers(rng, source, (2, windows * length, heads * (2 * qk_dim + v_dim)), corners=corners)
    tensors: dict[str, Array] = {}
    attributes: dict[str, Any] = {"windows": windows, "heads": heads, "qk_dim": qk_dim, "v_dim": v_dim}
    reach = LIMITS[source][1] ** 2 * qk_dim**0.5
    for name, low, high in (("exp", 2, 9), ("out", -2, 1)):
        mult = rng.integers(2**21, 2**22, heads).astype(np.int32)
        wanted = 2.0 ** rng.uniform(low, high, heads) / (reach if name == "exp" else 1)
        tensors[f"{name}_mult"] = mult
        tensors[f"{name}_shift"] = np.clip(np.round(21 - np.log2(wanted)), 1, 38).astype(np.uint8)
    if rng.random() < 0.7:
        biases = int(rng.integers(1, 30))
        tensors["bias_table"] = rng.integers(-(2**17), 2**17, (heads, biases)).astype(np.int32)
        tensors["bias_index"] = rng.integers(0, biases, (length, length)).astype(np.int32)
        attributes["biases"] = biases
    if rng.random() < 0.5:
        tensors["region"] = rng.integers(0, 3, (windows, length)).astype(np.uint8)
    return operation("attention", signed(rng), attributes, tensors), [x], tensors, _value(source, x)


def simple_case(rng: np.random.Generator, corners: bool) -> Case:
    """One of the operations that only move, look up, add or normalise."""
    rows, channels = int(rng.choice(SIZES)), int(rng.choice(SIZES))
    kind = str(rng.choice(["table", "add", "add_constant", "prepend", "gather", "mean", "softmax"]))
    unsigned_too = kind in ("gather", "mean", "softmax")
    dtype = signed(rng) if kind == "table" else either(rng, "int16") if unsigned_too else signed(rng, "int16")
    x = integers(rng, dtype, (2, rows, channels), corners=corners)
    attributes: dict[str, Any] = {}
    tensors: dict[str, Array] = {}
    inputs, out = [x], dtype
    if kind == "table":
        out = either(rng, "int16")
        tensors["values"] = integers(rng, out, (256,))
    elif kind == "add":
        inputs.append(integers(rng, dtype, x.shape, corners=corners))
    elif kind == "add_constant":
        tensors["constant"] = integers(rng, dtype, (rows, channels), corners=corners)
    elif kind == "prepend":
        attributes["rows"] = int(rng.integers(1, 4))
        tensors["rows"] = integers(rng, dtype, (attributes["rows"], channels))
    elif kind == "gather":
        attributes = {"rows": int(rng.choice(SIZES)), "joined": int(rng.integers(1, 5))}
        tensors["index"] = rng.integers(-1, rows, (attributes["rows"], attributes["joined"])).astype(np.int32)
    elif kind == "softmax":
        mult, shift = multiplier(2.0 ** rng.uniform(0, 10) / LIMITS[dtype][1])
        attributes, out = {"mult": int(mult), "shift": int(shift)}, "uint8"
    else:
        tensors.update(requantization(rng, channels, LIMITS[dtype][1] * rows**0.5))
        out = either(rng, "int16")
    return operation(kind, out, attributes, tensors, len(inputs)), inputs, tensors, _value(dtype, x)


MAKERS = (linear_case, conv_case, layer_norm_case, attention_case, simple_case)


def operation_cases(count: int, seed: int = 0) -> Iterator[Case]:
    """`count` random operations with inputs (batch of 2): (operation, inputs, tensors by role, value of the first
    input)."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield MAKERS[number % len(MAKERS)](rng, bool(rng.random() < 0.2))


def masked(program: Program, share: float, seed: int = 0) -> Program:
    """The Program with this share of its weights set to 0, at random."""
    rng = np.random.default_rng(seed)
    weights = {op.tensors["weight"] for op in program.operations if "weight" in op.tensors}
    kept = {key: program.tensors[key] * (rng.random(program.tensors[key].shape) >= share) for key in sorted(weights)}
    return replace(program, tensors={**program.tensors, **{key: t.astype(np.int8) for key, t in kept.items()}})


def small_program(
    seed: int = 0, *, size: int = 8, channels: int = 12, classes: int = 5, byte: str = "int8", weight: str = "int8"
) -> Program:
    """A network of one shifted-window block with every kind of operation, random weights.

    byte: type of the activations that fit one; weight: range of the weights.
    """
    rng = np.random.default_rng(seed)
    narrower, lighter = (8 - int(dtype.removeprefix("int")) for dtype in (byte, weight))  # bits below int8
    tokens, heads, dim, hidden = size * size // 4, 2, 4, 20
    operations: list[Operation] = []
    tensors: dict[str, Array] = {}

    def emit(
        kind: str, name: str, inputs: tuple[str, ...], dtype: str, roles: dict[str, Array], **attributes: Any
    ) -> str:
        keys = {role: f"{name}.{role}" for role in roles}
        tensors.update({keys[role]: tensor for role, tensor in roles.items()})
        operations.append(
            Operation(
                kind=kind, name=name, inputs=inputs, output=name, dtype=dtype, attributes=attributes, tensors=keys
            )
        )
        return name

    def linear(name: str, x: str, k: int, m: int, dtype: str = byte) -> str:
        reach = LIMITS[byte][1] * 0.5 * LIMITS[weight][1]
        unit = {byte: 0.4 * LIMITS[byte][1], "int16": 5000.0, "int32": 1e5}[dtype] / (reach * k**0.5 / 3)
        shift = np.full(m, round(21 - np.log2(unit)), dtype=np.uint8)
        roles = {
            "weight": integers(rng, weight, (m, k)),
            "bias": (rng.integers(-(2**12), 2**12, m) >> narrower + lighter).astype(np.int32),
            "mult": rng.integers(2**21, 2**22, m).astype(np.int32),
            "shift": shift,
        }
        return emit("linear", name, (x,), dtype, roles, channels=m)

    def norm(name: str, x: str, c: int, dtype: str = byte) -> str:
        gain = rng.integers(2**20, 2**22, c).astype(np.int32)
        shift = {byte: 32 + narrower, "int16": 24}[dtype]
        roles = {"gain": gain, "offset": (rng.integers(-8, 8, c) << shift >> narrower).astype(np.int64)}
        return emit("layer_norm", name, (x,), dtype, roles, epsilon=7, shift=shift)

    x = emit(
        "conv2d",
        "embed",
        ("images",),
        "int16",
        {
            "weight": integers(rng, weight, (channels, 2, 2, 3)),
            "bias": (rng.integers(-(2**15), 2**15, (size // 2, size // 2, channels)) >> lighter).astype(np.int32),
            "mult": rng.integers(2**21, 2**22, channels).astype(np.int32),
            "shift": np.full(channels, 24 - lighter, dtype=np.uint8),
        },
        channels=channels,
        kernel=[2, 2],
        stride=[2, 2],
        padding=[0, 0],
    )
    x = emit(
        "add_constant",
        "position",
        (x,),
        "int16",
        {"constant": rng.integers(-999, 999, (tokens, channels)).astype(np.int16)},
    )
    y = norm("norm1", x, channels)
    into = rng.permutation(tokens).astype(np.int32)[:, None]
    y = emit("gather", "windows", (y,), byte, {"index": into}, rows=tokens, joined=1)
    y = linear("qkv", y, channels, heads * 3 * dim)
    roles = {
        "exp_mult": np.full(heads, 2**21, np.int32),
        "exp_shift": np.full(heads, 30 - 2 * narrower, np.uint8),
        "out_mult": np.full(heads, 3 * 2**20, np.int32),
        "out_shift": np.full(heads, 21, np.uint8),
        "bias_table": (rng.integers(-9999, 9999, (heads, 7)) >> 2 * narrower).astype(np.int32),
        "bias_index": rng.integers(0, 7, (4, 4)).astype(np.int32),
        "region": rng.integers(0, 2, (tokens // 4, 4)).astype(np.uint8),
    }
    y = emit(
        "attention", "attention", (y,), byte, roles, windows=tokens // 4, heads=heads, qk_dim=dim, v_dim=dim, biases=7
    )
    y = linear("proj", y, heads * dim, channels, "int16")
    back = np.argsort(into[:, 0]).astype(np.int32)[:, None]
    y = emit("gather", "merge", (y,), "int16", {"index": back}, rows=tokens, joined=1)
    x = emit("add", "add1", (x, y), "int16", {})
    y = norm("norm2", x, channels)
    y = linear("fc1", y, channels, hidden)
    y = emit("table", "gelu", (y,), byte, {"values": integers(rng, byte, (256,))})
    y = linear("fc2", y, hidden, channels, "int16")
    x = emit("add", "add2", (x, y), "int16", {})
    x = emit(
        "prepend", "token", (x,), "int16", {"rows": rng.integers(-999, 999, (1, channels)).astype(np.int16)}, rows=1
    )
    quads = rng.integers(-1, tokens + 1, (6, 4)).astype(np.int32)
    x = emit("gather", "merging", (x,), "int16", {"index": quads}, rows=6, joined=4)
    x = norm("norm", x, 4 * channels, "int16")
    pool = {"mult": np.full(4 * channels, 2**21, np.int32), "shift": np.full(4 * channels, 27 + narrower, np.uint8)}
    x = emit("mean", "pool", (x,), byte, pool)
    linear("head", x, 4 * channels, classes, "int32")
    return Program(
        input=InputDescription(height=size, width=size, preprocessing={"mean": [0.5] * 3, "std": [0.25] * 3}),
        operations=tuple(operations),
        tensors=tensors,
        logit_scale=0.001,
        classes=tuple(f"class {i}" for i in range(classes)),
    )


def with_maps(program: Program) -> Program:
    """The same without its last operation: the values of whole types before it are named outputs."""
    *kept, _ = program.operations
    values = check(program)
    chosen = [op.output for op in kept if values[op.output].dtype in ("int8", "int16", "int32")]
    outputs = tuple(
        Output(name=f"map{i}", value=name, scale=0.5, shape=values[name].shape) for i, name in enumerate(chosen)
    )
    tensors = {key: program.tensors[key] for op in kept for key in op.tensors.values()}
    return replace(program, operations=tuple(kept), tensors=tensors, outputs=outputs, logit_scale=1.0, classes=None)

"""Random single operations for the kernel tests: a fast generator of valid cases, awkward sizes and corner values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl.spec.kinds import KINDS

Array = npt.NDArray[Any]
SMALL = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17]
MEDIUM = [*SMALL, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129]
DEEP = [*MEDIUM, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 3071, 3072, 4097]
MULT_MAX = 2**22 - 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation with its tensors and the arrays that it is called with, (N, *shape) each."""

    kind: str
    dtype: str
    arrays: tuple[Array, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Array] = field(default_factory=dict)

    @property
    def operation(self) -> spec.Operation:
        names = tuple(f"x{i}" for i in range(len(self.arrays)))
        return spec.Operation(
            kind=self.kind,
            name="case",
            inputs=names,
            output="y",
            dtype=self.dtype,
            attributes=self.attributes,
            tensors={role: role for role in self.tensors},
        )

    @property
    def inputs(self) -> list[spec.Value]:
        return [spec.Value(dtype=x.dtype.name, shape=x.shape[1:]) for x in self.arrays]

    def expected(self) -> Array:
        return KINDS[self.kind].run(self.arrays, self.tensors, self.attributes, self.dtype)

    def __str__(self) -> str:
        shapes = ", ".join(f"{x.dtype}{x.shape}" for x in self.arrays)
        return f"{self.kind} {shapes} -> {self.dtype}, {self.attributes}"


def pick(rng: np.random.Generator, choices: list[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def values(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    """Mostly uniform; also all at a limit, limits of either sign, almost all zero, and constant rows."""
    low, high = spec.LIMITS[dtype]
    style = rng.integers(8)
    if style == 0:
        drawn = np.full(shape, pick(rng, [low, high, 0]))
    elif style == 1:
        drawn = rng.choice([low, high], shape)
    elif style == 2:
        drawn = rng.integers(low, high + 1, shape) * (rng.random(shape) < 0.05)
    elif style == 3:
        drawn = np.broadcast_to(rng.integers(low, high + 1, (*shape[:-1], 1)), shape)
    else:
        drawn = rng.integers(low, high + 1, shape)
    return np.ascontiguousarray(drawn).astype(spec.STORAGE[dtype])


def requantization(rng: np.random.Generator, channels: int, reach: int, shift_max: int = 52) -> tuple[Array, Array]:
    """Factors that bring `reach` to some hundreds, or anything that is allowed, with mult 0 and both ends of shift."""
    style = rng.integers(4)
    if style == 0:
        mult = rng.integers(0, MULT_MAX + 1, channels)
        shift = rng.integers(1, shift_max + 1, channels)
    elif style == 1:
        mult = rng.choice([0, 1, 2**21, MULT_MAX], channels)
        shift = rng.choice([1, 22, 23, 24, 25, 32, 33, 34, shift_max], channels)
    else:
        mult, shift = spec.multiplier(rng.uniform(20, 20000) / max(reach, 1) * np.exp(rng.normal(size=channels)))
    return mult.astype(np.int32), np.minimum(shift, shift_max).astype(np.uint8)


def weighted(
    rng: np.random.Generator, x_dtype: str, shape: tuple[int, ...], bias_shape: tuple[int, ...]
) -> dict[str, Array]:
    """Weights, a bias that may reach the bound of the accumulator, and factors."""
    weight = values(rng, pick(rng, ["int8", "int8", "int6", "int4", "int2"]), shape)
    if rng.integers(3) == 0:  # as training leaves them: few are large
        weight = np.rint(np.clip(rng.normal(scale=pick(rng, [0.2, 0.35]), size=shape), -1, 1) * 127).astype(np.int8)
    peak = spec.LIMITS[x_dtype][1] * np.abs(weight.astype(np.int64)).reshape(shape[0], -1).sum(axis=1)
    room = 2**31 - 1 - peak
    limit = room if rng.integers(8) == 0 else np.minimum(room, peak + 10)
    bias = rng.integers(-limit, limit + 1, bias_shape)
    mult, shift = requantization(rng, shape[0], int(peak.max()))
    return {"weight": weight, "bias": bias.astype(np.int32), "mult": mult, "shift": shift}


def bounded(rng: np.random.Generator, *dtypes: str) -> tuple[str, dict[str, Any]]:
    """The type of a result, and the attribute of those that saturate below the limit of theirs."""
    dtype = pick(rng, list(dtypes))
    return dtype, {"largest": int(rng.integers(1, 255))} if dtype == "uint8" and rng.integers(2) else {}


def linear_case(rng: np.random.Generator) -> Case:
    depth = pick(rng, DEEP)
    sizes = MEDIUM if depth < 300 else SMALL
    channels, rows, x_dtype = pick(rng, MEDIUM), pick(rng, sizes), pick(rng, ["int8", "uint8"])
    shape = (depth,) if rng.integers(4) == 0 else (rows, depth)
    dtype, attributes = bounded(rng, "int8", "int8", "uint8", "int16", "int32")
    return Case(
        kind="linear",
        dtype=dtype,
        arrays=(values(rng, x_dtype, (int(rng.integers(1, 4)), *shape)),),
        attributes={"channels": channels, **attributes},
        tensors=weighted(rng, x_dtype, (channels, depth), (channels,)),
    )


def conv2d_case(rng: np.random.Generator) -> Case:
    kernel = [int(v) for v in rng.integers(1, 5, 2)]
    padding = [int(rng.integers(0, k)) for k in kernel]
    stride = [int(v) for v in rng.integers(1, 5, 2)]
    height, width = (int(rng.integers(max(1, k - 2 * p), k + 12)) for k, p in zip(kernel, padding, strict=True))
    in_channels, channels, x_dtype = pick(rng, [*SMALL, 64]), pick(rng, MEDIUM), pick(rng, ["int8", "uint8"])
    out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip((height, width), padding, kernel, stride, strict=True)]
    bias_shape = (*out, channels) if rng.integers(2) else (channels,)
    dtype, attributes = bounded(rng, "int8", "uint8", "int16", "int32")
    return Case(
        kind="conv2d",
        dtype=dtype,
        arrays=(values(rng, x_dtype, (int(rng.integers(1, 4)), height, width, in_channels)),),
        attributes={"channels": channels, "kernel": kernel, "stride": stride, "padding": padding, **attributes},
        tensors=weighted(rng, x_dtype, (channels, *kernel, in_channels), bias_shape),
    )


def layer_norm_case(rng: np.random.Generator) -> Case:
    channels = pick(rng, [*DEEP[:-1], 4096])
    rows, dtype = pick(rng, SMALL), pick(rng, ["int8", "int16"])
    limit = 2 ** int(rng.integers(1, 61))
    gain_limit = min(2 ** int(rng.integers(1, 23)), MULT_MAX)
    return Case(
        kind="layer_norm",
        dtype=pick(rng, ["int8", "int16"]),
        arrays=(values(rng, dtype, (int(rng.integers(1, 3)), rows, channels)),),
        attributes={"epsilon": int(rng.integers(0, 2 ** int(rng.integers(1, 59)))), "shift": int(rng.integers(1, 53))},
        tensors={
            "gain": rng.integers(-gain_limit, gain_limit + 1, channels).astype(np.int32),
            "offset": rng.integers(-limit, limit + 1, channels).astype(np.int64),
        },
    )


def attention_case(rng: np.random.Generator) -> Case:
    windows, heads = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    length = pick(rng, [*SMALL, 31, 33, 47, 48, 49, 50, 64, 65, 197])
    dims = [*SMALL, 24, 31, 32, 33, 48, 64, 65]
    qk_dim, v_dim = pick(rng, dims), pick(rng, dims)
    if length > 100:
        windows, heads = 1, 1
    reach = 127 * 127 * qk_dim
    factor = 10 ** rng.uniform(-1, 2) * 32 / reach * np.exp(rng.normal(size=heads))
    exp_mult, exp_shift = spec.multiplier(factor) if rng.integers(4) else requantization(rng, heads, reach)
    out_mult, out_shift = requantization(rng, heads, 127, shift_max=38)
    tensors = {"exp_mult": exp_mult, "exp_shift": exp_shift, "out_mult": out_mult, "out_shift": out_shift}
    attributes = {"windows": windows, "heads": heads, "qk_dim": qk_dim, "v_dim": v_dim}
    if rng.integers(2):
        biases = int(rng.integers(1, 300))
        limit = 2**30 - 1 - reach if rng.integers(4) == 0 else reach // 10 + 1
        attributes["biases"] = biases
        tensors["bias_table"] = rng.integers(-limit, limit + 1, (heads, biases)).astype(np.int32)
        tensors["bias_index"] = rng.integers(0, biases, (length, length)).astype(np.int32)
    if rng.integers(2):
        tensors["region"] = rng.integers(0, pick(rng, [1, 2, 4, 256]), (windows, length)).astype(np.uint8)
    channels = heads * (2 * qk_dim + v_dim)
    x = values(rng, "int8", (int(rng.integers(1, 3)), windows * length, channels))
    return Case(kind="attention", dtype="int8", arrays=(x,), attributes=attributes, tensors=tensors)


def softmax_case(rng: np.random.Generator) -> Case:
    x = values(rng, pick(rng, ["int8", "uint8", "int16", "int32"]), (2, pick(rng, SMALL), pick(rng, DEEP)))
    reach = 2 * spec.LIMITS[x.dtype.name][1]
    mult, shift = spec.multiplier(10 ** rng.uniform(-1, 4) * 32 / reach)
    if rng.integers(4) == 0:
        mult, shift = (each[0] for each in requantization(rng, 1, reach))
    return Case(kind="softmax", dtype="uint8", arrays=(x,), attributes={"mult": int(mult), "shift": int(shift)})


def table_case(rng: np.random.Generator) -> Case:
    dtype = pick(rng, ["int8", "uint8", "int16"])
    x = values(rng, "int8", (int(rng.integers(1, 4)), pick(rng, SMALL), pick(rng, DEEP)))
    return Case(kind="table", dtype=dtype, arrays=(x,), tensors={"values": values(rng, dtype, (256,))})


def add_case(rng: np.random.Generator) -> Case:
    dtype = pick(rng, ["int8", "int16", "int32"])
    batch, rows, channels = int(rng.integers(1, 4)), pick(rng, SMALL), pick(rng, MEDIUM)
    other = (batch, rows, channels) if rng.integers(2) else (batch, 1, rows, channels)
    return Case(
        kind="add", dtype=dtype, arrays=(values(rng, dtype, (batch, rows, channels)), values(rng, dtype, other))
    )


def _tokens(rng: np.random.Generator, *dtypes: str) -> Array:
    shape = (int(rng.integers(1, 4)), *pick(rng, [(pick(rng, SMALL),), (2, pick(rng, SMALL))]), pick(rng, MEDIUM))
    return values(rng, pick(rng, list(dtypes)), shape)


def _rows(x: Array) -> int:
    return int(np.prod(x.shape[1:-1]))


def add_constant_case(rng: np.random.Generator) -> Case:
    x = _tokens(rng, "int8", "int16")
    constant = values(rng, x.dtype.name, (_rows(x), x.shape[-1]))
    return Case(kind="add_constant", dtype=x.dtype.name, arrays=(x,), tensors={"constant": constant})


def prepend_case(rng: np.random.Generator) -> Case:
    x = _tokens(rng, "int8", "int16")
    count = pick(rng, SMALL)
    rows = values(rng, x.dtype.name, (count, x.shape[-1]))
    return Case(kind="prepend", dtype=x.dtype.name, arrays=(x,), attributes={"rows": count}, tensors={"rows": rows})


def gather_case(rng: np.random.Generator) -> Case:
    x = _tokens(rng, "int8", "uint8", "int16")
    rows, joined = pick(rng, MEDIUM), int(rng.integers(1, 6))
    index = rng.integers(-1, _rows(x), (rows, joined)).astype(np.int32)
    return Case(
        kind="gather",
        dtype=x.dtype.name,
        arrays=(x,),
        attributes={"rows": rows, "joined": joined},
        tensors={"index": index},
    )


def mean_case(rng: np.random.Generator) -> Case:
    x = _tokens(rng, "int8", "uint8", "int16")
    mult, shift = requantization(rng, x.shape[-1], _rows(x) * spec.LIMITS[x.dtype.name][1])
    dtype = pick(rng, ["int8", "uint8", "int16"])
    return Case(kind="mean", dtype=dtype, arrays=(x,), tensors={"mult": mult, "shift": shift})


MAKERS: dict[str, Callable[[np.random.Generator], Case]] = {
    "linear": linear_case,
    "conv2d": conv2d_case,
    "layer_norm": layer_norm_case,
    "attention": attention_case,
    "softmax": softmax_case,
    "table": table_case,
    "add": add_case,
    "add_constant": add_constant_case,
    "prepend": prepend_case,
    "gather": gather_case,
    "mean": mean_case,
}


def random_case(rng: np.random.Generator, kind: str) -> Case:
    return MAKERS[kind](rng)


# How often each kind is drawn: the matrix products have the most paths.
SHARES = {"linear": 8, "attention": 4, "conv2d": 2, "layer_norm": 2}


def random_cases(seed: int, count: int) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in MAKERS for _ in range(SHARES.get(kind, 1))]
    for number in range(count):
        yield random_case(rng, kinds[number % len(kinds)])

"""Single operations on NumPy arrays: as specified on every implementation, near the float functions, checked."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_operations import values

from swincompress_pl import accel, spec
from swincompress_pl.accel import core, functions
from swincompress_pl.spec import operations
from swincompress_pl.spec.integer import EXP_STEPS, exponential, fine_exponential
from swincompress_pl.spec.kinds import check_operation
from swincompress_pl.spec.lowering import TABLE_CODES, layer_norm_integers, table_values

Array = npt.NDArray[Any]
seeds = st.integers(0, 2**32 - 1)
threads = st.sampled_from([1, 3])
leading = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def assert_each_equals(expected: Array, function: Callable[..., Array], *arrays: Any, **options: Any) -> None:
    for implementation in accel.implementations():
        result = function(*arrays, **options, implementation=implementation)
        assert result.dtype == expected.dtype
        assert result.shape == expected.shape
        np.testing.assert_array_equal(result, expected, err_msg=implementation)


def strided(x: Array) -> Array:
    """The same values, apart in memory."""
    spread = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    spread[..., ::2] = x
    return spread[..., ::2]


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    shape=leading,
    depth=st.integers(1, 200),
    outputs=st.integers(1, 70),
    x_dtype=st.sampled_from(["int8", "uint8"]),
    dtype=st.sampled_from(["int8", "uint8", "int16", "int32"]),
    per_channel=st.booleans(),
    biased=st.booleans(),
    threads=threads,
)
def test_linear_equals_the_norm(
    seed: int,
    shape: tuple[int, ...],
    depth: int,
    outputs: int,
    x_dtype: str,
    dtype: str,
    per_channel: bool,
    biased: bool,
    threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    x, weight = values(rng, x_dtype, (*shape, depth)), values(rng, "int8", (outputs, depth))
    bias = rng.integers(-(2**20), 2**20, outputs).astype(np.int32) if biased else np.zeros(outputs, np.int32)
    scale = np.exp(rng.uniform(-20, 2, outputs if per_channel else ()))
    mult, shift = spec.multiplier(np.broadcast_to(scale, (outputs,)))
    expected = operations.linear(x, weight, bias, mult, shift, dtype=dtype)
    given_bias = bias if biased else None
    assert_each_equals(expected, accel.linear, x, weight, given_bias, scale=scale, dtype=dtype, threads=threads)
    np.testing.assert_array_equal(
        accel.linear(strided(x), np.asfortranarray(weight), given_bias, scale=scale, dtype=dtype), expected
    )


@settings(max_examples=60, deadline=None)
@given(seed=seeds, data=st.data(), x_dtype=st.sampled_from(["int8", "uint8"]), threads=threads)
def test_matmul_equals_numpy_and_the_norm(seed: int, data: st.DataObject, x_dtype: str, threads: int) -> None:
    rng = np.random.default_rng(seed)
    batch = data.draw(st.lists(st.integers(0, 3), max_size=3))
    batches = [
        tuple(size if data.draw(st.booleans()) else 1 for size in batch)[data.draw(st.integers(0, len(batch))) :]
        for _ in range(2)
    ]
    rows, depth, outputs = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 40))
    a, b = values(rng, x_dtype, (*batches[0], rows, depth)), values(rng, "int8", (*batches[1], depth, outputs))
    sums = np.matmul(a.astype(np.int64), b.astype(np.int64))
    assert_each_equals(sums.astype(np.int32), accel.matmul, a, b, threads=threads)
    np.testing.assert_array_equal(accel.matmul(strided(a), strided(b)), sums)
    scale = np.exp(rng.uniform(-15, 1, outputs))
    mult, shift = spec.multiplier(scale)
    for dtype in ("int8", "uint8", "int16", "int32"):
        expected = operations.requantize(sums, mult, shift, dtype)
        assert_each_equals(expected, accel.matmul, a, b, scale=scale, dtype=dtype, threads=threads)
    np.testing.assert_array_equal(accel.matmul(a, b, scale=scale), operations.requantize(sums, mult, shift, "int8"))


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    shape=leading,
    channels=st.integers(1, 300),
    dtype=st.sampled_from(["int8", "uint8", "int16", "int32"]),
    octaves=st.floats(-3, 12),
    threads=threads,
)
def test_softmax_equals_the_norm_and_keeps_its_bound(
    seed: int, shape: tuple[int, ...], channels: int, dtype: str, octaves: float, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    x = values(rng, dtype, (*shape, channels))
    scale = 2.0**octaves / spec.LIMITS[dtype][1]
    mult, shift = spec.multiplier(scale * EXP_STEPS / math.log(2))
    expected = operations.softmax(x, mult=int(mult), shift=int(shift)) if x.size else x.astype(np.uint8)
    assert_each_equals(expected, accel.softmax, x, scale=scale, threads=threads)
    np.testing.assert_array_equal(accel.softmax(strided(x), scale=scale), expected)
    if x.size:
        e = np.exp((x.astype(np.float64) - x.max(axis=-1, keepdims=True)) * scale)
        exact = e / e.sum(axis=-1, keepdims=True)
        assert np.abs(expected / 255 - exact).max() <= 2 / 255 + channels / 65280


def test_softmax_of_the_widest_rows_and_of_the_farthest_values() -> None:
    rng = np.random.default_rng(0)
    wide = rng.integers(-127, 128, (2, 2**16)).astype(np.int8)
    wide[1] = 5
    far = np.array([[2**31 - 1, -(2**31) + 1, 0], [-(2**31) + 1] * 3], dtype=np.int32)
    for x in (wide, far):
        for scale in (1e-30, 1e-9, 1.0, 45000.0):
            mult, shift = spec.multiplier(scale * EXP_STEPS / math.log(2))
            expected = operations.softmax(x, mult=int(mult), shift=int(shift))
            assert_each_equals(expected, accel.softmax, x, scale=scale)
    assert accel.softmax(far, scale=1.0).tolist() == [[255, 0, 0], [85, 85, 85]]
    with pytest.raises(spec.ProgramError, match="65537 channels; at most 65536"):
        accel.softmax(np.zeros((1, 2**16 + 1), np.int8), scale=1.0)


def test_attention_has_the_upper_byte_of_the_fine_exponential() -> None:
    distance = np.unique(np.concatenate([np.arange(40000), np.geomspace(1, 2**31 - 1, 5000).astype(np.int64)]))
    for mult, shift in [(2**21, 21), (2**22 - 1, 22), (2**21, 26), (3 * 2**20, 30), (0, 1), (2**22 - 1, 1)]:
        fine = fine_exponential(distance, mult, shift).astype(np.int64)
        np.testing.assert_array_equal(exponential(distance, np.int64(mult), np.int64(shift)), (fine + 128) >> 8)
    assert fine_exponential(np.array([0, 15 * 32, 15 * 32 + 31, 16 * 32, 99999]), 2**21, 21).tolist() == [
        65280,
        65280 >> 15,
        1,
        0,
        0,
    ]


def float_layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    normalized: Array = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias
    return normalized


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    shape=leading,
    channels=st.integers(1, 300),
    x_dtype=st.sampled_from(["int8", "int16"]),
    dtype=st.sampled_from(["int8", "int16"]),
    per_channel=st.booleans(),
    affine=st.booleans(),
    threads=threads,
)
def test_layernorm_equals_the_norm_and_stays_within_a_step(
    seed: int,
    shape: tuple[int, ...],
    channels: int,
    x_dtype: str,
    dtype: str,
    per_channel: bool,
    affine: bool,
    threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    x = values(rng, x_dtype, (*shape, channels))
    weight, bias = (rng.normal(1, 0.5, channels), rng.normal(size=channels)) if affine else (None, None)
    input_scale = float(np.exp(rng.uniform(-7, 0)))
    output_scale = np.exp(rng.uniform(-4, -2, channels if per_channel else ()))
    real_weight, real_bias = (weight, bias) if affine else (np.ones(channels), np.zeros(channels))
    attributes, tensors = layer_norm_integers(
        real_weight, real_bias, eps=1e-5, input_scale=input_scale, output_scale=output_scale
    )
    expected = operations.layer_norm(x, **tensors, **attributes, dtype=dtype)
    scales = {"input_scale": input_scale, "output_scale": output_scale}
    assert_each_equals(expected, accel.layernorm, x, weight, bias, **scales, dtype=dtype, threads=threads)
    np.testing.assert_array_equal(accel.layernorm(strided(x), weight, bias, **scales, dtype=dtype), expected)
    # epsilon is rounded to whole units of the variance; with few channels and coarse steps it becomes 0
    epsilon = attributes["epsilon"]
    assert abs(epsilon - 1e-5 * (channels / input_scale) ** 2) <= 0.5
    codes = channels * x.astype(np.int64)  # in these units the mean is a whole number
    exact = float_layer_norm(codes, real_weight, real_bias, epsilon or 1e-30) / output_scale
    limit = spec.LIMITS[dtype][1]
    assert (np.abs(expected - np.clip(exact, -limit, limit)) <= 1).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    shape=leading,
    scales=st.tuples(st.floats(-9, 3), st.floats(-9, 3)).map(lambda s: (2.0 ** s[0], 2.0 ** s[1])),
    dtype=st.sampled_from(["int8", "uint8", "int16"]),
    threads=threads,
)
def test_gelu_equals_the_norm_and_rounds_the_exact_one(
    seed: int, shape: tuple[int, ...], scales: tuple[float, float], dtype: str, threads: int
) -> None:
    x = values(np.random.default_rng(seed), "int8", shape) if shape else np.array(seed % 255 - 127, np.int8)
    options = {"input_scale": scales[0], "output_scale": scales[1], "dtype": dtype, "threads": threads}
    codes = np.arange(-127, 128, dtype=np.int8)
    entries = np.zeros(256, spec.STORAGE[dtype])
    entries[codes.view(np.uint8)] = accel.gelu(codes, **options)
    expected = operations.table(x.reshape(-1), entries).reshape(x.shape)
    assert_each_equals(expected, accel.gelu, x, **options)
    np.testing.assert_array_equal(accel.gelu(x.T, **options), expected.T)
    real = codes * scales[0]
    exact = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in real]) / scales[1]
    off = np.abs(accel.gelu(codes, **options) - np.clip(exact, *spec.LIMITS[dtype]))
    assert (off <= 0.5 + 1e-9).all()


def test_quantized_networks_have_the_same_tables_and_gains() -> None:
    torch = pytest.importorskip("torch")
    for scale in (0.01, 0.031, 0.2):
        real = torch.nn.GELU()(torch.from_numpy(TABLE_CODES) * scale).numpy()
        codes = np.arange(-127, 128, dtype=np.int8)
        expected = table_values(real, 0.7 * scale, "int8")[codes.view(np.uint8)]
        np.testing.assert_array_equal(accel.gelu(codes, input_scale=scale, output_scale=0.7 * scale), expected)


@pytest.mark.parametrize("function", ["linear", "matmul", "softmax", "layernorm", "gelu"])
def test_contiguous_arrays_are_read_where_they_lie(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Array] = []
    make = core.operation_engine

    class Watched:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def run(self, arrays: list[Array]) -> Array:
            seen.extend(arrays)
            result: Array = self._engine.run(arrays)
            return result

    monkeypatch.setattr(functions, "operation_engine", lambda *given, **named: Watched(make(*given, **named)))
    x = np.random.default_rng(0).integers(-127, 128, (2, 5, 6)).astype(np.int8)
    x.flags.writeable = False
    calls: dict[str, Callable[[Array], Array]] = {
        "linear": lambda x: accel.linear(x, np.ones((3, 6), np.int8), scale=0.1),
        "matmul": lambda x: accel.matmul(x, np.ones((6, 3), np.int8)),
        "softmax": lambda x: accel.softmax(x, scale=0.1),
        "layernorm": lambda x: accel.layernorm(x, input_scale=0.1, output_scale=0.1),
        "gelu": lambda x: accel.gelu(x, input_scale=0.1, output_scale=0.1),
    }
    calls[function](x)
    assert all(np.shares_memory(x, part) for part in seen)
    seen.clear()
    calls[function](x[:, ::2])
    assert not any(np.shares_memory(x, part) for part in seen)


def test_unaligned_arrays_are_right() -> None:
    content = np.random.default_rng(0).integers(0, 256, 2 * 24 + 1).astype(np.uint8).tobytes()
    x = np.frombuffer(content, np.int16, offset=1).reshape(4, 6)
    assert not x.flags.aligned
    np.testing.assert_array_equal(accel.softmax(x, scale=1e-4), accel.softmax(x.copy(), scale=1e-4))


X, W = np.ones((2, 4), np.int8), np.ones((3, 4), np.int8)
X_LOWEST, W_LOWEST = np.full_like(X, -128), np.full_like(W, -128)
SCALES = {"input_scale": 0.1, "output_scale": 0.1}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accel.linear(X.astype(np.float32), W, scale=1), TypeError, "x is float32; it must be int8 or uint8"),
        (lambda: accel.linear(X.astype(">i2"), W, scale=1), TypeError, "x is >i2"),
        (lambda: accel.linear(X, W.astype(np.uint8), scale=1), TypeError, "weight is uint8; it must be int8"),
        (lambda: accel.linear(X, W, np.zeros(3), scale=1), TypeError, "bias is float64; it must be int32"),
        (lambda: accel.linear(X_LOWEST, W, scale=1), ValueError, r"x holds -128; int8 values lie in \[-127, 127\]"),
        (lambda: accel.linear(X, W_LOWEST, scale=1), ValueError, "weight holds -128"),
        (lambda: accel.linear(X[:, :3], W, scale=1), ValueError, r"x has shape \(2, 3\); it must be \(..., 4\)"),
        (lambda: accel.linear(X[0, 0], W, scale=1), ValueError, r"x has shape \(\)"),
        (lambda: accel.linear(X, W[0], scale=1), ValueError, r"weight has shape \(4,\)"),
        (lambda: accel.linear(X, W[:0], scale=1), ValueError, r"weight has shape \(0, 4\)"),
        (lambda: accel.linear(X, W, np.zeros(2, np.int32), scale=1), ValueError, r"bias has shape \(2,\)"),
        (lambda: accel.linear(X, W, scale=0.0), ValueError, "scale is 0.0; it must be positive"),
        (lambda: accel.linear(X, W, scale=[1, np.nan, 1]), ValueError, "scale is nan"),
        (lambda: accel.linear(X, W, scale=-1.0), ValueError, "scale is -1.0"),
        (lambda: accel.linear(X, W, scale=2.0**21), ValueError, "below 2.09715e"),
        (lambda: accel.linear(X, W, scale=np.ones(2)), ValueError, r"scale has shape \(2,\)"),
        (lambda: accel.linear(X, W, scale=1, dtype="int4"), ValueError, "dtype is 'int4'; the result may be int8"),
        (lambda: accel.linear(X, W, scale=1, implementation="nope"), ValueError, "implementation 'nope' is unknown"),
        (lambda: accel.linear(X, W, scale=1, threads=0), ValueError, "threads is 0"),
        (lambda: accel.linear(X, W, scale=1, threads=10_000), ValueError, "threads is 10000"),
        (lambda: accel.linear(X, W, np.full(3, 2**31 - 1, np.int32), scale=1), spec.ProgramError, "accumulator may"),
        (lambda: accel.matmul(X, W), ValueError, r"a has shape \(2, 4\) and b \(3, 4\)"),
        (lambda: accel.matmul(X[0], W.T), ValueError, r"a has shape \(4,\)"),
        (lambda: accel.matmul(X[:, :0], W.T[:0]), ValueError, "K and N at least 1"),
        (lambda: accel.matmul(X, W.T.astype(np.uint8)), TypeError, "b is uint8"),
        (lambda: accel.matmul(X, W_LOWEST.T), ValueError, "b holds -128"),
        (lambda: accel.matmul(X, W.T, dtype="int8"), ValueError, "dtype is 'int8' without a scale"),
        (lambda: accel.matmul(X, W.T, scale=1, dtype="float32"), ValueError, "dtype is 'float32'"),
        (lambda: accel.matmul(np.ones((2, 2, 4), np.int8), np.ones((3, 4, 1), np.int8)), ValueError, "last two differ"),
        (lambda: accel.matmul(X, W.T, scale=np.ones(4)), ValueError, r"scale has shape \(4,\)"),
        (lambda: accel.matmul(X[:0], W.T, threads=0), ValueError, "threads is 0"),
        (lambda: accel.softmax(X.astype(np.float64), scale=1.0), TypeError, "x is float64"),
        (lambda: accel.softmax(np.array([-(2**15)], np.int16), scale=1.0), ValueError, "x holds -32768"),
        (lambda: accel.softmax(np.array([-(2**31)], np.int32), scale=1.0), ValueError, "x holds -2147483648"),
        (lambda: accel.softmax(X[:, :0], scale=1.0), ValueError, r"x has shape \(2, 0\)"),
        (lambda: accel.softmax(X, scale=float("inf")), ValueError, "scale is inf"),
        (lambda: accel.softmax(X, scale=46000.0), ValueError, "below 45426"),
        (lambda: accel.softmax(X, scale=np.ones(4)), ValueError, r"scale has shape \(4,\); it must be one number"),
        (lambda: accel.softmax(X, scale=1.0, implementation="nope"), ValueError, "implementation 'nope' is unknown"),
        (lambda: accel.layernorm(X.astype(np.uint8), **SCALES), TypeError, "x is uint8; it must be int8 or int16"),
        (lambda: accel.layernorm(X, np.ones(3), **SCALES), ValueError, r"weight has shape \(3,\); it must be \(4,\)"),
        (lambda: accel.layernorm(X, None, np.full(4, np.nan), **SCALES), ValueError, "bias holds NaN"),
        (lambda: accel.layernorm(X, eps=-1.0, **SCALES), ValueError, "eps is -1.0"),
        (lambda: accel.layernorm(X, eps=math.nan, **SCALES), ValueError, "eps is nan"),
        (lambda: accel.layernorm(X, input_scale=0, output_scale=1), ValueError, "input_scale is 0.0"),
        (lambda: accel.layernorm(X, input_scale=1, output_scale=[1, 1, 1, -1]), ValueError, "output_scale is -1.0"),
        (lambda: accel.layernorm(X, input_scale=1e-30, output_scale=1), ValueError, "eps 1e-05 is too large for input"),
        (lambda: accel.layernorm(X, input_scale=1, output_scale=1e-20), ValueError, "gain 1e.20 is too large"),
        (
            lambda: accel.layernorm(X, bias=np.full(4, 1e9), input_scale=1, output_scale=1e-4),
            ValueError,
            r"bias 1e\+09 is too large for its output scale",
        ),
        (lambda: accel.layernorm(X, **SCALES, dtype="uint8"), ValueError, "dtype is 'uint8'"),
        (
            lambda: accel.layernorm(np.ones((1, 4097), np.int8), **SCALES),
            spec.ProgramError,
            "'layernorm': 4097 channels; at most 4096",
        ),
        (lambda: accel.gelu(X.astype(np.int16), **SCALES), TypeError, "x is int16; it must be int8"),
        (lambda: accel.gelu(X_LOWEST, **SCALES), ValueError, "x holds -128"),
        (lambda: accel.gelu(X, input_scale=math.nan, output_scale=1), ValueError, "input_scale is nan"),
        (lambda: accel.gelu(X, input_scale=1, output_scale=0), ValueError, "output_scale is 0.0"),
        (lambda: accel.gelu(X, **SCALES, dtype="int32"), ValueError, "dtype is 'int32'"),
        (lambda: accel.gelu(X, **SCALES, threads=0), ValueError, "threads is 0"),
    ],
)
def test_each_guard_names_what_is_wrong(call: Callable[[], Array], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "dtype", "attributes", "message"),
    [
        ((3,), "uint8", {"mult": 2**22, "shift": 1}, "attribute mult is 4194304"),
        ((3,), "uint8", {"mult": -1, "shift": 1}, "attribute mult is -1"),
        ((3,), "uint8", {"mult": 1, "shift": 53}, "attribute shift is 53"),
        ((3,), "uint8", {"mult": 1, "shift": 0}, "attribute shift is 0"),
        ((3,), "uint8", {"mult": 1}, "attribute shift is missing"),
        ((3,), "uint8", {"mult": 1, "shift": 1, "eps": 1}, "unknown attribute 'eps'"),
        ((3,), "int8", {"mult": 1, "shift": 1}, "output is int8"),
        ((2, 2**16 + 1), "uint8", {"mult": 1, "shift": 1}, "65537 channels"),
    ],
)
def test_norm_and_engine_refuse_the_same_softmax(
    shape: tuple[int, ...], dtype: str, attributes: dict[str, int], message: str
) -> None:
    op = spec.Operation(kind="softmax", name="s", inputs=("x",), output="y", dtype=dtype, attributes=attributes)
    value = spec.Value(dtype="int8", shape=shape)
    for prove in (check_operation, core.operation_engine):
        with pytest.raises(spec.ProgramError, match=f"softmax 's': {message}"):
            prove(op, [value], {})


def test_sums_beyond_int32_are_refused_and_the_largest_are_right() -> None:
    widest = (2**31 - 1) // (255 * 127)
    x, weight = np.full((2, widest + 1), 255, np.uint8), np.full((3, widest + 1), 127, np.int8)
    exact = widest * 255 * 127
    assert_each_equals(np.full((2, 3), exact, np.int32), accel.matmul, x[:, 1:], weight[:, 1:].T)
    with pytest.raises(spec.ProgramError, match=r"'matmul': accumulator may reach .* beyond int32"):
        accel.matmul(x, weight.T)


def test_scales_at_their_limits_do_not_overflow() -> None:
    with np.errstate(all="raise"):
        for scale in (1e-30, 9e29):
            for other in (1e-30, 9e29):
                accel.gelu(X, input_scale=scale, output_scale=other)
            accel.layernorm(X, eps=0.0, input_scale=scale, output_scale=1.0)
            accel.softmax(X, scale=min(scale, 45000.0))
    assert accel.gelu(X, input_scale=9e29, output_scale=1e-30).tolist() == [[127] * 4] * 2


def test_the_example_of_the_docs_prints_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "reference" / "functions.md").read_text()
    (code,), (printed,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "text"))
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_they_need_no_torch() -> None:
    code = """
import sys
import numpy as np
from swincompress_pl import accel
x = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
accel.linear(x, x, scale=0.1), accel.matmul(x, x.T), accel.softmax(x, scale=0.1)
accel.layernorm(x, input_scale=0.1, output_scale=0.1), accel.gelu(x, input_scale=0.1, output_scale=0.1)
loaded = {"torch", "lightning", "timm", "scipy"} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""export_layer: one layer's kernel on NumPy arrays equals the specification and stays near the float layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swincompress_pl import accel, spec
from swincompress_pl.spec import operations


def linear_module(rng: np.random.Generator, channels: int, depth: int, bias: bool = True) -> Any:
    return SimpleNamespace(weight=rng.normal(size=(channels, depth)), bias=rng.normal(size=channels) if bias else None)


def conv_module(rng: np.random.Generator, **changes: Any) -> Any:
    settings = {"stride": (2, 1), "padding": (1, 0), "groups": 1, "dilation": (1, 1), **changes}
    return SimpleNamespace(weight=rng.normal(size=(6, 5, 3, 2)), bias=rng.normal(size=6), **settings)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 70),
    depth=st.integers(1, 200),
    rows=st.lists(st.integers(1, 6), max_size=2),
    dtype=st.sampled_from(["int8", "uint8"]),
)
def test_linear_layers_equal_the_norm(seed: int, channels: int, depth: int, rows: list[int], dtype: str) -> None:
    rng = np.random.default_rng(seed)
    layer = accel.export_layer(linear_module(rng, channels, depth), 0.02, 0.05)
    low, high = spec.LIMITS[dtype]
    x = rng.integers(low, high + 1, (*rows, depth)).astype(dtype)
    expected = operations.linear(x, layer.weight_q, layer.bias_q, layer.mult, layer.shift, dtype="int8")
    y = layer(x)
    assert y.dtype == np.int8
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("implementation", accel.implementations())
@pytest.mark.parametrize("size", [(9, 8), (5, 3), (12, 4)])
def test_convolutions_equal_the_norm(implementation: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    layer = accel.export_layer(conv_module(rng), 0.02, 0.05, implementation=implementation, threads=2)
    x = rng.integers(-127, 128, (3, *size, 5)).astype(np.int8)
    expected = operations.conv2d(
        x, layer.weight_q, layer.bias_q, layer.mult, layer.shift, stride=(2, 1), padding=(1, 0), dtype="int8"
    )
    np.testing.assert_array_equal(layer(x), expected)


def test_weights_get_one_symmetric_scale_a_channel() -> None:
    module = linear_module(np.random.default_rng(1), 9, 33, bias=False)
    module.weight[4] = 0
    layer = accel.export_layer(module)
    assert layer.weight_q.dtype == np.int8
    peaks = np.abs(layer.weight_q.astype(int)).max(axis=1)
    assert set(np.delete(peaks, 4)) == {127}
    assert peaks[4] == 0
    error = layer.weight_q * layer.weight_scale[:, None] - module.weight
    assert (np.abs(error) <= layer.weight_scale[:, None] / 2 + 1e-12).all()
    assert (layer.bias_q == 0).all()


def test_the_integer_layer_stays_near_the_float_layer() -> None:
    rng = np.random.default_rng(2)
    module = linear_module(rng, 40, 96)
    x = rng.normal(size=(50, 96))
    exact = x @ module.weight.T + module.bias
    layer = accel.export_layer(module, np.abs(x).max() / 127, np.abs(exact).max() / 127)
    given_output = layer.dequantize_output(layer(layer.quantize_input(x)))
    assert np.abs(given_output - exact).mean() < 0.03 * np.abs(exact).max()
    assert layer.quantize_input(np.full(3, 1e9)).tolist() == [127] * 3
    assert layer.quantize_input(np.full(3, -1.0), dtype="uint8").tolist() == [0] * 3


def test_torch_modules_work_and_agree() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 11, 11)
    exact = conv(x).detach().numpy().transpose(0, 2, 3, 1)
    layer = accel.export_layer(conv, float(x.abs().max()) / 127, float(np.abs(exact).max()) / 127)
    y = layer.dequantize_output(layer(layer.quantize_input(x.numpy().transpose(0, 2, 3, 1))))
    assert y.shape == exact.shape
    assert np.abs(y - exact).max() < 0.06 * np.abs(exact).max()
    linear = torch.nn.Linear(7, 5)
    assert accel.export_layer(linear).weight_q.shape == (5, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 2}, "groups=2"),
        ({"dilation": (2, 2)}, "dilation"),
        ({"padding": "same"}, "padding='same'"),
        ({"padding_mode": "reflect"}, "padding_mode='reflect'"),
    ],
)
def test_convolutions_that_the_engine_lacks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accel.export_layer(conv_module(np.random.default_rng(0), **changes))


def test_other_modules_and_values_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(TypeError, match="object has no weight"):
        accel.export_layer(object())
    with pytest.raises(TypeError, match="weight has shape"):
        accel.export_layer(SimpleNamespace(weight=np.ones(3)))
    module = linear_module(rng, 3, 4)
    module.weight[1, 2] = np.nan
    with pytest.raises(ValueError, match="weight holds NaN"):
        accel.export_layer(module)
    module = linear_module(rng, 3, 4)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="input_scale"):
            accel.export_layer(module, scale)
        with pytest.raises(ValueError, match="output_scale"):
            accel.export_layer(module, 1.0, scale)
    with pytest.raises(ValueError, match="implementation 'nope' is unknown"):
        accel.export_layer(module, implementation="nope")
    with pytest.raises(ValueError, match="threads is 0"):
        accel.export_layer(module, threads=0)
    module.bias[:] = 1e12
    with pytest.raises(spec.ProgramError, match="accumulator"):
        accel.export_layer(module, 1e-3)


def test_wrong_inputs_are_refused() -> None:
    layer = accel.export_layer(linear_module(np.random.default_rng(0), 3, 4))
    with pytest.raises(TypeError, match="float64"):
        layer(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 4\)"):
        layer(np.zeros((2, 5), dtype=np.int8))
    with pytest.raises(ValueError, match="-128"):
        layer(np.full((2, 4), -128, dtype=np.int8))
    with pytest.raises(ValueError, match="NaN"):
        layer.quantize_input(np.array([np.nan]))
    with pytest.raises(ValueError, match="dtype"):
        layer.quantize_input(np.zeros(1), dtype="int16")
    assert layer(np.zeros((0, 4), dtype=np.int8)).shape == (0, 3)
    conv = accel.export_layer(conv_module(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"\(N, H, W, 5\)"):
        conv(np.zeros((9, 8, 5), dtype=np.int8))
    assert conv(np.zeros((0, 9, 8, 5), dtype=np.int8)).shape == (0, 5, 7, 6)

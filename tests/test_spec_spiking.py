"""The spiking operations against exact rational arithmetic, spikingjelly's neurons and torch; what the checker
refuses."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spiking_programs import SpikingCase, spiking_cases

from swincompress_pl.spec import ProgramError
from swincompress_pl.spec import spiking as ops
from swincompress_pl.spec.kinds import KINDS, check_operation
from swincompress_pl.spec.operations import conv2d

HALF = 2**15


def spikes_of(
    x: Any, threshold: Any, *, reset: Any = 0, bias: Any = 0, steps: int | None = None, **options: Any
) -> np.ndarray:
    """`lif` of currents (T, C), or (C,) repeated `steps` times."""
    currents = np.asarray(x, dtype=np.int32)
    channels = currents.shape[-1]
    given = {"decay": HALF, "input_decay": 1, "soft_reset": 0, "fraction_bits": 0, **options}
    tensors = [np.broadcast_to(np.asarray(value, dtype=np.int32), channels) for value in (threshold, reset, bias)]
    repeated = int(steps is not None)
    return ops.lif(currents[None], *tensors, steps=steps or len(currents), repeated=repeated, **given)[0]


def exact_spikes(
    x: list[int], threshold: int, reset: int, *, tau: Fraction, input_decay: bool, soft: bool
) -> list[int]:
    """One neuron in rational numbers, from the textbook: dv/dt = (v_reset - v + input) / tau, one step a sample."""
    membrane, found = Fraction(reset), []
    for current in x:
        if input_decay:
            membrane += (current - (membrane - reset)) / tau
        else:
            membrane += current - (membrane - reset) / tau
        spike = membrane >= threshold
        found.append(int(spike))
        if spike:
            membrane = membrane - threshold if soft else Fraction(reset)
    return found


@given(
    st.lists(st.integers(-60, 60), min_size=1, max_size=12),
    st.integers(1, 30),
    st.integers(-20, 20),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=500)
def test_tau_2_gives_the_spikes_of_real_arithmetic(
    x: list[int], threshold: int, reset: int, input_decay: bool, soft: bool
) -> None:
    """Floors do not show: floor((floor(v) + x) / 2) = floor((v + x) / 2), and the threshold is an integer."""
    reset = 0 if soft else min(reset, threshold - 1)
    expected = exact_spikes(x, threshold, reset, tau=Fraction(2), input_decay=input_decay, soft=soft)
    options = {"input_decay": int(input_decay), "soft_reset": int(soft)}
    assert spikes_of(np.array(x)[:, None], threshold, reset=reset, **options)[:, 0].tolist() == expected


@given(st.lists(st.integers(-60, 60), min_size=1, max_size=12), st.integers(1, 90), st.booleans())
def test_without_leak_it_integrates_exactly(x: list[int], threshold: int, soft: bool) -> None:
    membrane, expected = 0, []
    for current in x:
        membrane += current
        expected.append(int(membrane >= threshold))
        if expected[-1]:
            membrane = membrane - threshold if soft else 0
    found = spikes_of(np.array(x)[:, None], threshold, decay=0, input_decay=0, soft_reset=int(soft))
    assert found[:, 0].tolist() == expected


@given(
    st.lists(st.integers(-300, 300), min_size=1, max_size=8),
    st.integers(1, 200),
    st.sampled_from([Fraction(5, 4), Fraction(3, 2), Fraction(3), Fraction(7)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([4, 8, 12]),
)
@settings(max_examples=500)
def test_another_tau_is_as_close_as_docs_norm_says(
    x: list[int], threshold: int, tau: Fraction, input_decay: bool, soft: bool, bits: int
) -> None:
    decay = math.floor(2**16 / tau + Fraction(1, 2))
    found = spikes_of(
        np.array(x)[:, None], threshold << bits, decay=decay, input_decay=int(input_decay), soft_reset=int(soft),
        fraction_bits=bits,
    )[:, 0].tolist()  # fmt: skip
    membrane, error = Fraction(0), Fraction(0)
    for current, spike in zip(x, found, strict=True):
        pulled = -membrane + (current if input_decay else 0)
        membrane += pulled / tau + (0 if input_decay else current)
        # one floor, the rounded decay on what is pulled, and what is left of the error before
        error = (1 - 1 / tau) * error + Fraction(1, 2**bits) + (abs(pulled) + error) / 2**17
        if abs(membrane - threshold) <= error:
            return  # too close to tell
        assert spike == (membrane >= threshold)
        if spike:
            membrane = membrane - threshold if soft else Fraction(0)
            error = error if soft else Fraction(0)


def spikingjelly_neurons() -> list[tuple[Any, dict[str, int]]]:
    from spikingjelly.activation_based import neuron

    made = []
    for v_reset in (None, 0.0, -0.25):
        soft = int(v_reset is None)
        for decay_input in (True, False):
            options = {"v_threshold": 0.75, "v_reset": v_reset, "step_mode": "m"}
            expected = {"soft_reset": soft, "input_decay": int(decay_input)}
            made.append((neuron.LIFNode(tau=2.0, decay_input=decay_input, **options), expected))
            made.append((neuron.ParametricLIFNode(init_tau=2.0, decay_input=decay_input, **options), expected))
        made.append((neuron.IFNode(**options), {"soft_reset": soft, "input_decay": 0, "decay": 0}))
    return made


def test_spikes_are_those_of_spikingjelly() -> None:
    rng = np.random.default_rng(0)
    for node, options in spikingjelly_neurons():
        integers = rng.integers(-40, 160, (6, 50))
        with torch.no_grad():
            expected = node.double()(torch.from_numpy(integers / 64)).numpy()
        assert 0.05 < expected.mean() < 0.95
        reset = 0 if node.v_reset is None else round(64 * node.v_reset)
        assert np.array_equal(spikes_of(integers, 48, reset=reset, **options), expected), (node, options)


def test_a_repeated_current_is_the_same_at_every_step() -> None:
    currents = np.random.default_rng(1).integers(-10, 60, 40)
    alone = spikes_of(currents, 25, steps=5, bias=3)
    assert np.array_equal(alone, spikes_of(np.tile(currents, (5, 1)), 25, bias=3))
    assert 0 < alone.mean() < 1


def test_bias_has_the_fraction_that_currents_lack() -> None:
    """16 x current + bias: a current of 3 is below a threshold of 3 + 1/16, one of 3 + 2/16 is not."""
    found = spikes_of([[3, 3]], 49, bias=[0, 2], decay=0, input_decay=0, fraction_bits=4)
    assert found.tolist() == [[0, 1]]


@given(st.integers(0, 2**32 - 1))
def test_nothing_leaves_int32(seed: int) -> None:
    """Currents, thresholds, biases and resets at their limits, in unbounded integers."""
    rng = np.random.default_rng(seed)
    ends = [-(2**31) + 1, -ops.CURRENT_MAX, -1, 0, 1, ops.CURRENT_MAX, 2**31 - 1]
    x = rng.choice(ends, (9, 1)).tolist()
    threshold, bias = int(rng.choice([1, ops.THRESHOLD_MAX])), int(rng.choice([-ops.CURRENT_MAX, 0, ops.CURRENT_MAX]))
    soft, input_decay = int(rng.integers(2)), int(rng.integers(2))
    reset = 0 if soft else int(rng.choice([-ops.THRESHOLD_MAX, 0, ops.THRESHOLD_MAX]))
    decay, bits = int(rng.choice([0, 1, HALF, 2**16])), int(rng.choice([0, 15]))
    membrane, expected = reset, []
    for (current,) in x:
        limit = ops.CURRENT_MAX >> bits
        i = (min(max(current, -limit), limit) << bits) + bias
        seen = [i, reset - membrane + i * input_decay]
        membrane += (seen[1] * decay >> 16) + (0 if input_decay else i)
        seen.append(membrane)
        membrane = min(max(membrane, -ops.MEMBRANE_MAX), ops.MEMBRANE_MAX)
        expected.append(int(membrane >= threshold))
        if expected[-1]:
            membrane = membrane - threshold if soft else reset
        assert all(abs(value) < 2**31 for value in seen)
    found = spikes_of(
        x, threshold, reset=reset, bias=bias, decay=decay, input_decay=input_decay, soft_reset=soft, fraction_bits=bits
    )
    assert found[:, 0].tolist() == expected


def test_max_pool_is_torchs() -> None:
    checked = 0
    for case in spiking_cases(400, 3):
        kernel, stride, padding = (case.attributes.get(key, [9, 9]) for key in ("kernel", "stride", "padding"))
        if case.kind != "max_pool" or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            continue  # torch takes no wider padding
        x = case.arrays[0].reshape(-1, *case.arrays[0].shape[-3:]).transpose(0, 3, 1, 2)
        pooled = F.max_pool2d(torch.from_numpy(x.astype(np.float64)), kernel, stride, padding).numpy()
        found = case.expected()
        assert np.array_equal(found.reshape(-1, *found.shape[-3:]).transpose(0, 3, 1, 2), pooled)
        checked += 1
    assert checked > 10


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_convolution_is_torchs_at_every_time_step(groups: int) -> None:
    rng = np.random.default_rng(groups)
    x = rng.integers(0, 2, (2, 3, 7, 6, 6)).astype(np.uint8)
    weight, bias = rng.integers(-127, 128, (12, 3, 2, 6 // groups)).astype(np.int8), rng.integers(-99, 99, 12)
    one = np.full(12, 2**21, np.int32), np.full(12, 21, np.uint8)
    found = conv2d(x, weight, bias, *one, stride=(2, 1), padding=(1, 1), groups=groups, dtype="int32")
    expected = F.conv2d(
        torch.from_numpy(x.reshape(6, 7, 6, 6).transpose(0, 3, 1, 2)).double(),
        torch.from_numpy(weight.transpose(0, 3, 1, 2)).double(),
        torch.from_numpy(bias).double(),
        (2, 1),
        (1, 1),
        groups=groups,
    ).numpy()
    assert np.array_equal(found, expected.transpose(0, 2, 3, 1).reshape(found.shape))


def test_counts_are_their_definitions() -> None:
    rng = np.random.default_rng(4)
    q, k, v = (rng.integers(0, 2, (2, 3 * 5, 2 * dim)).astype(np.uint8) for dim in (4, 4, 6))
    heads = [x.reshape(2, 3, 5, 2, -1).astype(int) for x in (q, k, v)]
    expected = np.einsum("btihd,btjhd,btjhe->btihe", *heads).reshape(2, 15, 12)
    assert np.array_equal(ops.spike_attention(q, k, v, windows=3, heads=2), expected)
    assert expected.any()

    x = rng.integers(0, 9, (2, 15, 12))
    by_head = ops.block_sum(x, rows=15, channels=2, dtype="int32")
    assert np.array_equal(by_head, x.reshape(2, 15, 2, 6).sum(-1))
    by_step = ops.block_sum(x, rows=3, channels=12, dtype="int32")
    assert np.array_equal(by_step, x.reshape(2, 3, 5, 12).sum(2))

    gate = rng.integers(0, 2, (2, 3, 12)).astype(np.uint8)
    kept = ops.multiply(v, gate, dtype="uint1")
    assert np.array_equal(kept, v * np.repeat(gate, 5, axis=1))
    gate = rng.integers(0, 2, (2, 15, 2)).astype(np.uint8)
    assert np.array_equal(ops.multiply(v, gate, dtype="uint1"), v * np.repeat(gate, 6, axis=2))


def test_sums_of_a_stream_saturate() -> None:
    x = np.full((1, 4, 1), 2**30, np.int32)
    assert ops.block_sum(x, rows=2, channels=1, dtype="int32").tolist() == [[[2**31 - 1], [2**31 - 1]]]


def _changed(case: SpikingCase, *, dtype: str | None = None, dtypes: tuple[str, ...] | None = None, **attributes: Any):
    tensors = dict(case.tensors)
    for role in [name for name in attributes if name in tensors]:
        tensors[role] = np.full_like(tensors[role], attributes.pop(role))
    return SpikingCase(
        kind=case.kind,
        dtype=dtype or case.dtype,
        dtypes=dtypes or case.dtypes,
        arrays=case.arrays,
        attributes=case.attributes | attributes,
        tensors=tensors,
    )


def _case(kind: str) -> SpikingCase:
    rng = np.random.default_rng(0)
    spikes = rng.integers(0, 2, (1, 6, 8)).astype(np.uint8)
    stream = rng.integers(-99, 99, (1, 6, 8)).astype(np.int32)
    neuron = {"steps": 3, "repeated": 0, "decay": HALF, "input_decay": 1, "soft_reset": 0, "fraction_bits": 2}
    units = {"threshold": np.ones(8, np.int32), "reset": np.zeros(8, np.int32), "bias": np.zeros(8, np.int32)}
    cases = {
        "lif": ("uint1", ("int32",), (stream,), neuron, units),
        "block_sum": ("uint3", ("uint1",), (spikes,), {"rows": 1, "channels": 8}, {}),
        "multiply": ("uint1", ("uint1", "uint1"), (spikes, spikes), {}, {}),
        "spike_attention": ("int32", ("uint1",) * 3, (spikes,) * 3, {"windows": 3, "heads": 2}, {}),
        "add": ("uint2", ("uint1", "uint1"), (spikes, spikes), {}, {}),
        "max_pool": (
            "int32",
            ("int32",),
            (stream.reshape(1, 2, 3, 8),),
            {"kernel": [2, 2], "stride": [1, 1], "padding": [1, 1]},
            {},
        ),
    }
    dtype, dtypes, arrays, attributes, tensors = cases[kind]
    return SpikingCase(kind=kind, dtype=dtype, dtypes=dtypes, arrays=arrays, attributes=attributes, tensors=tensors)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("lif", {"steps": 0}, r"attribute steps is 0; it must be an integer in \[1,"),
        ("lif", {"threshold": 2**29}, r"'threshold' holds values in"),
        ("lif", {"steps": 4}, "6 rows do not split into 4 time steps"),
        ("lif", {"dtype": "uint8"}, "output is uint8; it must be uint1"),
        ("lif", {"threshold": 0}, r"'threshold' holds values in \[0, 0\]; they must lie in \[1,"),
        ("lif", {"bias": 2**28}, "'bias' holds values"),
        ("lif", {"soft_reset": 1, "reset": 3}, r"'reset' holds values in \[3, 3\]; they must lie in \[0, 0\]"),
        ("lif", {"decay": 2**16 + 1}, "attribute decay is 65537"),
        ("lif", {"fraction_bits": 16}, "attribute fraction_bits is 16"),
        ("block_sum", {"rows": 4}, "6 rows and 8 channels does not split into 4 x 8 blocks"),
        ("block_sum", {"channels": 1}, "a sum may reach 48, beyond uint3"),
        ("multiply", {"dtypes": ("uint2", "uint1")}, "a product may reach 3, beyond uint1"),
        ("spike_attention", {"windows": 4}, "tokens; they must agree and split into 4 windows"),
        ("spike_attention", {"heads": 3}, "all split into 3 heads"),
        ("spike_attention", {"dtypes": ("int8", "uint1", "uint1")}, "input 0 is int8"),
        ("add", {"dtype": "uint1"}, "the sum may reach 2, beyond uint1"),
        ("add", {"dtypes": ("uint1", "int8"), "dtype": "uint2"}, "adds uint1 and int8 into uint2; they must agree"),
        ("max_pool", {"padding": [2, 0]}, r"padding \(2, 0\) reaches kernel \(2, 2\)"),
        ("max_pool", {"kernel": [9, 9], "padding": [0, 0]}, "is larger than the padded input"),
    ],
)
def test_what_contradicts_itself_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    case = _case(kind)
    check_operation(case.operation, case.values, case.tensors)
    changed = _changed(case, **change)
    with pytest.raises(ProgramError, match=message):
        check_operation(changed.operation, changed.values, changed.tensors)


def test_counts_beyond_int32_are_refused() -> None:
    case = _case("spike_attention")
    wide = SpikingCase(
        kind=case.kind,
        dtype="int32",
        dtypes=("uint8",) * 3,
        arrays=(np.zeros((1, 256, 1024), np.uint8),) * 3,
        attributes={"windows": 1, "heads": 1},
    )
    with pytest.raises(ProgramError, match=r"a count may reach .* beyond int32"):
        check_operation(wide.operation, wide.values, {})


def test_attention_counts_the_cheaper_order() -> None:
    case = _case("spike_attention")
    macs = KINDS["spike_attention"].macs(case.values, case.values[2], case.attributes, {})
    assert macs == 3 * 2 * 2 * min(2 * 8, 2 * 16)

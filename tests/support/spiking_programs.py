"""Random operations of spiking networks, for the tests of every interpreter, and a whole small Program of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from support.program_cases import integers, requantization, weights
from swincompress_pl.spec import InputDescription, Operation, Program, Value, multiplier
from swincompress_pl.spec.integer import LIMITS, MULTIPLIER_BITS, SHIFT_MAX
from swincompress_pl.spec.kinds import KINDS
from swincompress_pl.spec.spiking import AS_IT_IS, CURRENT_MAX, STEPS_MAX, THRESHOLD_MAX

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SpikingCase:
    """One operation with its tensors and what it is called on: `arrays` (N, *shape) of the types `dtypes`."""

    kind: str
    dtype: str
    dtypes: tuple[str, ...]
    arrays: tuple[Array, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Array] = field(default_factory=dict)
    largest: int | None = None  # that is known of the inputs

    @property
    def operation(self) -> Operation:
        return Operation(
            kind=self.kind,
            name="case",
            inputs=tuple(f"x{number}" for number in range(len(self.arrays))),
            output="y",
            dtype=self.dtype,
            attributes=self.attributes,
            tensors={role: role for role in self.tensors},
        )

    @property
    def values(self) -> list[Value]:
        return [
            Value(dtype=d, shape=x.shape[1:], largest=self.largest)
            for d, x in zip(self.dtypes, self.arrays, strict=True)
        ]

    def expected(self) -> Array:
        return KINDS[self.kind].run(self.arrays, self.tensors, self.attributes, self.dtype)


def _pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _spikes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (rng.random(shape) < _pick(rng, 0.05, 0.3, 1.0)).astype(np.uint8)


def _result(rng: np.random.Generator) -> tuple[str, dict[str, int]]:
    """The type of a result, and attributes that bound it: counts of at most `largest`."""
    dtype = str(_pick(rng, "int8", "uint8", "uint8", "uint3", "int16", "int32"))
    bounded = dtype.startswith("uint") and rng.integers(4) > 0
    return dtype, {"largest": int(rng.integers(1, LIMITS[dtype][1] + 1))} if bounded else {}


def lif_case(rng: np.random.Generator) -> SpikingCase:
    steps, repeated, soft = int(rng.integers(1, 6)), int(rng.integers(2)), int(rng.integers(2))
    bits, channels = int(_pick(rng, 0, 0, 1, 6, 15)), int(_pick(rng, 1, 3, 16, 33, 44))
    rows = _pick(rng, (), (5,), (3, 4))
    shape = (2, *(() if repeated else (steps,)), *rows, channels)
    reach = _pick(rng, 20, 2000, CURRENT_MAX >> bits, 2**31 - 1)
    unit = 1 << bits
    threshold = rng.integers(1, min(max(2, reach * unit), THRESHOLD_MAX) + 1, channels)
    low = min(int(threshold.max()), THRESHOLD_MAX)
    return SpikingCase(
        kind="lif",
        dtype="uint1",
        dtypes=("int32",),
        arrays=(rng.integers(-reach, reach + 1, shape).astype(np.int32),),
        attributes={
            "steps": steps,
            "repeated": repeated,
            "decay": int(_pick(rng, 2**15, 2**15, 0, 2**16, 21845, int(rng.integers(1, 2**16)))),
            "input_decay": int(rng.integers(2)),
            "soft_reset": soft,
            "fraction_bits": bits,
        },
        tensors={
            "threshold": threshold.astype(np.int32),
            "reset": (np.zeros(channels) if soft else rng.integers(-low, low, channels)).astype(np.int32),
            "bias": np.clip(rng.integers(-low, low + 1, channels), -CURRENT_MAX, CURRENT_MAX).astype(np.int32),
        },
    )


def max_pool_case(rng: np.random.Generator) -> SpikingCase:
    kernel = [int(v) for v in rng.integers(1, 5, 2)]
    size = [int(rng.integers(k, k + 7)) for k in kernel]
    dtype = str(_pick(rng, "uint1", "uint3", "int8", "int16", "int32"))
    steps = () if rng.integers(2) else (int(rng.integers(1, 4)),)
    return SpikingCase(
        kind="max_pool",
        dtype=dtype,
        dtypes=(dtype,),
        arrays=(integers(rng, dtype, (2, *steps, *size, int(_pick(rng, 1, 5, 17, 43)))),),
        attributes={
            "kernel": kernel,
            "stride": [int(v) for v in rng.integers(1, 4, 2)],
            "padding": [int(rng.integers(0, k)) for k in kernel],
        },
    )


def block_sum_case(rng: np.random.Generator) -> SpikingCase:
    rows, channels = int(_pick(rng, 1, 2, 6)), int(_pick(rng, 1, 3, 8))
    shape = (2, rows * int(_pick(rng, 1, 4, 7)), channels * int(_pick(rng, 1, 5, 16)))
    wide = bool(rng.integers(2))
    x = integers(rng, "int32", shape, corners=bool(rng.integers(4) == 0)) if wide else _spikes(rng, shape)
    reach = (shape[1] // rows) * (shape[2] // channels)
    dtype = "int32" if wide or reach > 255 else str(_pick(rng, "uint8", "int32"))
    return SpikingCase(
        kind="block_sum",
        dtype=dtype,
        dtypes=("int32" if wide else "uint1",),
        arrays=(x,),
        attributes={"rows": rows, "channels": channels},
    )


def multiply_case(rng: np.random.Generator) -> SpikingCase:
    rows, channels = int(_pick(rng, 1, 2, 6)), int(_pick(rng, 1, 3, 8))
    shape = (2, rows * int(_pick(rng, 1, 4)), channels * int(_pick(rng, 1, 5, 16)))
    dtypes = _pick(rng, ("uint1", "uint1", "uint1"), ("uint3", "uint1", "uint3"), ("uint4", "uint4", "uint8"))
    a, b = integers(rng, dtypes[0], shape), integers(rng, dtypes[1], (2, rows, channels))
    return SpikingCase(kind="multiply", dtype=dtypes[2], dtypes=dtypes[:2], arrays=(a, b))


def spike_attention_case(rng: np.random.Generator) -> SpikingCase:
    windows, heads, length = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(_pick(rng, 1, 4, 16, 49))
    dims = [int(_pick(rng, 1, 3, 8, 32)), int(_pick(rng, 1, 3, 8, 32, 56, 64, 90, 130))]
    dtype = str(_pick(rng, "uint1", "uint1", "uint2", "uint3", "uint4"))
    corners = bool(rng.integers(4) == 0)
    q, k, v = (integers(rng, dtype, (2, windows * length, heads * dims[n]), corners=corners) for n in (0, 0, 1))
    return SpikingCase(
        kind="spike_attention",
        dtype="int32",
        dtypes=(dtype,) * 3,
        arrays=(q, k, v),
        attributes={"windows": windows, "heads": heads},
    )


def requantize_case(rng: np.random.Generator) -> SpikingCase:
    channels, source = int(_pick(rng, 1, 5, 33)), str(_pick(rng, "int16", "int32"))
    x = integers(rng, source, (2, int(_pick(rng, 1, 7, 20)), channels))
    dtype, bound = _result(rng)
    return SpikingCase(
        kind="requantize",
        dtype=dtype,
        dtypes=(source,),
        arrays=(x,),
        attributes=bound,
        tensors=requantization(rng, channels, LIMITS[source][1]),
    )


def grouped_conv_case(rng: np.random.Generator) -> SpikingCase:
    """A convolution with time steps, with groups, down to one channel per group."""
    kernel = [int(v) for v in rng.integers(1, 5, 2)]
    size = [int(rng.integers(k, k + 6)) for k in kernel]
    padding = [int(rng.integers(0, k)) for k in kernel]
    stride = [int(v) for v in rng.integers(1, 3, 2)]
    groups, depth, outputs = int(_pick(rng, 1, 2, 5, 16)), int(_pick(rng, 1, 3)), int(_pick(rng, 1, 2, 4))
    if rng.integers(2):  # as many channels as go through registers together, and others
        groups, depth, outputs = int(_pick(rng, 7, 16, 24, 40, 56, 64, 65, 90, 130)), 1, 1
    steps = () if rng.integers(2) else (int(rng.integers(1, 4)),)
    dtype = str(_pick(rng, "uint1", "uint8", "int8"))
    m = groups * outputs
    out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, padding, kernel, stride, strict=True)]
    bias_shape = (*out, m) if rng.integers(2) else (m,)
    result, bound = _result(rng)
    return SpikingCase(
        kind="conv2d",
        dtype=result,
        dtypes=(dtype,),
        arrays=(integers(rng, dtype, (2, *steps, *size, groups * depth)),),
        attributes={"channels": m, "groups": groups, "kernel": kernel, "stride": stride, "padding": padding, **bound},
        tensors={
            "weight": weights(rng, (m, *kernel, depth), corners=False),
            "bias": rng.integers(-(2**14), 2**14, bias_shape).astype(np.int32),
            **requantization(rng, m, LIMITS[dtype][1] * 127 * (kernel[0] * kernel[1] * depth) ** 0.5),
        },
    )


def spike_linear_case(rng: np.random.Generator) -> SpikingCase:
    """Layers whose inputs are spikes or counts: few and many of them, more than int16 holds largest weights."""
    rows, k, m = (
        int(_pick(rng, 1, 5, 40)),
        int(_pick(rng, 1, 7, 64, 259, 700)),
        int(_pick(rng, 1, 16, 32, 33, 64, 65, 96, 97, 130)),
    )
    largest = int(_pick(rng, 1, 2, 3, 9, 64, 127))
    rate = float(_pick(rng, 0.0, 0.1, 0.6, 1.0))
    counts = np.full((2, rows, k), largest) if rate == 1 else rng.integers(1, largest + 1, (2, rows, k))
    x = np.where(rng.random((2, rows, k)) < rate, counts, 0)
    dtype, bound = _result(rng)
    return SpikingCase(
        kind="linear",
        dtype=dtype,
        dtypes=(f"uint{largest.bit_length()}",),
        arrays=(x.astype(np.uint8),),
        attributes={"channels": m, **bound},
        tensors={
            "weight": weights(rng, (m, k), corners=bool(rng.integers(2))),
            "bias": rng.integers(-(2**14), 2**14, m).astype(np.int32),
            **(
                requantization(rng, m, 127 * largest * k**0.5)
                if rng.integers(2)
                else {"mult": np.full(m, 2**21, np.int32), "shift": np.full(m, 21, np.uint8)}
            ),
        },
        largest=largest,
    )


def add_case(rng: np.random.Generator) -> SpikingCase:
    """Counts, which widen, and streams whose second summand is the same at every time step."""
    rows, repeats, channels = int(rng.integers(1, 9)), int(rng.integers(1, 4)), int(_pick(rng, 1, 5, 33))
    dtypes = _pick(
        rng, ("uint1", "uint1", "uint2"), ("uint3", "uint1", "uint4"), ("uint7", "uint7", "uint8"), ("int32",) * 3
    )
    a = integers(rng, dtypes[0], (2, rows * repeats, channels), corners=bool(rng.integers(4) == 0))
    b = integers(rng, dtypes[1], (2, rows, channels))
    return SpikingCase(kind="add", dtype=dtypes[2], dtypes=dtypes[:2], arrays=(a, b))


def _charge(rng: np.random.Generator, shape: tuple[int, ...], reach: int) -> Array:
    """int32 of all magnitudes up to `reach`, of either sign; at times only the largest."""
    if rng.integers(4) == 0:
        return rng.choice(np.array([-reach, reach]), shape).astype(np.int32)
    drawn = rng.integers(-reach, reach + 1, shape) >> rng.integers(0, 32, shape)
    return drawn.astype(np.int32)


def _factors(rng: np.random.Generator, channels: int, reach: int, largest: int) -> dict[str, Array]:
    """Factors that bring `reach` to about `largest`, that leave it as it is, that halve it (so that odd numbers are
    ties), or at the ends of what is allowed."""
    style = int(rng.integers(4))
    if style == 0:
        mult, shift = multiplier(np.minimum(2 * largest / reach * np.exp(rng.normal(size=channels)), 2**20))
    elif style == 1:
        ends = (2**MULTIPLIER_BITS - 1, 2**21, 0), (1, 21, SHIFT_MAX)
        mult, shift = (rng.choice(np.array(each), channels) for each in ends)
    else:
        mult, shift = np.full(channels, AS_IT_IS[0]), np.full(channels, AS_IT_IS[1] + style - 2)
    return {"mult": mult.astype(np.int32), "shift": shift.astype(np.uint8)}


def integrate_case(rng: np.random.Generator) -> SpikingCase:
    """Sums over time of spikes, of counts and of int32; the last may pass int32."""
    source, steps = str(_pick(rng, "uint1", "uint3", "uint8", "int32", "int32")), int(_pick(rng, 1, 2, 4, STEPS_MAX))
    rows = _pick(rng, (), (5,), (2, 3)) if steps < STEPS_MAX else ()
    channels, wide = int(_pick(rng, 1, 5, 17)), source == "int32"
    shape, reach = (2, steps, *rows, channels), int(_pick(rng, 50, 2**20, 2**31 - 1)) if wide else LIMITS[source][1]
    peak = int(_pick(rng, 0, reach, 2**31 - 1))
    bias = rng.integers(-peak - 1, peak + 1, channels)
    dtype, bound = _result(rng)
    return SpikingCase(
        kind="integrate",
        dtype=dtype,
        dtypes=(source,),
        arrays=(_charge(rng, shape, reach) if wide else integers(rng, source, shape),),
        attributes={"steps": steps, **bound},
        tensors={
            "bias": np.where(rng.random(channels) < 0.3, -peak - 1, bias).astype(np.int32),
            **_factors(rng, channels, steps * reach, bound.get("largest", LIMITS[dtype][1])),
        },
    )


def fire_case(rng: np.random.Generator) -> SpikingCase:
    steps, channels = int(_pick(rng, 1, 2, 4, 4, STEPS_MAX)), int(_pick(rng, 1, 5, 33))
    rows = _pick(rng, (), (5,), (2, 3)) if steps < STEPS_MAX else ()
    source, reach = _pick(
        rng, ("int32", 20), ("int32", 2**20), ("int32", 2**31 - 1), ("int16", 20), ("int16", 2**15 - 1)
    )
    return SpikingCase(
        kind="fire",
        dtype="uint1",
        dtypes=(source,),
        arrays=(_charge(rng, (2, *rows, channels), reach).astype(source),),
        attributes={"steps": steps},
        tensors=_factors(rng, channels, reach, steps),
    )


SPIKING_MAKERS = (
    lif_case, max_pool_case, block_sum_case, multiply_case, spike_attention_case, requantize_case, grouped_conv_case,
    spike_linear_case, add_case, integrate_case, fire_case,
)  # fmt: skip


def spiking_cases(count: int, seed: int = 0) -> Iterator[SpikingCase]:
    """`count` random operations, the kinds in turn."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield SPIKING_MAKERS[number % len(SPIKING_MAKERS)](rng)


def pictures(rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> Array:
    """uint8 inputs of different colours: noise alone looks the same to a network."""
    base = rng.integers(0, 256, (count, *[1] * (len(shape) - 1), shape[-1]))
    return ((base + rng.integers(0, 256, (count, *shape))) // 2).astype(np.uint8)


class ProgramBuilder:
    """Appends operations with random tensors to a Program, running them on a few random inputs, so that thresholds are
    where some neurons spike; every method gives the name of its value."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng(seed)
        self.operations: list[Operation] = []
        self.tensors: dict[str, Array] = {}
        self.seen = {"images": pictures(self.rng, 8, shape)}

    def emit(self, kind: str, inputs: tuple[str, ...], dtype: str, roles: dict[str, Array], **attributes: Any) -> str:
        name = f"{kind}{len(self.operations)}"
        keys = {role: f"{name}.{role}" for role in roles}
        self.tensors.update({keys[role]: tensor for role, tensor in roles.items()})
        self.operations.append(
            Operation(
                kind=kind, name=name, inputs=inputs, output=name, dtype=dtype, attributes=attributes, tensors=keys
            )
        )
        self.seen[name] = KINDS[kind].run([self.seen[each] for each in inputs], roles, attributes, dtype)
        return name

    def layer(self, weight: tuple[int, ...], spread: int, *, bias_shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """Weights of either sign and biases, accumulators kept as they are."""
        rng, channels = self.rng, weight[0]
        return {
            "weight": rng.integers(-100, 128, weight).astype(np.int8),
            "bias": rng.integers(-spread, spread, (*bias_shape, channels)).astype(np.int32),
            "mult": np.full(channels, 2**21, np.int32),
            "shift": np.full(channels, 21, np.uint8),
        }

    def linear(self, x: str, k: int, m: int, *, narrowed: int = 0) -> str:
        roles = self.layer((m, k), 99)
        roles["shift"] += np.uint8(narrowed)
        return self.emit("linear", (x,), "int32", roles, channels=m)

    def lif(self, x: str, steps: int, *, repeated: int = 0, **changes: int) -> str:
        fixed = {"decay": HALF_DECAY, "input_decay": 1, "soft_reset": 0, "fraction_bits": 0} | changes
        currents = self.seen[x].reshape(-1, self.seen[x].shape[-1]) << fixed["fraction_bits"]
        threshold = np.maximum(np.quantile(currents, 0.7, axis=0) / 2, 1).astype(np.int32)
        roles = {
            "threshold": threshold,
            "reset": np.zeros_like(threshold),
            "bias": self.rng.integers(-threshold // 4, threshold // 4 + 1).astype(np.int32),
        }
        return self.emit("lif", (x,), "uint1", roles, steps=steps, repeated=repeated, **fixed)


HALF_DECAY = 2**15


def spiking_program(
    seed: int = 0, *, steps: int = 3, events: bool = False, classes: int = 5, width: int = 12
) -> Program:
    """A network with every spiking operation: stem with a bias map and pooling, a depthwise convolution on a stream,
    spike attention, a gate by head, a head on counts."""
    size, heads = 8, 2
    given = InputDescription(height=size, width=size, channels=2 if events else 3, time_steps=steps if events else None)
    build = ProgramBuilder(seed, given.value.shape)
    stem = build.layer((width, 3, 3, given.channels), 4000, bias_shape=(size, size))
    x = build.emit("conv2d", ("images",), "int32", stem, channels=width, kernel=[3, 3], stride=[1, 1], padding=[1, 1])
    x = build.emit("max_pool", (x,), "int32", {}, kernel=[3, 3], stride=[2, 2], padding=[1, 1])
    spikes = build.lif(x, steps, repeated=int(not events), fraction_bits=2)
    deep = build.layer((width, 3, 3, 1), 50)
    y = build.emit(
        "conv2d", (spikes,), "int32", deep, channels=width, groups=width, kernel=[3, 3], stride=[1, 1], padding=[1, 1]
    )
    stream = build.emit("add", (y, y if events else x), "int32", {})
    spikes = build.lif(stream, steps, soft_reset=1)
    q, k, v = (build.lif(build.linear(spikes, width, width), steps) for _ in range(3))
    counts = build.emit("spike_attention", (q, k, v), "int32", {}, windows=steps, heads=heads)
    attended = build.lif(counts, steps, fraction_bits=1)
    by_head = build.emit("block_sum", (attended,), "int32", {}, rows=steps * size * size // 4, channels=heads)
    gated = build.emit("multiply", (v, build.lif(by_head, steps)), "uint1", {})
    counted = build.emit("add", (spikes, gated), "uint2", {})
    stream = build.emit("add", (stream, build.linear(counted, width, width, narrowed=1)), "int32", {})
    factors = {"mult": np.full(width, 2**21, np.int32), "shift": np.full(width, 30, np.uint8)}
    narrow = build.emit("requantize", (stream,), "int8", factors)
    summed = build.emit("block_sum", (build.linear(narrow, width, width),), "int32", {}, rows=steps, channels=width)
    spikes = build.lif(summed, steps, decay=21845, input_decay=0)
    counted = build.emit("block_sum", (spikes,), f"uint{max(4, steps.bit_length())}", {}, rows=1, channels=width)
    build.linear(counted, width, classes)
    return Program(
        input=given,
        operations=tuple(build.operations),
        tensors=build.tensors,
        logit_scale=0.01,
    )


def layers_of_spikes(seed: int = 0, *, steps: int = 3, width: int = 40, classes: int = 5) -> Program:
    """Layers that read the same spikes, which the brightness of the images rules: a convolution with neurons behind it,
    one with a sum, linear layers with neurons and with less than 32 bits. The spikes are "lif1"."""
    size = 9
    given = InputDescription(height=size, width=size, channels=3)
    build = ProgramBuilder(seed, given.value.shape)
    stem = build.layer((width, 1, 1, 3), 1) | {"weight": np.ones((width, 1, 1, 3), np.int8)}
    x = build.emit("conv2d", ("images",), "int32", stem, channels=width, kernel=[1, 1], stride=[1, 1], padding=[0, 0])
    spikes = build.emit(
        "lif",
        (x,),
        "uint1",
        {
            "threshold": build.rng.integers(2, 380, width).astype(np.int32),
            "reset": np.zeros(width, np.int32),
            "bias": np.zeros(width, np.int32),
        },
        steps=steps,
        repeated=1,
        decay=HALF_DECAY,
        input_decay=1,
        soft_reset=0,
        fraction_bits=0,
    )
    window: dict[str, Any] = {"channels": width, "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    deep = (width, 3, 3, width)
    through = build.lif(build.emit("conv2d", (spikes,), "int32", build.layer(deep, 50), **window), steps)
    first = build.emit("conv2d", (spikes,), "int32", build.layer(deep, 50, bias_shape=(size, size)), **window)
    second = build.emit("conv2d", (spikes,), "int32", build.layer(deep, 50), **window)
    stream = build.emit("add", (first, second), "int32", {})
    counted = build.emit("add", (through, build.lif(build.linear(spikes, width, width), steps)), "uint2", {})
    narrow = build.layer((width, width), 99) | {"shift": np.full(width, 29, np.uint8)}
    bytes_ = build.emit("linear", (counted,), "int8", narrow, channels=width)
    stream = build.emit("add", (stream, build.linear(bytes_, width, width)), "int32", {})
    counted = build.emit("block_sum", (build.lif(stream, steps),), "int32", {}, rows=1, channels=width)
    factors = {"mult": np.full(width, 2**21, np.int32), "shift": np.full(width, 23, np.uint8)}
    build.linear(build.emit("requantize", (counted,), "uint8", factors), width, classes)
    return Program(input=given, operations=tuple(build.operations), tensors=build.tensors, logit_scale=0.01)

"""The torch twin: runs a Program with torch and gives the specification's integers, bit for bit, on any device.

Every floating-point product here is exact: its integer partial sums stay below the 24 or 53 bits that float32 and
float64 hold, by the bounds that `spec.check` has proved. Autocast, TF32 and Winograd would break this. So autocast is
off here, and float32 products are used only where TF32 cannot be.
"""

from __future__ import annotations

import functools
import timeit
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swincompress_pl.quant import twin_spiking as spiking
from swincompress_pl.spec import INPUT_VALUE, LIMITS, STORAGE, Operation, Program, check
from swincompress_pl.spec.integer import (
    ACCUMULATOR_BOUND,
    EXP_STEPS,
    EXP_TABLE,
    EXP_ZERO,
    FINE_EXP_ZERO,
    NORMALIZED_FRACTION_BITS,
    RECIPROCAL_BITS,
    SOFTMAX_BITS,
)

_DTYPES: dict[str, torch.dtype] = {dtype: getattr(torch, storage) for dtype, storage in STORAGE.items()}
_FLOAT32_EXACT = 2**24
_CACHED_VALUES = 1 << 15


@dataclass(frozen=True)
class _Types:
    """The specification's types of what an operation reads and writes; a tensor tells only how it is stored."""

    inputs: tuple[str, ...]
    output: str

    @property
    def reach(self) -> int:
        """The largest magnitude that the first input can have."""
        return LIMITS[self.inputs[0]][1]


def _saturate(values: Tensor, dtype: str) -> Tensor:
    return values.clamp(*LIMITS[dtype]).to(_DTYPES[dtype])


def _shift_right_rounded(values: Tensor, shift: Tensor | int) -> Tensor:
    wide = torch.as_tensor(shift, dtype=torch.int64, device=values.device)
    return (values + torch.bitwise_left_shift(torch.ones_like(wide), wide - 1)) >> wide


def _requantize(accumulator: Tensor, mult: Tensor, shift: Tensor, dtype: str, bias: Tensor | None = None) -> Tensor:
    """Accumulators (..., M), plus bias (M,), times mult / 2**shift per channel, rounded and saturated."""
    mult, shift = mult.long(), shift.long()
    half = torch.bitwise_left_shift(torch.ones_like(shift), shift - 1)
    start = half if bias is None else bias.long() * mult + half

    def scaled(part: Tensor) -> Tensor:
        wide = part.long().mul_(mult).add_(start)
        return torch.bitwise_right_shift(wide, shift, out=wide).clamp_(*LIMITS[dtype])

    return _by_rows(scaled, accumulator, _DTYPES[dtype])


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """function(x), for a function of each row (last axis) alone, on as many rows at a time as a CPU's cache holds."""
    rows = x.reshape(-1, x.shape[-1])
    result = torch.empty(rows.shape, dtype=dtype, device=x.device)
    count = max(1, _CACHED_VALUES // x.shape[-1]) if x.device.type == "cpu" else max(1, len(rows))
    for part, place in zip(rows.split(count), result.split(count), strict=True):
        place.copy_(function(part))
    return result.reshape(x.shape)


def _matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """The exact product of integers whose partial sums are at most `bound` < 2**53 in magnitude.

    It uses float32 on a CPU below 2**24, and float64 otherwise.
    """
    floating = torch.float32 if bound < _FLOAT32_EXACT and a.device.type == "cpu" else torch.float64
    return torch.matmul(a.to(floating), b.to(floating)).to(torch.int64 if bound >= ACCUMULATOR_BOUND else torch.int32)


def _largest_products() -> tuple[Tensor, Tensor, int]:
    """Two square int8 matrices of the largest codes, and the bound of their product's sums."""
    rng = np.random.default_rng(0)
    x, weight = (
        torch.from_numpy(rng.choice(codes, (256, 256)).astype(np.int8)) for codes in ([-128, 127], [-127, 127])
    )
    for matrix in (x, weight):  # also rows of one sign, whose sums are the largest
        matrix[:2] = torch.tensor([int(matrix.min()), 127], dtype=torch.int8)[:, None]
    return x, weight.t(), 128 * 127 * 256


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` gives the right sums on this CPU.

    A kernel may add pairs of products in 16 bits, where they saturate.
    """
    x, weight, bound = _largest_products()
    return torch.equal(torch._int_mm(x, weight), _matmul(x, weight, bound))


@functools.cache
def _int_mm_pays() -> bool:
    """Whether `torch._int_mm` is exact and faster than floats.

    Without instructions for it (VNNI) it is a plain loop, ten to thirty times slower. Both ways give the same integers,
    so a measurement may decide.
    """
    x, weight, bound = _largest_products()
    return _int_mm_is_exact() and (
        _least_seconds(lambda: torch._int_mm(x, weight)) < _least_seconds(lambda: _matmul(x, weight, bound))
    )


def _least_seconds(function: Callable[[], object]) -> float:
    return min(timeit.repeat(function, number=1, repeat=5))


def _linear_accumulator(x: Tensor, weight: Tensor, reach: int) -> Tensor:
    """The int32 product (rows, M) of x (rows, K), int8 or uint8 with |x| <= reach, and weight (M, K), transposed."""
    if x.device.type == "cpu" and x.shape[0] > 16 and x.shape[1] % 8 == 0 and _int_mm_pays():
        if reach <= 127:
            return torch._int_mm(x.contiguous().view(torch.int8), weight.t())
        # a byte minus 128 is an int8; 128 times the sum of each row of the weight makes up for it
        centred = torch._int_mm((x.contiguous() ^ 128).view(torch.int8), weight.t())
        return centred + 128 * weight.sum(1, dtype=torch.int32)
    return _matmul(x, weight.t(), reach * int(weight.abs().sum(1, dtype=torch.int64).max()))


def _run_linear(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    rows = x[0].reshape(-1, x[0].shape[-1])
    accumulator = _linear_accumulator(rows, t["weight"], types.reach)
    out = _requantize(accumulator, t["mult"], t["shift"], types.output, t["bias"])
    return spiking.at_most(out, a).reshape(*x[0].shape[:-1], -1)


def _run_conv2d(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    image, weight, groups = x[0].reshape(-1, *x[0].shape[-3:]), t["weight"], a.get("groups", 1)
    kernel, stride, padding = a["kernel"], a["stride"], a["padding"]
    image = torch.nn.functional.pad(image, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    fields = image.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # N, Ho, Wo, C, kh, kw
    batch, height, width = fields.shape[:3]
    if groups == 1:
        columns = fields.permute(0, 1, 2, 4, 5, 3).reshape(batch * height * width, -1)
        accumulator = _linear_accumulator(columns, weight.flatten(1), types.reach)
    else:
        accumulator = _grouped_accumulator(fields.unflatten(3, (groups, -1)), weight, types.reach)
    accumulator = accumulator.reshape(batch, height, width, -1) + t["bias"]  # may differ from place to place
    out = spiking.at_most(_requantize(accumulator, t["mult"], t["shift"], types.output), a)
    return out.reshape(*x[0].shape[:-3], *out.shape[1:])


def _grouped_accumulator(fields: Tensor, weight: Tensor, reach: int) -> Tensor:
    """The accumulators (N * Ho * Wo, M) of a convolution with groups.

    `fields` is (N, Ho, Wo, groups, C / groups, kh, kw) and `weight` is (M, kh, kw, C / groups).
    """
    groups = fields.shape[3]
    columns = fields.permute(3, 0, 1, 2, 5, 6, 4).reshape(groups, -1, weight[0].numel())
    rows = weight.reshape(groups, -1, weight[0].numel())
    bound = reach * int(weight.flatten(1).abs().sum(1, dtype=torch.int64).max())
    return _matmul(columns, rows.transpose(1, 2), bound).transpose(0, 1).reshape(columns.shape[1], -1)


def _reciprocal_sqrt(variance: Tensor) -> tuple[Tensor, Tensor]:
    normalized, t = variance, torch.zeros_like(variance)
    for step in (16, 8, 4, 2, 1):
        small = normalized < 1 << (62 - 2 * step)
        normalized = torch.where(small, normalized << (2 * step), normalized)
        t = t + step * small
    root = normalized.double().sqrt().floor().long()
    root = root - (root * root > normalized).long()
    root = root + ((root + 1) * (root + 1) <= normalized).long()
    return torch.div(torch.full_like(root, 2**54 - 1), root, rounding_mode="floor"), t


def _run_layer_norm(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    gain, offset = t["gain"].long(), t["offset"] + (1 << (a["shift"] - 1))

    def normalized(rows: Tensor) -> Tensor:
        wide = rows.long()
        channels = wide.shape[-1]
        total = wide.sum(-1, keepdim=True)
        variance = channels * (wide * wide).sum(-1, keepdim=True) - total * total + a["epsilon"]
        r, exponent = _reciprocal_sqrt(variance.clamp(min=1))
        wide = wide.mul_(channels).sub_(total).mul_(r)
        wide = torch.bitwise_right_shift(wide, 54 - NORMALIZED_FRACTION_BITS - exponent, out=wide)
        wide = wide.mul_(gain).add_(offset)
        return torch.bitwise_right_shift(wide, a["shift"], out=wide).clamp_(*LIMITS[types.output])

    return _by_rows(normalized, x[0], _DTYPES[types.output])


def _run_table(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    values = t["values"]
    return _by_rows(lambda rows: values[rows.view(torch.uint8).int()], x[0], values.dtype)


def _run_add(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    wide = x[0].long() if types.output == "int32" else x[0].int()
    other = x[1]  # its rows repeat if they are fewer
    return _saturate(wide.reshape(len(other), -1, *other.shape[1:]) + other[:, None], types.output).reshape(x[0].shape)


def _run_add_constant(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    return _saturate(_tokens(x[0]).long() + t["constant"], types.output)


def _run_prepend(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    return torch.cat([t["rows"].expand(x[0].shape[0], -1, -1), _tokens(x[0])], dim=1)


def _run_gather(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    source = torch.nn.functional.pad(_tokens(x[0]), (0, 0, 0, 1))  # row -1 is the zero row
    index = t["index"].long() % source.shape[1]
    return source[:, index.flatten()].reshape(source.shape[0], index.shape[0], -1)


def _run_mean(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    return _requantize(_tokens(x[0]).sum(1, dtype=torch.int64), t["mult"], t["shift"], types.output)


def _mantissa(product: Tensor, shift: Tensor | int, zero: int) -> Tensor:
    octaves = _shift_right_rounded(product, shift).clamp(max=zero).int()
    mantissa = torch.from_numpy(EXP_TABLE.astype(np.int32)).to(product.device)[octaves % EXP_STEPS]
    return mantissa >> (octaves // EXP_STEPS)


def _exponential(distance: Tensor, mult: Tensor, shift: Tensor) -> Tensor:
    return (_mantissa(distance.long() * mult.long(), shift.long(), EXP_ZERO) + 128) >> 8


def _run_softmax(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    def probabilities(rows: Tensor) -> Tensor:
        wide = rows.long()
        distance = wide.amax(-1, keepdim=True) - wide
        e = _mantissa(distance * a["mult"], a["shift"], FINE_EXP_ZERO).long()
        total = e.sum(-1, keepdim=True)
        reciprocal = torch.div(torch.full_like(total, 255 << SOFTMAX_BITS), total, rounding_mode="floor")
        return _shift_right_rounded(e * reciprocal, SOFTMAX_BITS)

    return _by_rows(probabilities, x[0], torch.uint8)


def _run_attention(x: list[Tensor], t: Mapping[str, Tensor], a: Mapping[str, Any], types: _Types) -> Tensor:
    qkv = _tokens(x[0])
    windows, heads, qk_dim, v_dim = a["windows"], a["heads"], a["qk_dim"], a["v_dim"]
    batch, rows, _ = qkv.shape
    length = rows // windows
    parts = qkv.reshape(batch, windows, length, -1).split([heads * qk_dim, heads * qk_dim, heads * v_dim], dim=-1)
    q, k, v = (part.reshape(batch, windows, length, heads, -1).transpose(2, 3) for part in parts)

    def per_head(name: str) -> Tensor:
        return t[name][:, None, None]

    logits = _matmul(q, k.transpose(-1, -2), types.reach**2 * qk_dim)
    if "bias_table" in t:
        logits = logits + t["bias_table"][:, t["bias_index"].long()]
    if "region" in t:
        allowed = (t["region"][:, :, None] == t["region"][:, None, :])[:, None]
        maximum = logits.masked_fill(~allowed, torch.iinfo(torch.int32).min).amax(-1, keepdim=True)
        distance = (maximum - logits).masked_fill(~allowed, 0)
        e = _exponential(distance, per_head("exp_mult"), per_head("exp_shift")) * allowed
    else:
        distance = logits.amax(-1, keepdim=True) - logits
        e = _exponential(distance, per_head("exp_mult"), per_head("exp_shift"))
    numerator = (per_head("out_mult").long() << RECIPROCAL_BITS).expand(batch, windows, -1, length, -1)
    reciprocal = torch.div(numerator, e.sum(-1, keepdim=True, dtype=torch.int64), rounding_mode="floor")
    product = _matmul(e, v, 255 * types.reach * length).long() * reciprocal
    out = _saturate(_shift_right_rounded(product, per_head("out_shift").long() + RECIPROCAL_BITS), types.output)
    return out.transpose(2, 3).reshape(batch, rows, heads * v_dim)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1])


_RUN: dict[str, Callable[[list[Tensor], Mapping[str, Tensor], Mapping[str, Any], _Types], Tensor]] = {
    "linear": _run_linear,
    "conv2d": _run_conv2d,
    "layer_norm": _run_layer_norm,
    "softmax": _run_softmax,
    "table": _run_table,
    "add": _run_add,
    "add_constant": _run_add_constant,
    "prepend": _run_prepend,
    "gather": _run_gather,
    "mean": _run_mean,
    "attention": _run_attention,
    "lif": lambda x, t, a, types: spiking.lif(x[0], t, a),
    "max_pool": lambda x, t, a, types: spiking.max_pool(x[0], a),
    "block_sum": lambda x, t, a, types: spiking.block_sum(_tokens(x[0]), a, types.output).to(_DTYPES[types.output]),
    "multiply": lambda x, t, a, types: spiking.multiply(_tokens(x[0]), _tokens(x[1])).reshape(x[0].shape),
    "spike_attention": lambda x, t, a, types: spiking.spike_attention(
        _tokens(x[0]), _tokens(x[1]), _tokens(x[2]), a
    ).reshape(x[2].shape),
    "requantize": lambda x, t, a, types: spiking.at_most(_requantize(x[0], t["mult"], t["shift"], types.output), a),
    "integrate": lambda x, t, a, types: spiking.at_most(
        _requantize(x[0].sum(1, dtype=torch.int64), t["mult"], t["shift"], types.output, t["bias"]), a
    ),
    "fire": lambda x, t, a, types: spiking.fire(x[0], t["mult"].long(), t["shift"].long(), a["steps"]),
}


def run_operation(
    op: Operation, inputs: list[Tensor], tensors: Mapping[str, Tensor], input_types: Sequence[str] | None = None
) -> Tensor:
    """Runs one operation of the specification on torch tensors.

    Args:
        op: The operation.
        inputs: The values that it reads.
        tensors: Its tensors by role.
        input_types: The specification's types of the inputs; None for the full range of the tensors' types.

    Returns:
        The value that it writes.
    """
    given = [str(x.dtype).removeprefix("torch.") for x in inputs] if input_types is None else input_types
    return _RUN[op.kind](inputs, tensors, op.attributes, _Types(inputs=tuple(given), output=op.dtype))


class TorchTwin:
    """A checked Program with its tensors on one device.

    Args:
        program: The Program; a spec.ProgramError is raised if it breaks a rule.
        device: The device.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        values = check(program)
        self.program = program
        self._types = {name: value.dtype for name, value in values.items()}
        # the Program's arrays may be read-only, so torch gets a copy
        moved = {key: torch.from_numpy(np.array(tensor)).to(device) for key, tensor in program.tensors.items()}
        self.device = torch.empty(0, device=device).device  # with its index
        self._steps = [(op, {role: moved[key] for role, key in op.tensors.items()}) for op in program.operations]
        self._last_use = {name: number for number, op in enumerate(program.operations) for name in op.inputs}

    def __call__(self, images: Tensor) -> Tensor:
        """Runs a Program that gives logits.

        Args:
            images: uint8 pixels (N, H, W, C), or counts of events (N, T, H, W, C), on the twin's device.

        Returns:
            int32 logits (N, classes).

        Raises:
            ValueError: If the images have another type, shape or device.
        """
        last = self.program.operations[-1].output
        return self._run(images, {last})[last].reshape(images.shape[0], -1)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Runs a Program with named outputs.

        Args:
            images: As in a call.

        Returns:
            The integers (N, *shape) of each output by its name.

        Raises:
            ValueError: As in a call.
        """
        found = self._run(images, {output.value for output in self.program.outputs})
        return {o.name: found[o.value].reshape(images.shape[0], *o.shape) for o in self.program.outputs}

    def _run(self, images: Tensor, wanted: Set[str]) -> dict[str, Tensor]:
        """The values that are wanted, by name."""
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.program.input.value.shape:
            expected = ", ".join(map(str, self.program.input.value.shape))
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, {expected})")
        if images.device != self.device:
            raise ValueError(f"images are on {images.device}, the network on {self.device}; move one to the other")
        values, found = {INPUT_VALUE: images}, {}
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for number, (op, tensors) in enumerate(self._steps):
                types = [self._types[name] for name in op.inputs]
                output = run_operation(op, [values[name] for name in op.inputs], tensors, types)
                values = {name: value for name, value in values.items() if self._last_use.get(name, -1) > number}
                values[op.output] = output
                if op.output in wanted:
                    found[op.output] = output
        return found

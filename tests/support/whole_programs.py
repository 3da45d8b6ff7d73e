"""Whole Programs built by hand, Swin-like and ViT-like, and their images."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec

Array = npt.NDArray[Any]


class ProgramBuilder:
    """Strings operations together with random tensors whose scales keep values alive."""

    def __init__(self, seed: int, height: int, width: int, channels: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.input = spec.InputDescription(
            height=height, width=width, channels=channels, preprocessing={"mean": [0.5] * channels}
        )
        self.operations: list[spec.Operation] = []
        self.tensors: dict[str, Array] = {}

    def add(self, kind: str, inputs: tuple[str, ...], dtype: str, tensors: dict[str, Array], **attributes: Any) -> str:
        name = f"{kind}{len(self.operations)}"
        keys = {role: f"{name}.{role}" for role in tensors}
        self.tensors |= {keys[role]: tensor for role, tensor in tensors.items()}
        self.operations.append(
            spec.Operation(
                kind=kind, name=name, inputs=inputs, output=name, dtype=dtype, attributes=attributes, tensors=keys
            )
        )
        return name

    def _layer(self, shape: tuple[int, ...], a_max: int, dtype: str) -> dict[str, Array]:
        weight = self.rng.integers(-127, 128, shape).astype(np.int8)
        depth = int(np.prod(shape[1:]))
        spread = {"int8": 50, "uint8": 50, "int16": 3000, "int32": 1e6}[dtype]
        factors = spread / (a_max * 0.5 * 73 * np.sqrt(depth)) * self.rng.uniform(0.7, 1.4, shape[0])
        mult, shift = spec.multiplier(factors)
        bias = self.rng.integers(-5000, 5000, shape[0]).astype(np.int32)
        return {"weight": weight, "bias": bias, "mult": mult, "shift": shift}

    def linear(self, x: str, depth: int, channels: int, dtype: str = "int8") -> str:
        return self.add("linear", (x,), dtype, self._layer((channels, depth), 127, dtype), channels=channels)

    def conv(self, x: str, in_channels: int, channels: int, patch: int, dtype: str = "int16") -> str:
        layer = self._layer((channels, patch, patch, in_channels), 255, dtype)
        return self.add(
            "conv2d", (x,), dtype, layer, channels=channels, kernel=[patch] * 2, stride=[patch] * 2, padding=[0, 0]
        )

    def layer_norm(self, x: str, channels: int) -> str:
        gain = self.rng.integers(2**19, 2**20, channels).astype(np.int32)
        offset = self.rng.integers(-(2**34), 2**34, channels).astype(np.int64)
        return self.add("layer_norm", (x,), "int8", {"gain": gain, "offset": offset}, epsilon=channels**2, shift=31)

    def gather(self, x: str, dtype: str, index: Array) -> str:
        index = index.reshape(index.shape[0], -1).astype(np.int32)
        return self.add("gather", (x,), dtype, {"index": index}, rows=index.shape[0], joined=index.shape[1])

    def attention(self, x: str, windows: int, length: int, heads: int, dim: int, *, biased: bool) -> str:
        exp_mult, exp_shift = spec.multiplier(np.full(heads, 32 * 4 / (60 * 60 * np.sqrt(dim))))
        out_mult, out_shift = spec.multiplier(np.full(heads, 1.7))
        tensors = {"exp_mult": exp_mult, "exp_shift": exp_shift, "out_mult": out_mult, "out_shift": out_shift}
        attributes = {"windows": windows, "heads": heads, "qk_dim": dim, "v_dim": dim}
        if biased:
            attributes["biases"] = 3 * length
            tensors["bias_table"] = self.rng.integers(-9000, 9000, (heads, 3 * length)).astype(np.int32)
            tensors["bias_index"] = self.rng.integers(0, 3 * length, (length, length)).astype(np.int32)
            region = np.zeros((windows, length), dtype=np.uint8)
            region[windows // 2 :] = self.rng.integers(0, 3, (windows - windows // 2, length))
            tensors["region"] = region
        return self.add("attention", (x,), "int8", tensors, **attributes)

    def gelu(self, x: str) -> str:
        return self.add("table", (x,), "int8", {"values": self.rng.integers(-20, 128, 256).astype(np.int8)})

    def mlp(self, x: str, channels: int, ratio: int = 4) -> str:
        hidden = self.gelu(self.linear(self.layer_norm(x, channels), channels, ratio * channels))
        return self.add("add", (x, self.linear(hidden, ratio * channels, channels, "int16")), "int16", {})

    def classifier(self, x: str, channels: int, classes: int) -> spec.Program:
        logits = self.linear(x, channels, classes, "int32")
        assert logits == self.operations[-1].output
        return spec.Program(
            input=self.input,
            operations=tuple(self.operations),
            tensors=self.tensors,
            logit_scale=0.0123,
            classes=tuple(f"class {i}" for i in range(classes)),
            origin={"test": True},
        )

    def mean(self, x: str, tokens: int, channels: int) -> str:
        mult, shift = spec.multiplier(np.full(channels, 1 / tokens))
        return self.add("mean", (x,), "int8", {"mult": mult, "shift": shift})


def window_order(side: int, window: int, shift: int) -> Array:
    """Rows of a rolled (side, side) map, window after window."""
    rows = np.roll(np.arange(side * side).reshape(side, side), (-shift, -shift), axis=(0, 1))
    count = side // window
    return rows.reshape(count, window, count, window).transpose(0, 2, 1, 3).reshape(-1)


def swin_block(b: ProgramBuilder, x: str, side: int, window: int, shift: int, channels: int, heads: int) -> str:
    order = window_order(side, window, shift)
    windows, length = (side // window) ** 2, window * window
    normed = b.gather(b.layer_norm(x, channels), "int8", order)
    qkv = b.linear(normed, channels, 3 * channels)
    attended = b.attention(qkv, windows, length, heads, channels // heads, biased=True)
    back = b.gather(b.linear(attended, channels, channels, "int16"), "int16", np.argsort(order))
    return b.mlp(b.add("add", (x, back), "int16", {}), channels)


def swin_program(
    seed: int = 0,
    *,
    size: int = 32,
    patch: int = 4,
    window: int = 4,
    channels: int = 24,
    heads: tuple[int, ...] = (2, 4),
    depths: tuple[int, ...] = (2, 1),
    classes: int = 10,
) -> spec.Program:
    b = ProgramBuilder(seed, size, size)
    side = size // patch
    x = b.conv("images", 3, channels, patch)
    for stage, depth in enumerate(depths):
        for block in range(depth):
            shift = window // 2 if block % 2 and side > window else 0
            x = swin_block(b, x, side, window, shift, channels, heads[stage])
        if stage + 1 < len(depths):
            corners = np.arange(side * side).reshape(side // 2, 2, side // 2, 2).transpose(0, 2, 3, 1).reshape(-1, 4)
            merged = b.layer_norm(b.gather(x, "int16", corners), 4 * channels)
            x = b.linear(merged, 4 * channels, 2 * channels, "int16")
            side, channels = side // 2, 2 * channels
    return b.classifier(b.mean(b.layer_norm(x, channels), side * side, channels), channels, classes)


def vit_program(seed: int = 0, *, size: int = 24, patch: int = 8, channels: int = 32, heads: int = 2) -> spec.Program:
    b = ProgramBuilder(seed, size, size)
    tokens = (size // patch) ** 2
    x = b.conv("images", 3, channels, patch)
    x = b.add("prepend", (x,), "int16", {"rows": b.rng.integers(-500, 500, (1, channels)).astype(np.int16)}, rows=1)
    position = b.rng.integers(-900, 900, (tokens + 1, channels)).astype(np.int16)
    x = b.add("add_constant", (x,), "int16", {"constant": position})
    qkv = b.linear(b.layer_norm(x, channels), channels, 3 * channels)
    attended = b.attention(qkv, 1, tokens + 1, heads, channels // heads, biased=False)
    x = b.add("add", (x, b.linear(attended, channels, channels, "int16")), "int16", {})
    x = b.layer_norm(b.mlp(x, channels), channels)
    return b.classifier(b.gather(x, "int8", np.zeros((1, 1))), channels, 7)


PROGRAMS = {"swin": swin_program, "vit": vit_program}


def images_of(program: spec.Program, count: int, seed: int = 7) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *program.input.value.shape)).astype(np.uint8)

"""Writes the small artifacts that the fuzzer changes, with every kind of operation:

python tests/fuzz/corpus.py FOLDER [--coded]

--coded: compressed ones too, for a build that reads them.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.program_cases import integers, masked, small_program, with_maps
from support.spiking_programs import ProgramBuilder

from swincompress_pl import accel, spec
from swincompress_pl.accel import storage


def folded_program() -> spec.Program:
    """With a map of biases that has few different rows and columns."""
    program = neuron_program((4, 5, 3), 1)
    (conv,) = [op for op in program.operations if op.kind == "conv2d" and "images" in op.inputs]
    shape = spec.check(program)[conv.output].shape
    border = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape[-3:]).copy()
    border[0] += 7
    return dataclasses.replace(program, tensors={**program.tensors, conv.tensors["bias"]: border})


class TinyBuilder(ProgramBuilder):
    """Programs of a few operations: a description soon read, and a mutation that hits something."""

    def __init__(self, seed: int, *shape: int, weight: str = "int8") -> None:
        super().__init__(seed, shape)
        self._shape, self._weight = shape, weight

    def product(self, kind: str, x: str, weight: tuple[int, ...], dtype: str, **attributes: Any) -> str:
        reach = 60 * 60 * np.prod(weight[1:]) ** 0.5 / {"int8": 60, "int16": 9000, "int32": 10**6}[dtype]
        roles = {
            "weight": integers(self.rng, self._weight, weight),
            "bias": self.rng.integers(-999, 999, weight[0]).astype(np.int32),
            "mult": np.full(weight[0], 2**21, np.int32),
            "shift": np.full(weight[0], round(21 + np.log2(reach)), np.uint8),
        }
        return self.emit(kind, (x,), dtype, roles, channels=weight[0], **attributes)

    def patches(self, channels: int, dtype: str) -> str:
        window = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0]}
        return self.product("conv2d", "images", (channels, 2, 2, self._shape[-1]), dtype, **window)

    def head(self, x: str, channels: int) -> str:
        factors = {"mult": np.full(channels, 2**21, np.int32), "shift": np.full(channels, 22, np.uint8)}
        return self.product("linear", self.emit("mean", (x,), "int8", factors), (5, channels), "int32")

    def program(self) -> spec.Program:
        *time, height, width, channels = self._shape
        return spec.Program(
            input=spec.InputDescription(
                height=height, width=width, channels=channels, time_steps=time[0] if time else None
            ),
            operations=tuple(self.operations),
            tensors=self.tensors,
            logit_scale=0.5,
        )


def mlp_program(weight: str) -> spec.Program:
    b = TinyBuilder(1, 5, 6, 3, weight=weight)
    x = b.product("linear", b.patches(7, "int8"), (9, 7), "int8")
    x = b.emit("table", (x,), "int8", {"values": integers(b.rng, "int8", (256,))})
    b.head(b.product("linear", x, (6, 9), "int16"), 6)
    return b.program()


def stream_program() -> spec.Program:
    b = TinyBuilder(2, 4, 4, 3)
    x = b.patches(6, "int16")
    x = b.emit("add_constant", (x,), "int16", {"constant": b.rng.integers(-999, 999, (4, 6)).astype(np.int16)})
    balance = {"gain": b.rng.integers(2**20, 2**22, 6).astype(np.int32), "offset": np.full(6, 2**30, np.int64)}
    y = b.emit("layer_norm", (x,), "int8", balance, epsilon=7, shift=32)
    x = b.emit("add", (x, b.product("linear", y, (6, 6), "int16")), "int16", {})
    x = b.emit("prepend", (x,), "int16", {"rows": b.rng.integers(-999, 999, (1, 6)).astype(np.int16)}, rows=1)
    index = b.rng.integers(-1, 5, (3, 2)).astype(np.int32)
    b.head(b.emit("gather", (x,), "int16", {"index": index}, rows=3, joined=2), 12)
    return b.program()


def attention_program() -> spec.Program:
    b = TinyBuilder(3, 4, 8, 3)
    roles = {
        **{name: np.full(2, 2**21, np.int32) for name in ("exp_mult", "out_mult")},
        **{name: np.full(2, shift, np.uint8) for name, shift in (("exp_shift", 30), ("out_shift", 21))},
        "bias_table": b.rng.integers(-9999, 9999, (2, 7)).astype(np.int32),
        "bias_index": b.rng.integers(0, 7, (4, 4)).astype(np.int32),
        "region": b.rng.integers(0, 2, (2, 4)).astype(np.uint8),
    }
    x = b.patches(2 * (2 * 3 + 2), "int8")
    x = b.emit("attention", (x,), "int8", roles, windows=2, heads=2, qk_dim=3, v_dim=2, biases=7)
    b.head(b.emit("softmax", (x,), "uint8", {}, mult=2**21, shift=21), 4)
    return b.program()


def neuron_program(shape: tuple[int, ...], repeated: int) -> spec.Program:
    b = TinyBuilder(4, *shape)
    window = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    stem = b.layer((6, 3, 3, shape[-1]), 4000)
    x = b.emit("conv2d", ("images",), "int32", stem, channels=6, **window)
    x = b.emit("max_pool", (x,), "int32", {}, kernel=[3, 3], stride=[2, 2], padding=[1, 1])
    x = b.lif(x, 2, repeated=repeated)
    x = b.emit("conv2d", (x,), "int32", b.layer((6, 3, 3, 1), 50), channels=6, groups=6, **window)
    x = b.emit("block_sum", (b.lif(x, 2, soft_reset=1),), "uint6", {}, rows=1, channels=6)
    b.linear(x, 6, 5)
    return b.program()


def counting_program() -> spec.Program:
    b = TinyBuilder(5, 2, 4, 3)
    current = b.linear("images", 3, 4)
    q, k = b.lif(current, 2, repeated=1), b.lif(current, 2, repeated=1, decay=21845, input_decay=0)
    y = b.emit("spike_attention", (q, k, k), "int32", {}, windows=2, heads=2)
    counted = b.emit("add", (q, b.emit("multiply", (k, b.lif(y, 2)), "uint1", {})), "uint2", {})
    y = b.linear(counted, 4, 4)
    factors = {"mult": np.full(4, 2**21, np.int32), "shift": np.full(4, 24, np.uint8)}
    b.head(b.emit("requantize", (y,), "int8", factors), 4)
    return b.program()


def charge_program() -> spec.Program:
    b = TinyBuilder(6, 4, 4, 3)
    factors = {"mult": np.full(4, 2**21, np.int32), "shift": np.full(4, 30, np.uint8)}
    spikes = b.emit("fire", (b.patches(4, "int16"),), "uint1", factors, steps=3)
    bias = b.rng.integers(-99, 99, 4).astype(np.int32)
    b.head(b.emit("integrate", (b.linear(spikes, 4, 4),), "int8", {"bias": bias, **factors}, steps=3), 4)
    return b.program()


def programs() -> dict[str, spec.Program]:
    return {
        "mlp": mlp_program("int8"),
        "packed": mlp_program("int4"),
        "sparse": masked(mlp_program("int8"), 0.6),
        "sparse_packed": masked(mlp_program("int5"), 0.6),
        "stream": stream_program(),
        "maps": with_maps(stream_program()),
        "attention": attention_program(),
        "neurons": neuron_program((4, 5, 3), 1),
        "events": neuron_program((2, 4, 5, 2), 0),
        "counting": counting_program(),
        "charged": charge_program(),
        "folded": folded_program(),
        "whole": small_program(2, channels=7, weight="int3"),
    }


def write(folder: Path, coded: bool) -> list[Path]:
    storage._SPARSE_GAIN_BYTES = 0  # these tensors are small
    paths = [accel.export(program, folder / f"{name}.safetensors") for name, program in programs().items()]
    if coded:
        paths.append(accel.export(mlp_program("int4"), folder / "coded.safetensors", "lzma"))
    return paths


if __name__ == "__main__":
    for path in write(Path(sys.argv[1]), "--coded" in sys.argv):
        print(path)

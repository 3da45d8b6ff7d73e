"""Writes the small artifacts that the fuzzer changes, with every kind of operation: python tests/fuzz/corpus.py FOLDER."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from program_cases import small_program
from spiking_programs import spiking_program

from swincompress_pl import accel, norm


def folded_program() -> norm.Program:
    """With a map of biases that has few different rows and columns."""
    program = spiking_program(3)
    (conv,) = [op for op in program.operations if op.kind == "conv2d" and "images" in op.inputs]
    shape = norm.check(program)[conv.output].shape
    border = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape[-3:]).copy()
    border[0] += 7
    return dataclasses.replace(program, tensors={**program.tensors, conv.tensors["bias"]: border})


def plain_program() -> norm.Program:
    """A convolution and two layers: few rules, so that more mutants live."""
    rng = np.random.default_rng(5)
    tensors: dict[str, np.ndarray] = {}
    operations = []

    def layer(kind: str, x: str, weight: tuple[int, ...], dtype: str, **attributes: object) -> str:
        name = f"{kind}{len(operations)}"
        roles = {
            "weight": rng.integers(-127, 128, weight).astype(np.int8),
            "bias": rng.integers(-999, 999, weight[0]).astype(np.int32),
            "mult": np.full(weight[0], 2**21, np.int32),
            "shift": np.full(weight[0], 30, np.uint8),
        }
        tensors.update({f"{name}.{role}": tensor for role, tensor in roles.items()})
        operations.append(
            norm.Operation(
                kind=kind,
                name=name,
                inputs=(x,),
                output=name,
                dtype=dtype,
                attributes={"channels": weight[0], **attributes},
                tensors={role: f"{name}.{role}" for role in roles},
            )
        )
        return name

    window = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1]}
    x = layer("conv2d", "images", (16, 3, 3, 3), "int8", **window)
    x = layer("conv2d", x, (16, 3, 3, 1), "int8", groups=16, **window)
    pool = {"mult": np.full(16, 2**21, np.int32), "shift": np.full(16, 23, np.uint8)}
    tensors.update({f"pool.{role}": tensor for role, tensor in pool.items()})
    operations.append(
        norm.Operation(
            kind="mean", name="pool", inputs=(x,), output="pool", dtype="int8", tensors={r: f"pool.{r}" for r in pool}
        )
    )
    layer("linear", "pool", (7, 16), "int32")
    return norm.Program(
        input=norm.InputDescription(height=9, width=10), operations=tuple(operations), tensors=tensors, logit_scale=0.5
    )


def programs() -> dict[str, norm.Program]:
    return {
        "small": small_program(0),
        "narrow": small_program(1, weight="int4"),
        "odd": small_program(2, channels=7, weight="int3"),
        "spiking": spiking_program(),
        "events": spiking_program(1, events=True),
        "folded": folded_program(),
        "plain": plain_program(),
    }


def write(folder: Path) -> list[Path]:
    return [accel.export(program, folder / f"{name}.safetensors") for name, program in programs().items()]


if __name__ == "__main__":
    for path in write(Path(sys.argv[1])):
        print(path)

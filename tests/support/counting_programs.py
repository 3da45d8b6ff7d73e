"""Random small Programs whose neurons give counts of spikes, and a small E-SpikeFormer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from support.spiking_programs import ProgramBuilder
from swincompress_pl.spec import InputDescription, Program, multiplier
from swincompress_pl.spec.kinds import KINDS
from swincompress_pl.spec.spiking import AS_IT_IS

Array = npt.NDArray[Any]
SIZE = 5


class _Counting(ProgramBuilder):
    """Appends operations that give counts of 0 to `most`, with factors by which every count occurs."""

    def __init__(self, seed: int, most: int) -> None:
        super().__init__(seed, (SIZE, SIZE, 3))
        self.most = most
        self.dtype = str(self.rng.choice([f"uint{most.bit_length()}", "uint8"]))

    def counts(self, kind: str, x: str, roles: dict[str, Array], **attributes: Any) -> str:
        """An operation that gives counts, whose roles need no requantization."""
        channels = self.seen[x].shape[-1] if kind == "requantize" else len(roles["weight"])
        mult, shift = AS_IT_IS
        unscaled = {"mult": np.full(channels, mult, np.int32), "shift": np.full(channels, shift, np.uint8)}
        reached = KINDS[kind].run([self.seen[x]], {**roles, **unscaled}, attributes, "int32").reshape(-1, channels)
        real = self.most / np.maximum(np.quantile(reached, self.rng.uniform(0.5, 1.0), axis=0), 1)
        factors = dict(zip(("mult", "shift"), multiplier(real), strict=True))
        return self.emit(kind, (x,), self.dtype, {**roles, **factors}, largest=self.most, **attributes)

    def neuron(self, x: str) -> str:
        """Counts of a stream."""
        return self.counts("requantize", x, {})

    def counting_linear(self, x: str, inputs: int, channels: int) -> str:
        """Counts of a linear layer."""
        return self.counts("linear", x, self._weights((channels, inputs)), channels=channels)

    def counting_conv(self, x: str, inputs: int, channels: int, *, groups: int = 1) -> str:
        """Counts of a convolution with a random window."""
        kernel = [int(self.rng.integers(1, min(3, size) + 1)) for size in self.seen[x].shape[1:3]]
        window = {
            "kernel": kernel,
            "stride": [int(s) for s in self.rng.integers(1, 3, 2)],
            "padding": [int(self.rng.integers(0, k)) for k in kernel],
        }
        grouped = {"groups": groups} if groups > 1 else {}
        weights = self._weights((channels, *kernel, inputs // groups))
        return self.counts("conv2d", x, weights, channels=channels, **window, **grouped)

    def _weights(self, shape: tuple[int, ...]) -> dict[str, Array]:
        layer = self.layer(shape, 99)
        return {role: layer[role] for role in ("weight", "bias")}


def counting_program(seed: int = 0, most: int = 4, *, width: int = 6, classes: int = 3) -> Program:
    """A network with every operation that gives or reads counts: neurons on images, on a stream and on bytes, linear
    layers, convolutions, a depthwise one too, attention, and a sum of counts."""
    build = _Counting(seed, most)
    same = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1]}
    stream = build.emit("conv2d", ("images",), "int32", build.layer((width, 3, 3, 3), 999), channels=width, **same)
    seen = build.counting_conv("images", 3, width)
    seen = build.counting_linear(build.counting_conv(seen, width, width, groups=width), width, width)
    stream = build.emit("add", (stream, build.linear(build.neuron(stream), width, width)), "int32", {})
    counts = build.neuron(stream)
    q, k, v = (build.counting_linear(counts, width, channels) for channels in (4, 4, 8))
    attended = build.neuron(build.emit("spike_attention", (q, k, v), "int32", {}, windows=1, heads=2))
    stream = build.emit("add", (stream, build.linear(attended, 8, width)), "int32", {})
    summed = build.emit("add", (counts, build.neuron(stream)), f"uint{(2 * most).bit_length()}", {})
    narrow = build.layer((width, width), 99) | {"shift": np.full(width, 28, np.uint8)}
    narrow_kind = str(build.rng.choice(["int8", "int16"]))
    bytes_ = build.emit("linear", (counts,), narrow_kind, narrow, channels=width)
    of_bytes = build.counting_linear(bytes_, width, width) if narrow_kind == "int8" else build.neuron(bytes_)
    stream = build.emit("add", (build.linear(summed, width, width), build.linear(of_bytes, width, width)), "int32", {})
    parts = [build.neuron(build.emit("block_sum", (x,), "int32", {}, rows=1, channels=width)) for x in (stream, seen)]
    both = build.emit("add", (parts[0], parts[1]), f"uint{(2 * most).bit_length()}", {})
    logits = build.emit(
        "add", (build.linear(parts[0], width, classes), build.linear(both, width, classes)), "int32", {}
    )
    assert logits == build.operations[-1].output
    return Program(
        input=InputDescription(height=SIZE, width=SIZE, channels=3),
        operations=tuple(build.operations),
        tensors=build.tensors,
        logit_scale=0.01,
    )


@lru_cache
def e_spikeformer_program() -> Program:
    """Random weights, and BatchNorm's statistics from random images."""
    import torch  # the other Programs do without, and without spikingjelly

    from support.spiking_cases import COUNTING, SIZE_PX, lively
    from swincompress_pl.quant import quantize

    network, _ = lively(COUNTING["e-spikeformer"], 0, trained_statistics=True)
    images = torch.rand(8, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0)) * 4 - 2
    known = {"mean": [0.5] * 3, "std": [0.25] * 3, "height": SIZE_PX, "width": SIZE_PX}
    return quantize(network.float(), [images], method="max", preprocessing=known).to_program()

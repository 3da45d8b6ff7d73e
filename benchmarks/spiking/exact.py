"""Whether reference, twin and engine give the same integers for whole networks, every layer's spikes included."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swincompress_pl import accel, spec
from swincompress_pl.accel.core import operation_engine
from swincompress_pl.models.factory import create_model
from swincompress_pl.quant import QuantizedNetwork, quantize
from swincompress_pl.quant.twin import run_operation
from swincompress_pl.spec.reference import tensors_of

BUILDERS = {
    "spikformer_cifar10": 32,
    "spikformer_ti": 224,
    "spikformer_s": 224,
    "qkformer_10_384": 224,
    "sdt_8_384": 224,
    "maxformer_10_384": 224,
    "maxformer_cifar": 32,
    "meta_spikeformer_8_256": 224,
    "e_spikeformer_small": 224,
}
COUNTING = ("e_spikeformer_small",)
"""Networks whose neurons give counts: in one time step, or as binary spikes in as many as they may count."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(count: int, size_px: int, seed: int = 0) -> Tensor:
    """uint8 (N, size_px, size_px, 3): squares of colour with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).float()
    noise = torch.randint(-20, 21, (count, 3, size_px, size_px), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size_px, mode="bilinear") + noise
    return smooth.clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def normalized(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) float, as networks take them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std


def built(name: str, steps: int) -> nn.Module:
    """A builder's network with fresh weights."""
    return create_model(name) if name in COUNTING else create_model(name, T=steps)


def program_of(network: QuantizedNetwork, name: str, steps: int) -> spec.Program:
    """The network's integers; those of a network of counts in so many binary steps, if there are more than one."""
    program = network.to_program()
    if name not in COUNTING or steps == 1:
        return program
    binary = spec.binary_steps(program)
    if binary.time_steps != steps:
        raise ValueError(f"{name}: steps={steps}; its neurons count to {binary.time_steps}, so choose that or 1")
    return binary


def quantized(
    name: str,
    steps: int,
    seed: int = 0,
    *,
    bias: float = 1.0,
    network: Callable[[str, int], nn.Module] = built,
) -> QuantizedNetwork:
    """A builder's network with fresh weights, its statistics set by a pass in training mode, in integers.

    bias: of the normalizations, since fresh networks hardly spike. network: builds it.
    """
    torch.manual_seed(seed)
    size_px, made = BUILDERS[name], network(name, steps)
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.constant_(module.bias, bias)
    images = normalized(pictures(4, size_px, seed + 1))
    with torch.no_grad():
        made.train()(images)
    preprocessing = {"mean": MEAN, "std": STD, "height": size_px, "width": size_px}
    return quantize(made.eval(), [images], method="max", preprocessing=preprocessing).eval()


def compare(name: str, steps: int, batches: Iterable[int]) -> dict[str, Any]:
    """Counts of operations, neurons and differing values; a difference anywhere is in `differ`."""
    started, network = time.perf_counter(), quantized(name, steps)
    program = program_of(network, name, steps)
    engine, differ, rates = accel.Engine(program, threads=2), 0, []
    for count in batches:
        pixels = pictures(count, BUILDERS[name], seed=10 + count)
        logits, found = _compare_steps(program, pixels.numpy())
        differ += found["differ"]
        rates = found["rates"]
        differ += int((network.integer_logits(pixels).numpy() != logits).sum())
        differ += int((engine.run_integer(pixels.numpy()) != logits).sum())
    return {
        "network": name,
        "steps": steps,
        "batches": list(batches),
        "operations": len(program.operations),
        "neurons": len(rates),
        "spike_rate_percent": round(100 * float(np.mean(rates)), 2),
        "silent_neurons": sum(rate == 0 for rate in rates),
        "differ": differ,
        "parameter_bytes": program.parameter_bytes,
        "macs": sum(cost.macs for cost in spec.costs(program)),
        "seconds": round(time.perf_counter() - started),
    }


def _compare_steps(program: spec.Program, pixels: Any) -> tuple[Any, dict[str, Any]]:
    """Every operation of twin and engine on the reference's values; the logits, and what was seen."""
    values, known, rates, differ = spec.check(program), {spec.INPUT_VALUE: pixels}, [], 0
    last = {name: number for number, op in enumerate(program.operations) for name in op.inputs}
    for number, (op, output) in enumerate(spec.steps(program, pixels)):
        tensors, types = tensors_of(program, op), [values[each] for each in op.inputs]
        shaped = [np.ascontiguousarray(known[n].reshape(len(pixels), *values[n].shape)) for n in op.inputs]
        engine = operation_engine(op, types, tensors).run(shaped)
        moved = {role: torch.from_numpy(np.array(tensor)) for role, tensor in tensors.items()}
        twin = run_operation(op, [torch.from_numpy(x) for x in shaped], moved, [v.dtype for v in types]).numpy()
        differ += int((engine.reshape(output.shape) != output).sum() + (twin.reshape(output.shape) != output).sum())
        known[op.output] = output
        known = {name: value for name, value in known.items() if last.get(name, -1) > number or name == op.output}
        if op.kind in ("lif", "fire") or (op.kind != "integrate" and "largest" in op.attributes):
            rates.append(float(output.mean()) / op.attributes.get("largest", 1))
    return output.reshape(len(pixels), -1), {"differ": differ, "rates": rates}

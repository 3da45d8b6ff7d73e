"""Train a spiking transformer on event frames, quantize it with the counts as they are, and run it in the engine.

The events are made here: a bar that moves left, right, up or down, seen by a sensor with two polarities.

    $ python examples/events.py
float: 100.0%; engine: 100.0% of 200 recordings (4, 32, 32, 2)
spike rates of 12 layers of neurons: 0.021 to 0.440
per recording: 145,791 synaptic operations, 1,523,840 MACs of the shapes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from swincompress_pl import accel
from swincompress_pl.models import create_model
from swincompress_pl.quant import quantize

T, SIZE = 4, 32
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def moving_bars(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(count, T, H, W, 2) uint8 counts of OFF and ON events per time step and pixel, and (count,) directions."""
    labels = rng.integers(0, 4, count)
    frames = rng.poisson(0.05, (count, T, SIZE, SIZE, 2)).astype(np.uint8)  # noise of the sensor
    steps = list(DIRECTIONS.values())
    for frame, label, start in zip(frames, labels, rng.integers(8, 24, count), strict=True):
        axis, sign = (0, steps[label][0]) if steps[label][0] else (1, steps[label][1])
        for t in range(T):
            edge = start + sign * 2 * t
            on, off = np.arange(edge, edge + 2 * sign, sign), np.arange(edge - 4 * sign, edge - 2 * sign, sign)
            for polarity, places in ((1, on), (0, off)):
                place = (t, places % SIZE) if axis == 0 else (t, slice(None), places % SIZE)
                frame[(*place, ..., polarity)] += 2
    return frames, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("runs/events"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = create_model("SpikeDrivenTransformer", T=T, in_channels=2, num_classes=4, embed_dims=32, num_heads=2,
                           depths=1, pooling_stat="1111")  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(40 if given.quick else 120):
        counts, labels = moving_bars(32, rng)
        frames = torch.from_numpy(counts).permute(0, 1, 4, 2, 3).float()  # (N, T, 2, H, W): the counts themselves
        cross_entropy(network(frames), torch.from_numpy(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()

    counts, labels = moving_bars(32 if given.quick else 200, rng)
    frames = torch.from_numpy(counts).permute(0, 1, 4, 2, 3).float()
    with torch.no_grad():
        float_top1 = float((network.eval()(frames).argmax(1).numpy() == labels).mean())
    as_counts = {"mean": (0.0, 0.0), "std": (1 / 255, 1 / 255), "time_steps": T, "height": SIZE, "width": SIZE}
    quantized = quantize(network, [frames[:32]], preprocessing=as_counts, classes=list(DIRECTIONS))
    engine = accel.load(accel.export(quantized.eval(), given.output / "model.safetensors"))
    top1 = (engine(counts).argmax(1) == labels).mean()
    print(f"float: {float_top1:.1%}; engine: {top1:.1%} of {len(labels)} recordings {engine.input_shape}")
    profile = engine.profile(counts[:8])
    rates = [row.spike_rate for row in profile if row.spike_rate is not None]
    print(f"spike rates of {len(rates)} layers of neurons: {min(rates):.3f} to {max(rates):.3f}")
    print(f"per recording: {profile.sops // 8:,} synaptic operations, {profile.macs // 8:,} MACs of the shapes")


if __name__ == "__main__":
    main()

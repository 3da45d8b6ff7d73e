"""Time the int8 kernel of the C++ engine on one linear layer beside torch and NumPy, and compare its integers.

$ python examples/kernel_benchmark.py
(197, 384) x (384, 1536), avx512_vnni, 1 thread(s)
equal to the specification in NumPy: True; mean error against float: 0.0073
...
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from swincompress_pl import accel
from swincompress_pl.report import measure


def integers(layer: accel.QuantizedLayer, x: np.ndarray) -> np.ndarray:
    """What the layer is defined to compute: exact sums, times mult / 2**shift, rounded half up, clipped to int8."""
    sums = x.astype(np.int64) @ layer.weight_q.T.astype(np.int64) + layer.bias_q
    shift = layer.shift.astype(np.int64)
    rounded = (sums * layer.mult + (np.int64(1) << (shift - 1))) >> shift
    return np.clip(rounded, -127, 127).astype(np.int8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small layer and few repeats")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    rows, inputs, outputs, rounds = (8, 64, 64, 3) if given.quick else (197, 384, 1536, 50)  # fc1 of DeiT-Small

    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    linear = torch.nn.Linear(inputs, outputs)
    x = torch.randn(rows, inputs)
    layer = accel.export_layer(linear, input_scale=4 / 127, output_scale=3 / 127, threads=given.threads)
    codes = layer.quantize_input(x.numpy())
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    ones = np.ones(outputs)

    equal = np.array_equal(layer(codes), integers(layer, codes))
    error = np.abs(layer.dequantize_output(layer(codes)) - linear(x).detach().numpy())
    print(f"({rows}, {inputs}) x ({inputs}, {outputs}), {layer.implementation}, {layer.threads} thread(s)")
    print(f"equal to the specification in NumPy: {equal}; mean error against float: {error.mean():.4f}")

    runs: dict[str, Callable[[], object]] = {
        "int8, export_layer": lambda: layer(codes),
        "int8, accel.linear": lambda: accel.linear(
            codes, layer.weight_q, layer.bias_q, scale=ones * 1e-3, threads=given.threads
        ),
        "torch float32": lambda: torch.nn.functional.linear(x, linear.weight, linear.bias),
        "numpy float32": lambda: x.numpy() @ weight.T + bias,
    }
    macs = rows * inputs * outputs
    with torch.inference_mode():
        for name, latency in measure(runs, rounds=rounds, warm_up=2).items():
            print(f"{name:20s} median {latency.median_ms:8.3f} ms  {macs / latency.median_ms / 1e6:7.1f} GMAC/s")


if __name__ == "__main__":
    main()

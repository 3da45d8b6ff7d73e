"""`swincompress demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swincompress_pl.cli.common import parser


def main(name: str, arguments: Sequence[str]) -> int:
    """Runs the demo; returns 0."""
    command = parser(
        name,
        "Trains a small Swin (or Spikformer) on scikit-learn's digits, prunes it, quantizes it, exports it, runs it in "
        "integers and writes a report. This takes a few minutes on two cores. Nothing is downloaded.",
        "swincompress demo --output runs/demo --threads 2",
    )
    command.add_argument(
        "--output", type=str, default="runs/demo", help="directory for the report, the checkpoint and the artifact"
    )
    command.add_argument(
        "--model", default="swin", choices=("swin", "spikformer"), help="network; spikformer is a spiking one"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    command.add_argument(
        "--threads", type=int, default=None, help="threads of training and measurement; default: as many as torch uses"
    )
    given = command.parse_args(list(arguments))
    if given.threads is not None and given.threads < 1:
        raise ValueError(f"--threads is {given.threads}; give 1 or more")
    from swincompress_pl.demo import run

    run(Path(given.output), model=given.model, seed=given.seed, threads=given.threads)  # prints the path of its report
    return 0

"""`python -m benchmarks.primesvt COMMAND`: see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import torch

from ..pruning.subjects import Place
from .subjects import SUBJECTS


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.primesvt")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train baselines and write their weights into the tree")
    train.set_defaults(command=_train)
    for command in (train,):
        command.add_argument("--models", default=",".join(SUBJECTS), help="names, with commas between them")
        command.add_argument("--data", type=Path, required=True, help="the folder with cifar10_jpeg.tar.xz")
        command.add_argument("--cache", type=Path, required=True, help="of decoded images")
        command.add_argument("--out", type=Path, required=True, help="of checkpoints and results")
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        command.add_argument("--precision", default="32-true")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--commit", default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.command(given)


def _train(given: argparse.Namespace) -> None:
    from .baselines import train

    place = Place(data=given.data, cache=given.cache, device=given.device, precision=given.precision)
    for name in given.models.split(","):
        record = train(SUBJECTS[name], place, given.out, given.commit or _commit())
        print(json.dumps({"model": name, "test": record["test"], "seconds": record["seconds"]}), flush=True)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


if __name__ == "__main__":
    main()

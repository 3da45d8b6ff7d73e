"""`swincompress classify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from swincompress_pl import accel
from swincompress_pl.cli.common import existing_file, parser, print_json
from swincompress_pl.printable import printable
from swincompress_pl.text_table import text_table


def main(name: str, arguments: Sequence[str]) -> int:
    """Classifies pictures by an artifact; returns 0."""
    command = parser(
        name,
        "Classifies pictures by an artifact, and prints the likeliest classes of each. It needs Pillow, and no torch.",
        "swincompress classify model.safetensors cat.jpg",
        "swincompress classify model.safetensors photos/*.jpg --top 1 --json",
    )
    command.add_argument("file", type=str, help="the artifact")
    command.add_argument("pictures", type=str, nargs="+", help="files that Pillow reads")
    command.add_argument("--top", type=int, default=5, help="classes per picture (default: 5)")
    command.add_argument(
        "--exif", action="store_true", help="turn pictures upright as their EXIF orientation says; timm does not"
    )
    command.add_argument("--threads", type=int, default=None, help="threads; default: all cores")
    command.add_argument("--json", action="store_true", help="print JSON")
    given = command.parse_args(list(arguments))
    engine = accel.load(existing_file(given.file), threads=given.threads)
    prepared = accel.Preprocess.of(engine, exif=given.exif)
    found = engine.classify(given.pictures, given.top, preprocess=prepared)
    pairs = list(zip(given.pictures, found, strict=True))
    if given.json:
        print_json(
            [{"picture": picture, "predictions": [dataclasses.asdict(each) for each in row]} for picture, row in pairs]
        )
        return 0
    rows = [_cells(picture, each) for picture, row in pairs for each in row]
    print(text_table(["picture", "class", "probability"], rows, text=2))
    return 0


def _cells(picture: str, prediction: accel.Prediction) -> list[str]:
    name = str(prediction.label) if prediction.name is None else prediction.name
    return [printable(picture), printable(name), f"{prediction.probability:.2%}"]

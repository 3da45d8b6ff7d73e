"""`swincompress export ... -o model.onnx`: the forms for other runtimes, and how near they are to the engine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swincompress_pl import accel, interop, spec
from swincompress_pl.accel.outputs import equal_results
from swincompress_pl.progress import progress_bar

if TYPE_CHECKING:
    from torch import nn

SUFFIX = ".onnx"
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_AT_ONCE = 16
_MISMATCH = 1


def check_options(given: Any) -> None:
    """Raises ValueError for options of ONNX that contradict each other or would be ignored."""
    of_onnx = {
        "--form": given.form, "--float": given.float, "--reduce-range": given.reduce_range,
        "--gather-elements": given.gather_elements, "--verify": given.verify,
    }  # fmt: skip
    named = [option for option, value in of_onnx.items() if value not in (None, False)]
    if not given.output.endswith(SUFFIX):
        if named:
            raise ValueError(f"{', '.join(named)}: only for ONNX; name an output that ends in {SUFFIX}")
        return
    if given.compression is not None:
        raise ValueError(f"--compression {given.compression} is of artifacts; leave it out, or write one")
    if given.float and (others := [option for option in named if option != "--float"] + _quantizing(given)):
        raise ValueError(f"--float writes the network before quantization; leave {', '.join(others)} out")
    if given.verify is not None and not Path(given.verify).is_dir():
        raise FileNotFoundError(f"--verify {given.verify}: there is no such folder; name one with pictures")


def _quantizing(given: Any) -> list[str]:
    return [] if given.quantize is None else ["--quantize"]


def write_program(program: spec.Program, output: Path, given: Any) -> int:
    """Writes a Program as ONNX and compares answers; returns 0, or 1 if an exact form gives other integers."""
    form = given.form or "exact"
    interop.to_onnx(program, output, form=form, gather_elements=given.gather_elements, reduce_range=given.reduce_range)
    print(f"{output}: {output.stat().st_size:,} bytes, form {form}")
    runtime = _runtime(output, needed=given.verify is not None)
    if runtime is None:
        print("onnxruntime is not installed, so its answers were not compared", file=sys.stderr)
        return 0
    code = _compare_integers(program, runtime, given.reference_check) if form == "exact" else 0
    if given.verify is not None:
        _verify(program, runtime, Path(given.verify))
    return code


def write_float(network: nn.Module, output: Path, given: Any) -> int:
    """Writes a float network by torch's exporter: input "images", normalized float32 (N, C, H, W)."""
    import torch

    from swincompress_pl.files import write_file

    for package in ("onnx", "onnxscript"):
        _needed(package)
    shape = _image_shape(network)
    images = torch.zeros(2, *shape)
    program = torch.onnx.export(
        network.eval(), (images,), input_names=["images"], output_names=["logits"],
        dynamic_shapes=[{0: torch.export.Dim("N", min=1)}], dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    content = program.model_proto.SerializeToString()
    write_file(output, lambda stream: stream.write(content))
    print(f"{output}: {output.stat().st_size:,} bytes, float, images (N, {', '.join(map(str, shape))})")
    runtime = _runtime(output, needed=False)
    if runtime is None or not given.reference_check:
        return 0
    pixels = torch.randn(given.reference_check, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(pixels).numpy()
    answer = runtime.run(None, {"images": pixels.numpy()})[0]
    far = float(np.abs(answer - expected).max() / max(float(np.abs(expected).max()), 1e-9))
    print(f"onnxruntime is at most {far:.1e} of the largest logit off torch on {len(pixels)} random images")
    return 0


def _image_shape(network: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that the network says it takes."""
    config = getattr(network, "pretrained_cfg", None) or {}
    size = getattr(getattr(network, "patch_embed", None), "img_size", None) or config.get("input_size", (3, 0, 0))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(network, "in_chans", None) or config.get("input_size", (3,))[0]
    if not height or not width:
        raise ValueError(f"{type(network).__name__} does not say which images it takes; export it with torch.onnx")
    return channels, height, width


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {package}, which is not installed; `pip install swincompress_pl[onnx]` installs it"
        ) from error


def _runtime(file: Path, *, needed: bool) -> Any:
    """An onnxruntime session; None where it is not installed and not needed."""
    try:
        runtime = _needed("onnxruntime")
    except ImportError:
        if needed:
            raise
        return None
    return runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _compare_integers(program: spec.Program, runtime: Any, images: int) -> int:
    """Compares onnxruntime's integers with the specification's on random images."""
    rng, wrong = np.random.default_rng(0), 0
    reference = accel.ReferenceEngine(program)
    with progress_bar() as report:
        for number in range(images):
            report("comparing integers", number, images)
            pixels = rng.integers(0, 256, (1, *program.input.value.shape), dtype=np.uint8)
            wrong += not equal_results(_integers(program, runtime, pixels), reference.run_integer(pixels))
    if wrong:
        print(
            f"onnxruntime's integers differ from the reference on {wrong} of {images} images; please report this",
            file=sys.stderr,
        )
        return _MISMATCH
    if images:
        print(f"reference and onnxruntime: identical integer logits on {images} random images")
    return 0


def _integers(program: spec.Program, runtime: Any, pixels: Any) -> Any:
    names = [f"integer_{output.name}" for output in program.outputs] or ["integer_logits"]
    found = runtime.run(names, {spec.INPUT_VALUE: pixels})
    return dict(zip([o.name for o in program.outputs], found, strict=True)) if program.outputs else found[0]


def pictures_in(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """(file, name of its class) of a folder's pictures; a class is a folder inside it."""
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.is_file()):
        yield file, None if file.parent == folder else file.relative_to(folder).parts[0]


def _verify(program: spec.Program, runtime: Any, folder: Path) -> None:
    """Prints agreement with the engine, and accuracy where the folders are classes of the network."""
    if program.outputs:
        raise ValueError("--verify compares logits, and this network has named outputs; leave it out")
    pictures = list(pictures_in(folder))
    if not pictures:
        raise ValueError(f"--verify {folder}: no pictures ({', '.join(_PICTURES)}) in it")
    engine, preprocess = accel.Engine(program), accel.Preprocess.of(program)
    ours, theirs = [], []
    with progress_bar() as report:
        for first in range(0, len(pictures), _AT_ONCE):
            report("comparing pictures", first, len(pictures))
            pixels = preprocess([str(file) for file, _ in pictures[first : first + _AT_ONCE]])
            ours.append(engine(pixels))
            theirs.append(runtime.run(["logits"], {spec.INPUT_VALUE: pixels})[0])
    engine_logits, runtime_logits = np.concatenate(ours), np.concatenate(theirs)
    agree = float((engine_logits.argmax(1) == runtime_logits.argmax(1)).mean())
    centered = [logits - logits.mean(1, keepdims=True) for logits in (engine_logits, runtime_logits)]
    norms = np.linalg.norm(centered[0], axis=1) * np.linalg.norm(centered[1], axis=1)
    correlation = (centered[0] * centered[1]).sum(1) / np.maximum(norms, 1e-12)
    print(
        f"{len(pictures)} pictures: onnxruntime and the engine agree on {agree:.2%}; correlation of the logits "
        f"{correlation.mean():.4f}, at least {correlation.min():.4f}"
    )
    labels = _labels(program.classes, [name for _, name in pictures])
    if labels is None:
        print("no accuracy: the folders are not the classes of the network")
        return
    for name, logits in (("engine", engine_logits), ("onnxruntime", runtime_logits)):
        print(f"accuracy in {name}: {(logits.argmax(1) == labels).mean():.2%}")


def _labels(classes: tuple[str, ...] | None, names: list[str | None]) -> Any:
    """The number of each picture's class; None where a name is none of the classes."""
    numbers = {name: number for number, name in enumerate(classes or ())}
    known = [numbers.get(name) if name is not None else None for name in names]
    return None if None in known else np.array(known)

"""`swincompress export`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser

from swincompress_pl import accel, interop
from swincompress_pl.accel.outputs import equal_results
from swincompress_pl.cli import export_onnx
from swincompress_pl.cli.common import existing_file, is_checkpoint, parser
from swincompress_pl.progress import progress_bar

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch import nn

    from swincompress_pl.quant import QuantizedNetwork

# torch and lightning are imported where they are needed: --help and errors of the arguments need not wait for them.
_METHODS = ("searched", "max")
_MISMATCH = 1
_IMAGES = 128


def main(name: str, arguments: Sequence[str]) -> int:
    """Writes a checkpoint as an artifact; returns 0, or 1 if a check finds different integers."""
    command = parser(
        name,
        "Writes the quantized network of a Lightning checkpoint as one safetensors file for the integer engine, and "
        "compares torch, reference and engine on random images. A float checkpoint needs --quantize and --data. An "
        "output that ends in .onnx is written for other runtimes, from a checkpoint or an artifact.",
        "swincompress export runs/digits/best.ckpt -o model.safetensors",
        "swincompress export float.ckpt -o model.safetensors --quantize searched --data configs/digits_swin.yaml",
        "swincompress export model.safetensors -o model.onnx",
        "swincompress export model.safetensors -o model.onnx --form qdq --verify images",
    )
    command.add_argument(
        "checkpoint", type=str, help="Lightning checkpoint of a CompressibleClassifier; for ONNX an artifact, too"
    )
    command.add_argument(
        "-o", "--output", type=str, required=True, help="artifact to write; a complete one replaces an old one"
    )
    command.add_argument("--compression", choices=("lzma",), default=None, help="code the artifact without loss")
    command.add_argument(
        "--reference-check", type=int, default=2, metavar="N", help="compare integers on N images; 0 for none"
    )
    command.add_argument(
        "--quantize", type=str, default=None, help=f"quantize a float checkpoint: {' or '.join(_METHODS)}"
    )
    command.add_argument("--bits", type=str, default=None, help="bit widths for --quantize, e.g. W4A8; default: W8A8")
    command.add_argument(
        "--data", type=str, default=None, help="YAML config whose `data` has the images for --quantize"
    )
    command.add_argument("--data-root", type=str, default=None, help="replaces the `root` of that data")
    command.add_argument("--images", type=int, default=None, help="number of images for --quantize; default: 128")
    command.add_argument(
        "--model-class", type=str, default="swincompress_pl.models.CompressibleClassifier",
        help="class of the LightningModule, if it is your own (with CompressionMixin)",
    )  # fmt: skip
    command.add_argument(
        "--model-attribute", type=str, default=None, metavar="PATH",
        help="where the module holds the network to export, if it holds several, e.g. net or model.backbone",
    )  # fmt: skip
    command.add_argument(
        "--form",
        choices=interop.FORMS,
        default=None,
        help="of ONNX: exact to the bit, or for int8 kernels; default: exact",
    )
    command.add_argument("--float", action="store_true", help="ONNX of the network before quantization, by torch")
    command.add_argument(
        "--verify", type=str, default=None, metavar="IMAGES",
        help="ONNX: agreement with the engine, and accuracy, on a folder of pictures",
    )  # fmt: skip
    command.add_argument(
        "--reduce-range", action="store_true", help="--form qdq: weights of 7 bits, for CPUs without VNNI"
    )
    command.add_argument(
        "--gather-elements", action="store_true", help="exact form: faster in onnxruntime, not for onnx's evaluator"
    )
    given = command.parse_args(list(arguments))
    _check_options(given)
    export_onnx.check_options(given)
    return _export(given)


def _check_options(given: Any) -> None:
    """Raises ValueError for options that contradict each other or would be ignored."""
    if given.reference_check < 0:
        raise ValueError(f"--reference-check is {given.reference_check}; give 0 or more")
    if (given.quantize is None) != (given.data is None):
        raise ValueError("--quantize and --data go together: scales are found on the training images of a data config")
    of_quantize = {"--bits": given.bits, "--images": given.images, "--data-root": given.data_root}
    ignored = [f"{option} {value}" for option, value in of_quantize.items() if value is not None]
    if given.quantize is None and ignored:
        raise ValueError(
            f"{' and '.join(ignored)} goes with --quantize: a quantized checkpoint has its widths and scales; leave it "
            "out, or quantize a float checkpoint with --quantize and --data"
        )
    if given.quantize is not None and given.quantize not in _METHODS:
        raise ValueError(f"--quantize is {given.quantize!r}; choose {' or '.join(_METHODS)}")
    if given.images is not None and given.images < 1:
        raise ValueError(f"--images is {given.images}; give 1 or more")
    for option, file in (("the checkpoint", given.checkpoint), ("--data", given.data)):
        if file is not None and Path(given.output).resolve() == Path(file).resolve():
            raise ValueError(f"--output {given.output} is {option} itself, which it would replace; name another file")


def _export(given: Any) -> int:
    file, output = existing_file(given.checkpoint), Path(given.output)
    is_onnx = output.suffix == export_onnx.SUFFIX
    if not is_checkpoint(file) and (not is_onnx or given.float):
        what = "it has no float network" if given.float else "an artifact needs no export"
        raise ValueError(f"{file} is no Lightning checkpoint; {what}")
    if output.is_dir():
        raise ValueError(f"--output {output} is a directory; name a file in it")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: the folder {output.parent} does not exist; make it first")
    if not is_checkpoint(file):
        return export_onnx.write_program(accel.artifact.read(file), output, given)
    _say(f"loading {file}")
    module = load_module(file, given.model_class)
    path = network_path(module, file, given.model_attribute, is_to_be_quantized=given.quantize is not None)
    if given.float:
        return export_onnx.write_float(_float_network(module, path, file), output, given)
    network = quantized_network(module, path, file, is_to_be_quantized=given.quantize is not None)
    if given.quantize is not None:
        network = _quantize(network, given)
    _say(f"writing {output}")
    if is_onnx:
        return export_onnx.write_program(network.to_program(), output, given)
    accel.export(network, output, compression=given.compression)
    print(f"{output}: {output.stat().st_size:,} bytes")
    return _check(network, output, given.reference_check) if given.reference_check else 0


def load_module(file: Path, class_path: str) -> LightningModule:
    """Loads the LightningModule of a checkpoint; a ValueError if the class or the checkpoint does not fit."""
    from lightning.pytorch import LightningModule

    from swincompress_pl.cli.paths import import_from

    import_from(Path.cwd())
    try:
        package, _, name = class_path.rpartition(".")
        module_class = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--model-class {class_path!r} cannot be imported: {error}") from error
    if not (isinstance(module_class, type) and issubclass(module_class, LightningModule)):
        raise ValueError(f"--model-class {class_path!r} is no LightningModule")
    try:
        return module_class.load_from_checkpoint(file, map_location="cpu", weights_only=True).eval()
    except (TypeError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} does not load as {class_path}: {reason}. Pass --model-class for a module of your own; it needs "
            "CompressionMixin to come back compressed"
        ) from error


def network_path(module: LightningModule, file: Path, given: str | None, *, is_to_be_quantized: bool) -> str:
    """Where `module` holds the network to export: as given, or the only one that is quantized or is to be.

    Raises ValueError, naming the networks, if there are several, or none at the given place.
    """
    from swincompress_pl.checkpoint.holder import has_network, network_of, networks_to_name
    from swincompress_pl.checkpoint.networks import paths_of
    from swincompress_pl.quant import QuantizedNetwork

    if given is not None:
        if not has_network(module, given):
            raise ValueError(
                f"--model-attribute {given}: {type(module).__name__} has no network there; {networks_to_name(module)}"
            )
        return given
    paths = paths_of(module)
    quantized = [path for path in paths if isinstance(network_of(module, path), QuantizedNetwork)]
    choice = [path for path in paths if path not in quantized] if is_to_be_quantized else quantized
    if len(choice) > 1:
        raise ValueError(f"{file} holds the networks {', '.join(choice)}; name one by --model-attribute")
    return next(iter([*choice, *paths]), "net")


def quantized_network(module: LightningModule, path: str, file: Path, *, is_to_be_quantized: bool) -> Any:
    """The network at `path` of `module`; a ValueError if it is float and should not be, or the other way round."""
    from swincompress_pl.checkpoint.holder import network_of
    from swincompress_pl.quant import QuantizedNetwork

    network = network_of(module, path)
    if isinstance(network, QuantizedNetwork) == is_to_be_quantized:
        if is_to_be_quantized:
            raise ValueError(f"{file} is quantized already; export it without --quantize")
        raise ValueError(
            f"{file} is not quantized (its network is a {type(network).__name__}): add the callback "
            "QuantizationAwareTraining to the fit, or pass --quantize searched --data CONFIG here"
        )
    return network


def _float_network(module: LightningModule, path: str, file: Path) -> nn.Module:
    """The network at `path`, before quantization."""
    from swincompress_pl.checkpoint.holder import network_of
    from swincompress_pl.quant import QuantizedNetwork

    network = network_of(module, path)
    if isinstance(network, QuantizedNetwork):
        raise ValueError(f"{file} is quantized; --float takes a checkpoint from before, or leave --float out")
    return network


def _quantize(network: nn.Module, given: Any) -> QuantizedNetwork:
    from swincompress_pl import quant

    data = load_data(existing_file(given.data), given.data_root)
    if not hasattr(data, "calibration_dataloader"):
        raise ValueError(f"{given.data}: {type(data).__name__} has no calibration_dataloader; use swincompress_pl.data")
    preprocessing, classes = getattr(data, "preprocessing", None), getattr(data, "class_names", None)
    images, bits = given.images or _IMAGES, given.bits or "W8A8"
    _say(f"quantizing on {images} images")
    return quant.quantize(
        network, data.calibration_dataloader(images), method=given.quantize, bits=bits,
        preprocessing=preprocessing, calibration_images=images, classes=classes, progress=True,
    )  # fmt: skip


def load_data(config: Path, root: str | None) -> Any:
    """The datamodule that the `data` block of a YAML config describes; `root`, if given, replaces its root."""
    from lightning.pytorch import LightningDataModule

    from swincompress_pl.cli.paths import import_from, with_absolute_paths

    try:
        block = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("data")
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{config} is no YAML mapping: {error}") from error
    if not isinstance(block, dict) or "class_path" not in block:
        raise ValueError(f"{config} has no `data` with a class_path; see configs/ for examples")
    import_from(Path.cwd())
    block = with_absolute_paths({"data": block}, config.parent.resolve(), Path.cwd(), "")["data"]
    if root is not None:
        block.setdefault("init_args", {})["root"] = root
    factory = ArgumentParser(exit_on_error=False)
    factory.add_subclass_arguments(LightningDataModule, "data")
    try:
        return factory.instantiate_classes(factory.parse_object({"data": block})).data
    except Exception as error:
        # jsonargparse raises its own type of error, and those of the constructor; all of them are about this block
        raise ValueError(f"{config}: `data` is not accepted: {error}") from error


def _check(network: QuantizedNetwork, file: Path, images: int) -> int:
    """Compares torch, reference and engine on random pixels, and prints the verdict; returns 0 or 1."""
    import torch

    reference = accel.reference(file)
    runs: dict[str, Callable[[Any], Any]] = {"torch": lambda x: _arrays(network.integer_logits(torch.from_numpy(x)))}
    narrow = network.bits.activations < 8
    if not narrow:  # the engine runs 8-bit activations only
        engine = accel.load(file)
        runs[f"engine ({engine.implementation})"] = engine.run_integer
    rng = np.random.default_rng(0)
    wrong = dict.fromkeys(runs, 0)
    with progress_bar() as report, torch.no_grad():
        for number in range(images):
            report("comparing integers", number, images)
            pixels = rng.integers(0, 256, (1, *reference.program.input.value.shape), dtype=np.uint8)
            expected = reference.run_integer(pixels)
            for run_name, run in runs.items():
                wrong[run_name] += not equal_results(run(pixels), expected)
    if not any(wrong.values()):
        print(f"reference, {' and '.join(runs)}: identical integer logits on {images} random images")
        if narrow:
            print(f"{network.bits}: the C++ engine runs 8-bit activations; accel.reference runs this file")
        return 0
    different = ", ".join(f"{name} on {number} of {images}" for name, number in wrong.items() if number)
    print(f"integer logits differ from the reference: {different} images; please report this", file=sys.stderr)
    return _MISMATCH


def _arrays(integers: Any) -> Any:
    """The integers of the twin in NumPy, by name if they have names."""
    return {k: v.numpy() for k, v in integers.items()} if isinstance(integers, dict) else integers.numpy()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)

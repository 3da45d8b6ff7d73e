"""The alternative runtimes, prepared for the same architecture: torch, onnxruntime, OpenVINO, MNN and ExecuTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from swincompress_pl.report.comparison.compare import Runner
from swincompress_pl.report.comparison.worker import SEED, normalized, random_images
from swincompress_pl.report.environment import installed_version

LATENCY_ONLY = (
    "other runtimes run the same architecture with random float weights: their latency counts, their answers do not"
)

_ONNX = ("onnx", "onnxscript")
# {runtime: packages that all of its variants need}
_PACKAGES = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", *_ONNX),
    "openvino": ("openvino", *_ONNX),
    "mnn": ("mnn", *_ONNX),
    "executorch": ("executorch", "torchao"),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run a runtime.

    Attributes:
        name: Its name in tables.
        runtime: A key of `worker.BUILDERS`.
        form: The kind of file that it reads, which `_Forms` makes; None if it rebuilds the network itself.
        converter: A package that makes the file, in addition to those of the runtime.
        settings: As in `Runner`.
    """

    name: str
    runtime: str
    form: str | None = None
    converter: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that must be installed."""
        return _PACKAGES[self.runtime] + (() if self.converter is None else (self.converter,))


RUNTIMES: dict[str, tuple[Variant, ...]] = {
    "torch": (Variant(name="torch fp32", runtime="torch"),),
    "torch-bf16": (Variant(name="torch bf16", runtime="torch", settings={"precision": "bf16"}),),
    "torch-compile": (
        Variant(name="torch.compile fp32", runtime="torch", settings={"compile": True}),
        Variant(name="torch.compile bf16", runtime="torch", settings={"compile": True, "precision": "bf16"}),
    ),
    "onnxruntime": (
        Variant(name="onnxruntime fp32", runtime="onnxruntime", form="onnx"),
        Variant(name="onnxruntime dynamic int8", runtime="onnxruntime", form="onnx dynamic int8"),
    ),
    "onnxruntime-qdq": (Variant(name="onnxruntime static int8 (QDQ)", runtime="onnxruntime", form="onnx static int8"),),
    "openvino": (
        Variant(name="openvino fp32", runtime="openvino", form="onnx", settings={"INFERENCE_PRECISION_HINT": "f32"}),
        Variant(name="openvino int8 (nncf)", runtime="openvino", form="openvino int8", converter="nncf"),
    ),
    # Without VNNI, sums of products of 8 bits saturate at 16 bits. These forms keep their weights to 7 bits, or take
    # the slower instructions that do not saturate.
    "onnxruntime-safe": (
        Variant(name="onnxruntime dynamic int8, 7-bit weights", runtime="onnxruntime", form="onnx dynamic int7"),
        Variant(name="onnxruntime static int8 (QDQ), 7-bit weights", runtime="onnxruntime", form="onnx static int7"),
        Variant(
            name="onnxruntime dynamic int8, precise",
            runtime="onnxruntime",
            form="onnx dynamic int8",
            settings={"session.x64quantprecision": "1"},
        ),
    ),
    "openvino-safe": (
        Variant(name="openvino int8 (nncf), 7-bit weights", runtime="openvino", form="openvino int7", converter="nncf"),
    ),
    "mnn": (
        Variant(name="MNN fp32", runtime="mnn", form="mnn"),
        Variant(name="MNN 8-bit weights", runtime="mnn", form="mnn 8-bit weights"),
    ),
    "executorch": (Variant(name="ExecuTorch int8 (XNNPACK)", runtime="executorch", form="executorch int8"),),
}


def parse_runtimes(text: str) -> tuple[str, ...]:
    """The runtimes in a list such as "torch,onnxruntime"; a ValueError names an unknown one and lists the choices."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown:
        raise ValueError(f"unknown runtime {unknown[0]!r}; choose from {', '.join(RUNTIMES)}, separated by commas")
    return tuple(dict.fromkeys(names))


def prepare(
    names: Sequence[str],
    *,
    origin: Mapping[str, Any] | None,
    image_shape: tuple[int, ...],
    threads: Sequence[int],
    batch: int,
    directory: Path,
    on_progress: Callable[[str], object] | None = None,
) -> dict[int, list[Runner]]:
    """{number of threads: a runner per variant of every named runtime}; files are written into `directory` once.

    The float architecture is rebuilt from `origin`, a `Program.origin`, with random weights. Without it, or if a
    package is missing or a conversion fails, the runner is unavailable and says why.
    """
    forms = _Forms(origin=origin, image_shape=image_shape, batch=batch, directory=directory)
    runners: dict[int, list[Runner]] = {count: [] for count in threads}
    for variant in (variant for name in names for variant in RUNTIMES[name]):
        if on_progress is not None:
            on_progress(f"preparing {variant.name}")
        file, unavailable = _made(variant, forms)
        for count in threads:
            runners[count].append(
                Runner(
                    name=variant.name,
                    runtime=variant.runtime,
                    threads=count,
                    batch=batch,
                    image_shape=image_shape,
                    file=file,
                    origin=origin if variant.form is None else None,
                    settings=variant.settings,
                    unavailable=unavailable,
                )
            )
    return runners


def _made(variant: Variant, forms: _Forms) -> tuple[str | None, str | None]:
    """(file or None, why it is unavailable or None)."""
    missing = [package for package in variant.packages if installed_version(package) is None]
    if missing:
        return None, f"not installed: {', '.join(missing)}"
    if not (forms.origin or {}).get("network"):
        return None, "the artifact does not say which architecture it came from; build the network with create_model"
    if variant.form is None:
        return None, None
    try:
        return str(forms.file(variant.form)), None
    except Exception as error:  # a converter's failure belongs in the table and must not end the comparison
        return (
            None,
            f"conversion failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
        )


@dataclass(kw_only=True)
class _Forms:
    """The files that runtimes read, each made when it is first asked for."""

    origin: Mapping[str, Any] | None
    image_shape: tuple[int, ...]
    batch: int
    directory: Path
    made: dict[str, Path] = field(default_factory=dict)

    def file(self, form: str) -> Path:
        if form not in self.made:
            make: dict[str, Callable[[], Path]] = {
                "onnx": self._onnx,
                "onnx dynamic int8": self._dynamic,
                "onnx dynamic int7": partial(self._dynamic, weight_bits=7),
                "onnx static int8": self._static,
                "onnx static int7": partial(self._static, weight_bits=7),
                "openvino int8": self._openvino_int8,
                "openvino int7": partial(self._openvino_int8, weight_bits=7),
                "mnn": self._mnn,
                "mnn 8-bit weights": partial(self._mnn, weight_bits=8),
                "executorch int8": self._executorch_int8,
            }
            with _quiet():
                self.made[form] = make[form]()
        return self.made[form]

    def _network(self) -> Any:
        import torch

        from swincompress_pl import models

        assert self.origin is not None
        torch.manual_seed(SEED)
        return models.rebuild(self.origin).eval()

    def _onnx(self) -> Path:
        import torch

        *time_steps, height, width, channels = self.image_shape
        path = self.directory / "network.onnx"
        images = torch.zeros(self.batch, *time_steps, channels, height, width)
        torch.onnx.export(self._network(), (images,), path, dynamo=True, external_data=False, verbose=False)
        return path

    def _dynamic(self, weight_bits: int = 8) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = self.directory / f"network.dynamic-int{weight_bits}.onnx"
        quantize_dynamic(self._without_shapes(), path, weight_type=QuantType.QInt8, reduce_range=weight_bits == 7)
        return path

    def _static(self, weight_bits: int = 8) -> Path:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, name: str, samples: Sequence[Any]) -> None:
                self.feeds = iter([{name: sample} for sample in samples])

            def get_next(self) -> dict[str, Any] | None:
                return next(self.feeds, None)

        path = self.directory / f"network.static-int{weight_bits}.onnx"
        model: onnx.ModelProto = self._without_shapes()
        quantize_static(
            model,
            path,
            Reader(model.graph.input[0].name, self._samples()),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=weight_bits == 7,
        )
        return path

    def _without_shapes(self) -> Any:
        """The ONNX model without the inner shapes that torch's exporter leaves, which the quantizers reject."""
        import onnx

        model = onnx.load(self.file("onnx"))
        del model.graph.value_info[:]
        return model

    def _samples(self) -> list[Any]:
        """Random images for a calibration, different from those of the comparison but alike."""
        shape = (self.batch, *self.image_shape)
        return [normalized(random_images(shape, seed)) for seed in (SEED + 1, SEED + 2)]

    def _openvino_int8(self, weight_bits: int = 8) -> Path:
        import nncf
        import openvino

        samples = self._samples()
        model = openvino.Core().read_model(self.file("onnx"))
        quantized = nncf.quantize(
            model,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            fast_bias_correction=True,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE if weight_bits == 7 else nncf.OverflowFix.FIRST_LAYER
            ),
        )
        path = self.directory / f"network.int{weight_bits}.xml"
        openvino.save_model(quantized, path)
        return path

    def _mnn(self, weight_bits: int = 32) -> Path:
        """By MNN's compiled converter: its own command, and `MNN.tools`, install a package that reports uses."""
        path = self.directory / f"network.{weight_bits}.mnn"
        files = ["--modelFile", str(self.file("onnx")), "--MNNModel", str(path), "--bizCode", "none"]
        bits = [] if weight_bits == 32 else ["--weightQuantBits", str(weight_bits)]
        code = "import sys, MNN, _tools; sys.exit(not _tools.mnnconvert(sys.argv))"
        command = [sys.executable, "-c", code, "-f", "ONNX", *files, *bits]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.is_file():
            raise RuntimeError(f"MNN's converter ended with {done.returncode}: {(done.stdout + done.stderr)[-200:]}")
        return path

    def _executorch_int8(self) -> Path:
        """Symmetric, weights per channel, calibrated by torchao."""
        import torch
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from executorch.exir import to_edge_transform_and_lower
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        samples = [torch.from_numpy(sample) for sample in self._samples()]
        traced = torch.export.export(self._network(), (samples[0],)).module()
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(traced, quantizer)
        for sample in samples:
            prepared(sample)
        exported = torch.export.export(convert_pt2e(prepared), (samples[0],))
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
        path = self.directory / "network.int8.pte"
        path.write_bytes(program.buffer)
        return path


@contextlib.contextmanager
def _quiet() -> Any:
    """Silences converters, which print and log at length even if they succeed."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)

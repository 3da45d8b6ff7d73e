"""The alternative runtimes, prepared for the same architecture: torch, onnxruntime and OpenVINO."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
_PACKAGES = {"torch": ("torch",), "onnxruntime": ("onnxruntime", *_ONNX), "openvino": ("openvino", *_ONNX)}


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
            make = {
                "onnx": self._onnx,
                "onnx dynamic int8": self._dynamic,
                "onnx static int8": self._static,
                "openvino int8": self._openvino_int8,
            }
            with _quiet():
                self.made[form] = make[form]()
        return self.made[form]

    def _onnx(self) -> Path:
        import torch

        from swincompress_pl import models

        *time_steps, height, width, channels = self.image_shape
        assert self.origin is not None
        torch.manual_seed(SEED)
        network = models.rebuild(self.origin).eval()
        path = self.directory / "network.onnx"
        images = torch.zeros(self.batch, *time_steps, channels, height, width)
        torch.onnx.export(network, (images,), path, dynamo=True, external_data=False, verbose=False)
        return path

    def _dynamic(self) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = self.directory / "network.dynamic-int8.onnx"
        quantize_dynamic(self._without_shapes(), path, weight_type=QuantType.QInt8)
        return path

    def _static(self) -> Path:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, name: str, samples: Sequence[Any]) -> None:
                self.feeds = iter([{name: sample} for sample in samples])

            def get_next(self) -> dict[str, Any] | None:
                return next(self.feeds, None)

        path = self.directory / "network.static-int8.onnx"
        model: onnx.ModelProto = self._without_shapes()
        quantize_static(
            model,
            path,
            Reader(model.graph.input[0].name, self._samples()),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
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

    def _openvino_int8(self) -> Path:
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
        )
        path = self.directory / "network.int8.xml"
        openvino.save_model(quantized, path)
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

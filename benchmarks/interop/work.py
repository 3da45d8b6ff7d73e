"""One job: which forms a network has and whether they are exact; trained networks on real images; speed."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import openvino
import torch
from onnx.reference import ReferenceEvaluator

from swincompress_pl import accel, interop, spec
from swincompress_pl.quant import quantize
from swincompress_pl.report import describe_environment
from swincompress_pl.report.comparison.bench import ENGINE, ratios_to
from swincompress_pl.report.comparison.compare import Runner, compare
from swincompress_pl.report.plain import write_text

from ..pruning.subjects import Place
from ..quantization.work import calibration_batches, material
from ..runner import result_file
from . import emulated
from .networks import NETWORKS, images_of

_EVALUATED_PIXELS = 64 * 64  # the evaluator of onnx takes minutes on larger images
_IMAGES = 4
_EXACT_IMAGES = {"swin_cifar10": 1000, "deit_tiny": 100}
_EMULATED_IMAGES = 1000
_BATCH = 50
_PROFILED_RUNS = 8
Answers = Callable[[npt.NDArray[np.uint8]], list[npt.NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """kind: "forms" of a network; "answers" of a trained one, its "speed", or its answers "without-vnni"."""

    kind: str
    network: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the file of results."""
        return f"{self.kind}-{self.network.replace(' ', '_').replace(',', '').replace('%', 'percent')}"


def all_jobs() -> list[Job]:
    """Every row of the tables."""
    return [
        *(Job(kind="forms", network=name) for name in NETWORKS),
        *(Job(kind=kind, network=name) for kind in ("answers", "speed") for name in _EXACT_IMAGES),
        Job(kind="without-vnni", network="swin_cifar10"),
    ]


def do(job: Job, folder: Path, place: Place, commit: str, rounds: int) -> Path:
    """Runs `job` and writes its results into `folder`."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        if job.kind == "forms":
            found = _forms(NETWORKS[job.network](), Path(scratch))
        else:
            program, sets = _trained(job.network, place)
            if job.kind == "answers":
                found = _answers(job.network, program, sets, Path(scratch))
            elif job.kind == "speed":
                found = _speed(program, Path(scratch), rounds)
            else:
                found = _without_vnni(program, sets, Path(scratch))
    found |= {
        "kind": job.kind,
        "network": job.network,
        "commit": commit,
        "seconds": round(time.perf_counter() - started),
        "environment": describe_environment() | {"onnx": onnx.__version__},
    }
    return write_text(result_file(folder, job.name), json.dumps(found))


def session(path: Path, threads: int = 1) -> Any:
    """onnxruntime with its default settings but the number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def in_onnxruntime(path: Path, names: Sequence[str], threads: int = 1) -> Answers:
    """The named outputs of a file."""
    runtime = session(path, threads)
    return lambda images: list(runtime.run(list(names), {spec.INPUT_VALUE: images}))


def in_openvino(path: Path, names: Sequence[str]) -> Answers:
    """The same in OpenVINO, in fp32."""
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: [np.asarray(compiled({spec.INPUT_VALUE: images})[name]) for name in names]


def in_onnx(model: onnx.ModelProto, names: Sequence[str]) -> Answers:
    """The same in onnx's own evaluator, in NumPy."""
    evaluator = ReferenceEvaluator(model)
    return lambda images: list(evaluator.run(list(names), {spec.INPUT_VALUE: images}))


def _forms(program: spec.Program, folder: Path) -> dict[str, Any]:
    """What happens to a network in every form."""
    images = images_of(program, _IMAGES)
    expected, floats = spec.run(program, images), accel.Engine(program)(images)
    path = interop.to_onnx(program, folder / "exact.onnx")
    fast = interop.to_onnx(program, folder / "fast.onnx", gather_elements=True)
    model, name = onnx.load(path), ["integer_logits"]
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    found: dict[str, Any] = {
        "input": list(program.input.value.shape),
        "operators": len(model.graph.node),
        "file_bytes": path.stat().st_size,
        "exact": {
            "onnxruntime, 1 thread": _equal(in_onnxruntime(path, name), images, expected),
            "onnxruntime, 2 threads": _equal(in_onnxruntime(path, name, 2), images, expected),
            "onnxruntime, GatherElements": _equal(in_onnxruntime(fast, name), images, expected),
            "openvino": _equal(in_openvino(path, name), images, expected),
        },
    }
    if images.shape[-3] * images.shape[-2] <= _EVALUATED_PIXELS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy casts -inf to integers there
            found["exact"]["onnx's evaluator"] = _equal(in_onnx(model, name), images[:1], expected[:1])
    return found | {"qdq": _conventional(program, images, floats, folder)}


def _equal(answers: Answers, images: npt.NDArray[np.uint8], expected: npt.NDArray[Any]) -> bool:
    return bool(np.array_equal(answers(images)[0], expected))


def _conventional(program: spec.Program, images: Any, floats: Any, folder: Path) -> dict[str, Any]:
    try:
        path = interop.to_onnx(program, folder / "qdq.onnx", form="qdq")
    except spec.ProgramError as error:
        return {"refused": str(error)}
    return {
        "file_bytes": path.stat().st_size,
        **{
            name: min(float(np.corrcoef(a, b)[0, 1]) for a, b in zip(floats, answers(images)[0], strict=True))
            for name, answers in (
                ("onnxruntime", in_onnxruntime(path, ["logits"])),
                ("openvino", in_openvino(path, ["logits"])),
            )
        },
    }


def _trained(name: str, place: Place) -> tuple[spec.Program, dict[str, Any]]:
    """The integers of a trained network, and its images."""
    given = material(name, False, place)
    batches = calibration_batches(given, crops=0)
    quantized = quantize(
        given.network, batches, preprocessing=given.preprocessing, calibration_images=sum(map(len, batches))
    ).eval()
    images = given.sets["test"]
    with torch.no_grad():
        floats = [given.network(given.batch(part)).argmax(1) for part in torch.from_numpy(images.pixels).split(_BATCH)]
    return quantized.to_program(), {
        "pixels": images.pixels, "labels": images.labels, "float": torch.cat(floats).numpy(),
    }  # fmt: skip


def _answers(name: str, program: spec.Program, sets: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Integers on some images, and classes in every form on all of them."""
    pixels, labels = sets["pixels"], sets["labels"]
    exact = interop.to_onnx(program, folder / "exact.onnx", gather_elements=True)
    few, engine = pixels[: _EXACT_IMAGES[name]], accel.Engine(program)
    plain = in_onnxruntime(interop.to_onnx(program, folder / "plain.onnx"), ["integer_logits"], 2)
    wrong = sum(
        int((plain(part)[0] != engine.run_integer(part)).any(1).sum())
        for part in np.array_split(few, len(few) // _BATCH)
    )
    runs: dict[str, Answers] = {"engine": lambda x: [engine(x)]}
    sizes = {"exact": exact.stat().st_size}
    for label, options in (("qdq", {}), ("qdq, 7-bit weights", {"reduce_range": True})):
        path = interop.to_onnx(program, folder / f"{label}.onnx", form="qdq", **options)
        sizes[label] = path.stat().st_size
        runs[f"{label} in onnxruntime"] = in_onnxruntime(path, ["logits"], 2)
        runs[f"{label} in OpenVINO"] = in_openvino(path, ["logits"])
    classes = {"float": sets["float"]} | {
        label: np.concatenate([run(part)[0].argmax(1) for part in np.array_split(pixels, len(pixels) // _BATCH)])
        for label, run in runs.items()
    }
    return {
        "exact_images": len(few),
        "exact_wrong": wrong,
        "images": len(pixels),
        "file_bytes": sizes,
        "percent": {label: 100 * float((found == labels).mean()) for label, found in classes.items()},
        "agreement": {label: float((found == classes["engine"]).mean()) for label, found in classes.items()},
    }


def _without_vnni(program: spec.Program, sets: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What saturation costs, and that the exact form has none, in onnxruntime on an emulated CPU."""
    pixels, labels, engine = sets["pixels"][:_EMULATED_IMAGES], sets["labels"][:_EMULATED_IMAGES], accel.Engine(program)
    files = {
        "exact": (interop.to_onnx(program, folder / "exact.onnx", gather_elements=True), "integer_logits"),
        "qdq": (interop.to_onnx(program, folder / "qdq.onnx", form="qdq"), "logits"),
        "qdq, 7-bit weights": (
            interop.to_onnx(program, folder / "safe.onnx", form="qdq", reduce_range=True), "logits",
        ),
    }  # fmt: skip
    found, ours = emulated.answers(files, pixels, folder), engine.run_integer(pixels)
    classes = {"engine": ours.argmax(1)} | {name: logits.argmax(1) for name, logits in found.items()}
    return {
        "images": len(pixels),
        "exact_wrong": int((found["exact"] != ours).any(1).sum()),
        "percent": {name: 100 * float((each == labels).mean()) for name, each in classes.items()},
        "agreement": {name: float((each == classes["engine"]).mean()) for name, each in classes.items()},
    }


def _speed(program: spec.Program, folder: Path, rounds: int) -> dict[str, Any]:
    """The forms in turns with the engine, one thread, and where onnxruntime's time goes."""
    artifact = accel.export(program, folder / "model.safetensors")
    forms: dict[str, dict[str, Any]] = {
        "exact": {}, "exact, GatherElements": {"gather_elements": True}, "qdq": {"form": "qdq"},
        "qdq, 7-bit weights": {"form": "qdq", "reduce_range": True},
    }  # fmt: skip
    files = {label: interop.to_onnx(program, folder / f"{label}.onnx", **options) for label, options in forms.items()}
    common: dict[str, Any] = {"threads": 1, "batch": 1, "image_shape": program.input.value.shape}
    runners = [Runner(name=ENGINE, runtime="engine", file=str(artifact), **common)]
    runners += [
        Runner(name=f"{label} in onnxruntime", runtime="onnx program", file=str(file), **common)
        for label, file in files.items()
    ]
    runners += [
        Runner(
            name=f"{label} in OpenVINO", runtime="openvino pixels", file=str(files[label]),
            settings={"INFERENCE_PRECISION_HINT": "f32"}, **common,
        )
        for label in ("qdq", "qdq, 7-bit weights")
    ]  # fmt: skip
    results = compare(runners, rounds=rounds)
    return {
        "results": [result.to_dict() for result in results],
        "times_engine": {name: value.to_dict() for name, value in ratios_to(results[0], results[1:]).items()},
        "by_kind": _by_kind(program, files["exact, GatherElements"], folder),
    }


def _by_kind(program: spec.Program, file: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by kind of operation, in the engine and in onnxruntime, whose nodes have the operations' names."""
    images = images_of(program, 1)
    ours: dict[str, float] = defaultdict(float)
    for row in accel.Engine(program, threads=1).profile(images):
        ours[row.kind.split("+")[0]] += row.time_ms
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    # fused nodes would lose their names
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    runtime = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for _ in range(_PROFILED_RUNS):
        runtime.run(None, {spec.INPUT_VALUE: images})
    kinds = {op.name: op.kind for op in program.operations}
    theirs: dict[str, float] = defaultdict(float)
    for event in json.loads(Path(runtime.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            place = event["name"].rpartition("/")[0]
            theirs[kinds.get(place, "output")] += event["dur"] / 1000 / _PROFILED_RUNS
    return {"engine": dict(ours), "onnxruntime": dict(theirs)}

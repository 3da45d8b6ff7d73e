"""Measures an artifact: the engine against other runtimes, with its answers checked in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swincompress_pl import accel
from swincompress_pl.accel.outputs import equal_results
from swincompress_pl.interop import describe_onnx
from swincompress_pl.report.comparison.compare import Progress, Result, Runner, compare
from swincompress_pl.report.comparison.runtimes import prepare
from swincompress_pl.report.environment import describe_environment
from swincompress_pl.report.latency import Ratio, ratio
from swincompress_pl.report.operations import OperationTime, operation_times
from swincompress_pl.report.sizes import program_macs

ENGINE = "engine"
_IMAGES_CHECKED = 2


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a comparison gave.

    Attributes:
        file_bytes: Bytes of the artifact.
        macs: Multiply-accumulates per image.
        batch: Images per pass.
        implementation: Name of the kernels that ran.
        images_checked: Number of random images on which the answers were compared.
        answers_equal: Whether the integer logits of engine and reference were equal, in this very run.
        results: One per runner; the engine is the first.
        ratios: {runtime: its time / the engine's}.
        operations: Time of each operation of the engine.
        environment: What `describe_environment` gave.
    """

    file_bytes: int
    macs: int
    batch: int
    implementation: str
    images_checked: int
    answers_equal: bool
    results: tuple[Result, ...]
    ratios: dict[str, Ratio]
    operations: tuple[OperationTime, ...]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures in JSON types."""
        return {
            "file_bytes": self.file_bytes,
            "macs": self.macs,
            "batch": self.batch,
            "implementation": self.implementation,
            "answers": {"images": self.images_checked, "equal_to_reference": self.answers_equal},
            "results": [result.to_dict() for result in self.results],
            "times_engine": {name: value.to_dict() for name, value in self.ratios.items()},
            "operations": [operation.to_dict() for operation in self.operations],
            "environment": self.environment,
        }


def bench_artifact(
    file: Path,
    *,
    threads: int,
    batch: int,
    against: Sequence[str] = (),
    implementation: str | None = None,
    rounds: int = 10,
    operations: bool = False,
    directory: Path,
    on_progress: Progress,
) -> Bench:
    """Compares the artifact `file` with the runtimes named in `against`, which are keys of `runtimes.RUNTIMES`.

    `directory` takes the files that runtimes read. A runtime that is missing or fails has the reason in its result.
    ArtifactError or ProgramError is raised for a bad file, ValueError for an unknown implementation.
    """
    on_progress("checking the engine against the reference", 0, 1)
    engine = accel.load(file, threads=threads, implementation=implementation)
    images = np.random.default_rng(1).integers(0, 256, (_IMAGES_CHECKED, *engine.input_shape), dtype=np.uint8)
    if against and engine.num_classes == 0:
        raise ValueError(
            f"{file} has named outputs, and {', '.join(against)} would be compared by logits; leave out --against"
        )
    equal = equal_results(engine.run_integer(images), accel.reference(file).run_integer(images))
    times = operation_times(engine.profile(images[:1])) if operations else []
    results = compare_engine(
        engine, file, against=against, origin=engine.program.origin, threads=threads, batch=batch, rounds=rounds,
        directory=directory, on_progress=on_progress,
    )  # fmt: skip
    if results[0].latency is None:
        raise ValueError(f"{file}: the engine could not be measured: {results[0].unavailable}")
    return Bench(
        file_bytes=file.stat().st_size,
        macs=program_macs(engine.program),
        batch=batch,
        implementation=engine.implementation,
        images_checked=_IMAGES_CHECKED,
        answers_equal=equal,
        results=tuple(results),
        ratios=ratios_to(results[0], results[1:]),
        operations=tuple(times),
        environment=describe_environment(threads=threads),
    )


def bench_onnx(
    file: Path,
    *,
    artifact: Path | None,
    threads: int,
    batch: int,
    rounds: int = 10,
    on_progress: Progress,
) -> Bench:
    """Measures a file of `interop.to_onnx` in onnxruntime, and beside it the engine where there is an `artifact`.

    The integers of an exact form are compared with the engine's on random images. ValueError is raised for an ONNX file
    of another origin, and for an artifact of another network.
    """
    described = describe_onnx(file)
    given = described["input"]
    shape = tuple(given[axis] for axis in ("time_steps", "height", "width", "channels") if axis in given)
    runners = [
        Runner(
            name=f"onnxruntime, {described['form']}", runtime="onnx program", threads=threads, batch=batch,
            image_shape=shape, file=str(file),
        )
    ]  # fmt: skip
    checked, equal = 0, True
    if artifact is not None:
        engine = accel.load(artifact, threads=threads)
        if engine.input_shape != shape or program_macs(engine.program) != described["macs"]:
            raise ValueError(f"{artifact} is of another network than {file}; export the ONNX file from it again")
        if described["form"] == "exact":
            checked, equal = _IMAGES_CHECKED, _equal_integers(file, engine)
        ours = Runner(
            name=ENGINE, runtime="engine", threads=threads, batch=batch, image_shape=shape, file=str(artifact)
        )
        runners.insert(0, ours)
    results = compare(runners, rounds=rounds, on_progress=on_progress)
    if results[-1].latency is None:
        raise ValueError(f"{file}: it could not be measured: {results[-1].unavailable}")
    return Bench(
        file_bytes=file.stat().st_size,
        macs=described["macs"],
        batch=batch,
        implementation="onnxruntime" if artifact is None else f"{engine.implementation} and onnxruntime",
        images_checked=checked,
        answers_equal=equal,
        results=tuple(results),
        ratios=ratios_to(results[0], results[1:]),
        operations=(),
        environment=describe_environment(threads=threads),
    )


def _equal_integers(file: Path, engine: accel.Engine) -> bool:
    import onnxruntime

    images = np.random.default_rng(1).integers(0, 256, (_IMAGES_CHECKED, *engine.input_shape), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs() if output.name.startswith("integer_")]
    found = dict(zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True))
    expected = engine.run_integer(images)
    if not isinstance(expected, dict):
        expected = {"logits": expected}
    return all(np.array_equal(found[f"integer_{name}"], integers) for name, integers in expected.items())


def compare_engine(
    engine: accel.Engine,
    file: Path,
    *,
    against: Sequence[str],
    origin: Mapping[str, Any] | None,
    threads: int,
    batch: int = 1,
    rounds: int = 10,
    directory: Path,
    on_progress: Progress | None = None,
) -> list[Result]:
    """The result of the artifact `file` in the engine's implementation, then those of the runtimes in `against`.

    These rebuild the network from `origin` (see `runtimes.prepare`) and read files in `directory`.
    """
    report = on_progress or (lambda *_: None)
    shape = engine.input_shape
    others = prepare(
        against, origin=origin, image_shape=shape, threads=(threads,), batch=batch, directory=directory,
        on_progress=lambda what: report(what, 0, 1),
    )[threads]  # fmt: skip
    ours = Runner(
        name=ENGINE, runtime="engine", threads=threads, batch=batch, image_shape=shape, file=str(file),
        implementation=engine.implementation,
    )  # fmt: skip
    return compare([ours, *others], rounds=rounds, on_progress=on_progress)


def ratios_to(first: Result, others: Sequence[Result]) -> dict[str, Ratio]:
    """{name: its time / the time of `first`} of those that were measured."""
    if first.latency is None:
        return {}
    return {other.name: ratio(other.latency, first.latency) for other in others if other.latency is not None}

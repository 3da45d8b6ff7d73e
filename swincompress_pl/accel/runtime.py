"""Engines: an artifact's Program ready to run, in C++ or, as the definition, in NumPy. One interface for both."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl._deprecated import renamed_attributes
from swincompress_pl.accel import _core, artifact
from swincompress_pl.accel.core import artifact_engine, program_engine, resolve_threads
from swincompress_pl.accel.images import Images, as_images
from swincompress_pl.accel.profile import Counts, Profile, profile_of, spike_counts


@renamed_attributes(class_count="num_classes")
class _Runtime:
    """What both engines share: shapes, checks and the one step from integers to float logits."""

    implementation: str
    threads: int

    def __init__(
        self, taken: spec.InputDescription, num_classes: int, classes: tuple[str, ...] | None, logit_scale: float
    ) -> None:
        self._taken, self._num_classes, self._classes, self._logit_scale = taken, num_classes, classes, logit_scale

    @property
    def program(self) -> spec.Program:
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of the images, or (time steps, height, width, channels) of events."""
        return self._taken.value.shape

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names in the order of the logits, where the artifact has them."""
        return self._classes

    @property
    def num_classes(self) -> int:
        return self._num_classes

    def __call__(self, images: Images | Any) -> npt.NDArray[np.float32]:
        """images: (N, *input_shape) uint8, N >= 0 -> (N, classes) float32 logits: int32 * logit_scale.

        An array, a torch tensor on the CPU, or a list of such, one per image. Raises TypeError for another dtype and
        ValueError for another shape.
        """
        return (self.run_integer(images) * self._logit_scale).astype(np.float32)

    def run_integer(self, images: Images | Any) -> npt.NDArray[np.int32]:
        """images as in a call -> (N, classes) int32 logits, the same bits from every implementation."""
        images = as_images(self._taken, images)
        if images.shape[0] == 0:
            return np.zeros((0, self._num_classes), dtype=np.int32)
        return self._run(np.ascontiguousarray(images))

    def profile(self, images: Images | Any, *, repeats: int = 10) -> Profile:
        """Times every step on `images` (N >= 1): the median of `repeats` runs after a warm-up; one more run counts
        spikes and synaptic operations. Then the peak of the CPU is measured, for about 10 ms."""
        images = as_images(self._taken, images)
        if images.shape[0] == 0:
            raise ValueError("profile needs at least one image, got an empty batch")
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; it must be at least 1")
        steps, times_ns = self._times_ns(np.ascontiguousarray(images), repeats)
        return profile_of(
            self.program,
            steps,
            [float(value) / 1e6 for value in np.median(times_ns, axis=0)],
            self._spike_counts(np.ascontiguousarray(images)),
            implementation=self.implementation,
            threads=self.threads,
            images=images.shape[0],
            peak_gmacs_per_s=self._peak_gmacs_per_s(),
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.program.operations)} operations, images {self.input_shape}, "
            f"{self._num_classes} classes, implementation={self.implementation!r}, threads={self.threads})"
        )

    def _run(self, images: Images) -> npt.NDArray[np.int32]:
        raise NotImplementedError

    def _times_ns(self, images: Images, repeats: int) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
        """The operations that every step covers, and (repeats, steps) times."""
        raise NotImplementedError

    def _spike_counts(self, images: Images) -> list[Counts]:
        raise NotImplementedError

    def _peak_gmacs_per_s(self) -> float | None:
        return None


class Engine(_Runtime):
    """A Program in C++, integers only between pixels and logits; its activations have 8 bits (int8, uint8) or more.

    threads: 1 to 256, None for all CPUs that this process may use (affinity and CPU quotas). implementation: a name of
    `implementations()`, None for the best. An engine may be used from several Python threads: calls take turns and
    release the GIL; Ctrl-C ends a long one. It works in forked children. Pickles and copies hold the artifact and make
    an engine of their own with the same threads and implementation. Raises spec.ProgramError for a Program with
    narrower activations, which only `ReferenceEngine` runs.
    """

    def __init__(self, program: spec.Program, *, threads: int | None = None, implementation: str | None = None) -> None:
        values = spec.check(program)
        classes = values[program.operations[-1].output].channels
        super().__init__(program.input, classes, program.classes, program.logit_scale)
        self._program: spec.Program | bytes = program
        self._hold(program_engine(program, implementation=implementation, threads=threads))

    @classmethod
    def _of_artifact(cls, content: bytes, implementation: str, threads: int) -> Engine:
        """By the C++ reader alone; the Program is made when it is asked for."""
        engine = cls.__new__(cls)
        core, facts = artifact_engine(content, implementation, threads)
        *time, height, width, channels = facts["input_shape"]
        taken = spec.InputDescription(
            height=height, width=width, channels=channels, time_steps=time[0] if time else None
        )
        _Runtime.__init__(engine, taken, facts["class_count"], facts["classes"], facts["logit_scale"])
        engine._program = content
        engine._hold(core)
        return engine

    def _hold(self, core: _core.Engine) -> None:
        self._core = core
        self.implementation = core.implementation
        self.threads = core.threads

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "_program": self._artifact()}
        del state["_core"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        name = self.implementation
        if name not in _core.implementations():
            name = _core.select()
            warnings.warn(
                f"the engine was pickled with implementation={self.implementation!r}, which cannot run here; it runs "
                f"with {name!r}, to the same bits",
                stacklevel=2,
            )
        self._hold(artifact_engine(state["_program"], name, self.threads)[0])

    def _artifact(self) -> bytes:
        return self._program if isinstance(self._program, bytes) else artifact.to_bytes(self._program)

    @property
    def program(self) -> spec.Program:
        if isinstance(self._program, bytes):
            self._program = artifact.unproved_program(self._program)  # the engine has proved it
        return self._program

    def _run(self, images: Images) -> npt.NDArray[np.int32]:
        logits: npt.NDArray[np.int32] = self._core.run([images]).reshape(images.shape[0], self._num_classes)
        return logits

    def _times_ns(self, images: Images, repeats: int) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
        self._core.run([images])
        return self._core.steps, self._core.profile([images], repeats)

    def _spike_counts(self, images: Images) -> list[Counts]:
        return [(int(a), int(b), int(c)) for a, b, c in self._core.count_spikes([images])]

    def _peak_gmacs_per_s(self) -> float:
        return _core.peak_gmacs(self.implementation, self.threads)


class ReferenceEngine(_Runtime):
    """A Program in NumPy, as it is specified: slow, and what every other engine equals to the bit."""

    implementation = "reference"
    threads = 1

    def __init__(self, program: spec.Program) -> None:
        self._program = program
        self._values = spec.check(program)
        classes = self._values[program.operations[-1].output].channels
        super().__init__(program.input, classes, program.classes, program.logit_scale)

    @property
    def program(self) -> spec.Program:
        return self._program

    def _run(self, images: Images) -> npt.NDArray[np.int32]:
        return spec.run(self.program, images)

    def _times_ns(self, images: Images, repeats: int) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
        count = len(self.program.operations)
        times_ns = np.zeros((repeats, count), dtype=np.int64)
        for repeat in range(repeats):
            last = time.perf_counter_ns()
            for number, _ in enumerate(spec.steps(self.program, images)):
                now = time.perf_counter_ns()
                times_ns[repeat, number], last = now - last, now
        return [[number] for number in range(count)], times_ns

    def _spike_counts(self, images: Images) -> list[Counts]:
        seen: dict[str, npt.NDArray[Any]] = {spec.INPUT_VALUE: images}
        counts = []
        for number, (op, output) in enumerate(spec.steps(self.program, images)):
            seen[op.output] = output.reshape(len(images), *self._values[op.output].shape)
            counts.append(spike_counts(self.program, self._values, seen, number))
        return counts


def load(path: str | os.PathLike[str], threads: int | None = None, implementation: str | None = None) -> Engine:
    """The engine of an artifact written by `export`.

    Raises FileNotFoundError, ArtifactError (truncated, altered, foreign, of another version, or with activations below
    8 bits, which `reference` runs), or ValueError for `threads` outside [1, 256] and for an `implementation` that this
    CPU cannot run; the message lists those it can.
    """
    count, name = resolve_threads(threads), _core.select(implementation or "")
    return artifact.through(path, lambda content: Engine._of_artifact(content, name, count))


def reference(path: str | os.PathLike[str]) -> ReferenceEngine:
    """The NumPy engine of an artifact, with the interface of `Engine`."""
    return ReferenceEngine(artifact.read(path))

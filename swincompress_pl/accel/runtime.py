"""Engines: an artifact's Program, ready to run in C++ or, as the definition, in NumPy, with one interface for both."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl._deprecated import renamed_attributes
from swincompress_pl.accel import _core, artifact, pictures
from swincompress_pl.accel.artifact import Result
from swincompress_pl.accel.core import Content, artifact_engine, program_engine, resolve_threads
from swincompress_pl.accel.images import Images, as_images
from swincompress_pl.accel.outputs import EngineOutput, by_name, empty, named_outputs, single_output
from swincompress_pl.accel.pictures import Prediction, Preprocess
from swincompress_pl.accel.profile import Counts, Profile, profile_of, spike_counts
from swincompress_pl.accel.times import LayerTimes, Tuning
from swincompress_pl.accel.tuning import tunings

if TYPE_CHECKING:
    from swincompress_pl.accel.pictures import Picture


@renamed_attributes(class_count="num_classes")
class _Runtime:
    """What both engines share: shapes, checks and the step from integers to float logits."""

    implementation: str
    threads: int

    def __init__(
        self,
        taken: spec.InputDescription,
        num_classes: int,
        classes: tuple[str, ...] | None,
        logit_scale: float,
        named: tuple[EngineOutput, ...] = (),
    ) -> None:
        self._taken, self._num_classes, self._classes, self._logit_scale = taken, num_classes, classes, logit_scale
        self._named = named  # the outputs, if they have names

    @property
    def program(self) -> spec.Program:
        """The Program that runs."""
        raise NotImplementedError

    @property
    def input(self) -> spec.InputDescription:
        """What the engine takes, and in `input.preprocessing` how it is made from a picture."""
        return self.program.input

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of the images, or (time steps, height, width, channels) of events."""
        return self._taken.value.shape

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names in the order of the logits; None if the artifact has none."""
        return self._classes

    @property
    def num_classes(self) -> int:
        """The number of logits; 0 with named outputs."""
        return self._num_classes

    @property
    def outputs(self) -> tuple[EngineOutput, ...]:
        """What the engine gives: the artifact's named outputs in their order, or one entry, "logits" or "features"."""
        if self._named:
            return self._named
        name = "features" if self.program.origin.get("answers") == "features" else "logits"
        return single_output(name, self._num_classes, self._logit_scale)

    def __call__(self, images: Images | Any) -> Any:
        """Computes the logits or the named outputs in float.

        Args:
            images: uint8 (N, *input_shape), N of 0 or more: an array, a torch tensor on the CPU, or a list or tuple of
                them, one per image.

        Returns:
            float32 logits (N, classes): the int32 logits times the Program's `logit_scale`. If the artifact has named
            outputs, {name: float32 (N, *shape)}, channels last: each output's integers times its scale.

        Raises:
            TypeError: If `images` is not uint8; the message says what to pass.
            ValueError: If `images` has another shape; the message says how to mend it.
        """
        found = self.run_integer(images)
        if not self._named:
            return (found * self._logit_scale).astype(np.float32)
        return {output.name: (found[output.name] * output.scale).astype(np.float32) for output in self._named}

    @overload
    def classify(
        self,
        source: Picture,
        top: int = 5,
        *,
        preprocess: Preprocess | Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> list[Prediction]: ...
    @overload
    def classify(
        self,
        source: list[Any] | tuple[Any, ...],
        top: int = 5,
        *,
        preprocess: Preprocess | Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> list[list[Prediction]]: ...
    def classify(
        self,
        source: Picture | Sequence[Picture],
        top: int = 5,
        *,
        preprocess: Preprocess | Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Finds the likeliest classes of pictures. Pillow reads them.

        Args:
            source: A file, the bytes of one, a PIL image, or a list or tuple of them.
            top: Number of classes per picture, 1 or more.
            preprocess: How a picture becomes pixels: a `Preprocess`, a `data.Preprocessing`, or a mapping of those
                fields that the artifact lacks or that differ from it; None for what the artifact says.
            classes: Names of the classes, in the order of the logits; None for those of the artifact.

        Returns:
            The predictions, the likeliest first; for a list of pictures, a list per picture.

        Raises:
            ImportError: If Pillow is not installed.
            OSError: If a file cannot be opened.
            TypeError: If a source is no picture.
            ValueError: If the artifact does not say how to make its pixels, a picture is damaged, an argument does not
                fit, or the engine takes events or has named outputs.
        """
        return pictures.classify(self, source, top, preprocess, classes)

    def run_integer(self, images: Images | Any) -> Any:
        """Computes the logits or the named outputs in integers, which are the same bits in every implementation.

        Args:
            images: As in a call.

        Returns:
            int32 logits (N, classes); with named outputs, {name: integers (N, *shape) of the output's type}.

        Raises:
            TypeError: If `images` is not uint8; the message says what to pass.
            ValueError: If `images` has another shape; the message says how to mend it.
        """
        images = as_images(self._taken, images)
        if self._named:
            return self._run_named(np.ascontiguousarray(images)) if images.shape[0] else empty(self._named)
        if images.shape[0] == 0:
            return np.zeros((0, self._num_classes), dtype=np.int32)
        return self._run(np.ascontiguousarray(images))

    def profile(self, images: Images | Any, *, repeats: int = 10) -> Profile:
        """Times every step.

        After the timed runs, one more run counts spikes and synaptic operations. `Engine` then measures the peak of the
        CPU, for about 10 ms.

        Args:
            images: As in a call, with N of 1 or more.
            repeats: Number of timed runs, 1 or more; the times are their medians.

        Returns:
            The times by step.

        Raises:
            TypeError: If `images` is not uint8.
            ValueError: If `images` has another shape or is empty, or `repeats` is below 1.
        """
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
            f"{self._gives()}, implementation={self.implementation!r}, threads={self.threads})"
        )

    def _gives(self) -> str:
        return f"outputs {', '.join(o.name for o in self._named)}" if self._named else f"{self._num_classes} classes"

    def _run(self, images: Images) -> npt.NDArray[np.int32]:
        raise NotImplementedError

    def _run_named(self, images: Images) -> dict[str, npt.NDArray[Any]]:
        raise NotImplementedError

    def _times_ns(self, images: Images, repeats: int) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
        """The operations that every step covers, and times (repeats, steps)."""
        raise NotImplementedError

    def _spike_counts(self, images: Images) -> list[Counts]:
        raise NotImplementedError

    def _peak_gmacs_per_s(self) -> float | None:
        return None


class Engine(_Runtime):
    """A Program in C++, with integers only between pixels and logits.

    `load` makes it from an artifact. Calls from several Python threads take turns and release the GIL; Ctrl-C ends a
    long one. An engine works in forked children. Pickles and copies hold the artifact and make an engine of their own,
    with the same threads and implementation.

    Args:
        program: The Program; its activations need 8 bits or more, apart from spikes and their counts.
        threads: The most threads to use, 1 to 256; None for all CPUs that this process may use (affinity and CPU
            quotas). All engines of a process share its threads, and a run takes fewer where that is faster.
        implementation: One of `implementations()`; None for the best.

    Raises:
        TypeError: If `threads` is not an integer.
        ValueError: If `threads` is outside its range, or this CPU cannot run `implementation`.
        spec.ProgramError: If the Program breaks a rule of the specification, or has narrower activations, which only
            `ReferenceEngine` runs.
    """

    def __init__(self, program: spec.Program, *, threads: int | None = None, implementation: str | None = None) -> None:
        values = spec.check(program)
        super().__init__(*_facts(program, values))
        self._program: spec.Program | bytes | artifact.StoredArtifact = program
        self._tunings: dict[int, Tuning] = {}
        self._hold(program_engine(program, implementation=implementation, threads=threads))

    @classmethod
    def _of_artifact(cls, stored: artifact.StoredArtifact, implementation: str, threads: int) -> Engine:
        """Makes an engine by the C++ reader alone; the Program is made on first use."""
        engine = cls.__new__(cls)
        core, facts = stored.through(lambda content: artifact_engine(content, implementation, threads))
        *time, height, width, channels = facts["input_shape"]
        taken = spec.InputDescription(
            height=height, width=width, channels=channels, time_steps=time[0] if time else None
        )
        named = tuple(
            EngineOutput(name=name, dtype=dtype, shape=shape, scale=scale)
            for name, dtype, shape, scale in facts["outputs"]
        )
        _Runtime.__init__(engine, taken, facts["class_count"], facts["classes"], facts["logit_scale"], named)
        engine._program, engine._tunings = stored, {}
        engine._hold(core)
        return engine

    def _hold(self, core: _core.Engine) -> None:
        self._core = core
        self.implementation = core.implementation
        self.threads = core.threads

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self)}
        if isinstance(self._program, spec.Program):
            state["_program"] = artifact.to_bytes(self._program)
        del state["_core"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        name = self.implementation
        if name not in _core.implementations():
            name = _core.select()
            warnings.warn(
                f"the engine was pickled with implementation={self.implementation!r}, which cannot run here; it runs "
                f"with {name!r} and gives the same bits",
                stacklevel=2,
            )
        self._hold(self._tuned(name))

    def _read(self, reader: Callable[[Content], Result]) -> Result:
        """What `reader` returns for the artifact's bytes, as `artifact.from_bytes`."""
        if isinstance(self._program, artifact.StoredArtifact):
            return self._program.through(reader)
        held = self._program if isinstance(self._program, bytes) else artifact.to_bytes(self._program)
        return artifact.from_bytes(held, reader)

    def tune(self, times: LayerTimes | None = None) -> dict[str, Tuning]:
        """Lets each linear layer and convolution run in the way that is fastest on this machine, with the same bits.

        Layers over spikes gain most: from which density of spikes on multiplying is faster than listing depends on the
        layer's shape and on the CPU. Times that the table lacks are measured, which takes about 0.1 s per different
        layer of a small network, and should not be disturbed; they are kept for later engines of the same machine.

        Args:
            times: The table; None for that of this machine.

        Returns:
            What was chosen, by the name of the operation; the others run as they did.

        Raises:
            ImportError: If there is no table, and platformdirs, which knows the cache folder, is not installed.
        """
        table = LayerTimes() if times is None else times
        found = tunings(self.program, table, implementation=self.implementation, threads=self.threads)
        self._tunings = found
        self._hold(self._tuned(self.implementation))
        return {self.program.operations[number].name: tuning for number, tuning in found.items()}

    def _tuned(self, implementation: str) -> _core.Engine:
        chosen = {number: tuning.as_core() for number, tuning in self._tunings.items()}
        if isinstance(self._program, spec.Program):
            return program_engine(self._program, implementation=implementation, threads=self.threads, tunings=chosen)
        return self._read(lambda content: artifact_engine(content, implementation, self.threads, chosen))[0]

    @property
    def program(self) -> spec.Program:
        """The Program that runs; after `load` it is made on first use."""
        if not isinstance(self._program, spec.Program):
            self._program = self._read(artifact.unproved_program)  # the engine has proved it
        return self._program

    def _run(self, images: Images) -> npt.NDArray[np.int32]:
        logits: npt.NDArray[np.int32] = self._core.run([images]).reshape(images.shape[0], self._num_classes)
        return logits

    def _run_named(self, images: Images) -> dict[str, npt.NDArray[Any]]:
        return by_name(self._named, self._core.run_all([images]), images.shape[0])

    def _times_ns(self, images: Images, repeats: int) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
        self._core.run([images])
        return self._core.steps, self._core.profile([images], repeats)

    def _spike_counts(self, images: Images) -> list[Counts]:
        return [(int(a), int(b), int(c)) for a, b, c in self._core.count_spikes([images])]

    def _peak_gmacs_per_s(self) -> float:
        return _core.peak_gmacs(self.implementation, self.threads)


class ReferenceEngine(_Runtime):
    """A Program in NumPy: the definition of the result, slow, and equal to every other engine to the bit.

    Args:
        program: The Program.

    Raises:
        spec.ProgramError: If the Program breaks a rule of the specification.
    """

    implementation = "reference"
    threads = 1

    def __init__(self, program: spec.Program) -> None:
        self._program = program
        self._values = spec.check(program)
        super().__init__(*_facts(program, self._values))

    @property
    def program(self) -> spec.Program:
        """The Program that runs."""
        return self._program

    def _run(self, images: Images) -> npt.NDArray[np.int32]:
        return spec.run(self.program, images)

    def _run_named(self, images: Images) -> dict[str, npt.NDArray[Any]]:
        return spec.run_outputs(self.program, images)

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


def _facts(
    program: spec.Program, values: Mapping[str, spec.Value]
) -> tuple[spec.InputDescription, int, tuple[str, ...] | None, float, tuple[EngineOutput, ...]]:
    """What an engine of a checked Program says about itself, from its values."""
    classes = 0 if program.outputs else values[program.operations[-1].output].channels
    return program.input, classes, program.classes, program.logit_scale, named_outputs(program, values)


def load(path: str | os.PathLike[str], threads: int | None = None, implementation: str | None = None) -> Engine:
    """Loads an artifact, which `export` wrote, as an engine in C++.

    Args:
        path: The file.
        threads: The most threads to use, 1 to 256; None for all CPUs that this process may use (affinity and CPU
            quotas). All engines of a process share its threads, and a run takes fewer where that is faster.
        implementation: One of `implementations()`; None for the best.

    Returns:
        The engine.

    Raises:
        FileNotFoundError: If the file is missing.
        ArtifactError: If the file is truncated, altered, not an artifact, of another version, or has activations below
            8 bits, which only `reference` runs.
        TypeError: If `threads` is not an integer.
        ValueError: If `threads` is outside its range, or this CPU cannot run `implementation`; the message lists those
            that it can run.
    """
    count, name = resolve_threads(threads), _core.select(implementation or "")
    return Engine._of_artifact(artifact.StoredArtifact(path), name, count)


def reference(path: str | os.PathLike[str]) -> ReferenceEngine:
    """Loads an artifact as an engine in NumPy, with the interface of `Engine`.

    Args:
        path: The file.

    Returns:
        The engine.

    Raises:
        FileNotFoundError: If the file is missing.
        ArtifactError: If the file is truncated, altered, not an artifact, or of another version.
    """
    return ReferenceEngine(artifact.read(path))

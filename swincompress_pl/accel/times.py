"""Measured times of single layers on this machine: a table that is filled on demand and kept in a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl.accel import _core
from swincompress_pl.accel.core import layer_engine
from swincompress_pl.files import write_file

_KINDS = ("linear", "conv2d")
_FORMAT = 1
_ROUNDS, _RUNS_MAX, _TURN_MS = 3, 20, 10.0  # turns of each candidate; of a turn: runs at most, and about its time


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a layer runs. Its integers are the same for all.

    Attributes:
        block_bytes: Bytes of converted inputs that go through all weights together; None for a size by the
            second-level cache.
        events_max_percent: A layer over spikes lists them if at most this percentage of its inputs are spikes, and
            multiplies otherwise: 0 for hardly ever, 1000 for always, None for what the implementation says.
    """

    block_bytes: int | None = None
    events_max_percent: int | None = None

    def as_core(self) -> tuple[int, int]:
        """Says the same as the extension takes it.

        Returns:
            (block_bytes, events_max_percent), 0 and -1 for None.
        """
        percent = self.events_max_percent
        return self.block_bytes or 0, -1 if percent is None else percent


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """All that a layer's time depends on beside the machine.

    Attributes:
        kind: "linear" or "conv2d".
        shape: Of its input for one image, (rows..., channels).
        dtype: Type of its input, such as "int8" or "uint1".
        largest: The largest magnitude of an input: 1 or 2 where that is proved, else the limit of the type.
        output: Type of its output.
        attributes: Those of the operation, sorted by name, such as (("channels", 96),).
        steps: Time steps of the neurons that alone read its output and run with it; None without.

    Raises:
        ValueError: If the kind has no times.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    largest: int
    output: str
    attributes: tuple[tuple[str, Any], ...]
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind is {self.kind!r}; times are measured of {' and '.join(_KINDS)}")

    @classmethod
    def of(cls, op: spec.Operation, x: spec.Value, neurons: spec.Operation | None = None) -> LayerShape:
        """Takes the shape of an operation.

        Args:
            op: A linear layer or a convolution.
            x: Type, shape and bound of its input.
            neurons: The "lif" operation that alone reads its output, if there is one.

        Returns:
            The shape.

        Raises:
            ValueError: If the operation is of another kind.
        """
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in op.attributes.items()}
        return cls(
            kind=op.kind,
            shape=tuple(x.shape),
            dtype=x.dtype,
            largest=x.reach if x.reach <= 2 else spec.LIMITS[x.dtype][1],
            output=op.dtype,
            attributes=tuple(sorted(plain.items())),
            steps=None if neurons is None else neurons.attributes["steps"],
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(outputs, inputs), or (outputs, kernel height, kernel width, inputs of a group)."""
        given = dict(self.attributes)
        inputs = self.shape[-1] // given.get("groups", 1)
        return (given["channels"], inputs) if self.kind == "linear" else (given["channels"], *given["kernel"], inputs)

    @property
    def key(self) -> str:
        """The shape as text, unique for it."""
        return json.dumps(astuple(self), separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a time is of.

    Attributes:
        shape: The layer.
        implementation: One of `implementations()`.
        threads: Number of threads.
        density: The part of the inputs that are spikes, 0 to 1; None for inputs of all values.
        tuning: How it runs.
    """

    shape: LayerShape
    implementation: str
    threads: int = 1
    density: float | None = None
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        if self.density is not None and not 0 <= self.density <= 1:
            raise ValueError(f"density is {self.density}; it is a part of the inputs, 0 to 1")

    @property
    def key(self) -> str:
        """The fields as text, unique for them."""
        how = [self.implementation, self.threads, self.density, *self.tuning.as_core()]
        return json.dumps(how, separators=(",", ":")) + self.shape.key


class LayerTimes:
    """Times of linear layers and convolutions on this machine, alone, with random weights and inputs.

    A time that is asked for the first time is measured, and kept in a file. Times of another CPU, or of another build
    of the engine, are not used; the table is then empty. Several processes may use one file.

    Args:
        file: The file; None for one of this CPU in the user's cache folder (`SWINCOMPRESS_CACHE`, else that of the
            operating system).

    Attributes:
        file: The file.

    Raises:
        ImportError: If there is no file, and platformdirs, which knows the cache folder, is not installed.
    """

    def __init__(self, file: str | os.PathLike[str] | None = None) -> None:
        self.file = _usual_file() if file is None else Path(file)
        self._times: dict[str, float] = self._stored()

    def __len__(self) -> int:
        return len(self._times)

    def time_ms(
        self,
        shape: LayerShape,
        *,
        implementation: str | None = None,
        threads: int = 1,
        density: float | None = None,
        tuning: Tuning | None = None,
    ) -> float:
        """Looks up a layer's time for one image, or measures it.

        Args:
            shape: The layer.
            implementation: One of `implementations()`; None for the best.
            threads: Number of threads.
            density: The part of the inputs that are spikes, 0 to 1; None for inputs of all values.
            tuning: How it runs; None for as usual.

        Returns:
            The time of the fastest of several runs, in milliseconds.

        Raises:
            ValueError: If this CPU cannot run `implementation`, or the density is none.
            spec.ProgramError: If the shape breaks a rule of the specification.
        """
        measured = Measured(
            shape=shape,
            implementation=_core.select(implementation or ""),
            threads=threads,
            density=density,
            tuning=tuning or Tuning(),
        )
        return self.times_ms([[measured]])[0][0]

    def times_ms(self, groups: Sequence[Sequence[Measured]]) -> list[list[float]]:
        """Looks up times, or measures them; those of a group, which are to be compared, in turns.

        Args:
            groups: What the times are of. A group of which one is missing is measured as a whole.

        Returns:
            The times in milliseconds, as in `time_ms`.
        """
        fresh: dict[str, float] = {}
        for group in groups:
            if any(each.key not in self._times for each in group):
                fresh |= dict(zip((each.key for each in group), _measure(group), strict=True))
        if fresh:
            self._times = self._stored() | self._times | fresh  # what other processes have added meanwhile
            self._store()
        return [[self._times[each.key] for each in group] for group in groups]

    def _stored(self) -> dict[str, float]:
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            facts, times = content["facts"], {str(key): float(value) for key, value in content["times"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{self.file} has no times that can be read ({error}); they are measured again", stacklevel=3)
            return {}
        whole = all(math.isfinite(value) and value > 0 for value in times.values())
        return times if facts == _facts() and whole else {}

    def _store(self) -> None:
        content = json.dumps({"facts": _facts(), "times": self._times}, indent=1).encode()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.file, lambda stream: stream.write(content))
        except OSError as error:
            warnings.warn(f"the measured times of layers are not kept: {error}", stacklevel=4)


def _measure(group: Sequence[Measured]) -> list[float]:
    """Milliseconds of each, the fastest of runs in turns."""
    engines = [_engine(each) for each in group]
    inputs = [_inputs(each) for each in group]
    best = [math.inf] * len(group)
    for engine, x in zip(engines, inputs, strict=True):
        engine.run([x])
    for _ in range(_ROUNDS):
        for number, (engine, x) in enumerate(zip(engines, inputs, strict=True)):
            first = _fastest_ms(engine, x, 1)
            runs = int(min(max(_TURN_MS / first, 1), _RUNS_MAX))
            best[number] = min(best[number], first, _fastest_ms(engine, x, runs))
    return best


def _fastest_ms(engine: _core.Engine, x: npt.NDArray[Any], runs: int) -> float:
    return float(engine.profile([x], runs).sum(axis=1).min()) / 1e6


def _engine(measured: Measured) -> _core.Engine:
    shape, rng = measured.shape, np.random.default_rng(0)
    weight = rng.integers(-127, 128, shape.weight_shape).astype(np.int8)
    channels = shape.weight_shape[0]
    # Currents of neurons are sums as they are; other results fill the output's type.
    down = 0 if shape.output == "int32" else round(math.log2(max(weight[0].size, 2)) / 2) + 7
    tensors: dict[str, npt.NDArray[Any]] = {
        "weight": weight,
        "bias": np.zeros(channels, np.int32),
        "mult": np.full(channels, 2**21, np.int32),
        "shift": np.full(channels, 21 + down, np.uint8),
    }
    x = spec.Value(dtype=shape.dtype, shape=shape.shape, largest=shape.largest)
    return layer_engine(
        shape.kind,
        dict(shape.attributes),
        tensors,
        x,
        shape.output,
        neuron_steps=shape.steps,
        tuning=measured.tuning.as_core(),
        implementation=measured.implementation,
        threads=measured.threads,
    )


def _inputs(measured: Measured) -> npt.NDArray[Any]:
    shape, rng = measured.shape, np.random.default_rng(1)
    storage = spec.STORAGE[shape.dtype]
    if measured.density is not None:
        return (rng.random((1, *shape.shape)) < measured.density).astype(storage)
    low = 0 if shape.dtype.startswith("uint") else -shape.largest
    return rng.integers(low, shape.largest + 1, (1, *shape.shape)).astype(storage)


def _usual_file() -> Path:
    folder = os.environ.get("SWINCOMPRESS_CACHE") or _users_folder()
    name = hashlib.sha256(_facts()["cpu"].encode()).hexdigest()[:16]
    return Path(folder) / f"layer_times-{name}.json"


def _users_folder() -> Path:
    try:
        import platformdirs  # which an artifact runs without
    except ImportError as error:
        raise ImportError(
            "without platformdirs, nothing says where measured times are kept; `pip install platformdirs`, set "
            "SWINCOMPRESS_CACHE to a folder, or pass LayerTimes(file)"
        ) from error
    return platformdirs.user_cache_path("swincompress_pl")


def _facts() -> Mapping[str, Any]:
    """What the times hold for: this CPU and this build of the engine."""
    build = Path(_core.__file__).stat()
    return {"format": _FORMAT, "cpu": _cpu(), "engine": f"{build.st_size}-{build.st_mtime_ns}"}


def _cpu() -> str:
    """The CPU by its maker's numbers, as names alone may stand for several; without /proc, its name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    names = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    return ", ".join([found[name] for name in names if name in found] + [f"{os.cpu_count()} CPUs"])

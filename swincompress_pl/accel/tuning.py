"""How each layer of a network runs fastest on this machine, by measured times."""

from __future__ import annotations

from collections import Counter

from swincompress_pl import spec
from swincompress_pl.accel import _core
from swincompress_pl.accel.times import LayerShape, LayerTimes, Measured, Tuning

# Of the places of spikes: two between which the time of listing them is a line, and one for the products.
_FEW, _SOME, _MANY = 0.04, 0.15, 0.3
_PERCENT_MAX = 1000
_BLOCK_BYTES = 128 * 1024  # for CPUs whose second-level cache is smaller, or shared by more, than the system says
# What a block of another size must bring, and of what time, or noise would choose.
_GAIN_MIN, _TIME_MIN_MS = 0.03, 0.05


def tunings(program: spec.Program, times: LayerTimes, *, implementation: str, threads: int) -> dict[int, Tuning]:
    """Finds how the layers of a Program run fastest.

    What `times` lacks is measured now, each different layer once, and kept there.

    Args:
        program: The Program.
        times: The table of this machine.
        implementation: One of `implementations()`.
        threads: Number of threads.

    Returns:
        Tunings by the number of the operation; those without any run as they do by default.
    """
    shapes = layer_shapes(program)
    different = list(dict.fromkeys(shapes.values()))
    wanted = {shape: _candidates(shape, implementation, threads) for shape in different}
    found = dict(zip(different, times.times_ms(list(wanted.values())), strict=True))
    best = {shape: _best(shape, implementation, found[shape]) for shape in different}
    return {number: best[shape] for number, shape in shapes.items() if best[shape] != Tuning()}


def layer_shapes(program: spec.Program) -> dict[int, LayerShape]:
    """The shapes of a Program's linear layers and convolutions that are not grouped, by number of the operation."""
    values = spec.check(program)
    readers = Counter(name for op in program.operations for name in op.inputs)
    readers.update(output.value for output in program.outputs)
    behind = {op.inputs[0]: op for op in program.operations if op.kind == "lif"}
    found = {}
    for number, op in enumerate(program.operations):
        if op.kind not in ("linear", "conv2d") or op.attributes.get("groups", 1) > 1:
            continue
        neurons = behind.get(op.output) if readers[op.output] == 1 else None
        joined = neurons is not None and not neurons.attributes["repeated"]
        found[number] = LayerShape.of(op, values[op.inputs[0]], neurons if joined else None)
    return found


def _lists_spikes(shape: LayerShape, implementation: str) -> bool:
    return shape.dtype.startswith("uint") and shape.largest <= _core.event_largest(implementation)


def _candidates(shape: LayerShape, implementation: str, threads: int) -> list[Measured]:
    """What decides between the ways in which a layer can run."""

    def measured(density: float | None, tuning: Tuning) -> Measured:
        return Measured(shape=shape, implementation=implementation, threads=threads, density=density, tuning=tuning)

    if not _lists_spikes(shape, implementation):
        return [measured(None, Tuning()), measured(None, Tuning(block_bytes=_BLOCK_BYTES))]
    always, never = Tuning(events_max_percent=_PERCENT_MAX), Tuning(events_max_percent=0)
    return [measured(_FEW, always), measured(_MANY, always), measured(_SOME, never)]


def _best(shape: LayerShape, implementation: str, times_ms: list[float]) -> Tuning:
    if not _lists_spikes(shape, implementation):
        usual, other = times_ms
        better = usual >= _TIME_MIN_MS and other < (1 - _GAIN_MIN) * usual
        return Tuning(block_bytes=_BLOCK_BYTES) if better else Tuning()
    few, many, products = times_ms
    slope = (many - few) / (_MANY - _FEW)
    if slope <= 0:
        return Tuning(events_max_percent=_PERCENT_MAX if few < products else 0)
    crossing = _FEW + (products - few) / slope
    return Tuning(events_max_percent=round(100 * min(max(crossing, 0.0), _PERCENT_MAX / 100)))

"""Compress vision transformers, standard and spiking, and run them in integers.

    swincompress_pl.prune(network, holdout, input_shape=(1, 3, 224, 224))
    swincompress_pl.export(swincompress_pl.quantize(network, dataloader), "model.safetensors")
    logits = swincompress_pl.load("model.safetensors")(images)

`callbacks`, `models` and `data` are for Lightning; `pruning`, `quant` and `accel` have the rest. Names are imported on
first use: importing this module imports neither torch nor Lightning, and `load` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from swincompress_pl._deprecated import install as _find_old_modules
from swincompress_pl.dependencies import missing_package as _missing_package

if TYPE_CHECKING:
    from swincompress_pl.accel import export, load
    from swincompress_pl.checkpoint.plain import load_network, save_network
    from swincompress_pl.pruning import primesvt, prune
    from swincompress_pl.quant import quantize

__version__ = "0.1.0"
__all__ = ["export", "load", "load_network", "primesvt", "prune", "quantize", "save_network"]

_ROOM_OF = {
    "export": "accel",
    "load": "accel",
    "load_network": "checkpoint.plain",
    "primesvt": "pruning",
    "prune": "pruning",
    "quantize": "quant",
    "save_network": "checkpoint.plain",
}
_ROOMS = ("accel", "callbacks", "checkpoint", "data", "hub", "interop", "models", "pruning", "quant", "report", "spec")

_find_old_modules()


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF and name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        room = importlib.import_module(f"{__name__}.{_ROOM_OF.get(name, name)}")
    except ImportError as error:
        missing = _missing_package(error)
        if missing is None:
            raise
        raise ImportError(f"{__name__}.{name}: {missing}") from error
    return getattr(room, name) if name in _ROOM_OF else room


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS, "__version__"]

"""Arguments are checked when they are given: an error names the argument, the value and what it has to be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from swincompress_pl import arguments, prune
from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT, QuantizationAwareTraining
from swincompress_pl.models import create_model
from swincompress_pl.models.training import DistillationConfig, MixingConfig, OptimizationConfig
from swincompress_pl.pruning import (
    AdaptivePruningConfig,
    AllocatedPolicy,
    HoldOut,
    PrimeSVTConfig,
    PrioritizedPolicy,
    collect_gradients,
)
from swincompress_pl.quant import Bits, QuantizedNetwork, SearchOptions
from swincompress_pl.quant.rounding import Learning


class Foreign:
    """Nothing that compares, hashes or shows itself."""

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ODD: list[Any] = [
    math.nan, math.inf, -math.inf, 0, -1, 0.5, 1.5, 10**400, -(2**70), "3", "", "a\x00b", b"3", True, False, None, (),
    [], {}, {"a": 1}, {3}, [None], ["x"], [math.nan], (1, "2"), object(), Foreign(), 1j, Fraction(1, 3), np.int64(3),
    np.float32(0.5), np.float64("nan"), np.bool_(True), np.array([0.1, 0.2]), np.array([[1]]), np.array(2),
    torch.tensor(1.0), torch.tensor([1.0, 2.0]), range(3), lambda: 1, int,
]  # fmt: skip
HOLDOUT = (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))


def _qat(**options: Any) -> Any:
    return QuantizationAwareTraining(**{"start_epoch": 1, **options})


def _holdout(**options: Any) -> Any:
    return HoldOut(*HOLDOUT, **options)


def _from_batches(**options: Any) -> Any:
    return HoldOut.from_batches([HOLDOUT], **options)


def _refusal(act: Callable[[], Any]) -> str | None:
    """The ValueError's text; every other exception is foreign, and goes on."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return None


MAKERS: dict[str, tuple[Callable[..., Any], Any]] = {
    "AdaptiveIterativePruning": (AdaptiveIterativePruning, AdaptiveIterativePruning.__init__),
    "PrimeSVT": (PrimeSVT, inspect.unwrap(PrimeSVT.__init__)),
    "QuantizationAwareTraining": (_qat, QuantizationAwareTraining.__init__),
    "AdaptivePruningConfig": (AdaptivePruningConfig, AdaptivePruningConfig),
    "PrimeSVTConfig": (PrimeSVTConfig, PrimeSVTConfig.__dataclass_fields__),
    "AllocatedPolicy": (AllocatedPolicy, AllocatedPolicy),
    "PrioritizedPolicy": (PrioritizedPolicy, PrioritizedPolicy),
    "SearchOptions": (SearchOptions, SearchOptions.__dataclass_fields__),
    "Learning": (Learning, Learning),
    "Bits": (Bits, Bits),
    "OptimizationConfig": (OptimizationConfig, OptimizationConfig),
    "MixingConfig": (MixingConfig, MixingConfig),
    "DistillationConfig": (DistillationConfig, DistillationConfig),
}


def _names(source: Any) -> list[str]:
    found = source if isinstance(source, dict) else inspect.signature(source).parameters
    return [name for name in found if name not in ("self", "callback", "args", "kwargs")]


PLACES = [(kind, name) for kind, (_, source) in MAKERS.items() for name in _names(source)]
PLACES += [("HoldOut", name) for name in ("batch_size", "confidence", "seed", "cache_size_bytes", "sharded")]


def _make(kind: str) -> Callable[..., Any]:
    return _holdout if kind == "HoldOut" else MAKERS[kind][0]


@pytest.mark.filterwarnings("ignore:tolerance=")
@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_odd_values_are_taken_or_refused_by_the_arguments_name(kind: str, name: str) -> None:
    if (kind, name) == ("PrimeSVT", "calibration_dataloader"):
        pytest.skip("any iterable is one")
    for value in ODD:
        refused = _refusal(lambda value=value: _make(kind)(**{name: value}))
        assert refused is None or (name in refused and "not supported" not in refused), (value, refused)


WHOLE = [
    *[(kind, "start_epoch") for kind in ("AdaptiveIterativePruning", "PrimeSVT", "QuantizationAwareTraining")],
    ("AdaptiveIterativePruning", "every_n_epochs"), ("AdaptiveIterativePruning", "max_images"),
    ("AdaptiveIterativePruning", "holdout_size_bytes"), ("AdaptiveIterativePruning", "gradient_batches"),
    ("AdaptivePruningConfig", "round_to"), ("AdaptivePruningConfig", "max_rounds"), ("PrimeSVTConfig", "round_to"),
    ("QuantizationAwareTraining", "calibration_images"), ("QuantizationAwareTraining", "freeze_epoch"),
    ("SearchOptions", "rows"), ("SearchOptions", "seed"), ("Learning", "iterations"), ("Learning", "batch_images"),
    ("Bits", "weights"), ("Bits", "activations"), ("Bits", "first_and_last"), ("HoldOut", "batch_size"),
    ("HoldOut", "cache_size_bytes"), ("HoldOut", "seed"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), WHOLE)
def test_whole_numbers_are_whole(kind: str, name: str) -> None:
    for bad in (math.nan, math.inf, 0.5, 3.5, "3", True, -1, [3], torch.tensor(3)):
        with pytest.raises(ValueError, match=name):
            _make(kind)(**{name: bad})
    for good in (3, 3.0, np.int64(3), np.float32(3), np.uint8(3)):
        made = _make(kind)(**{name: good})
        for holder in (made, getattr(made, "config", None)):
            if hasattr(holder, name):
                assert (getattr(holder, name), type(getattr(holder, name))) == (3, int)


NUMBERS: list[tuple[str, str]] = [
    ("AdaptiveIterativePruning", "tolerance"), ("AdaptivePruningConfig", "first_tolerance"),
    ("AdaptivePruningConfig", "step"), ("AdaptivePruningConfig", "min_step"), ("AdaptivePruningConfig", "max_sparsity"),
    ("AdaptivePruningConfig", "target"), ("AdaptivePruningConfig", "time_budget_s"), ("PrimeSVT", "tolerance"),
    ("PrimeSVTConfig", "min_memory_saving"), ("PrimeSVTConfig", "min_block_share"), ("PrimeSVTConfig", "rates"),
    ("AllocatedPolicy", "resolution_points"), ("PrioritizedPolicy", "theta"), ("PrioritizedPolicy", "increments"),
    ("PrioritizedPolicy", "target_sets"), ("PrioritizedPolicy", "benefit_resolution_points"),
    ("QuantizationAwareTraining", "percentile"), ("QuantizationAwareTraining", "scale_lr_factor"),
    ("QuantizationAwareTraining", "distillation"), ("QuantizationAwareTraining", "temperature"), ("Learning", "lr"),
    ("HoldOut", "confidence"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_numbers_are_finite_and_no_texts_or_bools(kind: str, name: str) -> None:
    for bad in (math.nan, math.inf, "0.5", True, -0.5, [math.nan], ["0.5"], (True,), {0.5}, torch.tensor(0.5)):
        with pytest.raises(ValueError, match=name):
            _make(kind)(**{name: bad})


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"rows": 0}, "search: rows=0: it has to be an integer of 1 or more"),
        ({"rows": math.nan}, "search: rows=nan"),
        ({"equalize": "no"}, "search: equalize='no': it has to be True or False"),
        ({"rounding": "best"}, "search: rounding='best': it has to be one of nearest, second_order, learned"),
        ({"learning": {"iterations": 1.5}}, "search: learning: iterations=1.5"),
        ({"learning": {"steps": 3}}, "search: learning has no option steps; there are iterations"),
        ({"speed": 1}, "search has no option speed; there are equalize"),
        ({3: 1}, "search has no option 3"),
        (7, "search=7: it has to be a mapping of equalize"),
    ],
)
def test_options_of_the_search_are_refused_when_the_callback_is_made(search: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(start_epoch=90, search=search)


def test_bits_are_of_any_integer_type_and_names_are_shown() -> None:
    bits = Bits(weights=np.int64(4), layers={"a": np.uint8(6)})  # type: ignore[arg-type,dict-item]
    assert (bits, type(bits.weights)) == (Bits(weights=4, layers={"a": 6}), int)
    with pytest.raises(ValueError, match=r"layers\['a'\] is True bits"):
        Bits(layers={"a": True})
    with pytest.raises(ValueError, match="layers=3: it has to be a mapping"):
        Bits(layers=3)  # type: ignore[arg-type]


def test_others_at_their_calls() -> None:
    for bad in (0, 1.5, math.nan, "8", True, None):
        with pytest.raises(ValueError, match="max_batches="):
            collect_gradients(nn.Linear(2, 2), [], max_batches=bad)
    for name in ("max_images", "max_size_bytes"):
        for bad in (0, 1.5, math.nan, "8", True):
            with pytest.raises(ValueError, match=f"{name}="):
                _from_batches(**{name: bad})
    with pytest.raises(ValueError, match="config=3: it has to be of type AdaptivePruningConfig"):
        AdaptiveIterativePruning(config=3)  # type: ignore[arg-type]
    network = create_model("vit", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    for bad in (5, [1, 2, 3], []):
        with pytest.raises(ValueError, match=r"classes=.*: it has to be a list of the classes' names"):
            QuantizedNetwork(network, preprocessing={"mean": [0.5], "std": [0.5]}, classes=bad)
    for bad in (None, 3, "x"):
        with pytest.raises(TypeError, match=f"what scores is a {type(bad).__name__}; give a HoldOut, or a function"):
            prune(network, bad)


@settings(max_examples=200)
@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none(), st.fractions()))
def test_an_integer_is_one_within_its_limit_or_refused(value: Any) -> None:
    whole = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    whole = whole and math.isfinite(value) and value == math.floor(value) and value >= 1
    refused = _refusal(lambda: arguments.integer("n", value, least=1))
    if not whole or abs(value) > 1e300:
        assert refused is None or refused.startswith("n=")
    assert whole or refused is not None
    if refused is None:
        found = arguments.integer("n", value, least=1)
        assert (type(found), found) == (int, value)


def test_what_cannot_be_shown_is_named_by_its_type() -> None:
    assert arguments.shown(Foreign()) == "<Foreign>"
    assert len(arguments.shown(list(range(1000)))) == 80
    assert "\n" not in arguments.shown(np.zeros((40, 40)))

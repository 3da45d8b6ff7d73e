"""A file of PrimeSVT's verdicts is taken up where all that they hang on is the same, and nothing else is written to."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.prime_cases import by_zeros, holdout_of, network_of, prime_config
from support.spiking_cases import SIZE_PX
from torch import Tensor, nn

from swincompress_pl.pruning import HoldOut, PrimeSVTResult, primesvt
from swincompress_pl.pruning.evaluation.holdout import Verdict
from swincompress_pl.pruning.evaluation.scorer import FunctionScorer
from swincompress_pl.pruning.prime.evaluation_cache import EvaluationCache

OPTIONS: dict[str, Any] = {
    "tolerance": 30,
    "min_memory_saving": 0.0,
    "rates": (0.3,),
    "round_to": 1,
    "layers": ("blocks.0.mlp*",),
}
IMAGES = torch.randn(24, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
NETWORK = network_of()
ABOUT_ANOTHER = r"cache\.jsonl' is about another network, hold-out or constraint"
UNITS = {"a": 8, "b": 4}
GOOD = {"score": 80.0, "accepted": True, "images": 3, "exact": False, "error_points": 0.5}


def _shot(file: Path, evaluate: Any = None, network: nn.Module | None = None, **options: Any) -> PrimeSVTResult:
    calibration = options.pop("calibration", None)
    network = copy.deepcopy(NETWORK) if network is None else network
    scorer = holdout_of(NETWORK, 24) if evaluate is None else evaluate
    config = prime_config(**{**OPTIONS, **options})
    return primesvt(network, scorer, config, calibration=calibration, evaluation_cache=file)


def _law(cost: float, fingerprint: str | None = None) -> Callable[[nn.Module], float]:
    found = by_zeros({"blocks.0": cost}, IMAGES[:1])
    if fingerprint is not None:
        found.fingerprint = fingerprint  # type: ignore[attr-defined]
    return found


def _refused(file: Path, message: str, *arguments: Any, **options: Any) -> None:
    """And the file is as it was."""
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(ValueError, match=message):
        _shot(file, *arguments, **options)
    assert before is None or file.read_bytes() == before


def test_a_function_has_a_name_and_another_one_is_told_from_it(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    for anonymous in (_law(5.0), FunctionScorer(_law(5.0)), lambda network: 90.0):
        _refused(file, r"nothing tells this `evaluate` .* evaluate\.fingerprint = ", anonymous)
    assert not file.exists()
    for bad in (3, "", b"name"):
        _refused(file, "fingerprint=.*: it has to be a string", _law(5.0, bad))  # type: ignore[arg-type]
    first = _shot(file, _law(5.0, "loses 5"))
    again = _shot(file, _law(5.0, "loses 5"))
    assert (again.scoring["evaluations"], again.saving) == (0, first.saving)
    for other in (_law(60.0, "loses 60"), FunctionScorer(_law(60.0, "version 2")), holdout_of(NETWORK, 24)):
        _refused(file, ABOUT_ANOTHER, other)
    # The name was forgotten, but the unpruned network scores otherwise.
    higher = by_zeros({"blocks.0": 5.0}, IMAGES[:1])

    def shifted(network: nn.Module) -> float:
        return higher(network) - 3

    shifted.fingerprint = "loses 5"  # type: ignore[attr-defined]
    _refused(file, ABOUT_ANOTHER, shifted)


def test_a_hold_out_is_known_by_every_image_and_by_how_it_decides(tmp_path: Path) -> None:
    file, holdout = tmp_path / "cache.jsonl", holdout_of(NETWORK, 24)
    images, labels = holdout._images, holdout._labels
    _shot(file)
    assert _shot(file, HoldOut(images.clone(), labels, batch_size=7)).scoring["evaluations"] == 0
    middle = images.clone()
    middle[11, 0, 3, 3] += 1e-3
    relabelled = labels.clone()
    relabelled[5] = (relabelled[5] + 1) % 3
    others = [
        HoldOut(middle, labels), HoldOut(images, relabelled), HoldOut(images, labels, confidence=0.6),
        HoldOut(images, labels, seed=1), HoldOut(images.double(), labels), HoldOut(images[:23], labels[:23]),
    ]  # fmt: skip
    for other in others:
        assert other.fingerprint != holdout.fingerprint
    for other in others[:4]:
        _refused(file, ABOUT_ANOTHER, other)


def test_a_predict_has_a_name(tmp_path: Path) -> None:
    def predict(network: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        return logits

    holdout, file = holdout_of(NETWORK, 24), tmp_path / "cache.jsonl"
    data = holdout._images, holdout._labels
    _refused(file, "nothing tells this", HoldOut(*data, predict=predict))
    predict.fingerprint = "plain"  # type: ignore[attr-defined]
    _shot(file, HoldOut(*data, predict=predict))
    assert _shot(file, HoldOut(*data, predict=predict)).scoring["evaluations"] == 0
    _refused(file, ABOUT_ANOTHER, HoldOut(*data))


def test_calibration_images_count_where_statistics_are_corrected(tmp_path: Path) -> None:
    file, one, other = tmp_path / "cache.jsonl", [IMAGES[:8], IMAGES[8:16]], [IMAGES[8:16], IMAGES[16:]]
    _shot(file, batchnorm="correct", calibration=one)
    again = _shot(file, batchnorm="correct", calibration=[(images, 0) for images in reversed(one)])
    assert again.scoring["evaluations"] == 0
    _refused(file, ABOUT_ANOTHER, batchnorm="correct", calibration=other)
    _refused(file, ABOUT_ANOTHER, batchnorm="keep")
    kept = tmp_path / "kept.jsonl"
    _shot(kept, calibration=one)
    assert _shot(kept, calibration=other).scoring["evaluations"] == 0, "nobody looks at them"


def test_a_network_is_known_by_more_than_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    _shot(file)
    steps, threshold = copy.deepcopy(NETWORK), copy.deepcopy(NETWORK)
    for module in threshold.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 1.25
    steps.T = 3
    for other in (threshold, steps):
        _refused(file, ABOUT_ANOTHER, holdout_of(other, 24), network=other)


FOREIGN = {
    "a text": b"my thesis", "a line": b"my thesis\n", "no end": b"line 1\nline 2", "json": b'{"a": 1}\n{"b": 2}',
    "a list": b"[1, 2]\n", "bytes": bytes(range(256)), "a header of more": b'{"version": 2, "about": "x", "by": 1}\n',
    "deep": b"[" * 100_000, "a later version": b'{"version": 3, "about": "f"}\n', "a blank line": b"\n",
}  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_cache_is_never_written_to(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"cache\.jsonl' is (no evaluation cache|about another)"):
        EvaluationCache(file, "f", units=UNITS)
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match="is no file"):
        EvaluationCache(tmp_path, "f", units=UNITS)


def _line(widths: Any = None, **changed: Any) -> str:
    return json.dumps({"widths": {"a": 4} if widths is None else widths, "verdict": {**GOOD, **changed}})


BAD_LINES = [
    _line(score=float("nan")), _line(score=101), _line(score=-1), _line(score="80"), _line(score=True),
    _line(score=10**400), _line(accepted=1), _line(accepted=None), _line(images=-1), _line(images=2.5),
    _line(images=True),
    _line(exact="yes"), _line(error_points=float("inf")), _line(error_points=-0.1), _line(extra=1), _line({"c": 1}),
    _line({"a": 0}), _line({"a": 9}), _line({"a": 4.0}), _line({"a": True}), _line([["a", 4]]),
    "", "[]", "null", "nonsense",
    _line()[:-1], '{"widths": {"a": 4}}', _line()[:-1] + ', "more": 1}',
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES)
def test_values_are_checked_when_they_are_read(bad: str, tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    EvaluationCache(file, "f", units=UNITS).put({"a": 2}, Verdict(**GOOD))
    with file.open("a", encoding="utf-8") as appended:
        appended.write(bad + "\n" + _line() + "\n")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"cache\.jsonl' is damaged: line 3: "):
        EvaluationCache(file, "f", units=UNITS)
    assert file.read_bytes() == before


def test_every_cut_of_the_end_is_mended(tmp_path: Path) -> None:
    """A kill at each byte: whole entries stay, what comes next stands on a line of its own."""
    file = tmp_path / "cache.jsonl"
    cache = EvaluationCache(file, "f", units=UNITS)
    header = file.stat().st_size
    cache.put({"a": 2}, Verdict(**GOOD))
    first = file.stat().st_size
    cache.put({"b": 1}, Verdict(**GOOD))
    whole = file.read_bytes()
    for size in range(header - 1, len(whole) + 1):
        file.write_bytes(whole[:size])
        EvaluationCache(file, "f", units=UNITS).put({"a": 3}, Verdict(**GOOD))
        again = EvaluationCache(file, "f", units=UNITS)
        known = [again.get(widths) is not None for widths in ({"a": 2}, {"b": 1}, {"a": 3})]
        assert known == [size >= first - 1, size >= len(whole) - 1, True], size
    for tail in (b"not ours", b'{"else": '):
        file.write_bytes(whole + tail)
        with pytest.raises(ValueError, match="is damaged: line 4"):
            EvaluationCache(file, "f", units=UNITS)
        assert file.read_bytes() == whole + tail


def test_a_new_file_is_there_with_its_header_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, target = tmp_path / "cache.jsonl", tmp_path / "elsewhere.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr("swincompress_pl.files.os.replace", lambda *_, **__: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            EvaluationCache(file, "f", units=UNITS)
    assert list(tmp_path.iterdir()) == []
    file.symlink_to(target)
    EvaluationCache(file, "f", units=UNITS).put({"a": 2}, Verdict(**GOOD))
    assert file.is_symlink()
    assert target.read_bytes().count(b"\n") == 2
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    EvaluationCache(empty, "f", units=UNITS)
    assert json.loads(empty.read_text(encoding="utf-8"))["about"] == "f"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_a_file_of_0_1_says_that_it_knows_less(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    file.write_text(f'{{"version": 1, "about": "then"}}\n{_line()}\n', encoding="utf-8")
    with pytest.warns(UserWarning, match=r"is of version 0\.1, which did not note all"):
        assert EvaluationCache(file, "now", earlier="then", units=UNITS).get({"a": 4}) == Verdict(**GOOD)
    for earlier in (None, "another"):
        with pytest.raises(ValueError, match="is about another"):
            EvaluationCache(file, "now", earlier=earlier, units=UNITS)

"""The benchmark of features: figures of features whose neighbors are known, and the section of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.pages import quantization as page
from benchmarks.quantization import features


def pictures(*classes: str) -> features.Pictures:
    return features.Pictures(files=[Path(name) for name in classes], classes=list(classes))


CASES = {"train": pictures(*"abcdefg"), "val": pictures("a", "c", "g")}
GALLERY = np.eye(7, dtype=np.float32)
QUERIES = GALLERY[[0, 2, 6]] + 0.01 * np.arange(7, dtype=np.float32)


def figures() -> dict[str, Any]:
    other = QUERIES.copy()
    other[1] = 3 * GALLERY[3] + 2 * GALLERY[2]  # d comes first, then c
    return features.compare(
        {"train": GALLERY, "val": QUERIES}, {"train": 5 * GALLERY, "val": 2 * other}, CASES
    )  # lengths do not count


def test_the_nearest_are_counted() -> None:
    found = figures()
    assert (found["images"], found["gallery"], found["channels"]) == (3, 7, 7)
    assert [found[form]["nearest"]["correct"] for form in ("float", "integers")] == [3, 2]
    assert [found[form]["among_5"]["correct"] for form in ("float", "integers")] == [3, 3]
    assert (found["paired"]["right_to_wrong"], found["paired"]["wrong_to_right"]) == (1, 0)
    assert found["cosine"]["least"] < found["cosine"]["mean"] < 1


def test_neighbors_are_by_cosine() -> None:
    nearest = features.neighbors(QUERIES, 100 * GALLERY[::-1])
    assert nearest.shape == (3, features.NEAREST)
    assert nearest[:, 0].tolist() == [6, 4, 0]


def test_pictures_of_a_tree(tmp_path: Path) -> None:
    for name in ("n2/b.jpg", "n1/a.JPEG", "n1/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = features.Pictures.of(tmp_path)
    assert ([file.name for file in found.files], found.classes) == (["a.JPEG", "b.jpg"], ["n1", "n2"])


def test_other_integers_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Answer:
        def __init__(self, value: int) -> None:
            self.value = value

        def run_integer(self, _: Any) -> Any:
            return np.full((1, 2), self.value)

        def integer_logits(self, _: Any) -> Any:
            return self

        def numpy(self) -> Any:
            return np.full((1, 2), 1)

    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    monkeypatch.setattr(features.accel, "reference", lambda _: Answer(1))
    features._require_equal(Answer(1), tmp_path, Answer(1), pixels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other integers than the reference"):
        features._require_equal(Answer(2), tmp_path, Answer(1), pixels)  # type: ignore[arg-type]


def test_the_page_says_them() -> None:
    times = {"import_ms": 100, "load_ms": 15, "first_ms": 20, "picture_ms": 9.5, "command_ms": 300, "processes": 5}
    environment = {"cpu": "AMD EPYC", "cpu_flags": [], "commit": "0123456789"}
    more = {"calibration_images": 128, "checked_images": 16, "jpeg_to_class": times, "environment": environment}
    text = "\n".join(page._features(figures() | more))
    assert "| integers |" in text
    assert "66.67 % (2)" in text
    assert "1 images change from right to wrong, 0 back" in text
    assert "9.5 ms for each further one" in text

"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine must not fail a test: no deadline for an example.
settings.register_profile("swincompress", deadline=None)
settings.load_profile("swincompress")

REPOSITORY = Path(__file__).resolve().parent.parent

LONGEST = (
    "test_accel_isas.py",
    "test_accel_networks.py",
    "test_demo.py",
    "test_docs_blocks.py",
    "test_interrupts.py",
    "test_tutorials.py",
)

# For benchmarks/, which no package holds; last, so that it does not change where an installed package comes from.
sys.path.append(str(REPOSITORY))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that fork come first: some libraries that other tests load make torch refuse gradients in a fork. Then come
    the longest, so that no process is left alone with one of them at the end."""
    forks = {path: "rank_cases" in path.read_text(encoding="utf-8") for path in {item.path for item in items}}
    items.sort(key=lambda item: (not forks[item.path], item.path.name not in LONGEST))


# torch is imported where tests run: the process that hands them out to the others does without.


@pytest.fixture(autouse=True, scope="session")
def _little_overhead() -> None:
    """The tests' tensors are small: more threads only cost time. Networks, graphs and figures are many objects: looking
    for garbage as often as Python does by default was a twelfth of all time."""
    gc.set_threshold(20_000, 10, 10)
    os.environ.setdefault("SWINCOMPRESS_CACHE", tempfile.mkdtemp())  # no test writes into the user's
    if importlib.util.find_spec("torch") is None:  # .ci/test_wheel.py runs the engine's tests without it
        return
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images and weights, from SWINCOMPRESS_DATA or beside the repository; skips where absent."""
    folder = Path(os.environ.get("SWINCOMPRESS_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder}: no folder with the real data; set SWINCOMPRESS_DATA to it.")
    return folder


def _extracted(archive: Path, folder: Path) -> Path:
    if not archive.is_file():
        pytest.skip(f"{archive}: absent.")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def imagenet_mini(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet-style tree of 1,000 images in train (one per class) and 600 in val (332 classes)."""
    return _extracted(shared_data / "imagenet_mini.tar", tmp_path_factory.mktemp("imagenet_mini"))


@pytest.fixture(scope="session")
def cifar10(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 (JPEG copy) as folders train|test/<class>/."""
    return _extracted(shared_data / "cifar10_jpeg.tar.xz", tmp_path_factory.mktemp("cifar10"))

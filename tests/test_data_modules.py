"""The datamodules: class numbers, disjoint splits, layouts, caches, and errors that name the file."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from swincompress_pl.data import CIFAR10, Digits, ImageClassificationData, ImageNetFolder, PadCropFlip, Preprocessing
from swincompress_pl.data.cifar import CLASS_NAMES
from swincompress_pl.data.imagenet import official_class_index

WNIDS = ("n01440764", "n01443537", "n02099601", "n15075141")  # classes 0, 1, 207 and 999


def write_image(path: Path, seed: int, size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def imagenet_tree(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    for wnid in WNIDS:
        for number in range(5):
            write_image(root / "train" / wnid / f"{number}.png", seed=number, size=40)
    for number in range(3):
        write_image(root / "val" / WNIDS[2] / f"{number}.png", seed=number, size=40)
    return root


@pytest.fixture
def cifar_tree(tmp_path: Path) -> Path:
    root = tmp_path / "cifar"
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(CLASS_NAMES):
            for number in range(count):
                write_image(root / split / name / f"{number}.png", seed=100 * label + number)
    return root


def small_imagenet(root: Path, **options: object) -> ImageNetFolder:
    preprocessing = Preprocessing(height=32, width=32, resize=36)
    settings = {"preprocessing": preprocessing, "holdout": 4, "batch_size": 4, "num_workers": 0, **options}
    return ImageNetFolder(root, **settings)  # type: ignore[arg-type]


def keys(data: ImageClassificationData, split: str) -> list[bytes]:
    return [image.tobytes() for pixels, _ in data.uint8_batches(split) for image in pixels]


def labels_of(loader: DataLoader[object]) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]


# What holds for every datamodule, shown on the digits.


def test_digits_splits_are_disjoint_complete_and_stratified() -> None:
    data = Digits()
    sizes = {split: len(data.dataset(split)) for split in ("train", "holdout", "test")}
    assert sizes == {"train": 1257, "holdout": 180, "test": 360}
    parts = [keys(data, split) for split in sizes]
    assert len(set().union(*parts)) == len({key for part in parts for key in part}) >= 1790  # a few digits are twins
    for split, size in sizes.items():
        counts = np.bincount(data.dataset(split).labels, minlength=10)
        assert np.all(np.abs(counts - size / 10) <= size / 100 + 2)


def test_splits_are_functions_of_the_seed() -> None:
    assert keys(Digits(seed=3), "holdout") == keys(Digits(seed=3), "holdout")
    assert keys(Digits(seed=3), "holdout") != keys(Digits(seed=4), "holdout")


def test_float_input_is_the_normalized_pixels() -> None:
    data = Digits(batch_size=50)
    loaders = {
        "holdout": data.val_dataloader(),
        "test": data.test_dataloader(),
        "calibration": data.calibration_dataloader(),
    }
    for split, loader in loaders.items():
        for (inputs, labels), (pixels, pixel_labels) in zip(loader, data.uint8_batches(split), strict=True):
            assert pixels.dtype == np.uint8
            assert pixels.shape[1:] == (32, 32, 3)
            assert torch.equal(inputs, data.preprocessing.normalize(torch.from_numpy(pixels)))
            assert torch.equal(labels, torch.from_numpy(pixel_labels))


def test_calibration_is_a_fixed_stratified_part_of_train() -> None:
    data = Digits()
    sample = keys(data, "calibration")
    assert sample == keys(Digits(), "calibration")
    assert len(sample) == 128
    assert set(sample) <= set(keys(data, "train"))
    assert set(np.bincount(labels_of(data.calibration_dataloader(100))).tolist()) <= {9, 10, 11}


def test_digits_keep_every_level_of_gray() -> None:
    source = Digits().dataset("train").source
    assert len({*np.asarray(source.image(0)).ravel().tolist()}) > 5
    assert max(np.asarray(source.image(item)).max() for item in range(50)) == 255


class Recorder(LightningModule):
    """Learns nothing; notes the batches of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[list[bytes]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen[-1].append(batch[0].numpy().tobytes())
        return self.layer(batch[0].mean().reshape(1, 1)).sum()

    def validation_step(self, batch: object, batch_idx: int) -> None:
        """The hold-out is not looked at here."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit_and_record(folder: Path, *, workers: int, epochs: int, resume: Path | None = None) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=3,
    )
    trainer.fit(recorder, datamodule=Digits(num_workers=workers), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return recorder


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_batches_do_not_depend_on_workers_or_on_a_resume(tmp_path: Path) -> None:
    here = fit_and_record(tmp_path, workers=0, epochs=3).seen
    assert len({batch for epoch in here for batch in epoch}) == 9
    # 2 persistent workers: they live through all epochs and must still be told the epoch
    assert fit_and_record(tmp_path, workers=2, epochs=3).seen == here
    first = fit_and_record(tmp_path, workers=0, epochs=1).seen
    rest = fit_and_record(tmp_path, workers=0, epochs=3, resume=tmp_path / "last.ckpt").seen
    assert first + rest == here


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(holdout=0), "holdout is 0"),
        (lambda: Digits(holdout=1.0), r"holdout is 1\.0"),
        (lambda: Digits(holdout=True), "holdout is True"),
        (lambda: Digits(batch_size=0), "batch_size is 0"),
        (lambda: Digits(num_workers=-1), "num_workers is -1"),
        (lambda: Digits(seed=-1), "seed is -1"),
        (lambda: Digits(test_images=1797), "test_images is 1797"),
        (lambda: Digits(holdout=1437).setup("fit"), "holdout=1437 takes 1437 of 1437"),
        (lambda: Digits(batch_size=2000).train_dataloader(), "batch_size is 2000, but training has 1257"),
        (lambda: Digits().calibration_dataloader(1258), "calibration asks for 1258"),
        (lambda: Digits().dataset("val"), "split is 'val'"),
        (lambda: Digits().uint8_batches("val"), "split is 'val'"),
    ],
)
def test_bad_options_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ImageNet


def test_imagenet_numbers_are_official_where_folders_are_missing(imagenet_tree: Path) -> None:
    data = small_imagenet(imagenet_tree)
    data.setup()
    assert data.num_classes == len(data.class_names) == 1000
    assert data.class_names[207].startswith("golden retriever")
    assert set(data.dataset("train").labels.tolist()) == {0, 1, 207, 999}
    assert set(labels_of(data.test_dataloader())) == {207}


def test_imagenet_holdout_is_stratified_and_not_trained_on(imagenet_tree: Path) -> None:
    data = small_imagenet(imagenet_tree, holdout=0.2)
    assert sorted(labels_of(data.val_dataloader())) == [0, 1, 207, 999]
    assert len(data.dataset("train")) == 16
    held, trained = data.dataset("holdout").positions, data.dataset("train").positions
    assert not set(held.tolist()) & set(trained.tolist())


def test_imagenet_training_images_are_augmented_to_size(imagenet_tree: Path) -> None:
    images, labels = next(iter(small_imagenet(imagenet_tree).train_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert labels.dtype == torch.int64


def test_a_class_index_of_ones_own(imagenet_tree: Path, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({wnid: 3 - number for number, wnid in enumerate(WNIDS)}))
    data = small_imagenet(imagenet_tree, class_index=index)
    assert data.class_names == WNIDS[::-1]
    assert set(labels_of(data.test_dataloader())) == {1}


def own_tree(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        for part in ("train", "val"):
            write_image(root / part / name / "0.png", seed=number)
            write_image(root / part / name / "1.png", seed=10 + number)
    return root


def test_folders_of_ones_own_need_no_index(tmp_path: Path) -> None:
    data = small_imagenet(own_tree(tmp_path, "tiger", "Zebra", "bear", ".hidden"), holdout=2)
    data.setup()
    assert data.class_names == ("Zebra", "bear", "tiger")  # the order of torchvision's ImageFolder
    assert data.num_classes == 3
    assert labels_of(data.test_dataloader()) == [0, 0, 1, 1, 2, 2]
    (tmp_path / "val" / "wolf").mkdir()
    message = "'wolf' is not a class of the index .*; the classes are Zebra, bear, tiger. .* add 'wolf' to train"
    with pytest.raises(ValueError, match=message):
        small_imagenet(tmp_path).setup("test")


def test_a_wnid_among_names_of_ones_own_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'cat' is not a class .*; the classes are the 1,000 wnids"):
        small_imagenet(own_tree(tmp_path, "cat", WNIDS[0])).setup()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"a": 0, "b": 2}', '{"a": 0, "b": 0}', '{"a": "0"}'])
def test_a_bad_class_index_is_refused(imagenet_tree: Path, tmp_path: Path, content: str) -> None:
    index = tmp_path / "index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: not"):
        small_imagenet(imagenet_tree, class_index=index)


def test_imagenet_errors_name_the_folder_or_file(imagenet_tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*expected <root>/train"):
        ImageNetFolder(imagenet_tree / "nowhere")
    with pytest.raises(FileNotFoundError, match="index is missing"):
        ImageNetFolder(imagenet_tree, class_index=imagenet_tree / "none.json")
    with pytest.raises(FileNotFoundError, match="the train images"):
        ImageNetFolder(imagenet_tree / "train").setup("fit")
    (imagenet_tree / "val" / "goldfish").mkdir()
    with pytest.raises(ValueError, match="'goldfish' is not a class of the index"):
        small_imagenet(imagenet_tree).setup("test")
    stray = imagenet_tree / "train" / WNIDS[0] / "notes.txt"
    stray.write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt: not an image"):
        small_imagenet(imagenet_tree).setup("fit")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "val" / WNIDS[0]).mkdir(parents=True)
    with pytest.raises(ValueError, match="the test images are empty"):
        ImageNetFolder(tmp_path).setup("test")


def test_a_broken_image_is_named(imagenet_tree: Path) -> None:
    broken = imagenet_tree / "val" / WNIDS[2] / "1.png"
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"1\.png: cannot be decoded"):
        list(small_imagenet(imagenet_tree).test_dataloader())


# CIFAR-10


def test_cifar_folder_has_the_official_class_order(cifar_tree: Path) -> None:
    data = CIFAR10(cifar_tree, holdout=10, batch_size=4)
    assert labels_of(data.test_dataloader()) == list(range(10))
    expected = np.asarray(Image.open(cifar_tree / "test" / "frog" / "0.png"))
    pixels = np.concatenate([pixels for pixels, _ in data.uint8_batches("test")])
    assert np.array_equal(pixels[6], expected)


def test_cifar_cache_gives_the_same_and_notices_changes(cifar_tree: Path) -> None:
    first = keys(CIFAR10(cifar_tree), "test")
    cache = cifar_tree / ".cifar10_test.npz"
    assert cache.is_file()
    assert sorted(path.name for path in cifar_tree.iterdir() if path.name.startswith(".")) == [cache.name]
    written = cache.stat().st_mtime_ns
    assert keys(CIFAR10(cifar_tree), "test") == first
    assert cache.stat().st_mtime_ns == written  # it was read, not written again
    write_image(cifar_tree / "test" / "frog" / "0.png", seed=12345)
    os.utime(cifar_tree / "test" / "frog" / "0.png", ns=(1, 1))
    changed = keys(CIFAR10(cifar_tree), "test")
    assert [a != b for a, b in zip(first, changed, strict=True)] == [name == "frog" for name in CLASS_NAMES]


def test_cifar_broken_cache_is_rebuilt(cifar_tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    first = keys(CIFAR10(cifar_tree, cache_dir=folder), "test")
    cache = folder / "cifar10_test.npz"
    cache.write_bytes(cache.read_bytes()[:1000])
    assert keys(CIFAR10(cifar_tree, cache_dir=folder), "test") == first
    assert "unreadable" in caplog.text
    assert not list(cifar_tree.glob(".*"))
    assert [path.name for path in folder.iterdir()] == [cache.name]


def test_cifar_reads_torchvisions_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        batch = {"data": generator.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASS_NAMES)}))
    with pytest.raises(ValueError, match="Unpack the official archive"):  # the MD5 sums differ
        CIFAR10(tmp_path).setup("fit")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = CIFAR10(tmp_path, holdout=10, batch_size=10)
    assert len(data.dataset("train")) == 90
    pixels, labels = next(iter(data.uint8_batches("test")))
    planes = pickle.loads((folder / "test_batch").read_bytes())["data"]
    assert np.array_equal(pixels[3], planes[3].reshape(3, 32, 32).transpose(1, 2, 0))
    assert labels.tolist() == list(range(10))


def test_cifar_errors_name_the_folder_or_file(cifar_tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CIFAR10(cifar_tree / "nowhere")
    with pytest.raises(FileNotFoundError, match="cache_dir"):
        CIFAR10(cifar_tree, cache_dir=cifar_tree / "nowhere")
    write_image(cifar_tree / "train" / "cat" / "big.png", seed=0, size=33)
    with pytest.raises(ValueError, match=r"big\.png: 33 x 33"):
        CIFAR10(cifar_tree).setup("fit")
    (cifar_tree / "test" / "frog").rename(cifar_tree / "test" / "toad")
    with pytest.raises(ValueError, match=r"missing: \['frog'\], unknown: \['toad'\]"):
        CIFAR10(cifar_tree).setup("test")


def test_cifar_can_be_enlarged_for_a_larger_network(cifar_tree: Path) -> None:
    preprocessing = Preprocessing(height=64, width=64, resize=64)
    data = CIFAR10(cifar_tree, holdout=10, preprocessing=preprocessing, augmentation=PadCropFlip(), batch_size=4)
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 64, 64)


# Real images


def test_official_index_is_the_one_of_the_real_data(shared_data: Path) -> None:
    index = json.loads((shared_data / "imagenet_wnid_to_index.json").read_text())
    assert official_class_index() == index


def test_real_imagenet_folder(imagenet_mini: Path, shared_data: Path) -> None:
    data = ImageNetFolder(imagenet_mini, holdout=0.1, num_workers=0)
    data.setup()
    index = json.loads((shared_data / "imagenet_wnid_to_index.json").read_text())
    assert len(data.dataset("train")) == 900
    assert len(data.dataset("holdout")) == 100
    test = data.dataset("test")
    assert len(test) == 600
    assert len(set(test.labels.tolist())) == 332
    for position in range(0, 600, 37):
        assert test.labels[position] == index[test.source.path(position).parent.name]  # type: ignore[attr-defined]


def test_a_pretrained_network_recognizes_real_images(imagenet_mini: Path, shared_data: Path) -> None:
    from swincompress_pl.models.factory import create_model

    weights = shared_data / "deit_tiny_patch16_224.safetensors"
    network = create_model("deit_tiny_patch16_224", checkpoint_path=weights).eval()
    data = ImageNetFolder(imagenet_mini, holdout=100, num_workers=0, batch_size=25)
    right = 0
    with torch.no_grad():
        for images, labels in data.calibration_dataloader(50):
            right += int((network(images).argmax(-1) == labels).sum())
    assert right >= 33  # about 80 % of train; wrong class numbers or pixels would give 0 or far less

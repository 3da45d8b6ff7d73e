"""The networks that are pruned, one of each family, small, and how they are trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
from safetensors import safe_open

from swincompress_pl.data.cifar import CIFAR10_PREPROCESSING
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.models.training import OptimizationConfig

from ..pruning.batches import MemoryData, pad_crop_flip
from ..pruning.images import load_splits
from ..pruning.subjects import Place

HOLDOUT = 5000
CLASSES = 10
INPUT_SHAPE = (1, 3, 32, 32)
WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Of a fit: AdamW with a warm-up and a cosine, on padded crops and mirrored images."""

    epochs: int
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1


_FINE_TUNING = Recipe(epochs=4, lr=1e-3, warmup_epochs=0.2)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A family's network. model, arguments: for `create_model`. baseline, fine_tuning: how it was trained, and how it
    and all that is made of it are trained on."""

    name: str
    model: str
    arguments: dict[str, Any]
    baseline: Recipe
    fine_tuning: Recipe = _FINE_TUNING

    @property
    def weights(self) -> Path:
        """The trained baseline."""
        return WEIGHTS / f"{self.name}.safetensors"

    def data(self, place: Place, recipe: Recipe, seed: int) -> MemoryData:
        """CIFAR-10's images; which are held out depends on nothing, so that no fit and no seed has trained on them."""
        return MemoryData(
            load_splits("cifar10", place.data, place.cache, holdout=HOLDOUT, seed=0),
            device=place.device,
            size_px=CIFAR10_PREPROCESSING.height,
            mean=CIFAR10_PREPROCESSING.mean,
            std=CIFAR10_PREPROCESSING.std,
            augment=pad_crop_flip,
            batch_size=recipe.batch_size,
            seed=seed,
        )

    def classifier(self, recipe: Recipe, seed: int, *, trained: bool) -> CompressibleClassifier:
        """The network in its LightningModule, with fresh weights or the baseline's."""
        lightning.seed_everything(seed, verbose=False)
        return CompressibleClassifier(
            model=self.model,
            num_classes=CLASSES,
            model_kwargs=self.arguments,
            checkpoint_path=self.weights if trained else None,
            optimization=OptimizationConfig(
                lr=recipe.lr, weight_decay=recipe.weight_decay, warmup_epochs=recipe.warmup_epochs
            ),
            label_smoothing=recipe.label_smoothing,
        )

    def baseline_record(self) -> dict[str, Any]:
        """How the committed baseline was trained, and what it reached."""
        with safe_open(self.weights, framework="np") as file:
            return dict(json.loads(file.metadata()["record"]))

    def to_dict(self) -> dict[str, Any]:
        """The network and its training, in JSON types."""
        return {key: value for key, value in asdict(self).items() if key != "fine_tuning"}


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            name="spikformer",
            model="Spikformer",
            arguments={
                "T": 2, "img_size_h": 32, "img_size_w": 32, "patch_size": 4, "embed_dims": 128, "num_heads": 8,
                "depths": 2,
            },
            baseline=Recipe(epochs=24),
        ),
        Subject(
            name="sdt",
            model="SpikeDrivenTransformer",
            arguments={"T": 2, "embed_dims": 128, "num_heads": 8, "depths": 2, "pooling_stat": "0011"},
            baseline=Recipe(epochs=21),
        ),
        Subject(
            name="qkformer",
            model="QKFormer",
            arguments={"T": 2, "embed_dims": 160, "num_heads": [1, 2, 4], "depths": [1, 1, 2]},
            baseline=Recipe(epochs=19),
        ),
        Subject(
            name="maxformer",
            model="MaxFormer",
            arguments={"T": 2, "embed_dims": 96, "depths": [1, 1, 2], "cifar": True},
            baseline=Recipe(epochs=17),
        ),
        Subject(
            name="meta_spikeformer",
            model="MetaSpikeFormer",
            arguments={
                "T": 2, "embed_dims": [16, 32, 64, 96], "depths": [1, 1, 1, 2, 1], "num_heads": 4,
                "strides": [1, 2, 2, 1, 1], "attention_scale": 1.0,
            },
            baseline=Recipe(epochs=11),
        ),
        Subject(
            name="e_spikeformer",
            model="ESpikeFormer",
            arguments={
                "embed_dims": [16, 32, 64, 96], "depths": [1, 1, 1, 2, 1], "num_heads": 4, "strides": [1, 2, 2, 1, 1],
            },
            baseline=Recipe(epochs=9),
            fine_tuning=Recipe(epochs=2, lr=1e-3, warmup_epochs=0.2),
        ),
    )
}  # fmt: skip
BINARY = {name: subject for name, subject in SUBJECTS.items() if "T" in subject.arguments}
"""Those with binary neurons and time steps; the other one is trained with integers, and has rows of its own."""

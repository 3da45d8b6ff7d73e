"""How a classifier is trained: its options, the groups of its optimizer, its schedule, and its distillation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from swincompress_pl.arguments import integer, number, numbers, require

Config = TypeVar("Config")

# A parameter with one of these in its name is not decayed, nor is one with fewer than two dimensions (norms, biases).
# "scale" covers the learned scales of quantization, which may have two dimensions.
_NO_DECAY = ("pos_embed", "cls_token", "dist_token", "reg_token", "relative_position", "scale")


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """AdamW with a linear warm-up and then a cosine to `min_lr`, over the steps of the fit.

    Attributes:
        lr: Peak of the learning rate, above 0.
        weight_decay: Weight decay of matrices, 0 or more. Biases, norms, position embeddings and tokens have none.
        warmup_epochs: Length of the warm-up in epochs, 0 or more; fractions are allowed.
        min_lr: Learning rate at the last step, 0 to `lr`.
        betas: Decay rates of AdamW's averages, two numbers in [0, 1).

    Raises:
        ValueError: If a value is outside its range.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        lr = number("OptimizationConfig.lr", self.lr, lambda x: x > 0, "a finite number above 0")
        betas = "two numbers in [0, 1)"
        found: dict[str, Any] = {
            "lr": lr,
            "weight_decay": number("OptimizationConfig.weight_decay", self.weight_decay, _not_negative, "0 or more"),
            "warmup_epochs": number("OptimizationConfig.warmup_epochs", self.warmup_epochs, _not_negative, "0 or more"),
            "min_lr": number("OptimizationConfig.min_lr", self.min_lr, lambda x: 0 <= x <= lr, f"0 to lr ({lr})"),
            "betas": numbers("OptimizationConfig.betas", self.betas, lambda beta: 0 <= beta < 1, betas),
        }
        require("OptimizationConfig.betas", self.betas, len(found["betas"]) == 2, betas)
        _set(self, found)


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Mixup and CutMix by timm, per batch; the mixing is a function of (seed, epoch, batch).

    Attributes:
        mixup_alpha: Parameter of Mixup's Beta distribution (Zhang et al. 2018), 0 or more; 0 switches it off.
        cutmix_alpha: Parameter of CutMix's Beta distribution (Yun et al. 2019), 0 or more; 0 switches it off.
        probability: Probability that a batch is mixed, 0 to 1.
        switch_probability: Probability that a mixed batch gets CutMix if both are on, 0 to 1.
        seed: Decides how batches are mixed; 0 or more.

    Raises:
        ValueError: If a value is outside its range.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        found: dict[str, Any] = {"seed": integer("MixingConfig.seed", self.seed, least=0)}
        for name in ("mixup_alpha", "cutmix_alpha"):
            found[name] = number(f"MixingConfig.{name}", getattr(self, name), _not_negative, "0 or more")
        for name in ("probability", "switch_probability"):
            found[name] = number(f"MixingConfig.{name}", getattr(self, name), lambda x: 0 <= x <= 1, "0 to 1")
        _set(self, found)

    @property
    def enabled(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Distillation from the uncompressed network (Hinton et al. 2015).

    The loss is `(1 - weight) * loss of the labels + weight * T**2 * KL(teacher || student)` at temperature T. The
    teacher is the network itself as it is when `start_epoch` begins, so that epoch must come before the first
    compression.

    Attributes:
        weight: Weight of the teacher in the loss, above 0 and at most 1.
        temperature: Temperature T of both softmaxes, above 0.
        start_epoch: Epoch from which on the teacher counts, 0 or more; before it only the labels do. With 0 the network
            must have loaded weights.

    Raises:
        ValueError: If a value is outside its range.
    """

    weight: float = 0.5
    temperature: float = 1.0
    start_epoch: int = 0

    def __post_init__(self) -> None:
        part, above = "above 0 and at most 1", "a number above 0"
        found: dict[str, Any] = {
            "weight": number("DistillationConfig.weight", self.weight, lambda x: 0 < x <= 1, part),
            "temperature": number("DistillationConfig.temperature", self.temperature, lambda x: x > 0, above),
            "start_epoch": integer("DistillationConfig.start_epoch", self.start_epoch, least=0),
        }
        _set(self, found)


def _not_negative(value: float) -> bool:
    return value >= 0


def _set(config: object, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        object.__setattr__(config, name, value)


def as_config(kind: type[Config], value: Config | Mapping[str, Any]) -> Config:
    """A config from plain data, such as a checkpoint's hyperparameters; a ValueError names unknown options."""
    if not isinstance(value, Mapping):
        require(kind.__name__, value, isinstance(value, kind), "a mapping of its options, or one of it")
        return value
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # all three are dataclasses
    unknown = sorted(value.keys() - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown option {', '.join(unknown)}; it has {', '.join(known)}.")
    return kind(**value)


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `network` in two groups for an optimizer: with `weight_decay` and without.

    Without it are parameters with fewer than two dimensions (norms, biases), position embeddings, tokens,
    relative-position tables, and the scales of quantization.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or any(part in name for part in _NO_DECAY)
            (plain if spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def warmup_cosine(step: int, steps: int, warmup_steps: int, *, floor: float) -> float:
    """The learning rate at `step`, 0 to steps - 1, as a part of its peak: linear to 1, then a cosine to `floor`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / max(steps - 1 - warmup_steps, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T**2 * KL(teacher || student) at temperature T, the mean over the batch, of logits (N, C)."""
    student = functional.log_softmax(logits / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2

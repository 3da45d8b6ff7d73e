"""What a classifier is trained with: its options, the groups of its optimizer, its schedule, its distillation."""

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

# A parameter whose name holds one of these is not decayed, nor is any with fewer than two dimensions (norms, biases).
# "scale" covers the learned scales of quantization, which may have two dimensions.
_NO_DECAY = ("pos_embed", "cls_token", "dist_token", "reg_token", "relative_position", "scale")


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """AdamW, with a linear warm-up and a cosine to `min_lr` over the steps of the fit.

    lr: the peak, > 0. weight_decay: >= 0, for matrices only (`decay_groups`). warmup_epochs: >= 0, fractions allowed.
    min_lr: 0 to lr, reached at the last step. betas: AdamW's.
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
    """Mixup and cutmix by timm, per batch; which images are mixed is a function of (seed, epoch, batch).

    mixup_alpha, cutmix_alpha: the Beta distributions' parameter, 0 switches one off (both 0: no mixing). probability:
    of mixing a batch at all. switch_probability: of cutmix, where both are on.
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
        """Whether any batch is mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Learn from the uncompressed network: loss = (1 - weight) * labels + weight * T^2 * KL(teacher || student).

    weight: above 0, at most 1. temperature T: above 0. start_epoch: the teacher is the network as it stands when this
    epoch starts, so it must come before the first compression; before it, only the labels teach. 0 asks for loaded
    weights.
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
    """A config that came as plain data (a checkpoint's hyperparameters) as the dataclass; unknown options raise."""
    if not isinstance(value, Mapping):
        require(kind.__name__, value, isinstance(value, kind), "a mapping of its options, or one of it")
        return value
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # all three are dataclasses
    unknown = sorted(value.keys() - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown option {', '.join(unknown)}; it has {', '.join(known)}.")
    return kind(**value)


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `network` in two groups for an optimizer: with `weight_decay` and with none.

    Not decayed: anything with fewer than two dimensions (norms, biases), position embeddings, tokens,
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
    """The learning rate at `step` in 0 .. steps - 1 as a part of its peak: linear to 1, then a cosine to `floor`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / max(steps - 1 - warmup_steps, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, the batch's mean; (N, C) logits each (Hinton et al., 2015)."""
    student = functional.log_softmax(logits / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2

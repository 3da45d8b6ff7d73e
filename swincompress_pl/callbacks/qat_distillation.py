"""Distills the float network into the quantized one, in any LightningModule."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from swincompress_pl.checkpoint.holder import held_by
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.history import history_of
from swincompress_pl.models.training import distillation_loss
from swincompress_pl.quant import QuantizedNetwork


class Distillation:
    """Adds a teacher to the training loss of a module.

    The loss becomes (1 - weight) * the module's own + weight * T^2 KL(teacher || student). For a network that ends in
    features or feature maps, with a head outside it, their relative squared error replaces T^2 KL. The teacher sees the
    same images that `training_step` gives to the network (mixed, augmented). So nothing of the module has to be known
    but the attribute that holds the network.

    Args:
        weight: Weight of the teacher, above 0 and at most 1.
        temperature: Temperature T of both softmaxes, above 0.
    """

    def __init__(self, weight: float, temperature: float) -> None:
        self.weight, self.temperature = weight, temperature
        self.teacher: nn.Module | None = None
        self._module: LightningModule | None = None

    def take_teacher(self, network: nn.Module, saved: Mapping[str, Any] | None = None) -> None:
        """Makes a frozen copy of the float network the teacher.

        Args:
            network: The float network.
            saved: What `to_dict` returned for an earlier teacher, which may be wider than the network is by now.
        """
        teacher = copy.deepcopy(network).requires_grad_(False).eval()
        if saved is not None:
            if saved.get("teacher_history") is not None:
                teacher = restore_from_history(teacher, saved["teacher_history"])
            teacher.load_state_dict(saved["teacher"])
        self.teacher = teacher

    def to_dict(self) -> dict[str, Any]:
        """Returns the teacher as plain data and tensors; the entries are None if there is no teacher yet."""
        if self.teacher is None:
            return {"teacher": None, "teacher_history": None}
        return {"teacher": self.teacher.state_dict(), "teacher_history": history_of(self.teacher)}

    def attach(self, module: LightningModule, model_attribute: str) -> None:
        """Lets `module.training_step` return the joint loss from now on, once the network is quantized."""
        self.detach()
        step = module.training_step

        # A function, not an object: copies of the module (EMA) must not copy the teacher and the trainer with it.
        @functools.wraps(step)
        def distilled(*args: Any, **kwargs: Any) -> Any:
            network = held_by(module, model_attribute)
            if not isinstance(network, QuantizedNetwork) or self.teacher is None:
                return step(*args, **kwargs)
            seen: list[tuple[Tensor, Any]] = []
            handle = network.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
            try:
                outcome = step(*args, **kwargs)
            finally:
                handle.remove()
            return outcome if outcome is None else self._joined(module, outcome, seen, embeds=network.graph.embeds)

        module.training_step = distilled  # type: ignore[method-assign]
        self._module = module

    def detach(self) -> None:
        """Gives the module its own `training_step` back."""
        if self._module is not None:
            vars(self._module).pop("training_step", None)
            self._module = None

    def _joined(self, module: LightningModule, outcome: Any, seen: list[tuple[Tensor, Any]], *, embeds: bool) -> Any:
        seen = [(images, answer) for images, answer in seen if any(part.requires_grad for part in parts_of(answer))]
        loss = outcome.get("loss") if isinstance(outcome, Mapping) else outcome
        if not seen or not isinstance(loss, Tensor):
            raise ValueError(
                f"distillation: {type(module).__name__}.training_step "
                + ("returns no loss" if seen else "does not call the network with gradients")
                + "; return a loss of the network's logits, or pass distillation=0"
            )
        taught = torch.stack([self._loss(images, answer, embeds=embeds) for images, answer in seen]).mean()
        module.log("qat/distillation", taught.detach(), on_step=False, on_epoch=True, batch_size=len(seen[0][0]))
        joint = (1 - self.weight) * loss + self.weight * taught
        return {**outcome, "loss": joint} if isinstance(outcome, Mapping) else joint

    def _loss(self, images: Tensor, answer: Any, *, embeds: bool) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            taught = parts_of(self.teacher(images.to(next(self.teacher.parameters()).dtype)))
        pairs = [(part.float(), theirs.float()) for part, theirs in zip(parts_of(answer), taught, strict=True)]
        if embeds:  # features have no classes; the error of each output is relative to its mean square
            errors = [(part - theirs).square().mean() / theirs.square().mean() for part, theirs in pairs]
            return torch.stack(errors).mean()
        return distillation_loss(*pairs[0], self.temperature)


def parts_of(answer: Any) -> list[Tensor]:
    """The outputs of a network that gives a list of them, or its only output."""
    return list(answer) if isinstance(answer, list | tuple) else [answer]


def refuse_teaching(module: LightningModule) -> None:
    """Raises a ValueError for a module whose loss takes no distillation, or that distills already."""
    if not module.automatic_optimization:
        raise ValueError(
            f"distillation: {type(module).__name__} optimizes by hand, so nothing can be added to its loss; add the "
            "distillation there and pass distillation=0"
        )
    if getattr(module, "distillation", None) is not None and getattr(module, "teacher", None) is not None:
        raise ValueError(
            f"{type(module).__name__} has a DistillationConfig and distills already, also into the quantized network; "
            "leave the callback's distillation at 0"
        )

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
    features, with a head outside it, their relative squared error replaces T^2 KL. The teacher sees the same images
    that `training_step` gives to the network (mixed, augmented). So nothing of the module has to be known but the
    attribute that holds the network.

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
            seen: list[tuple[Tensor, Tensor]] = []
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

    def _joined(self, module: LightningModule, outcome: Any, seen: list[tuple[Tensor, Tensor]], *, embeds: bool) -> Any:
        seen = [(images, logits) for images, logits in seen if logits.requires_grad]
        loss = outcome.get("loss") if isinstance(outcome, Mapping) else outcome
        if not seen or not isinstance(loss, Tensor):
            raise ValueError(
                f"distillation: {type(module).__name__}.training_step "
                + ("returns no loss" if seen else "does not call the network with gradients")
                + "; return a loss of the network's logits, or pass distillation=0"
            )
        taught = torch.stack([self._loss(images, logits, embeds=embeds) for images, logits in seen]).mean()
        module.log("qat/distillation", taught.detach(), on_step=False, on_epoch=True, batch_size=len(seen[0][0]))
        joint = (1 - self.weight) * loss + self.weight * taught
        return {**outcome, "loss": joint} if isinstance(outcome, Mapping) else joint

    def _loss(self, images: Tensor, logits: Tensor, *, embeds: bool) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            taught: Tensor = self.teacher(images.to(next(self.teacher.parameters()).dtype))
        if embeds:  # features have no classes; the error is relative to their mean square
            return (logits.float() - taught.float()).square().mean() / taught.float().square().mean()
        return distillation_loss(logits.float(), taught.float(), self.temperature)


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

"""How much a weight matters, and from that how much a unit does.

A criterion gives the *saliency* of every weight of a parameter. It is 0 or more, and low for what is not worth keeping.
A unit's score is the sum over everything that it owns, so all granularities (units, single weights, n:m, blocks) share
the criteria. "l1" and "magnitude" (also called "l2") look at the weights alone. "taylor", "fisher" and "layer_fisher"
also look at gradients of the loss (`collect_gradients`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from swincompress_pl.arguments import integer
from swincompress_pl.evaluation_mode import evaluation_mode, gradients
from swincompress_pl.pruning.evaluation.ranks import agree, failing_together, world_size
from swincompress_pl.pruning.structure.groups import Group, Slice


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """Statistics of the loss's gradient g over some batches, for every parameter of a network.

    The tensors are float32, of the parameter's shape, and on its device.

    Attributes:
        absolute: Maps a parameter name to the mean of |g| over the batches.
        squared: Maps a parameter name to the mean of g^2 over the batches.
        batches: Number of batches, those of all ranks together.
    """

    absolute: Mapping[str, Tensor] = field(repr=False)
    squared: Mapping[str, Tensor] = field(repr=False)
    batches: int


Criterion = Callable[[str, Tensor, Gradients | None], Tensor]
"""(parameter name, weight, gradients of the network or None) -> saliency: the weight's shape, finite, 0 or more.

A function that reads the gradients says so with an attribute: `mine.needs_gradients = True`. A function whose scores
estimate how far the loss rises says so with `mine.estimates_loss = True`.
"""


def l1(name: str, weight: Tensor, gradients: Gradients | None) -> Tensor:
    """|w|."""
    return weight.double().abs()


def magnitude(name: str, weight: Tensor, gradients: Gradients | None) -> Tensor:
    """w^2. A unit's score is the root of the sum: the L2 norm of what it owns."""
    return weight.double().square()


def taylor(name: str, weight: Tensor, gradients: Gradients | None) -> Tensor:
    """|w| * mean|g|: how far the loss moves, to first order, if w is set to 0 (Molchanov et al., CVPR 2019)."""
    return weight.double().abs() * _statistics(gradients, "taylor").absolute[name]


def fisher(name: str, weight: Tensor, gradients: Gradients | None) -> Tensor:
    """w^2 * mean(g^2) / 2: how far the loss rises, to second order, if w is set to 0.

    The diagonal of the empirical Fisher stands for that of the Hessian (LeCun et al., Optimal Brain Damage, 1990; Theis
    et al., arXiv 1801.05787). g is the mean gradient of a batch, so compare only scores from batches of one size.
    """
    return weight.double().square() * _statistics(gradients, "fisher").squared[name] / 2


def layer_fisher(name: str, weight: Tensor, gradients: Gradients | None) -> Tensor:
    """`fisher` with mean(g^2) averaged over the whole parameter.

    Inside a layer it ranks by magnitude, and between layers by how much the loss depends on each. It is steadier than
    `fisher` for single weights, because a few batches estimate the g^2 of a single weight badly.
    """
    squared = _statistics(gradients, "layer_fisher").squared[name]
    return weight.double().square() * squared.double().mean() / 2


CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "l1": l1,
    "l2": magnitude,
    "taylor": taylor,
    "fisher": fisher,
    "layer_fisher": layer_fisher,
}
SECOND_ORDER = "second_order"
"""The criterion whose scores come from second moments of activations; see `compensation.errors`."""

_WITH_GRADIENTS: tuple[Criterion, ...] = (taylor, fisher, layer_fisher)


def needs_gradients(criterion: str | Criterion) -> bool:
    """Whether `criterion` needs the statistics of `collect_gradients`."""
    if criterion == SECOND_ORDER:
        return False
    found = _find(criterion)
    return found in _WITH_GRADIENTS or bool(getattr(found, "needs_gradients", False))


def estimates_loss(criterion: str | Criterion) -> bool:
    """Whether a unit's score estimates how far the loss rises without it, so that it may be divided by its cost.

    Both Fisher criteria estimate that. "taylor" does not: it adds up absolute values, which makes large units look
    important. A function of the user says so with `mine.estimates_loss = True`.
    """
    if criterion == SECOND_ORDER:
        return True
    found = _find(criterion)
    return found in (fisher, layer_fisher) or bool(getattr(found, "estimates_loss", False))


def saliency(network: nn.Module, name: str, criterion: str | Criterion, gradients: Gradients | None = None) -> Tensor:
    """Computes and checks the saliency of one parameter.

    Args:
        network: The network that holds the parameter.
        name: Name of the parameter, dotted.
        criterion: A name in `CRITERIA`, or a function.
        gradients: Statistics for the criteria that need them (`needs_gradients`).

    Returns:
        The saliency: float64, of the parameter's shape, on its device.

    Raises:
        ValueError: If the parameter or the criterion is unknown, gradients are missing or of another shape, or the
            saliency has a wrong shape, is below 0 or is not finite.
    """
    parameter = dict(network.named_parameters(remove_duplicate=False)).get(name)
    if parameter is None:
        raise ValueError(f"{name}: {type(network).__name__} has no parameter of that name")
    return _saliency(name, parameter, criterion, gradients)


def unit_scores(
    network: nn.Module,
    group: Group,
    criterion: str | Criterion = "magnitude",
    gradients: Gradients | None = None,
    *,
    normalize: bool | None = None,
) -> Tensor:
    """Scores each unit of a group; the lowest are removed first.

    A score is the sum of the saliency over all parameters that the unit owns, for "magnitude" the root of that sum.

    Args:
        network: The network of the group.
        group: The group.
        criterion: A name in `CRITERIA`, or a function.
        gradients: Statistics for the criteria that need them.
        normalize: Whether to divide by the group's mean, so that groups can be compared. None does so only for criteria
            without gradients: the others are in units of the loss, and can be compared as they are.

    Returns:
        The scores (units,), float32, on the CPU.

    Raises:
        ValueError: As for `saliency`.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    slices: dict[str, list[Slice]] = {}
    for part in group.slices:
        if part.tensor in parameters:
            slices.setdefault(part.tensor, []).append(part)
    total = torch.zeros(group.units, dtype=torch.float64)
    for name, parts in slices.items():
        elements = _saliency(name, parameters[name], criterion, gradients)
        for part in parts:
            along = elements.movedim(part.axis, 0).flatten(1).sum(1) if elements.ndim > 1 else elements
            for offset in part.offsets:
                owned = along[offset : offset + group.units * part.width]
                total += owned.reshape(group.units, part.width).sum(1).cpu()
    scores = total.sqrt() if _find(criterion) is magnitude else total
    if _normalizes(criterion, normalize):
        scores = _divided(scores, scores.mean())
    return scores.float()


def weight_scores(
    network: nn.Module,
    name: str,
    criterion: str | Criterion = "magnitude",
    gradients: Gradients | None = None,
    *,
    normalize: bool | None = None,
) -> Tensor:
    """Scores each weight of a parameter; the lowest are removed first.

    A score is the saliency, divided by its mean over the layer if `normalize` asks for it. With "magnitude", layers are
    then compared by (|w| / root mean square)^2. Masked weights (saliency 0) do not count in the mean.

    Args:
        network: The network that holds the parameter.
        name: Name of the parameter, dotted.
        criterion: A name in `CRITERIA`, or a function.
        gradients: Statistics for the criteria that need them.
        normalize: As for `unit_scores`.

    Returns:
        The scores: float32, of the parameter's shape, on its device.

    Raises:
        ValueError: As for `saliency`.
    """
    scores = saliency(network, name, criterion, gradients)
    if _normalizes(criterion, normalize):
        scores = _divided(scores, scores.sum() / (scores > 0).sum().clamp(min=1))
    return scores.float()


def lowest_units(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` units with the lowest scores, sorted by index; of equal scores the lower index is taken."""
    order = torch.argsort(scores, stable=True)
    return tuple(sorted(order[:count].tolist()))


def collect_gradients(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy,
    max_batches: int = 8,
    predict: Callable[[Any], Any] | None = None,
) -> Gradients:
    """Collects statistics of the gradients of all parameters, frozen ones too.

    The network is in eval mode meanwhile. Afterwards its modes, `requires_grad`, `.grad` and the global random
    generators are as they were. With torch.distributed, all processes have to call this, and all get the mean over all
    ranks.

    Args:
        network: The network.
        batches: Pairs (inputs, targets) of training data; do not use the hold-out that decides. Tensors are moved to
            the network's device.
        loss: (outputs, targets) -> scalar. The default is the cross entropy of logits (N, classes).
        max_batches: How many batches are read from the beginning, 1 or more.
        predict: inputs -> outputs, called in the place of the network.

    Returns:
        The statistics of every floating-point parameter.

    Raises:
        ValueError: If `max_batches` is below 1, there are no batches, a batch is not a pair, the loss carries no
            gradient, or the loss or a gradient is not finite.
        RankFailedError: If another process of a distributed run failed.
    """
    max_batches = integer("max_batches", max_batches, least=1)
    parameters = {name: p for name, p in network.named_parameters() if p.is_floating_point()}
    device = next(iter(parameters.values())).device
    with ExitStack() as stack:
        # Lightning validates in inference mode, where nothing can be differentiated.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(failing_together("collecting gradients"))
        stack.enter_context(_generators_kept(device))
        stack.enter_context(_differentiable_evaluation(network))
        sums = _Sums(parameters)
        for batch in islice(batches, max_batches):
            inputs, targets = _pair(batch, device)
            if not sums.add(loss((predict or network)(inputs), targets)):
                break
        sums.reduce_over_ranks()
    return sums.means(dict(network.named_parameters(remove_duplicate=False)))


class _Sums:
    """The sums of |g| and g^2 so far.

    A loss that is not finite is counted and raised only after the exchange, so that no rank waits for another.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.absolute, self.squared = (
            {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()} for _ in range(2)
        )
        self.batches, self.bad_losses = 0, 0

    def add(self, loss: Tensor) -> bool:
        """Adds the gradient of a batch's loss; returns False if the loss is not finite."""
        if not loss.requires_grad:
            raise ValueError(
                "the loss carries no gradient; a quantized network in eval mode gives none (collect from its "
                ".network), and neither does a predict under no_grad"
            )
        if not bool(torch.isfinite(loss)):
            self.bad_losses += 1
            return False
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for name, gradient in zip(self.parameters, found, strict=True):
            if gradient is not None:
                wide = gradient.detach().float()
                self.absolute[name] += wide.abs()
                self.squared[name].addcmul_(wide, wide)
        self.batches += 1
        return True

    def reduce_over_ranks(self) -> None:
        """Adds up the sums of all ranks."""
        if world_size() == 1:
            return
        agree()
        device = next(iter(self.parameters.values())).device
        counts = torch.tensor([self.batches, self.bad_losses], device=device)
        for tensor in [counts, *self.absolute.values(), *self.squared.values()]:
            distributed.all_reduce(tensor)
        self.batches, self.bad_losses = counts.tolist()

    def means(self, names: Mapping[str, nn.Parameter]) -> Gradients:
        """The means under every name that a parameter has."""
        if self.bad_losses:
            raise ValueError("the loss is not finite; look for NaN weights or NaN images")
        if not self.batches:
            raise ValueError("there are no batches to collect gradients from; give at least one (inputs, targets)")
        first = {id(parameter): name for name, parameter in self.parameters.items()}
        for name, total in self.squared.items():
            if not bool(torch.isfinite(total).all()):
                raise ValueError(f"{name}: its gradient is not finite; look for NaN weights or a loss that overflows")
            total /= self.batches
            self.absolute[name] /= self.batches
        owners = {name: first[id(p)] for name, p in names.items() if id(p) in first}
        return Gradients(
            absolute={name: self.absolute[owner] for name, owner in owners.items()},
            squared={name: self.squared[owner] for name, owner in owners.items()},
            batches=self.batches,
        )


@contextmanager
def _differentiable_evaluation(network: nn.Module) -> Iterator[None]:
    """Eval mode with every floating-point parameter differentiable inside the context."""
    parameters = [parameter for parameter in network.parameters() if parameter.is_floating_point()]
    with evaluation_mode(network), gradients(parameters, wanted=True):
        yield


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Restores the global random generators afterwards, because iterating over a DataLoader draws from them."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _pair(batch: Any, device: torch.device) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(f"a batch is a {type(batch).__name__}{length}; a pair (inputs, targets) is expected")
    inputs, targets = (_usable(part.to(device)) if isinstance(part, Tensor) else part for part in batch)
    return inputs, targets


def _usable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor  # autograd cannot save inference tensors


def _saliency(name: str, parameter: Tensor, criterion: str | Criterion, gradients: Gradients | None) -> Tensor:
    found, title = _find(criterion), _title(criterion)
    if needs_gradients(found):
        statistic = None if gradients is None else gradients.squared.get(name)
        if statistic is None:
            raise ValueError(
                f"{name}: criterion {title} needs gradients; pass those of collect_gradients(network, ...)"
            )
        if statistic.shape != parameter.shape:
            raise ValueError(
                f"{name}: the gradients for criterion {title} have shape {tuple(statistic.shape)}, the parameter "
                f"{tuple(parameter.shape)}; collect them again after pruning"
            )
    with torch.no_grad():
        values = torch.as_tensor(found(name, parameter.detach(), gradients)).detach()
        if values.shape != parameter.shape:
            raise ValueError(
                f"{name}: criterion {title} gave shape {tuple(values.shape)}, {tuple(parameter.shape)} is expected"
            )
        values = values.to(parameter.device, torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: criterion {title} gave a saliency that is not finite; are there NaN weights?")
        if bool((values < 0).any()):
            raise ValueError(f"{name}: criterion {title} gave {values.min().item():.3g}; a saliency is 0 or more")
    return values


def _find(criterion: str | Criterion) -> Criterion:
    if not isinstance(criterion, str):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(
            f"criterion {criterion!r} is unknown; there are {', '.join(CRITERIA)}, or pass a function "
            "(parameter name, weight, gradients) -> saliency"
        )
    return CRITERIA[criterion]


def _title(criterion: str | Criterion) -> str:
    return repr(criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__))


def _statistics(gradients: Gradients | None, criterion: str) -> Gradients:
    if gradients is None:
        raise ValueError(f"criterion {criterion!r} needs gradients; pass those of collect_gradients(network, ...)")
    return gradients


def _normalizes(criterion: str | Criterion, normalize: bool | None) -> bool:
    if normalize is not None:
        return normalize
    return not (needs_gradients(criterion) or estimates_loss(criterion))


def _divided(scores: Tensor, mean: Tensor) -> Tensor:
    return scores / mean if bool(mean > 0) else scores

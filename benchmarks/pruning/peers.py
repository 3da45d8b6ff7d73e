"""The same fine-tuning after or with the pruning of others, at the sparsity that our search reached.

Unstructured: `torch.nn.utils.prune` once before the fit, over all prunable weights together or in each layer, and
Lightning's `ModelPruning`, once or a little after every epoch in which our rounds run. Structured: one shot with our
own groups, in proportion or ranked together, and Torch-Pruning. ModelPruning's structured functions only write zeros:
no MAC goes, so they have no row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune as torch_prune

from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.pruning import AdaptivePruningConfig, count_macs
from swincompress_pl.pruning.space import prunable_weights, search_space
from swincompress_pl.pruning.structure.cost import skeleton

from .jobs import Job
from .subjects import Recipe, Subject
from .training import fit, network_figures

Parameters = list[tuple[nn.Module, str]]
_PARTS = 1000  # a part of a network is asked for in thousandths
_MOST_TORCH_PRUNING = 0.9  # near 1 it leaves layers whole that would have nothing left


class Foreign(CompressibleClassifier):
    """Holds a network that another package has cut, which `CompressibleClassifier` refuses: no checkpoint fits it."""


class UnreachableError(Exception):
    """A method cannot reach the sparsity that it should be compared at."""


def peer(subject: Subject, job: Job, reference: dict[str, Any]) -> dict[str, Any]:
    """Prunes to the sparsity of `reference` (the results of one of our jobs) with job.method, and fine-tunes
    if the job has recovery.

    A method that fails on this network is a result: {"failed": its error}.
    """
    data, module = subject.data(), subject.classifier()
    callbacks: list[Callback] = []
    parameters = _parameters(module.net)
    try:
        if job.granularity == "weight":
            callbacks = unstructured(
                parameters, job.method or "", reference["after"]["prunable"]["removed"], subject.recipe
            )
        else:
            macs = reference["after"]["macs"]
            module.net = structured(module.net, job.method or "", macs, subject.input_shape, subject.recipe)
            module.__class__ = Foreign
    except ImportError:
        raise  # a package that is not installed is no result
    except Exception as error:  # whatever a peer raises on a network it was not made for belongs into the table
        return {"failed": f"{type(error).__name__}: {error}"[:600], "versions": _versions(job)}
    seconds = fit(subject, module, data, callbacks) if job.recovery else 0.0
    for layer, name in parameters:
        if torch_prune.is_pruned(layer) and hasattr(layer, f"{name}_orig"):
            torch_prune.remove(layer, name)
    return {"after": network_figures(module.net, subject, data), "seconds": seconds, "versions": _versions(job)}


def _parameters(network: nn.Module) -> Parameters:
    names = [name.rpartition(".") for name in prunable_weights(network)]
    return [(network.get_submodule(path), leaf) for path, _, leaf in names]


def _versions(job: Job) -> dict[str, str]:
    package = {"torch_pruning": "torch-pruning", "lightning_": "lightning"}
    names = [name for start, name in package.items() if (job.method or "").startswith(start)]
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            found[name] = "not installed"
    return found


# Unstructured


def unstructured(parameters: Parameters, method: str, amount: float, recipe: Recipe) -> list[Callback]:
    """Prunes `amount` of the weights at once, or gives the callback that will; torch's masks hold in training."""
    if method == "oneshot_global":
        torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=amount)
        return []
    if method == "oneshot_uniform":
        for layer, name in parameters:
            torch_prune.l1_unstructured(layer, name, amount=amount)
        return []
    if method == "lightning_once":
        return [_model_pruning(parameters, amount, [0])]
    if method == "lightning_iterative":
        # It prunes after an epoch, our rounds run before one; an amount is a part of what is left.
        first = max(recipe.start_epoch - 1, 0)
        epochs = range(first, first + recipe.max_rounds)
        return [_model_pruning(parameters, 1 - (1 - amount) ** (1 / len(epochs)), epochs)]
    raise ValueError(f"unknown method {method!r}")


def _model_pruning(parameters: Parameters, amount: float, epochs: Sequence[int]) -> Callback:
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=parameters,
        amount=amount,
        apply_pruning=lambda epoch: epoch in epochs,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,  # it would reset the weights to the given ones at each pruning
    )


# Structured


def structured(network: nn.Module, method: str, macs: int, input_shape: tuple[int, ...], recipe: Recipe) -> nn.Module:
    """`network` with at most `macs`, as near as the method's widths allow; it may be a changed copy."""
    if method in ("oneshot_uniform", "oneshot_global"):
        return one_shot(
            network, method == "oneshot_global", macs, input_shape, kinds=recipe.kinds, round_to=recipe.round_to
        )
    return torch_pruning(network, method, macs, input_shape, recipe.round_to)


def one_shot(
    network: nn.Module,
    ranked_together: bool,
    macs: int,
    input_shape: tuple[int, ...],
    *,
    kinds: Sequence[str],
    round_to: int,
) -> nn.Module:
    """Slices by magnitude, the same part of every group or the least of all groups together, to at most `macs`."""
    config = AdaptivePruningConfig(
        kinds=tuple(kinds), round_to=round_to, ranking="global" if ranked_together else "local", max_sparsity=0.99
    )
    granularity = search_space(config)
    targets = [(each, granularity.removals(network, each, None)) for each in granularity.targets(network)]

    def removal(part: float) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for target, gone in targets:
            wanted = round(target.units * (1 - part) / target.granule) * target.granule
            keep = min(max(wanted, target.least_units(config.max_sparsity)), target.units)
            if keep < target.units:
                chosen.update(gone(keep))
        return chosen

    def macs_at(part: float) -> int:
        bare = skeleton(network)
        granularity.commit(bare, removal(part))
        return count_macs(bare, input_shape)

    granularity.commit(network, removal(smallest_part(macs_at, macs)))
    return network


def smallest_part(macs_at: Callable[[float], int], macs: int, *, most: float = 0.999) -> float:
    """The smallest part to remove, in thousandths up to `most`, that leaves at most `macs`; UnreachableError where none
    does."""
    low, high = 0, round(most * _PARTS)
    if macs_at(high / _PARTS) > macs:
        raise UnreachableError(f"{macs_at(high / _PARTS):,} MACs are left at the least, {macs:,} are asked for")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if macs_at(middle / _PARTS) <= macs else (middle + 1, high)
    return low / _PARTS


def torch_pruning(network: nn.Module, method: str, macs: int, input_shape: tuple[int, ...], round_to: int) -> nn.Module:
    """Torch-Pruning's magnitude pruner: everything but the classifier ("torch_pruning"), or the MLPs alone."""
    import torch_pruning as tp

    def pruned(part: float) -> nn.Module:
        copied = copy.deepcopy(network).cpu().eval()
        mlp_only = method != "torch_pruning"
        kept = [
            module
            for name, module in copied.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and (not name.endswith("mlp.fc1") if mlp_only else name.startswith("head"))
        ]
        heads = {m.qkv: m.num_heads for m in copied.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
        tp.pruner.MagnitudePruner(
            copied,
            torch.zeros(input_shape),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=part,
            global_pruning=method.endswith("_global"),
            ignored_layers=kept,
            round_to=round_to,
            **({} if mlp_only else {"num_heads": heads, "prune_num_heads": True, "head_pruning_ratio": part}),
        ).step()
        copied(torch.zeros(input_shape))  # what does not run raises here
        return copied

    return pruned(smallest_part(lambda part: count_macs(pruned(part), input_shape), macs, most=_MOST_TORCH_PRUNING))

"""Checks, before anything is cut, that a network can be cut as its groups say: masked == sliced on a trial image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from swincompress_pl.evaluation_mode import on_trial
from swincompress_pl.layer_types import full_name, peculiarities
from swincompress_pl.pruning.structure.apply import apply_plan, revert_plan
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.plan import PruningPlan
from swincompress_pl.pruning.structure.unit_masks import mask_plan

BOUND = 1e-5
"""The largest relative error between a masked and a sliced network, both in float64."""

_IMAGES = 1  # whether a cut goes wrong does not depend on the image
_REMEDY = (
    "Pruning cuts the layers that the network's family is made of, and nothing beside them: remove what was added or "
    "replaced, merge it into a plain layer, or leave the group out (kinds=, layers=)"
)


class FirstInputs:
    """The positional arguments of a network's first call, cut to one image; `arguments` is None before a call."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] | None = None

    @contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """Listens to a network inside the context, unless it is compiled in place: a hook would compile it again."""
        if network._compiled_call_impl is not None:
            yield
            return
        handle = network.register_forward_pre_hook(self._keep, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, network: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.arguments is None and not options:
            self.arguments = tuple(a[:_IMAGES].detach() if isinstance(a, Tensor) else a for a in arguments)

    def or_random(self, network: nn.Module, shape: Sequence[int] | None) -> tuple[Any, ...] | None:
        """What was heard, or else random images of a known shape.

        None if there is neither, or the network does not take these arguments alone.
        """
        arguments, like = self.arguments, next(network.parameters())
        if arguments is None and shape is not None:
            images = torch.randn(_IMAGES, *shape[1:], generator=torch.Generator().manual_seed(0))
            arguments = (images.to(like.device, like.dtype),)
        if arguments is None:
            return None
        try:
            with on_trial(network, None), torch.no_grad():
                network(*_as(arguments, None))
        except Exception:  # a network may raise anything for images that other code has to prepare
            return None
        return arguments


def check_cuts(network: nn.Module, groups: Sequence[Group], arguments: tuple[Any, ...]) -> None:
    """Raises ValueError, naming group and module, unless the network computes the same sliced and masked.

    On trial, one unit of each group goes, of all groups together. The network is called with `arguments`, and left as
    it was.
    """
    narrowed = [group for group in groups if group.units > group.min_units]
    complaint = _complaint(network, narrowed, arguments) if narrowed else None
    if complaint is None:
        return
    for group in narrowed:
        alone = _complaint(network, [group], arguments)
        if alone is not None:
            raise ValueError(f"{group.name}: {alone}. {_REMEDY}")
    raise ValueError(f"all groups at once: {complaint}. {_REMEDY}")


def _complaint(network: nn.Module, groups: Sequence[Group], arguments: tuple[Any, ...]) -> str | None:
    """What is wrong with the network without a unit of each group; None if nothing is."""
    plan = PruningPlan.removing(groups, {group.name: [group.units - 1] for group in groups})
    try:
        masked = _masked(network, plan, groups, arguments, torch.float64)
        dtype: torch.dtype | None = torch.float64
    except (RuntimeError, TypeError):  # something in it cannot compute in float64
        masked, dtype = _masked(network, plan, groups, arguments, None), None
    inside: list[str] = []
    with on_trial(network, dtype), torch.no_grad():
        applied = apply_plan(network, plan, groups=groups)
        try:
            with _entered(network, inside):
                sliced = network(*_as(arguments, dtype))
        except Exception as error:
            return f"without a unit of it, {_named(network, inside[-1:])} fails ({str(error).splitlines()[0]})"
        finally:
            revert_plan(network, applied)
    distance = _distance(masked, sliced)
    kind = dtype or next(network.parameters()).dtype
    if distance <= max(BOUND, math.sqrt(torch.finfo(kind).eps)):
        return None
    peculiar = [path for path, module in network.named_modules() if any(_reasons(network, module))]
    where = f"; it may be {_named(network, peculiar)}" if peculiar else ""
    return f"the sliced network differs from the one with the unit masked (relative error {distance:.2g}){where}"


def _masked(
    network: nn.Module,
    plan: PruningPlan,
    groups: Sequence[Group],
    arguments: tuple[Any, ...],
    dtype: torch.dtype | None,
) -> Any:
    with on_trial(network, dtype), torch.no_grad(), mask_plan(network, plan, groups):
        return network(*_as(arguments, dtype))


def _as(arguments: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(dtype if dtype and value.is_floating_point() else value.dtype, copy=True)

    result: tuple[Any, ...] = tree_map(converted, arguments)
    return result


def _distance(masked: Any, sliced: Any) -> float:
    """The largest relative error between the tensors that two calls gave."""
    pairs = list(zip(tree_flatten(masked)[0], tree_flatten(sliced)[0], strict=True))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    if any(a.shape != b.shape for a, b in tensors):
        return float("inf")
    sizes = [(float((a - b).norm()), float(a.norm())) for a, b in tensors if bool(a.isfinite().all())]
    return max((error / size if size else float("inf") for error, size in sizes if error), default=0.0)


@contextmanager
def _entered(network: nn.Module, inside: list[str]) -> Iterator[None]:
    """Keeps in `inside` the paths of the modules whose forward has begun and not ended, the innermost last."""
    with ExitStack() as hooks:
        for path, module in network.named_modules():
            begin = module.register_forward_pre_hook(lambda _module, _inputs, path=path: inside.append(path))
            end = module.register_forward_hook(lambda _module, _inputs, _output: _dropped(inside))
            hooks.callback(begin.remove)
            hooks.callback(end.remove)
        yield


def _dropped(inside: list[str]) -> None:
    inside.pop()


def _named(network: nn.Module, paths: Sequence[str]) -> str:
    found = []
    for path in paths[:3]:
        module = network.get_submodule(path)
        reasons = "; ".join(_reasons(network, module))
        found.append(f"{path or 'the network'} ({full_name(type(module))}{': ' if reasons else ''}{reasons})")
    return " or ".join(found) or "the network"


def _reasons(network: nn.Module, module: nn.Module) -> Iterator[str]:
    return peculiarities(module, type(network).__module__.partition(".")[0])

"""Physical slicing: a plan becomes smaller tensors, and the network's integer attributes follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import adapter_for
from .groups import Group, validate_units
from .plan import PruningPlan, find_group


@dataclass(frozen=True, kw_only=True)
class SlicedTensor:
    """One tensor that a plan replaced: `new` is `old` with only the kept indices along each listed axis."""

    name: str
    old: Tensor
    new: Tensor
    kept: tuple[tuple[int, Tensor], ...]

    def slice(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the old shape, cut the same way (for gradients and optimizer state)."""
        for axis, index in self.kept:
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor


@dataclass(frozen=True, kw_only=True)
class AppliedPlan:
    """What `apply_plan` did: enough to slice optimizers (`slice_optimizer`) and to go back (`revert_plan`)."""

    plan: PruningPlan
    tensors: tuple[SlicedTensor, ...]
    attributes: tuple[tuple[str, str, int, int], ...]  # module, name, value before, value after

    def replacement(self, parameter: Tensor) -> SlicedTensor | None:
        """The change made to `parameter`, or None when it was left alone."""
        return next((t for t in self.tensors if t.old is parameter), None)


def apply_plan(network: nn.Module, plan: PruningPlan, *, groups: Iterable[Group] | None = None) -> AppliedPlan:
    """Remove from `network`, physically and in place, the units that `plan` does not keep.

    The sliced parameters are new `nn.Parameter`s of the same dtype, device and `requires_grad`, with their gradients
    sliced; the plan is appended to `network.compression_history` as {"prune": plan.to_dict()} unless it is empty. An
    optimizer that was made before still holds the old parameters: hand the returned AppliedPlan to `slice_optimizer`.
    groups: those of the network's adapter unless given.
    Raises ValueError before anything is touched: an unknown group, units out of range, too few units kept, a network of
    another width than the plan's, a parameter that is shared or computed.
    """
    known = {g.name: g for g in (adapter_for(network).groups(network) if groups is None else groups)}
    removed = {name: _removed_units(find_group(known, name), plan) for name in plan.kept}
    touched = [known[name] for name, gone in removed.items() if gone]
    _check_slots(network, touched)
    _check_attributes(network, touched)
    tensors = tuple(_slice_tensor(network, name, axes) for name, axes in _lost_indices(touched, removed).items())
    attributes = tuple(_new_attributes(network, touched, removed, {t.name: t.new for t in tensors}))
    for sliced in tensors:
        _put(network, sliced.name, sliced.new)
    for module, name, _, value in attributes:
        setattr(network.get_submodule(module), name, value)
    if plan:
        _set_history(network, [*history_of(network), {"prune": plan.to_dict()}])
    return AppliedPlan(plan=plan, tensors=tensors, attributes=attributes)


def revert_plan(network: nn.Module, applied: AppliedPlan) -> None:
    """Undo the latest `apply_plan`: the old tensors come back, with the values that they had then."""
    for sliced in applied.tensors:
        _put(network, sliced.name, sliced.old)
    for module, name, value, _ in applied.attributes:
        setattr(network.get_submodule(module), name, value)
    if applied.plan:
        history = history_of(network)
        if not history or history[-1] != {"prune": applied.plan.to_dict()}:
            raise ValueError("only the latest plan can be reverted; the network was changed after this one")
        _set_history(network, history[:-1])


def history_of(network: nn.Module) -> list[dict[str, Any]]:
    """What was done to `network` so far, oldest first: the entries of `network.compression_history`."""
    return list(getattr(network, "compression_history", []))


def _set_history(network: nn.Module, history: list[dict[str, Any]]) -> None:
    network.compression_history = history  # type: ignore[assignment]  # a plain list; nn.Module types every attribute as a tensor


def _removed_units(group: Group, plan: PruningPlan) -> tuple[int, ...]:
    kept = set(validate_units(group, plan.kept[group.name], "the kept units"))
    expected = (plan.units or {}).get(group.name, group.units)
    if expected != group.units:
        raise ValueError(
            f"{group.name}: the plan was made for {expected} units, this network has {group.units}; "
            "apply it to a fresh network of the architecture that it was made for"
        )
    if len(kept) < group.min_units:
        raise ValueError(f"{group.name}: the plan keeps {len(kept)} units, at least {group.min_units} have to stay")
    return tuple(u for u in range(group.units) if u not in kept)


def _check_slots(network: nn.Module, groups: Iterable[Group]) -> None:
    """Every tensor exists, belongs to one place only, and is long enough for the group's indices."""
    owners: dict[int, list[str]] = {}
    tensors: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                full = f"{path}.{name}".lstrip(".")
                owners.setdefault(id(tensor), []).append(full)
                tensors[full] = tensor
    for group in groups:
        for part in group.slices:
            tensor = tensors.get(part.tensor)
            if tensor is None:
                raise ValueError(
                    f"{group.name}: {part.tensor} is no parameter of the network (a parametrization computes it, or "
                    "the layer was replaced); remove the parametrization before pruning"
                )
            if len(owners[id(tensor)]) > 1:
                raise ValueError(
                    f"{group.name}: {part.tensor} is shared ({', '.join(owners[id(tensor)])}); cutting it would break "
                    "the other place. Untie it first: give each place its own nn.Parameter"
                )
            if tensor.ndim <= part.axis or tensor.shape[part.axis] < part.end(group.units):
                raise ValueError(
                    f"{group.name}: {part.tensor} has shape {tuple(tensor.shape)}, which does not hold {part}"
                )


def _attribute_value(network: nn.Module, module: str, name: str) -> int:
    value = getattr(network.get_submodule(module), name, None)
    if not isinstance(value, int):
        raise ValueError(
            f"{module}.{name} is {value!r}, an integer is expected; does this version of the model differ?"
        )
    return value


def _check_attributes(network: nn.Module, groups: Iterable[Group]) -> None:
    for group in groups:
        for a in group.attributes:
            expected = group.units if a.size_of is None else _tensor(network, a.size_of).shape[a.axis]
            if (value := _attribute_value(network, a.module, a.name)) != expected:
                raise ValueError(f"{group.name}: {a.module}.{a.name} is {value}, {expected} is expected before pruning")


def _lost_indices(groups: Iterable[Group], removed: Mapping[str, tuple[int, ...]]) -> dict[str, dict[int, set[int]]]:
    """{tensor: {axis: indices to remove}}; groups that meet in a tensor are cut at once."""
    lost: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        for part in group.slices:
            lost.setdefault(part.tensor, {}).setdefault(part.axis, set()).update(part.indices(removed[group.name]))
    return lost


def _tensor(network: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(network.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor)  # _check_slots has seen it
    return tensor


def _put(network: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(path), leaf, tensor)


def _slice_tensor(network: nn.Module, name: str, lost: Mapping[int, set[int]]) -> SlicedTensor:
    old = _tensor(network, name)
    kept = tuple(
        (axis, torch.tensor([i for i in range(old.shape[axis]) if i not in gone], device=old.device))
        for axis, gone in sorted(lost.items())
    )
    cut = SlicedTensor(name=name, old=old, new=old, kept=kept)
    new = cut.slice(old.detach())
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)  # marks that users and libraries hang on parameters
        if old.grad is not None:
            new.grad = cut.slice(old.grad)
    return SlicedTensor(name=name, old=old, new=new, kept=kept)


def _new_attributes(
    network: nn.Module, groups: Iterable[Group], removed: Mapping[str, tuple[int, ...]], new: Mapping[str, Tensor]
) -> Iterable[tuple[str, str, int, int]]:
    for group in groups:
        for a in group.attributes:
            before = _attribute_value(network, a.module, a.name)
            if a.size_of is None:
                after = group.units - len(removed[group.name])
            else:
                after = new.get(a.size_of, _tensor(network, a.size_of)).shape[a.axis]
            yield a.module, a.name, before, after

"""Physical slicing: a plan makes tensors smaller; the network's attributes and, where needed, classes follow."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import outside_inference_mode
from swincompress_pl.history import append_entry, drop_latest_entry, history_of
from swincompress_pl.interrupts import all_or_nothing
from swincompress_pl.layer_types import LAYERS, alteration, full_name
from swincompress_pl.pruning.structure.groups import Attribute, ClassSwap, Group, validate_units
from swincompress_pl.pruning.structure.plan import PruningPlan, find_group
from swincompress_pl.registry import adapter_for


@dataclass(frozen=True, kw_only=True)
class SlicedTensor:
    """A tensor that a plan replaced.

    Attributes:
        name: Name of the parameter or buffer, dotted.
        old: The tensor before.
        new: `old` with only the kept indices.
        kept: Pairs (axis, the indices that stay along it).
    """

    name: str
    old: Tensor = field(repr=False)
    new: Tensor = field(repr=False)
    kept: tuple[tuple[int, Tensor], ...] = field(repr=False)

    def slice(self, tensor: Tensor) -> Tensor:
        """Cuts another tensor of the old shape in the same way, such as a gradient or an optimizer's state."""
        for axis, index in self.kept:
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor


@dataclass(frozen=True, kw_only=True)
class AppliedPlan:
    """What `apply_plan` did: enough to slice optimizers (`slice_optimizer`) and to undo it (`revert_plan`).

    Attributes:
        plan: The plan.
        tensors: The tensors that were replaced.
        attributes: (module, name, value before, value after) of the attributes that were set.
        swapped: (module, class before, class after) of the modules that got another class.
    """

    plan: PruningPlan
    tensors: tuple[SlicedTensor, ...] = field(repr=False)
    attributes: tuple[tuple[str, str, Any, Any], ...] = field(repr=False)  # module, name, value before, value after
    # module, class before, class after
    swapped: tuple[tuple[str, type[nn.Module], type[nn.Module]], ...] = field(default=(), repr=False)

    def replacement(self, parameter: Tensor) -> SlicedTensor | None:
        """The change made to a parameter, which is the one before; None if it was left alone."""
        return next((t for t in self.tensors if t.old is parameter), None)


@outside_inference_mode()
def apply_plan(network: nn.Module, plan: PruningPlan, *, groups: Iterable[Group] | None = None) -> AppliedPlan:
    """Removes from a network, physically and in place, the units that a plan does not keep.

    The sliced parameters are new `nn.Parameter`s of the same dtype, device and `requires_grad`, with sliced gradients.
    A buffer `<parameter>_mask` beside a parameter is cut with it. The plan is appended to `network.compression_history`
    as `{"prune": plan.to_dict()}` unless it is empty. An optimizer that was made before still holds the old parameters:
    give it and the result to `slice_optimizer`. On any exception the network is left as it was.

    Args:
        network: The network.
        plan: The units that stay.
        groups: The groups of the network; None for those of its adapter.

    Returns:
        What was changed.

    Raises:
        ValueError: If a group is unknown, units are out of range, fewer than `min_units` stay, the plan is for a
            network of another width, a parameter is shared or computed, units are masked by an open context, or an
            attribute or a class is not what the group expects.
        UnsupportedNetworkError: If the network has no adapter and `groups` is None.
    """
    known = {g.name: g for g in (adapter_for(network).groups(network) if groups is None else groups)}
    removed = {name: _removed_units(find_group(known, name), plan) for name in plan.kept}
    touched = [known[name] for name, gone in removed.items() if gone]
    _check_slots(network, touched)
    _check_attributes(network, touched)
    _check_unmasked(network, touched)
    swapped = tuple(_new_class(network, e) for group in touched for e in group.class_swaps)
    lost = _with_masks(network, _lost_indices(touched, removed))
    tensors = tuple(_slice_tensor(network, name, axes) for name, axes in lost.items())
    attributes = tuple(_new_attributes(network, touched, removed, {t.name: t.new for t in tensors}))
    applied = AppliedPlan(plan=plan, tensors=tensors, attributes=attributes, swapped=swapped)
    with all_or_nothing(network):
        for sliced in tensors:
            put_tensor(network, sliced.name, sliced.new)
        for module, name, _, value in attributes:
            write_attribute(network, module, name, value)
        for module, _, new_class in swapped:
            network.get_submodule(module).__class__ = new_class
        if plan:
            append_entry(network, "prune", plan.to_dict())
        return applied


def revert_plan(network: nn.Module, applied: AppliedPlan) -> None:
    """Undoes the latest `apply_plan`: the old tensors come back, with the values that they had then.

    On any exception the network is left as it was. A ValueError says that it was changed after that plan.
    """
    history = history_of(network)
    if applied.plan and (not history or history[-1] != {"prune": applied.plan.to_dict()}):
        raise ValueError("only the latest plan can be reverted; the network was changed after this one")
    with all_or_nothing(network):
        for sliced in applied.tensors:
            put_tensor(network, sliced.name, sliced.old)
        # backwards: two groups of the plan may have changed the same one
        for module, name, value, _ in reversed(applied.attributes):
            write_attribute(network, module, name, value)
        for module, old_class, _ in reversed(applied.swapped):
            network.get_submodule(module).__class__ = old_class
        if applied.plan:
            drop_latest_entry(network)


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
    """Raises ValueError unless every tensor exists, is used once, and is long enough for the group's indices."""
    owners: dict[int, list[str]] = {}
    tensors: dict[str, Tensor] = {}
    for path, module in network.named_modules(remove_duplicate=False):
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
        check_layers(network, (part.tensor for part in group.slices))


def check_layers(network: nn.Module, tensors: Iterable[str]) -> None:
    """Raises ValueError for an owner of these tensors that does not compute what its class says; see `alteration`."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        layer = network.get_submodule(path)
        reason = alteration(layer) if isinstance(layer, LAYERS) else None
        if reason is not None:
            raise ValueError(f"{path} is {full_name(type(layer))}, which cannot be pruned as it is: {reason}")


def _holder(network: nn.Module, module: str, name: str) -> tuple[Any, Any]:
    """The object that holds the attribute, and its key there; `name` may lead through lists and dictionaries."""
    holder: Any = network.get_submodule(module)
    *path, leaf = name.split(".")
    for step in path:
        holder = getattr(holder, step) if isinstance(holder, nn.Module) else holder[_key(holder, step)]
    return holder, _key(holder, leaf)


def _key(holder: Any, step: str) -> str | int:
    return int(step) if isinstance(holder, list) else step


def read_attribute(network: nn.Module, module: str, name: str) -> Any:
    """The value at `module` and `name` (see `Attribute`); None if there is none."""
    try:
        holder, key = _holder(network, module, name)
        return getattr(holder, key) if isinstance(holder, nn.Module) else holder[key]
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def write_attribute(network: nn.Module, module: str, name: str, value: Any) -> None:
    """Sets what `read_attribute` reads."""
    holder, key = _holder(network, module, name)
    if isinstance(holder, nn.Module):
        setattr(holder, key, value)
    else:
        holder[key] = value


def attribute_value(network: nn.Module, attribute: Attribute, width: int) -> int | tuple[int]:
    """The value of an attribute at a width: an integer, or a tuple of one integer if it is such a tuple now."""
    if attribute.value is not None:
        return attribute.value
    present = read_attribute(network, attribute.module, attribute.name)
    return (width,) if isinstance(present, tuple) else width


def _check_attributes(network: nn.Module, groups: Iterable[Group]) -> None:
    for group in groups:
        for a in group.attributes:
            value = read_attribute(network, a.module, a.name)
            name = f"{a.module}.{a.name}".lstrip(".")
            if not isinstance(value[0] if isinstance(value, tuple) and len(value) == 1 else value, int):
                raise ValueError(f"{name} is {value!r}, an integer is expected; does this version of the model differ?")
            width = group.units if a.size_of is None else stored_tensor(network, a.size_of).shape[a.axis]
            if a.value is None and value != (expected := attribute_value(network, a, width)):
                raise ValueError(f"{group.name}: {name} is {value}, {expected} is expected before pruning")


def _check_unmasked(network: nn.Module, groups: Iterable[Group]) -> None:
    for group in groups:
        for norm in group.norms:
            if "kept_channels" in vars(network.get_submodule(norm.module)):  # see `masks`
                raise ValueError(f"{group.name}: {norm.module} is masked; leave the context of the mask before slicing")


def _new_class(network: nn.Module, swap: ClassSwap) -> tuple[str, type[nn.Module], type[nn.Module]]:
    old = type(network.get_submodule(swap.module))
    package, _, name = swap.type.partition(":")
    new = getattr(importlib.import_module(package), name)
    if not issubclass(new, old):
        raise ValueError(
            f"{swap.module} is a {old.__qualname__}, which {swap.type} does not extend, so its width cannot "
            "change; does this version of the model differ?"
        )
    return swap.module, old, new


def _lost_indices(groups: Iterable[Group], removed: Mapping[str, tuple[int, ...]]) -> dict[str, dict[int, set[int]]]:
    """{tensor: {axis: indices to remove}}; groups that share a tensor are cut together."""
    lost: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        for part in group.slices:
            lost.setdefault(part.tensor, {}).setdefault(part.axis, set()).update(part.indices(removed[group.name]))
    return lost


def _with_masks(network: nn.Module, lost: dict[str, dict[int, set[int]]]) -> dict[str, dict[int, set[int]]]:
    """Adds to `lost` the masks of its tensors."""
    return lost | {mask: axes for name, axes in lost.items() if (mask := mask_name(network, name)) is not None}


def mask_name(network: nn.Module, name: str) -> str | None:
    """The name of the buffer that masks the weights of a parameter; None if there is none."""
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    mask = module._buffers.get(f"{leaf}_mask")
    return None if mask is None or mask.shape != getattr(module, leaf).shape else f"{name}_mask"


def stored_tensor(network: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name`; a ValueError if a parametrization computes it or there is none."""
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    tensor = module._parameters.get(leaf, module._buffers.get(leaf))
    if tensor is None:
        raise ValueError(f"{name} is no parameter of the network; remove the parametrization that computes it")
    return tensor


def put_tensor(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces the parameter or buffer `name`."""
    path, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(path), leaf, tensor)


def _slice_tensor(network: nn.Module, name: str, lost: Mapping[int, set[int]]) -> SlicedTensor:
    old = stored_tensor(network, name)
    kept = tuple(
        (axis, torch.tensor([i for i in range(old.shape[axis]) if i not in gone], device=old.device))
        for axis, gone in sorted(lost.items())
    )
    cut = SlicedTensor(name=name, old=old, new=old, kept=kept)
    new = cut.slice(old.detach())
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)  # attributes that users and libraries set on parameters
        if old.grad is not None:
            new.grad = cut.slice(old.grad)
    return SlicedTensor(name=name, old=old, new=new, kept=kept)


def _new_attributes(
    network: nn.Module, groups: Iterable[Group], removed: Mapping[str, tuple[int, ...]], new: Mapping[str, Tensor]
) -> Iterable[tuple[str, str, Any, Any]]:
    for group in groups:
        for a in group.attributes:
            width = group.units - len(removed[group.name])
            if a.size_of is not None:
                width = new.get(a.size_of, stored_tensor(network, a.size_of)).shape[a.axis]
            yield a.module, a.name, read_attribute(network, a.module, a.name), attribute_value(network, a, width)

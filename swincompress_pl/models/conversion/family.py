"""What a family of torchvision or transformers tells about itself, and how its weights get timm's names."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int]
"""Height and width in pixels."""
Tensors = dict[str, Tensor]
Name = str | Callable[[re.Match[str]], str]
"""The name in timm, with groups of the pattern; "path@1" is part 1 of "path", along the first axis."""

_PART = re.compile(r"(.*)@(\d)(.*)")
_SHOWN = 3


def _unchanged(tensors: Tensors, network: Any, size: Size) -> None:
    """Leaves the tensors as they are."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How networks of some classes become networks of timm.

    Attributes:
        classes: The classes, as "package:Class".
        architecture: Name and arguments for `create_model`, given the network and the image size. It raises a
            ValueError for variants that timm's class does not have.
        names: (pattern, name in timm) of parameters, buffers and modules, without their ".weight" and ".bias".
        answer: Runs the network on images, and returns what timm's network returns.
        native_size: The image size of the network.
        any_size: Whether the network also runs on images of other sizes.
        unused: Patterns of the names that evaluation does not need.
        adjust: Changes the renamed tensors further, given the network and the image size.
    """

    classes: tuple[str, ...]
    architecture: Callable[[Any, Size], tuple[str, dict[str, Any]]]
    names: tuple[tuple[str, Name], ...]
    answer: Callable[[Any, Tensor], Tensor]
    native_size: Callable[[Any], Size]
    any_size: bool = False
    unused: tuple[str, ...] = ()
    adjust: Callable[[Tensors, Any, Size], None] = _unchanged

    def renamed(self, key: str) -> str | None:
        """The name in timm of a parameter or buffer; None if there is none."""
        path, _, last = key.rpartition(".")
        path, suffix = (path, f".{last}") if last in ("weight", "bias") else (key, "")
        for pattern, name in self.names:
            match = re.fullmatch(pattern, path)
            if match:
                return (match.expand(name) if isinstance(name, str) else name(match)) + suffix
        return None

    def tensors(self, network: nn.Module, size: Size, wanted: Mapping[str, Tensor]) -> Tensors:
        """The tensors of `network` by timm's names; a ValueError if they are not exactly those that are `wanted`."""
        parts: dict[str, dict[str, Tensor]] = {}
        left_over = []
        for key, value in network.state_dict().items():
            if any(re.fullmatch(pattern, key) for pattern in self.unused):
                continue
            name = self.renamed(key)
            match = _PART.fullmatch(name or "")
            whole, part = (match[1] + match[3], match[2]) if match else (name, "")
            if whole is None or part in parts.get(whole, {}):
                left_over.append(key)
            else:
                parts.setdefault(whole, {})[part] = value.detach().to("cpu", torch.float32)
        tensors = {name: torch.cat([found[part] for part in sorted(found)]) for name, found in parts.items()}
        self.adjust(tensors, network, size)
        _check_names(network, tensors, wanted, left_over)
        return tensors

    def copy_epsilons(self, network: nn.Module, converted: nn.Module) -> None:
        """Gives each LayerNorm of `converted` the epsilon of the one that it comes from."""
        for path, module in network.named_modules():
            name = self.renamed(f"{path}.weight")
            if isinstance(module, nn.LayerNorm) and name is not None:
                norm: Any = converted.get_submodule(name.removesuffix(".weight"))
                norm.eps = module.eps


def _check_names(network: nn.Module, tensors: Tensors, wanted: Mapping[str, Tensor], left_over: Sequence[str]) -> None:
    problems = {
        "left over": [*left_over, *sorted(tensors.keys() - wanted.keys())],
        "missing (by timm's name)": sorted(wanted.keys() - tensors.keys()),
        "of another shape (by timm's name)": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in tensors and tensors[key].shape != value.shape
        ],
    }
    found = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if names[_SHOWN:] else ''})"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(
            f"{type(network).__name__}: its tensors are not those of its class: {'; '.join(found)}. Merge adapters and "
            "undo changes of its layers first"
        )


def refused(network: nn.Module | type, what: str, remedy: str) -> ValueError:
    """The error for a network or a class that timm has no equal of."""
    kind = network if isinstance(network, type) else type(network)
    return ValueError(f"{kind.__name__}: {what}, which timm's class does not have; {remedy}")


def rates(**given: float) -> dict[str, float]:
    """The arguments of dropout that are not 0."""
    return {name: float(rate) for name, rate in given.items() if rate}


def warn_of_dropout(network: nn.Module, what: str) -> None:
    """Warns that training drops at other places in timm."""
    warnings.warn(f"{type(network).__name__}: {what}; answers in evaluation are equal", stacklevel=5)


def ratio_for(hidden: int, width: int) -> float:
    """The `mlp_ratio` with which timm makes `hidden` channels for `width`."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def out_features(head: Any) -> int:
    """The number of classes of a head; 0 for none."""
    return head.out_features if isinstance(head, nn.Linear) else 0


def pair(value: Any) -> Size:
    """(height, width) of one number or two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def check_windows(network: nn.Module, size: Size, patch: Size, window: Size, stages: int, *, clamped: bool) -> None:
    """Raises a ValueError if a feature map is no multiple of the window, because libraries pad it in different ways.

    `clamped` says that a window is never larger than the feature map.
    """
    sides = [side // step for side, step in zip(size, patch, strict=True)]
    for stage in range(stages):
        used = [min(side, most) if clamped else most for side, most in zip(sides, window, strict=True)]
        if any(side % width for side, width in zip(sides, used, strict=True)):
            raise ValueError(
                f"{type(network).__name__}: for images of {size[0]}x{size[1]} pixels, stage {stage} has a feature map "
                f"of {sides[0]}x{sides[1]}, no multiple of its window of {used[0]}x{used[1]}. Libraries pad such maps "
                "in different ways, so no network of timm is equal; choose another image size"
            )
        sides = [(side + 1) // 2 for side in sides]

"""Gradient checkpointing of the fake-quantized pass, block by block, where the network asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from swincompress_pl.quant.graph import Run, WeightedNode

# The flag of timm, which `set_grad_checkpointing` sets, and that of transformers.
_FLAGS = ("grad_checkpointing", "gradient_checkpointing")


def checkpointed_paths(network: nn.Module) -> list[str]:
    """The modules of `network` whose blocks are to be checkpointed; "" is the network itself."""
    return [
        path
        for path, module in network.named_modules()
        if any(vars(module).get(flag, False) is True for flag in _FLAGS)
    ]


class CheckpointedRun(Run):
    """A `Run` with gradient checkpointing in the blocks where the network has it switched on.

    These blocks keep only their inputs, and compute the values inside again for the gradients. Results and gradients
    are those of a `Run`: random numbers are replayed, and statistics of BatchNorms are updated once.
    """

    def walk(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs all nodes, with checkpoints if gradients are on."""
        paths = checkpointed_paths(self.network) if torch.is_grad_enabled() else []
        if not paths:
            return super().walk(values)
        known = dict(values)
        for numbers in self.graph.blocks():
            if self._lies_in(numbers, paths):
                known = self._checkpointed(known, numbers)
            else:
                known = self.advance(known, numbers)
        return known

    def _lies_in(self, numbers: range, paths: Sequence[str]) -> bool:
        modules = [node.module for node in self._nodes(numbers) if isinstance(node, WeightedNode)]
        return any(f"{module}.".startswith(f"{path}." if path else "") for module in modules for path in paths)

    def _checkpointed(self, values: dict[str, Tensor], numbers: range) -> dict[str, Tensor]:
        norms = [
            self.network.get_submodule(path) for node in self._nodes(numbers) for path in getattr(node, "norms", ())
        ]
        statistics = _Statistics([norm for norm in norms if isinstance(norm, _BatchNorm) and norm.training])

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), statistics

        advanced: dict[str, Tensor] = checkpoint(
            self.advance, values, numbers, use_reentrant=False, context_fn=contexts
        )
        return advanced

    def _nodes(self, numbers: range) -> Sequence[Any]:
        return self.graph.nodes[numbers.start : numbers.stop]


class _Statistics(AbstractContextManager[None]):
    """Gives BatchNorms copies of the running statistics that they have when it is made.

    So the second pass folds weights with the statistics of the first one, and does not update them again.
    """

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        self._now = [(norm, {name: _copy(buffer) for name, buffer in norm._buffers.items()}) for norm in norms]
        self._held: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self._held = [dict(norm._buffers) for norm, _ in self._now]
        for norm, buffers in self._now:
            norm._buffers.update({name: _copy(buffer) for name, buffer in buffers.items()})

    def __exit__(self, *_: object) -> None:
        for (norm, _now), buffers in zip(self._now, self._held, strict=True):
            norm._buffers.update(buffers)


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.clone()

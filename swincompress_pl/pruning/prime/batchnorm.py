"""BatchNorm's running statistics of a pruned network, corrected by what pruning changes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from swincompress_pl.pruning.evaluation.images import check_finite
from swincompress_pl.pruning.evaluation.ranks import from_all_ranks, share_buffers

_LEAST_VARIANCE = 1e-5  # BatchNorm's own epsilon, which bounds the ratio for a channel that was silent


class StatisticsCorrection:
    """Corrects the statistics of a network for what is pruned at the time of a call.

    Args:
        network: The network before pruning.
        calibration: Batches (images, ...), which each correction reads again. None leaves the statistics alone.

    Attributes:
        passes: How often the batches were read.
    """

    def __init__(self, network: nn.Module, calibration: Iterable[Any] | None) -> None:
        self._network, self._calibration = network, calibration
        self.passes = 0
        self._unpruned = {} if calibration is None else self._estimated(calibration)

    @property
    def is_active(self) -> bool:
        """Whether statistics are corrected at all."""
        return self._calibration is not None

    def correct(self) -> None:
        """Corrects the mean by its difference to the unpruned network's on the same images, the variance by the ratio.

        So the difference between these few images and the training images cancels, and a network of which nothing is
        pruned does not change.
        """
        if self._calibration is None:
            return
        trained, pruned = batchnorm_state(self._network), self._estimated(self._calibration)
        corrected = dict(trained)
        for name, unpruned in self._unpruned.items():
            if name.endswith("running_mean"):
                corrected[name] = trained[name] + (pruned[name] - unpruned)
            elif name.endswith("running_var"):
                corrected[name] = trained[name] * (pruned[name] + _LEAST_VARIANCE) / (unpruned + _LEAST_VARIANCE)
        restore_batchnorm(self._network, corrected)

    def _estimated(self, calibration: Iterable[Any]) -> dict[str, Tensor]:
        """The statistics on the calibration images; the running ones are left as they are."""
        before, device = batchnorm_state(self._network), next(self._network.parameters()).device
        seen = 0

        def counted() -> Iterator[Any]:
            nonlocal seen
            for batch in calibration:
                images = batch[0] if isinstance(batch, list | tuple) else batch
                check_finite(f"batch {seen} of calibration", images)
                seen += 1
                yield batch

        try:
            update_bn(counted(), self._network, device=device)
            if before and not from_all_ranks(seen)[0]:  # rank 0's buffers are shared; the other ranks' do not count
                raise ValueError("batchnorm='correct': calibration has no batch; give a few of training images")
            share_buffers(self._network)
            self.passes += 1
            return batchnorm_state(self._network)
        finally:
            restore_batchnorm(self._network, before)


def batchnorm_state(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics of every BatchNorm, by name."""
    return {name: buffer.clone() for name, buffer in _statistics(network)}


def restore_batchnorm(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restores the running statistics that `batchnorm_state` returned."""
    with torch.no_grad():
        for name, buffer in _statistics(network):
            buffer.copy_(state[name])


def _statistics(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var", "num_batches_tracked"):
                    yield f"{prefix}.{name}", buffer

"""What may stand beside a callback that changes the network in the middle of a fit, and what may not."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn


def refuse_strategy(trainer: Trainer, who: str) -> None:
    """ValueError for strategies that hold shards of the parameters; one device and DDP are fine."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"{who} cannot shrink a model in the middle of a fit under {type(trainer.strategy).__name__}, which holds "
            "shards of its parameters. Prune first (Trainer(devices=1) or strategy='ddp'), then fit the pruned "
            "checkpoint with your strategy and without this callback"
        )


def refuse_neighbours(trainer: Trainer, who: str) -> None:
    """ValueError for callbacks that keep a copy of the weights or replace them."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by the trainer
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            raise ValueError(
                f"{type(other).__name__} keeps a copy of the model whose sizes and masks do not follow {who}; take it "
                "out of this fit and average in a later one, after pruning"
            )
        if isinstance(other, ModelPruning):
            raise ValueError(
                f"{type(other).__name__} replaces weights by masked ones, which cannot be pruned again; use it or "
                f"{who}, not both"
            )


def refuse_outside_sharing(module: LightningModule, network: nn.Module, model_attribute: str) -> None:
    """A parameter of the network that another part of the LightningModule holds as its own would keep its old shape."""
    inside = {id(m) for m in network.modules()}
    own = {id(p): name for name, p in network.named_parameters()}
    for path, other in module.named_modules():
        if id(other) in inside:
            continue
        for name, parameter in other._parameters.items():
            if id(parameter) in own:
                raise ValueError(
                    f"{path}.{name} is shared with {model_attribute}.{own[id(parameter)]}; a shrink would leave it "
                    "behind. Give it its own nn.Parameter"
                )


def wrap_anew(trainer: Trainer) -> None:
    """Under DDP: wrap the module again, whose parameters are others now. Broadcasts the weights of rank 0."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        # The old wrapper has to go first: its reducer still hooks the parameters that stayed.
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()

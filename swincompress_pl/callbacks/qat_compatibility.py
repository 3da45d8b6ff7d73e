"""What may stand beside quantization-aware training, and what may not."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

WHO = "QuantizationAwareTraining"
_PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")


def refuse_surroundings(trainer: Trainer, module: LightningModule, callback: object) -> None:
    """ValueError, with the remedy, for what cannot work beside the callback: strategy, precision, compiled code,
    neighbours."""
    _refuse_strategy(trainer)
    if trainer.precision not in _PRECISIONS:
        raise ValueError(
            f"{WHO} cannot train with precision={trainer.precision!r}, which would round the scales and the float "
            f"weights themselves; use 'bf16-mixed', '16-mixed' or '32-true'"
        )
    _refuse_compiled(module)
    _refuse_neighbours(trainer, callback)


def _refuse_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    name = type(strategy).__name__
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"{WHO} cannot exchange the network in the middle of a fit under {name}, which holds shards of its "
            "parameters. Train with strategy='ddp' or on one device (Trainer(devices=1)), or quantize after the fit "
            "with quant.quantize"
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{WHO} cannot run under {name}'s spawned or forked processes: the weights that come back when they end "
            "belong to another network than the module here. Use strategy='ddp' in a script, or one device"
        )
    if isinstance(strategy, DDPStrategy) and strategy._ddp_comm_state is not None:
        raise ValueError(
            f"{WHO} adds parameters to a model whose {name} has a ddp_comm_state "
            f"({type(strategy._ddp_comm_state).__name__}), which keeps what belongs to the old ones. Leave it out"
        )


def _refuse_compiled(module: LightningModule) -> None:
    if getattr(module, "_compiler_ctx", None) is not None:
        raise ValueError(
            f"{type(module).__name__} is compiled as a whole, but evaluation after quantization is integer arithmetic "
            "that torch.compile does not see through. Compile the network alone (module.net = "
            "torch.compile(module.net)): its training goes on compiled"
        )


def _refuse_neighbours(trainer: Trainer, callback: object) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
    for place, other in enumerate(callbacks):
        name = type(other).__name__
        if isinstance(other, StochasticWeightAveraging):
            raise ValueError(
                f"{name} keeps a copy of the model that knows no scales, and its own learning rates; average with "
                "lightning's WeightAveraging (the same average) or EMAWeightAveraging instead"
            )
        if isinstance(other, WeightAveraging) and callback in callbacks[place:]:
            raise ValueError(
                f"{name} stands before {WHO}, so that on a resume it would take up its average before there is a "
                f"quantized network; put {WHO} before it in Trainer(callbacks=[...])"
            )
        if isinstance(other, ModelPruning):
            raise ValueError(
                f"{name} replaces weights by masked ones, which no quantizer of ours sees; prune with "
                "AdaptiveIterativePruning(granularity='weight')"
            )

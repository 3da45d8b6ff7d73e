"""Fine-tuning of a network for a few epochs, in floats (the control) or quantized: one recipe for both."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback
from torch import nn

from benchmarks.pruning.subjects import Subject, trainer
from swincompress_pl.callbacks import QuantizationAwareTraining

# What differs from the recipe of pruning: less to recover, so fewer epochs (and on CIFAR-10 a lower rate), and always a
# teacher, the float network as it was given.
RECIPES: dict[str, dict[str, Any]] = {
    "swin_cifar10": {"epochs": 3, "lr": 2e-4, "warmup_epochs": 0.3, "distillation": 0.5},
    "deit_tiny": {"epochs": 12, "lr": 5e-5, "warmup_epochs": 1.0, "distillation": 0.9},
}


def tune(
    what: Subject, network: nn.Module, bits: str | None, preprocessing: dict[str, Any], options: dict[str, Any]
) -> tuple[nn.Module, float]:
    """(network, seconds): `network` fine-tuned, on the device, with masks kept; quantized from the first epoch
    on where `bits` say to what. options: of `quant.quantize`."""
    module = what.classifier()
    module.take_teacher()  # the whole network, also where a pruned one is tuned
    module.net = network.train()
    callbacks: list[Callback] = []
    if bits is not None:
        callbacks = [QuantizationAwareTraining(start_epoch=0, bits=bits, preprocessing=preprocessing, **options)]
    started = time.perf_counter()
    trainer(what.recipe.epochs, callbacks, what.place, limit_train_batches=what.recipe.train_batches).fit(
        module, datamodule=what.data()
    )
    # Lightning leaves it on the CPU.
    return module.net.to(what.place.device).eval(), time.perf_counter() - started

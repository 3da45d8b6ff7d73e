"""What does not happen in a fit is said: at its start by name where it cannot, else by a warning."""

from __future__ import annotations

import copy
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import precision as plugins
from support.callback_cases import Plain as Narrow
from support.callback_cases import greedy, make_trainer
from support.callback_cases import loader as narrow_loader
from support.qat_cases import PREPROCESSING, Plain, fit, loader, pruning, qat, trainer
from timm.optim import Lookahead
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from swincompress_pl.callbacks import CompressedCheckpoint
from swincompress_pl.callbacks.averages import refuse_averages
from swincompress_pl.history import history_of
from swincompress_pl.quant import QuantizedNetwork, quantize


def told(run: Any) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


# The awaited epoch


class Stop(Callback):
    """Ends the fit after an epoch, without an exception."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


ENDS: dict[str, tuple[dict[str, Any], list[Callback]]] = {
    "max_steps": ({"max_steps": 6}, []),
    "max_time": ({"max_time": timedelta(microseconds=1)}, []),
    "EarlyStopping": ({}, [EarlyStopping("val/top1", mode="max", stopping_threshold=-1.0)]),
    "should_stop": ({}, [Stop()]),
    "no batches": ({"limit_train_batches": 0}, []),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("callback", "what"), [(qat, "quantized"), (pruning, "pruned")])
def test_a_fit_that_ends_before_start_epoch(tmp_path: Path, end: str, callback: Any, what: str) -> None:
    options, beside = ENDS[end]
    said = told(lambda: fit(Plain(), tmp_path, 9, callback(start_epoch=3), *beside, **options))
    assert len([text for text in said if "start_epoch=3" in text and f"nothing is {what}" in text]) == 1


def test_it_is_said_once(tmp_path: Path) -> None:
    said = told(lambda: fit(Plain(), tmp_path, 1, qat(start_epoch=3), pruning(start_epoch=3)))
    assert len([text for text in said if "start_epoch=3" in text]) == 2  # one per callback


def test_freeze_epoch_likewise(tmp_path: Path) -> None:
    said = told(lambda: fit(Plain(), tmp_path, 9, qat(start_epoch=0, freeze_epoch=5), max_steps=6))
    assert [text for text in said if "before freeze_epoch=5" in text]
    said = told(lambda: fit(Plain(), tmp_path, 2, qat(start_epoch=0, freeze_epoch=5)))
    assert len([text for text in said if "freeze_epoch=5 is not reached in max_epochs=2" in text]) == 1


def test_a_resume_beyond_it_says_nothing(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"start_epoch": 0, "freeze_epoch": 1}
    said = told(lambda: fit(Plain(), tmp_path, 2, pruning(), qat(**options), keeper))
    run = trainer(tmp_path, 3, pruning(), qat(**options))
    path = str(tmp_path / "epoch=1.ckpt")
    said += told(lambda: run.fit(Plain(), loader(), loader(), ckpt_path=path))
    assert not [text for text in said if "_epoch=" in text]


# CompressedCheckpoint


def test_a_checkpoint_of_a_fit_that_only_prunes(tmp_path: Path) -> None:
    keeper = CompressedCheckpoint(dirpath=tmp_path, model_attribute="backbone", save_top_k=-1, filename="{epoch}")
    fit(Plain(), tmp_path, 3, pruning(start_epoch=1), keeper)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=1.ckpt", "epoch=2.ckpt"]


@pytest.mark.parametrize(
    ("callbacks", "word"),
    [
        (lambda: [], "no callback of this fit"),
        (lambda: [qat(start_epoch=5)], "saved nothing: backbone was not quantized"),
        (lambda: [pruning(start_epoch=5)], "saved nothing: backbone was not compressed"),
        (lambda: [pruning(), qat(start_epoch=5)], "saved nothing: backbone was not quantized"),
    ],
)
def test_a_checkpoint_that_waits_says_so(tmp_path: Path, callbacks: Any, word: str) -> None:
    keeper = CompressedCheckpoint(dirpath=tmp_path, model_attribute="backbone")
    said = told(lambda: fit(Plain(), tmp_path, 1, *callbacks(), keeper))
    assert [text for text in said if "CompressedCheckpoint" in text and word in text]
    assert not list(tmp_path.glob("*.ckpt"))


# Hooks


def hooked(register: Any) -> Plain:
    module = Plain()
    register(module.backbone)
    return module


HOOKS: dict[str, tuple[Any, str]] = {
    "a block": (lambda net: net.blocks[-1].register_forward_hook(lambda *a: None), "blocks.1 (at all)"),
    "the head": (lambda net: net.head.register_forward_pre_hook(lambda *a: None), "head (at all)"),
    "itself": (lambda net: net.register_forward_hook(lambda *a: None), "(itself) (at all)"),
    "keywords": (
        lambda net: net.blocks[0].attn.register_forward_hook(lambda *a: None, with_kwargs=True),
        "blocks.0.attn (at all)",
    ),
    "backward": (lambda net: net.blocks[0].mlp.register_full_backward_hook(lambda *a: None), "blocks.0.mlp (at all)"),
    "a norm": (lambda net: net.norm.register_forward_hook(lambda *a: None), "norm (in evaluation"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_fall_silent(name: str) -> None:
    register, place = HOOKS[name]
    network, (images, _) = hooked(register).backbone, next(iter(loader()))
    said = told(lambda: quantize(network, [images], method="max", preprocessing=PREPROCESSING))
    assert [text for text in said if "hooks of VisionTransformer" in text and place in text]


def test_hooks_are_told_of_when_the_fit_begins_and_at_the_exchange(tmp_path: Path) -> None:
    module = hooked(HOOKS["a block"][0])
    assert len([text for text in told(lambda: fit(module, tmp_path, 2, qat())) if "hooks of" in text]) == 2
    said = told(lambda: fit(Plain(), tmp_path, 2, pruning(), qat(distillation=0.5)))
    assert not [text for text in said if "hooks of" in text]


# Averages of one's own


class Ema(Callback):
    """timm's, made when the fit starts."""

    kind: Any = ModelEmaV3

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = self.kind(pl_module, decay=0.9)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.kept.update(pl_module)


class OldEma(Ema):
    kind = ModelEmaV2


class Handmade:
    """Like ultralytics' ModelEMA: no module."""

    def __init__(self, network: nn.Module) -> None:
        self.kept = copy.deepcopy(network)

    def update(self, network: nn.Module) -> None:
        for mine, theirs in zip(self.kept.parameters(), network.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.1)


class Held(Callback):
    def __init__(self, network: nn.Module) -> None:
        self.tracker = Handmade(network)


class InTheModule(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.slow = AveragedModel(self.backbone)


class MeanTeacher(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)

    def update_teacher(self) -> None:
        """Called in a hook."""


class NamedSo(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.copies = [copy.deepcopy(self.backbone)]
        self.model_ema = {"decay": 0.9, "network": copy.deepcopy(self.backbone)}


class Together(Plain):
    """One container for both."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({"live": self.backbone, "ema": copy.deepcopy(self.backbone)})


class Knows(Callback):
    def __init__(self, module: Plain) -> None:
        self.module, self.backbone = module, module.backbone


def averaging() -> dict[str, tuple[Plain, list[Callback], str]]:
    held = Plain()
    return {
        "ModelEmaV3": (Plain(), [Ema()], "Ema.kept"),
        "ModelEmaV2": (Plain(), [OldEma()], "OldEma.kept"),
        "an object": (held, [Held(held.backbone)], "Held.tracker.kept"),
        "AveragedModel": (InTheModule(), [], "InTheModule.slow"),
        "a mean teacher": (MeanTeacher(), [], "MeanTeacher.teacher"),
        "by name": (NamedSo(), [], "NamedSo.model_ema.network"),
    }


@pytest.mark.parametrize("name", averaging())
@pytest.mark.parametrize("callback", [qat, pruning])
def test_an_average_that_cannot_follow_is_refused(tmp_path: Path, name: str, callback: Any) -> None:
    module, beside, place = averaging()[name]
    with pytest.raises(ValueError, match=rf"{place} holds a copy of VisionTransformer that is an average"):
        fit(module, tmp_path, 9, callback(start_epoch=5), *beside)


class Teaches(Plain):
    """A frozen teacher, which is evaluated and keeps its sizes; more of them in a container with an `update`."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False).eval()
        self.teachers = nn.ModuleDict({"one": copy.deepcopy(self.backbone)}).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        taught = self.teacher(batch[0]) + self.teachers["one"](batch[0])
        return super().training_step(batch, batch_idx) + nn.functional.mse_loss(self.backbone(batch[0]), taught)


def test_a_teacher_is_no_average(tmp_path: Path) -> None:
    module = Teaches()
    fit(module, tmp_path, 2, pruning(), qat(), Knows(module))
    assert isinstance(module.backbone, QuantizedNetwork)
    average = EMAWeightAveraging()
    fit(Teaches(), tmp_path, 2, qat(), average)  # Lightning's own follows


def test_an_average_beside_the_network_in_one_container() -> None:
    module, run = Together(), SimpleNamespace(callbacks=[])
    with pytest.raises(ValueError, match=r"Together\.networks\.ema holds a copy"):
        refuse_averages(cast(Trainer, run), module, module.backbone, "AdaptiveIterativePruning")


def test_an_average_that_is_made_later_is_refused_before_the_cut(tmp_path: Path) -> None:
    class Late(Ema):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            """Not yet."""

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.kept = ModelEmaV3(pl_module)

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            """Not at all."""

    module = Plain()
    with pytest.raises(ValueError, match=r"Late\.kept holds a copy"):
        fit(module, tmp_path, 2, pruning(start_epoch=1), Late())
    assert history_of(module.backbone) == []


def test_an_error_of_a_copy_with_old_shapes_names_it(tmp_path: Path) -> None:
    class Slow(Narrow):
        """An average that nothing gives away."""

        def __init__(self) -> None:
            super().__init__()
            self.second = copy.deepcopy(self.net).requires_grad_(False)

        def on_train_batch_end(self, *_: Any) -> None:
            for mine, theirs in zip(self.second.parameters(), self.net.parameters(), strict=True):
                mine.data.lerp_(theirs.data, 0.1)

    with pytest.raises(RuntimeError, match="must match") as failure:
        make_trainer(tmp_path, 1, greedy()).fit(Slow(), narrow_loader(), narrow_loader())
    assert "Slow.second is a copy with the old shapes" in failure.value.__notes__[0]


# Precisions


@pytest.mark.parametrize("precision", ["64-true", "16-true", "bf16-true"])
def test_precisions_that_quantization_cannot_train_in(tmp_path: Path, precision: Any) -> None:
    with pytest.raises(ValueError, match=rf"QuantizationAwareTraining cannot train with precision='{precision}'"):
        fit(Plain(), tmp_path, 1, qat(), precision=precision)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precisions_that_pruning_works_in(tmp_path: Path, precision: Any) -> None:
    module = Plain()
    fit(module, tmp_path, 1, pruning(), precision=precision)
    assert history_of(module.backbone)


def test_a_quantized_network_is_not_pruned_in_double_precision(tmp_path: Path) -> None:
    module, (images, _) = Plain(), next(iter(loader()))
    module.backbone = quantize(module.backbone, [images], method="max", preprocessing=PREPROCESSING)
    with pytest.raises(ValueError, match="AdaptiveIterativePruning cannot train with precision='64-true'"):
        fit(module, tmp_path, 1, pruning(), precision="64-true")


@pytest.mark.parametrize("callback", [qat, pruning])
def test_plugins_with_layers_of_their_own(tmp_path: Path, callback: Any) -> None:
    class BitsandbytesPrecision(plugins.Precision):
        """Has the name of the one that cannot be made without bitsandbytes."""

    with pytest.raises(ValueError, match="the precision plugin BitsandbytesPrecision"):
        fit(Plain(), tmp_path, 1, callback(), plugins=[BitsandbytesPrecision()])


# Optimizers


def parts(module: Plain) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks, and the rest."""
    matrices = [p for p in module.backbone.blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    return matrices, [p for p in module.parameters() if id(p) not in known]


class Muon(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.Muon(parts(self)[0], lr=1e-3)


class WrappedMuon(Plain):
    def configure_optimizers(self) -> Any:
        return Lookahead(torch.optim.Muon(parts(self)[0], lr=1e-3))


class Both(Plain):
    """Two optimizers by hand, the one for matrices first."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        matrices, rest = parts(self)
        return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        loss = nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "name"), [(Muon, "Muon"), (WrappedMuon, "Lookahead")])
def test_an_optimizer_of_matrices_takes_no_scales(tmp_path: Path, kind: type[Plain], name: str) -> None:
    module = kind()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=rf"{name} steps no vectors.*learn_scales=False"):
        fit(module, tmp_path, 9, qat(start_epoch=5))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    fit(kind(), tmp_path, 2, qat(learn_scales=False))


def test_the_scales_go_to_the_optimizer_that_takes_them(tmp_path: Path) -> None:
    module = Both()
    run = fit(module, tmp_path, 2, qat())
    assert isinstance(module.backbone, QuantizedNetwork)
    adjustment = module.backbone.scales.adjustment
    assert adjustment is not None
    assert adjustment.any()
    assert run.optimizers[1].param_groups[-1]["params"] == [adjustment]
    assert len(run.optimizers[0].param_groups) == 1

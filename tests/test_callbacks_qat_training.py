"""Quantization-aware training beside what users have in a fit: a teacher, averages, masks, DDP, mixed precision."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from support.callback_cases import assert_same_state
from support.ddp_cases import StepDigests, ddp
from support.qat_cases import (
    PREPROCESSING,
    VIT,
    Plain,
    Restorable,
    fit,
    loader,
    pixels_and_labels,
    pruning,
    qat,
    trainer,
)
from support.rank_cases import call_for_kill, killed, on_ranks
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from swincompress_pl.callbacks import AdaptiveIterativePruning, QuantizationAwareTraining
from swincompress_pl.callbacks.qat_distillation import Distillation
from swincompress_pl.models import CompressibleClassifier, create_model
from swincompress_pl.models.training import DistillationConfig, OptimizationConfig, distillation_loss
from swincompress_pl.pruning.structure.weight_masks import masked_parameters
from swincompress_pl.quant import QuantizedNetwork, quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


# Distillation


def test_the_loss_is_joined_with_the_teachers() -> None:
    """On the images that the network was given, at the temperature, with the gradient of the student alone."""
    module, images = Plain(), next(iter(loader()))[0]
    teacher = copy.deepcopy(module.backbone).eval()
    module.backbone = quantize(
        module.backbone, [images], method="max", preprocessing=PREPROCESSING, calibration_images=8
    ).train()
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign,assignment]
    batch = next(iter(loader()))
    own = module.training_step(batch, 0)
    distillation = Distillation(0.75, 2.0)
    distillation.take_teacher(teacher)
    distillation.attach(module, "backbone")
    joint = module.training_step(batch, 0)
    taught = distillation_loss(module.backbone(batch[0]), teacher(batch[0]), 2.0)
    torch.testing.assert_close(joint, 0.25 * own + 0.75 * taught)
    torch.testing.assert_close(logged["qat/distillation"], taught)
    joint.backward()
    assert all(parameter.grad is None for parameter in distillation.teacher.parameters())  # type: ignore[union-attr]
    distillation.detach()
    assert "training_step" not in vars(module)


class Dictionaries(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "other": 1} if batch_idx else None


def test_a_teacher_is_taken_before_quantization_and_changes_the_fit(tmp_path: Path) -> None:
    ends = []
    for weight in (0.0, 1.0):
        module, callback = Dictionaries(), qat(distillation=weight, temperature=2.0)
        run = fit(module, tmp_path, 3, callback)
        ends.append(dict(module.state_dict()))
        assert "training_step" not in vars(module)
        if weight:
            assert float(run.callback_metrics["qat/distillation"]) > 0
            teacher = callback._distillation.teacher
            assert not any(p.requires_grad for p in teacher.parameters())
            assert not teacher.training
            assert not torch.equal(teacher.cls_token, module.backbone.network.cls_token)  # type: ignore[union-attr]
    assert not torch.equal(ends[0]["backbone.network.cls_token"], ends[1]["backbone.network.cls_token"])


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Blind(Plain):
    """Calls the network without gradients only."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.backbone(batch[0])
        return sum((p.sum() for p in self.parameters()), torch.zeros(()))


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Manual optimizes by hand"):
        fit(Manual(), tmp_path, 1, qat(distillation=0.5))
    with pytest.raises(ValueError, match=r"Blind\.training_step does not call the network with gradients"):
        fit(Blind(), tmp_path, 1, qat(start_epoch=0, distillation=0.5))


def classifier(tmp_path: Path, **options: Any) -> CompressibleClassifier:
    weights = tmp_path / "w.pt"
    torch.manual_seed(0)
    torch.save(create_model("VisionTransformer", **VIT).state_dict(), weights)
    kwargs = {key: value for key, value in VIT.items() if key != "num_classes"}
    return CompressibleClassifier(
        "VisionTransformer", 3, kwargs, weights, OptimizationConfig(warmup_epochs=0), **options
    )


def test_a_classifier_distils_by_itself_or_by_the_callback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a DistillationConfig and distills already"):
        fit(
            classifier(tmp_path, distillation=DistillationConfig()),
            tmp_path,
            1,
            qat(model_attribute="net", distillation=0.5),
        )
    module = classifier(tmp_path)
    run = fit(module, tmp_path, 2, qat(model_attribute="net", distillation=0.5))
    assert "qat/distillation" in run.callback_metrics
    groups = run.optimizers[0].param_groups
    assert len(groups) == 3
    assert groups[2]["weight_decay"] == 0.0
    assert groups[2]["lr"] == pytest.approx(groups[0]["lr"])


def test_a_checkpoint_without_a_teacher_is_refused_after_quantization(tmp_path: Path) -> None:
    fit(Plain(), tmp_path, 2, qat()).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="its checkpoint has no teacher"):
        trainer(tmp_path, 3, qat(distillation=0.5)).fit(Plain(), loader(), ckpt_path=tmp_path / "a.ckpt")


# Averages


class Average(Callback):
    """What each validation saw: the integers of the module as it was then."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        network: Any = pl_module.backbone
        if isinstance(network, QuantizedNetwork) and _[2] == 0:
            self.seen.append(network.integer_logits(pixels_and_labels()[0]))
            assert torch.equal(self.seen[-1], _fresh(network))


def _fresh(network: QuantizedNetwork) -> Tensor:
    again = copy.deepcopy(network).eval()
    return again.integer_logits(pixels_and_labels()[0])


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize("average", [lambda: EMAWeightAveraging(decay=0.8), WeightAveraging], ids=["ema", "swa"])
def test_an_average_is_evaluated_in_integers(tmp_path: Path, start_epoch: int, average: Any) -> None:
    """By hand beside it: each parameter's and scale's average of what the steps left."""
    module, mean = Plain(), average()
    states: list[dict[str, Tensor]] = []

    class Steps(Callback):
        """Looks at the integers of the weights in training, which are not those of the average."""

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            states.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
            self.on_train_end(trainer, pl_module)

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if isinstance(pl_module.backbone, QuantizedNetwork):
                pl_module.backbone.integer_logits(pixels_and_labels()[0])

    watch = Average()
    callback = qat(start_epoch=start_epoch, scale_lr_factor=10.0)
    fit(module, tmp_path, 3, callback, Steps(), mean, watch)
    name = "backbone.network.cls_token"
    tokens = [state.get(name, state.get("backbone.cls_token")) for state in states]
    drifts = [state["backbone.scales.adjustment"] for state in states if name in state]
    for found, steps in ((module.backbone.network.cls_token, tokens), (module.backbone.scales.adjustment, drifts)):  # type: ignore[union-attr]
        assert not torch.equal(found, steps[-1])
    expected = tokens[0]
    for number, token in enumerate(tokens[1:], start=1):
        expected = (
            torch.lerp(token, expected, 0.8)
            if isinstance(mean, EMAWeightAveraging)
            else expected + (token - expected) / (number + 1)
        )
    torch.testing.assert_close(module.backbone.network.cls_token, expected, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
    pixels, _ = pixels_and_labels()
    assert len(watch.seen) == 3 - start_epoch
    assert torch.equal(module.backbone.integer_logits(pixels), _fresh(module.backbone))  # type: ignore[arg-type,operator]
    assert torch.equal(module.backbone.integer_logits(pixels), watch.seen[-1])  # type: ignore[operator]


@pytest.mark.parametrize("stop", [1, 2])
def test_an_average_survives_a_resume(tmp_path: Path, stop: int) -> None:
    def run_to(epochs: int, ckpt: Path | None = None) -> Any:
        module = Restorable()
        save = ModelCheckpoint(tmp_path / str(epochs), "stop", save_on_train_epoch_end=True)
        run = trainer(tmp_path, epochs, qat(), EMAWeightAveraging(decay=0.8), save)
        run.fit(module, loader(), loader(), ckpt_path=ckpt)
        return {"weights": dict(module.state_dict()), "optimizer": run.optimizers[0].state_dict()}

    whole = run_to(3)
    run_to(stop)
    assert_same_state(run_to(3, tmp_path / str(stop) / "stop.ckpt"), whole)
    again = Restorable.load_from_checkpoint(tmp_path / "3" / "stop.ckpt")
    assert_same_state(dict(again.state_dict()), whole["weights"])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            lambda: (EMAWeightAveraging(), qat()),
            "EMAWeightAveraging stands before.*put QuantizationAwareTraining before",
        ),
        (lambda: (qat(), StochasticWeightAveraging(1e-2)), "StochasticWeightAveraging.*WeightAveraging"),
        (lambda: (qat(), ModelPruning("l1_unstructured", amount=0.5)), "ModelPruning.*AdaptiveIterativePruning"),
    ],
)
def test_neighbours_are_refused_by_name(tmp_path: Path, callbacks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Plain(), tmp_path, 2, *callbacks())


# Pruning


def test_masks_stay_through_quantization_without_the_pruning_callback(tmp_path: Path) -> None:
    """Plain has no mixin: the callback keeps them itself; learned steps do not bring zeros back."""
    module = Plain()
    fit(module, tmp_path, 1, pruning(granularity="weight"))
    masks = {name: mask.clone() for name, (_, mask) in masked_parameters(module.backbone).items()}
    assert any(not mask.all() for mask in masks.values())
    fit(module, tmp_path, 2, qat(start_epoch=0, bits="W4A8"))
    assert isinstance(module.backbone, QuantizedNetwork)
    kept = masked_parameters(module.backbone.network)
    assert kept.keys() == masks.keys()
    program = module.backbone.to_program()
    for name, mask in masks.items():
        assert bool((kept[name][0][~mask] == 0).all())
        assert bool((torch.from_numpy(program.tensors[name])[~mask] == 0).all())


def test_masked_and_quantized_in_one_fit(tmp_path: Path) -> None:
    module = Restorable()
    search = AdaptiveIterativePruning(
        tolerance=100.0, step=0.25, granularity="weight", model_attribute="backbone", max_rounds=2
    )
    run = fit(module, tmp_path, 4, search, qat(start_epoch=2, bits="W4A8"), ModelCheckpoint(tmp_path, "a"))
    masked = masked_parameters(module.backbone)
    assert any(not mask.all() for _, mask in masked.values())
    assert all(bool((weight[~mask] == 0).all()) for weight, mask in masked.values())
    assert search.search_state is not None
    assert search.search_state.rounds == 2
    later = trainer(tmp_path, 5, pruning(granularity="weight"), qat(start_epoch=2, bits="W4A8"))
    resumed = Restorable()
    later.fit(resumed, loader(), loader(), ckpt_path=run.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert all(bool((weight[~mask] == 0).all()) for weight, mask in masked_parameters(resumed.backbone).values())


# DDP


def ddp_fit(
    folder: Path, rank: int, *callbacks: Callback, epochs: int = 3, ckpt: Path | None = None, **options: Any
) -> Any:
    torch.manual_seed(rank)  # what a rank draws by itself must not matter
    module, digests = Plain(), StepDigests()
    sampler = DistributedSampler(loader().dataset, 2, rank, shuffle=False)
    data = DataLoader(loader().dataset, 4, sampler=sampler)
    run = trainer(folder, epochs, qat(**options), *callbacks, digests, strategy=ddp(), devices=2)
    run.fit(module, data, loader(), ckpt_path=ckpt)
    return {
        "digests": digests.found,
        "state": dict(module.state_dict()),
        "integers": module.backbone.integer_logits(pixels_and_labels()[0]),  # type: ignore[operator]
    }


@pytest.mark.parametrize(
    "options",
    [
        {"start_epoch": 0, "method": "searched", "distillation": 0.5, "freeze_epoch": 2},
        {"start_epoch": 1, "learn_scales": False, "search": {"bias_correction": True}, "method": "searched"},
    ],
)
def test_ranks_are_equal_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    def work(rank: int) -> Any:
        return ddp_fit(tmp_path, rank, EMAWeightAveraging(decay=0.8), **options)

    first, second = on_ranks(tmp_path / "ranks", 2, work)
    assert_same_state(first, second)
    assert len(set(first["digests"])) == len(first["digests"]) == 12


def test_ranks_resume(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        save = ModelCheckpoint(tmp_path / "ckpt", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        whole = ddp_fit(tmp_path, rank, save)
        resumed = [ddp_fit(tmp_path, rank, ckpt=tmp_path / "ckpt" / f"epoch={epoch}.ckpt") for epoch in (0, 1)]
        return [whole, *resumed]

    first, second = on_ranks(tmp_path / "ranks", 2, work)
    assert_same_state(first, second)
    for resumed in first[1:]:
        assert_same_state(resumed["state"], first[0]["state"])


def test_a_failing_calibration_ends_every_rank(tmp_path: Path) -> None:
    def quantize(*_: Any, **__: Any) -> Any:
        raise ValueError("calibration fails")

    def work(rank: int) -> Any:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("swincompress_pl.callbacks.quantization.quantize", quantize)
                ddp_fit(tmp_path, rank, start_epoch=0)
        except (ValueError, RuntimeError) as error:
            return [type(error).__name__, str(error)]
        return []

    first, second = on_ranks(tmp_path / "ranks", 2, work)
    assert first == ["ValueError", "calibration fails"]
    assert second[0] == "RankFailedError"
    assert second[1].startswith("rank 0 failed while calibrating: ValueError")


def test_images_that_do_not_fit_end_every_rank_before_the_first_epoch(tmp_path: Path) -> None:
    """Only one rank sees them, and the other must not wait for it."""
    wrong = {"mean": [0.0] * 3, "std": [0.01] * 3}

    def work(rank: int) -> Any:
        try:
            ddp_fit(tmp_path, rank, start_epoch=5, **({} if rank == 0 else {"preprocessing": wrong}))
        except (ValueError, RuntimeError) as error:
            return [type(error).__name__, str(error)]
        return []

    first, second = on_ranks(tmp_path / "ranks", 2, work)
    assert "pixel steps" in first[1]
    assert "pixel steps" in second[1]


# Strategies, precisions, compiled code


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), "FSDPStrategy.*strategy='ddp'.*quant.quantize"),
        (SimpleNamespace(), "SimpleNamespace"),
        (DDPStrategy(ddp_comm_state=object()), "ddp_comm_state"),
    ],
)
def test_strategies_are_refused_by_name(strategy: Any, message: str) -> None:
    run: Any = SimpleNamespace(strategy=strategy, callbacks=[], precision="32-true")
    with pytest.raises(ValueError, match=message):
        qat().setup(run, Plain(), "fit")


def test_forked_ranks_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, 1, qat(), strategy="ddp_fork", devices=2)
    with pytest.raises(ValueError, match="spawned or forked"):
        qat().setup(run, Plain(), "fit")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_half_precision_is_refused(tmp_path: Path, precision: Any) -> None:
    with pytest.raises(ValueError, match=f"precision='{precision}'.*'bf16-mixed'"):
        fit(Plain(), tmp_path, 1, qat(), precision=precision)


def test_a_module_compiled_as_a_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Plain is compiled as a whole.*Compile the network alone"):
        fit(torch.compile(Plain(), backend="eager"), tmp_path, 1, qat())  # type: ignore[arg-type]


def test_mixed_precision_accumulation_and_clipping(tmp_path: Path) -> None:
    module = Plain()
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    run = fit(module, tmp_path, 3, qat(distillation=0.5, bits="W4A8"), **options)
    pixels, labels = pixels_and_labels()
    logits = module.backbone.integer_logits(pixels)  # type: ignore[operator]
    assert float(run.callback_metrics["val/top1"]) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert module.backbone.scales.adjustment.dtype == torch.float32  # type: ignore[union-attr]
    assert bool(torch.isfinite(module.backbone.scales.adjustment).all())  # type: ignore[union-attr,arg-type]


# Kill, and what training and evaluation see


class KilledAfter(Callback):
    def __init__(self, flag: Path, epoch: int) -> None:
        self.flag, self.epoch = flag, epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            call_for_kill(self.flag)


@pytest.mark.parametrize("epoch", [1, 2])
def test_killed_and_resumed(tmp_path: Path, epoch: int) -> None:
    """In the first quantized epoch and in the second: the end is that of an uninterrupted fit."""

    def run(folder: Path, *others: Callback, ckpt: Path | None = None) -> Any:
        torch.manual_seed(7 if ckpt is None else 99)
        module = Plain()
        module.backbone.blocks[0].mlp.drop1.p = 0.3  # type: ignore[union-attr,index]
        save = ModelCheckpoint(folder, "{epoch}", save_last=True, save_on_train_epoch_end=True)
        fitting = trainer(folder, 3, *others, qat(distillation=0.5), EMAWeightAveraging(decay=0.5), save)
        data: Dataset[Any] = loader().dataset
        fitting.fit(module, DataLoader(data, 8, shuffle=True), loader(), ckpt_path=ckpt)
        return [dict(module.state_dict()), fitting.optimizers[0].state_dict(), torch.get_rng_state()]

    whole = run(tmp_path / "whole")
    killed(tmp_path, lambda flag: run(tmp_path / "run", KilledAfter(flag, epoch)))
    assert_same_state(run(tmp_path / "run", ckpt=tmp_path / "run" / "last.ckpt"), whole)


@pytest.mark.parametrize("bits", ["W8A8", "W4A8"])
def test_training_and_evaluation_agree(tmp_path: Path, bits: str) -> None:
    """What fake quantization answers in training, the integers answer: at least 99 % of predictions."""
    module = Plain()
    fit(module, tmp_path, 6, qat(start_epoch=3, bits=bits, method="searched"))
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (1000, 3, 16, 16), generator=generator)
    images = (pixels.float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        fake = module.backbone.train()(images).argmax(-1)
        integer = module.backbone.eval()(images).argmax(-1)
    assert len(set(fake.tolist())) > 1
    assert float((fake == integer).float().mean()) >= 0.99


def test_the_callback_is_cheap_to_construct_with_plain_data() -> None:
    """As a command line gives it."""
    callback = QuantizationAwareTraining(start_epoch=1, bits={"weights": 4, "layers": {"head": 8}}, search={"rows": 64})
    assert callback.bits.layers == {"head": 8}
    assert callback.search is not None
    assert callback.search.rows == 64
    assert callback.learn_scales
    assert not QuantizationAwareTraining(start_epoch=1, method="affine").learn_scales

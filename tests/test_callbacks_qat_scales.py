"""Learned scales: their gradient, their positivity, their parameter group, and their fit."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callback_cases import assert_same_state
from support.qat_cases import PREPROCESSING, VIT, Plain, Restorable, fit, loader, pixels_and_labels, qat, trainer
from torch import Tensor, nn
from torch.optim import lr_scheduler

from swincompress_pl.callbacks.qat_scales import ScaleGroup
from swincompress_pl.models import create_model
from swincompress_pl.quant import QuantizedNetwork, quantize
from swincompress_pl.quant.graph import QuantizerSpec
from swincompress_pl.quant.quantizers import ActivationQuantizer, LearnedStep
from swincompress_pl.quant.scales import _Adjusted

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def plain_lsq(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The formula of the paper, for autograd."""
    ratio = x / scale
    rounded = ratio.round().detach()
    inside = (rounded >= low) & (rounded <= high)
    return scale * torch.where(inside, ratio + (rounded - ratio).detach(), rounded.clamp(low, high))


def quantized_vit(**options: Any) -> QuantizedNetwork:
    torch.manual_seed(0)
    images = next(iter(loader()))[0]
    network = create_model("VisionTransformer", **VIT)
    return quantize(
        network, [images], **{"method": "max", "preprocessing": PREPROCESSING, "calibration_images": 8, **options}
    )


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(5,), (3, 4), (2, 3, 4)]),
    scale=st.floats(1e-3, 2.0),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    per_channel=st.booleans(),
)
def test_gradient_is_that_of_the_formula(
    seed: int, shape: tuple[int, ...], scale: float, bits: int, signed: bool, per_channel: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    scales = torch.rand(shape[-1] if per_channel else 1, generator=generator).add(0.5).mul(scale).requires_grad_()
    high = 2 ** (bits - signed) - 1
    low = -high if signed else 0
    upstream = torch.randn(shape, generator=generator)
    ours, plain = LearnedStep.apply(x, scales, low, high, 0.25), plain_lsq(x, scales, low, high)
    assert torch.allclose(ours, plain)
    found, expected = (torch.autograd.grad(y, (x, scales), upstream) for y in (ours, plain))
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[0] == 0, expected[0] == 0)
    torch.testing.assert_close(found[1], 0.25 * expected[1], rtol=1e-4, atol=1e-3)


def test_gradient_agrees_with_torchs_own_kernel() -> None:
    x = torch.randn(64, 16, requires_grad=True)
    scale = torch.tensor([0.02], requires_grad=True)
    upstream = torch.randn_like(x)
    torchs = torch._fake_quantize_learnable_per_tensor_affine(x, scale, torch.zeros(1), -127, 127, 0.5)
    expected = torch.autograd.grad(torchs, (x, scale), upstream)
    found = torch.autograd.grad(LearnedStep.apply(x, scale, -127, 127, 0.5), (x, scale), upstream)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-2)


@given(adjustment=st.floats(-1e3, 1e3, width=32), base=st.floats(2.0**-20, 1.0, width=32))
def test_a_scale_is_positive_wherever_it_drifts(adjustment: float, base: float) -> None:
    value = _Adjusted.apply(torch.tensor([adjustment]), torch.tensor([base]))
    assert float(value) > 0
    assert (float(value) > base) == (adjustment > 0) or abs(adjustment) < 1e-6
    still: Tensor = _Adjusted.apply(torch.zeros(1), torch.tensor([base]))
    assert torch.equal(still, torch.tensor([base]))


def test_a_plain_step_on_the_drift_is_one_on_the_scale() -> None:
    base = torch.tensor([0.02, 0.5])
    adjustment, gradient = torch.zeros(2, requires_grad=True), torch.tensor([0.3, -2.0])
    _Adjusted.apply(adjustment, base).backward(gradient)
    assert adjustment.grad is not None
    moved: Tensor = _Adjusted.apply(-1e-5 * adjustment.grad, base)
    torch.testing.assert_close(moved - base, -1e-5 * gradient, rtol=1e-2, atol=1e-9)


def test_segments_and_ratios_pass_their_gradients_on() -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(3, 7, 6), torch.randn(3, 7, 6)
    for spec in (
        QuantizerSpec(name="qkv", segments=(2, 2, 2)),
        QuantizerSpec(name="norm", segments=(6,), equalized=True),
    ):
        module = ActivationQuantizer(spec, affine=False)
        if spec.equalized:
            module.equalization.copy_(torch.rand(6) + 0.5)
        scale = torch.full((len(spec.segments),), 0.01, requires_grad=True)
        channels = scale.repeat_interleave(torch.tensor(spec.segments)) * getattr(module, "equalization", 1.0)
        (expected,) = torch.autograd.grad(plain_lsq(x, channels, -127, 127), scale, upstream)
        (found,) = torch.autograd.grad(module.learned(x, scale), scale, upstream)
        count = 7 * 6 / len(spec.segments)
        torch.testing.assert_close(found, expected / math.sqrt(count * 127), rtol=1e-3, atol=1e-4)


def test_learning_changes_no_integer_before_the_first_step() -> None:
    network, (pixels, _) = quantized_vit().eval(), pixels_and_labels()
    before = network.integer_logits(pixels)
    names = set(network.state_dict())
    network.learn_scales()
    network.learn_scales()
    assert torch.equal(network.integer_logits(pixels), before)
    assert set(network.state_dict()) - names == {"scales.adjustment"}
    assert network.compression_history[-1]["quantize"]["learned_scales"] is True


def test_what_is_learned_is_what_is_exported() -> None:
    """In training, in the integers, and in `Scales.fixed`; the calibrated buffers stay."""
    network = quantized_vit().eval()
    network.learn_scales()
    images = next(iter(loader()))[0]
    still = network.fake_quantized(images)
    with torch.no_grad():
        network.scales.adjustment.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
    moved, integers = network.fake_quantized(images), network(images)
    assert not torch.allclose(still, moved, atol=1e-3)
    torch.testing.assert_close(integers, moved, rtol=0.2, atol=0.1)
    fixed = network.fixed_scales()
    present = network.scales.present()
    assert fixed.adjustment is None
    node = network.graph.weighted_nodes[1]
    assert torch.equal(fixed.step(node), present[f"weights.{node.name.replace('.', '/')}"])
    assert not torch.equal(fixed.step(node), network.scales.weights[node.name.replace(".", "/")].step)  # type: ignore[arg-type]
    for read in (
        lambda: network.scales.step(node),
        lambda: network.scales.activation_quantizer(next(iter(network.graph.quantizers.values()))),
    ):
        with pytest.raises(RuntimeError, match=r"these are the calibrated ones; read QuantizedNetwork\.fixed_scales"):
            read()


def test_learned_steps_leave_room_for_the_bias() -> None:
    """A step that shrank to nothing under a bias would not fit int32."""
    network = quantized_vit().eval()
    network.learn_scales()
    with torch.no_grad():
        network.scales.adjustment.fill_(-40.0)  # type: ignore[union-attr]
        network.network.blocks[0].mlp.fc1.bias.fill_(3e4)  # type: ignore[union-attr,index]
    network.to_program()


def test_missing_scales_are_named() -> None:
    torch.manual_seed(0)
    network = QuantizedNetwork(
        create_model("VisionTransformer", **VIT), preprocessing=PREPROCESSING, learned_scales=True
    )
    with pytest.raises(ValueError, match=r"activations\.\S+ is not finite"):
        network(next(iter(loader()))[0])
    network = quantized_vit()
    network.learn_scales()
    with torch.no_grad():
        network.scales.adjustment[0] = math.nan  # type: ignore[index]
    with pytest.raises(ValueError, match="smaller scale_lr_factor"):
        network(next(iter(loader()))[0])


def test_affine_scales_are_not_learned() -> None:
    with pytest.raises(ValueError, match="zero-points"):
        quantized_vit(method="affine").learn_scales()


# The parameter group


def group_of(optimizer: torch.optim.Optimizer, *schedulers: Any, factor: float = 0.1) -> tuple[QuantizedNetwork, Any]:
    network = quantized_vit()
    optimizer.add_param_group({"params": list(network.network.parameters())})
    made = [make(optimizer) for make in schedulers]
    network.learn_scales()
    configs = [SimpleNamespace(scheduler=scheduler) for scheduler in made]
    run: Any = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=configs, callbacks=[])
    ScaleGroup(factor).join(run, network)
    return network, made


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_the_groups_rate_follows_every_schedule(name: str) -> None:
    extra = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(extra.parameters(), lr=1e-2, weight_decay=0.1)
    network, (schedule,) = group_of(optimizer, SCHEDULERS[name])
    own, host = optimizer.param_groups[-1], optimizer.param_groups[1]
    assert [id(p) for p in own["params"]] == [id(network.scales.adjustment)]
    assert own["weight_decay"] == 0.0
    rates = set()
    for _ in range(6):
        optimizer.step()
        assert own["lr"] == host["lr"] * 0.1
        rates.add(host["lr"])
        schedule.step(*([1.0] if name == "plateau" else []))
    assert len(rates) > 1
    state = schedule.state_dict()
    schedule.load_state_dict(state)


def test_scales_given_to_another_group_are_taken_out_of_it() -> None:
    network = quantized_vit()
    network.learn_scales()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=1e-2)
    run: Any = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[], callbacks=[])
    ScaleGroup(1.0).join(run, network)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(network.network.parameters())), 1]


def test_optimizers_without_a_place_are_refused() -> None:
    network = quantized_vit()
    network.learn_scales()
    run: Any = SimpleNamespace(
        optimizers=[torch.optim.LBFGS(network.network.parameters())], lr_scheduler_configs=[], callbacks=[]
    )
    with pytest.raises(ValueError, match="LBFGS takes no new group"):
        ScaleGroup(1.0).join(run, network)
    run.optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters())]
    with pytest.raises(ValueError, match=r"no optimizer trains a parameter.*learn_scales=False"):
        ScaleGroup(1.0).join(run, network)


# The fit


class Scheduled(Plain):
    """With a schedule and groups, as users have them."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Drifts(Callback):
    """The learned scales after each epoch, and whether the integers were seen."""

    def __init__(self) -> None:
        self.found: list[Tensor | None] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scales = getattr(pl_module.backbone, "scales", None)
        self.found.append(None if scales is None else scales.adjustment.detach().clone())


def test_scales_move_until_they_are_frozen(tmp_path: Path) -> None:
    module, watch = Scheduled(), Drifts()
    run = fit(module, tmp_path, 4, qat(freeze_epoch=3, scale_lr_factor=2.0), watch)
    none, first, second, frozen = watch.found
    assert none is None
    assert first is not None
    assert second is not None
    assert frozen is not None
    assert (first != 0).float().mean() > 0.9
    assert not torch.equal(first, second)
    assert torch.equal(second, frozen)
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    assert len(rates) == 3
    assert run.optimizers[0].param_groups[2]["weight_decay"] == 0.0


def test_fixed_scales_have_no_parameter(tmp_path: Path) -> None:
    module = Plain()
    run = fit(module, tmp_path, 2, qat(learn_scales=False))
    assert module.backbone.scales.adjustment is None  # type: ignore[union-attr]
    assert len(run.optimizers[0].param_groups) == 1


def test_affine_trains_with_fixed_scales(tmp_path: Path) -> None:
    module = Plain()
    fit(module, tmp_path, 2, qat(method="affine"))
    assert module.backbone.method == "affine"
    assert module.backbone.scales.adjustment is None  # type: ignore[union-attr]


def everything(module: LightningModule, run: Trainer) -> dict[str, Any]:
    (optimizer,) = run.optimizers
    return {
        "weights": dict(module.state_dict()),
        "optimizer": optimizer.state_dict(),
        "schedule": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
    }


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_gives_the_same_weights_scales_and_optimizer(tmp_path: Path, stop: int) -> None:
    """Stopped before the quantization, after it, and after the freeze; the fit shuffles."""

    def run_to(epochs: int, ckpt: Path | None = None) -> Any:
        torch.manual_seed(7 if ckpt is None else 99)
        module = Scheduled()
        save = ModelCheckpoint(tmp_path / str(epochs), "stop")
        run = trainer(tmp_path, epochs, qat(freeze_epoch=2, distillation=0.5, calibration_images=16), save)
        data = torch.utils.data.DataLoader(loader().dataset, batch_size=8, shuffle=True)
        run.fit(module, data, loader(), ckpt_path=ckpt)
        return everything(module, run)

    whole = run_to(4)
    run_to(stop)
    assert_same_state(run_to(4, tmp_path / str(stop) / "stop.ckpt"), whole)


def test_load_from_checkpoint_has_the_learned_scales(tmp_path: Path) -> None:
    module = Restorable()
    fit(module, tmp_path, 3, qat(bits="W4A8", scale_lr_factor=10.0)).save_checkpoint(tmp_path / "a.ckpt")
    again = Restorable.load_from_checkpoint(tmp_path / "a.ckpt")
    pixels, _ = pixels_and_labels()
    assert isinstance(again.backbone, QuantizedNetwork)
    assert again.backbone.bits.weights == 4
    assert again.backbone.scales.adjustment is not None
    assert again.backbone.scales.adjustment.abs().max() > 0
    assert torch.equal(again.backbone.integer_logits(pixels), module.backbone.integer_logits(pixels))  # type: ignore[operator]


def test_a_network_quantized_before_the_fit_learns_too(tmp_path: Path) -> None:
    module, watch = Plain(), Drifts()
    module.backbone = quantized_vit()
    run = fit(module, tmp_path, 1, qat(start_epoch=0), watch)
    assert watch.found[0] is not None
    assert watch.found[0].abs().max() > 0
    assert len(run.optimizers[0].param_groups) == 2
    affine = Plain()
    affine.backbone = quantized_vit(method="affine")
    with pytest.raises(ValueError, match="cannot be learned; pass learn_scales=False"):
        fit(affine, tmp_path, 1, qat(start_epoch=0))


def test_search_options_arrive(tmp_path: Path) -> None:
    module = Plain()
    options = {"search": {"equalize": False, "center": False, "rows": 64}, "percentile": 99.9, "bits": "W8A6"}
    fit(module, tmp_path, 1, qat(start_epoch=0, method="searched", learn_scales=False, **options))
    assert isinstance(module.backbone, QuantizedNetwork)
    assert module.backbone.bits.activations == 6
    assert module.backbone.unsigned == ()
    assert all(bool((ratios == 1).all()) for ratios in module.backbone.scales.equalizations.values())

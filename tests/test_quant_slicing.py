"""Scales that follow a cut of the network: what stays keeps its scale, and the integers stay the specification's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.quant_cases import PREPROCESSING, network_and_images
from torch import Tensor

from swincompress_pl import spec
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.pruning.structure.apply import AppliedPlan, revert_plan
from swincompress_pl.pruning.structure.unit_masks import mask_plan
from swincompress_pl.quant import QuantizedNetwork, quantize
from swincompress_pl.registry import adapter_for

KINDS = ["mlp", "heads", "head_dim", "embed"]
NAMES = ["vit", "vit registers", "swin", "swin padded"]


def quantized(name: str, *, bits: str = "W8A8", method: str = "searched") -> tuple[QuantizedNetwork, Tensor, Tensor]:
    network, pixels, images = network_and_images(name)
    options = {"search": {"rows": 64}} if method == "searched" else {}
    made = quantize(network, [images], preprocessing=PREPROCESSING, bits=bits, method=method, **options)  # type: ignore[arg-type]
    for name_of, buffer in made.scales.named_buffers():
        if name_of.endswith(".centering") and method != "affine":
            buffer.copy_(torch.linspace(-0.05, 0.1, len(buffer)))  # all different
    return made, pixels, images


def plan_for(network: Any, *kinds: str) -> PruningPlan:
    """Removes the first and the third unit, or the first alone, of each second group of these kinds."""
    groups = [group for group in adapter_for(network).groups(network) if group.kind in kinds]
    removed = {group.name: [0, 2] if group.units > 3 else [0] for group in groups[::2] if group.units > group.min_units}
    return PruningPlan.removing(groups, removed)


def cut(made: QuantizedNetwork, plan: PruningPlan) -> tuple[AppliedPlan, Any]:
    applied = apply_plan(made.network, plan)
    return applied, made.follow({sliced.name: dict(sliced.kept) for sliced in applied.tensors})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_sliced_is_masked(name: str, kind: str) -> None:
    """In fake quantization up to float rounding, which may take a value of an image to the next step."""
    made, _, images = quantized(name, method="searched" if kind == "embed" else "max")
    plan = plan_for(made.network, kind)
    assert plan
    with torch.no_grad():
        whole = made.fake_quantized(images)
        with mask_plan(made.network, plan):
            masked = made.fake_quantized(images)
        cut(made, plan)
        sliced = made.fake_quantized(images)
    assert float((masked - whole).abs().mean()) > 1e-3
    same = ((sliced - masked).abs() < 1e-5).all(dim=1)
    assert float(same.float().mean()) > 0.75


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_integers_of_a_cut_network_are_the_norms(name: str, learned: bool) -> None:
    made, pixels, _ = quantized(name, bits="W4A8", method="searched" if learned else "max")
    made.eval().integer_logits(pixels)  # a twin of the wide network is there
    if learned:
        adjust_by_hand(made)
    cut(made, plan_for(made.network, *KINDS))
    expected = spec.run(made.to_program(), pixels.numpy())
    assert (made.integer_logits(pixels).numpy() == expected).all()


def adjust_by_hand(made: QuantizedNetwork) -> None:
    """Learned scales that are all different."""
    made.learn_scales()
    assert made.scales.adjustment is not None
    with torch.no_grad():
        made.scales.adjustment.copy_(torch.linspace(-0.1, 0.1, len(made.scales.adjustment)))


def channelwise_of(made: QuantizedNetwork) -> dict[tuple[str, str], Tensor]:
    """Ratios and centerings of the equalized quantizers, which are outputs of LayerNorms."""
    specs = [spec for spec in made.graph.quantizers.values() if spec.equalized]
    scales = [(spec.name, made.scales.calibrated_quantizer(spec)) for spec in specs]
    return {
        (name, key): scale.get_buffer(key)
        for name, scale in scales
        for key in ("equalization", "centering")
        if key in scale._buffers
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_stays_keeps_its_scale_to_the_bit(name: str) -> None:
    made, _, _ = quantized(name)
    adjust_by_hand(made)
    before = {key: value.detach().clone() for key, value in made.scales.present().items()}
    channelwise = {key: value.clone() for key, value in channelwise_of(made).items()}
    applied, _ = cut(made, plan_for(made.network, *KINDS))
    kept = {sliced.name: dict(sliced.kept) for sliced in applied.tensors}
    after = made.scales.present()
    assert after.keys() == before.keys()
    for key, value in after.items():
        rows = kept.get(f"{key.removeprefix('weights.').replace('/', '.')}.weight", {}).get(0)
        own = key.startswith("weights.") and rows is not None
        assert torch.equal(value, before[key][rows] if own else before[key]), key
    for (name, name_of), value in channelwise_of(made).items():
        channels, whole = kept.get(f"{name}.weight", {}).get(0), channelwise[name, name_of]
        assert torch.equal(value, whole if channels is None else whole[channels]), name


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_uncut_is_as_it_was(name: str) -> None:
    made, pixels, images = quantized(name)
    adjust_by_hand(made)
    adjustment, graph = made.scales.adjustment, made.graph
    state = copy.deepcopy(made.state_dict())
    expected = made.integer_logits(pixels)
    fake = made.fake_quantized(images)
    for _ in range(2):
        applied, done = cut(made, plan_for(made.network, *KINDS))
        assert made.state_dict()["scales.adjustment"].shape != state["scales.adjustment"].shape
        revert_plan(made.network, applied)
        made.unfollow(done)
    assert made.scales.adjustment is adjustment
    assert made.graph is graph
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in made.state_dict().items())
    assert torch.equal(made.integer_logits(pixels), expected)
    assert torch.equal(made.fake_quantized(images), fake)


def test_gradients_of_learned_scales_are_cut_with_them() -> None:
    made, _, images = quantized("vit")
    made.learn_scales()
    made.train()(images).sum().backward()
    assert made.scales.adjustment is not None
    gradient = made.scales.adjustment.grad
    assert gradient is not None
    _, done = cut(made, plan_for(made.network, "mlp"))
    _, new, index = done.adjustment
    assert new is made.scales.adjustment
    assert new.grad is not None
    assert torch.equal(new.grad, gradient[index])
    made.scales.adjustment.requires_grad_(False)
    cut(made, plan_for(made.network, "mlp"))
    assert not made.scales.adjustment.requires_grad


def test_affine_offsets_follow() -> None:
    made, _, images = quantized("vit", method="affine")
    plan = plan_for(made.network, "mlp", "heads")
    with torch.no_grad(), mask_plan(made.network, plan):
        masked = made.fake_quantized(images)
    cut(made, plan)
    same = ((made(images) - masked).abs() < 1e-5).all(dim=1)
    assert float(same.float().mean()) > 0.75


def test_a_cut_without_its_indices_is_refused_and_undone() -> None:
    made, pixels, _ = quantized("vit")
    expected, graph = made.integer_logits(pixels), made.graph
    applied = apply_plan(made.network, plan_for(made.network, "mlp"))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1: the layer is .* cut the network and its scales"):
        made.follow({})
    revert_plan(made.network, applied)
    assert made.graph is graph
    assert torch.equal(made.integer_logits(pixels), expected)


def test_the_history_is_replayed_in_order() -> None:
    """Pruned, quantized, pruned, pruned again; then the way to every other history and back."""
    network, pixels, images = network_and_images("vit")
    stages: list[Any] = [[]]
    apply_plan(network, plan_for(network, "mlp"))
    stages.append(list(network.compression_history))  # type: ignore[arg-type]
    made = quantize(network, [images], preprocessing=PREPROCESSING, method="max")
    made.learn_scales()
    stages.append(made.compression_history)
    cut(made, plan_for(network, "heads"))
    stages.append(made.compression_history)
    cut(made, plan_for(network, "mlp", "embed"))
    stages.append(made.compression_history)
    assert [list(entry) for entry in stages[-1]] == [["prune"], ["quantize"], ["prune"], ["prune"]]
    for start in range(len(stages)):
        for end in range(len(stages)):
            again = restore_from_history(network_and_images("vit")[0], stages[start])
            again = restore_from_history(again, stages[end])
            assert getattr(again, "compression_history", []) == stages[end]
            if end == len(stages) - 1:
                again.load_state_dict(made.state_dict())
                assert torch.equal(again.eval().integer_logits(pixels), made.eval().integer_logits(pixels))  # type: ignore[operator]

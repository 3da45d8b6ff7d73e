"""What is left after a structured cut makes up for it: exactly where it can, and never by changing anything else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from swincompress_pl.masks import masked_parameters, refuse_filled_masks
from swincompress_pl.pruning import AdaptivePruningConfig, Group, PruningPlan, apply_plan, compensate, prune
from swincompress_pl.pruning.adaptive.search import SearchSession
from swincompress_pl.pruning.compensation import compensator as compensator_module
from swincompress_pl.pruning.compensation.axes import HeadMoments, Heads, turn
from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.pruning.compensation.errors import removal_errors
from swincompress_pl.pruning.compensation.moments import CalibrationError, Moments
from swincompress_pl.pruning.evaluation.divergence import distance
from swincompress_pl.pruning.space import SpaceConfig, StructuredSpace, compensator_for
from swincompress_pl.pruning.structure.change import gone_units, revert
from swincompress_pl.pruning.structure.unit_masks import mask_units
from swincompress_pl.pruning.structure.weight_masks import register_masks, set_mask
from swincompress_pl.registry import adapter_for

SHAPE = (1, 3, 16, 16)
HIDDEN = "blocks.0.mlp.channels"
DIMENSIONS = "blocks.0.attn.head_dim"


def _vit() -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    for parameter in network.parameters():  # timm's initialization has no biases, and its MLPs hardly act
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def _swin() -> SwinTransformer:
    torch.manual_seed(0)
    network = SwinTransformer(
        img_size=16, patch_size=2, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=5
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def _images(count: int = 64) -> Tensor:
    return torch.randn(count, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


def _groups(network: nn.Module, *kinds: str) -> list[Group]:
    return [group for group in adapter_for(network).groups(network) if group.kind in (kinds or ("mlp", "heads"))]


def _group(network: nn.Module, name: str) -> Group:
    return next(group for group in adapter_for(network).groups(network) if group.name == name)


def _compensator(network: nn.Module, groups: list[Group], images: Tensor, **options: object) -> Compensator:
    compensator = Compensator([images], **options)  # type: ignore[arg-type]
    compensator.begin_round(network, groups)
    return compensator


@torch.no_grad()
def _cut(network: nn.Module, group: Group, units: list[int], compensator: Compensator) -> Tensor:
    """What the network gives of the images without the units, compensated, masked."""
    with mask_units(network, group, units), compensator.compensated(network, compensator.lost_columns(group, units)):
        output: Tensor = network(_images())
        return output


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def _repeat_channels(network: nn.Module, copies: dict[int, int]) -> None:
    """Makes hidden channels of the first MLP the same as others."""
    fc1 = network.get_submodule("blocks.0.mlp.fc1")
    for channel, original in copies.items():
        fc1.weight[channel] = fc1.weight[original]
        fc1.bias[channel] = fc1.bias[original]


@settings(max_examples=10, deadline=None)
@given(gone=st.lists(st.integers(0, 63), min_size=1, max_size=30, unique=True))
def test_channels_that_others_repeat_go_without_any_loss(gone: list[int]) -> None:
    network, images = _vit(), _images()
    _repeat_channels(network, {channel: 64 + channel for channel in gone})
    with torch.no_grad():
        before = network(images)
    compensator = _compensator(network, _groups(network, "mlp"), images, damping=1e-12)
    after = _cut(network, _group(network, HIDDEN), gone, compensator)
    assert float((after - before).abs().max()) < 1e-3 * float(before.abs().max())


def test_repeated_channels_are_the_first_that_second_order_removes() -> None:
    network = _vit()
    _repeat_channels(network, {channel: 64 + channel for channel in range(10)})
    compensator = _compensator(network, _groups(network, "mlp"), _images(256), damping=1e-9)
    errors = compensator.removal_errors(_group(network, HIDDEN))
    assert errors is not None
    twins = {channel % 64 for channel in errors.argsort()[:10].tolist()}
    assert twins == set(range(10))  # one of each pair


def test_less_is_lost_with_each_method() -> None:
    network, images = _vit(), _images(512)
    group, gone = _group(network, HIDDEN), list(range(0, 128, 3))
    with torch.no_grad():
        wanted = network(_images())
    lost = {}
    for method in ("none", "bias", "ridge"):
        if method == "none":
            with mask_units(network, group, gone), torch.no_grad():
                found = network(_images())
        else:
            found = _cut(network, group, gone, _compensator(network, [group], images, method=method))
        lost[method] = float((found - wanted).square().mean())
    assert lost["ridge"] < 0.5 * lost["bias"] < 0.5 * lost["none"]


def test_infinite_damping_leaves_the_weights_and_solves_the_bias() -> None:
    network, images, gone = _vit(), _images(), [1, 2, 3]
    group, before = _group(network, HIDDEN), _state(network)
    weight = before["blocks.0.mlp.fc2.weight"]
    seen: list[Tensor] = []
    handle = network.get_submodule("blocks.0.mlp.fc2").register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    network(images)
    handle.remove()
    mean = seen[0].flatten(0, 1).double().mean(0)
    expected = before["blocks.0.mlp.fc2.bias"].double() + weight[:, gone].double() @ mean[gone]
    for options in ({"method": "bias"}, {"method": "ridge", "damping": float("inf")}):
        compensator = _compensator(network, [group], images, **options)
        lost = compensator.lost_columns(group, gone)
        with mask_units(network, group, gone), compensator.compensated(network, lost):
            after = _state(network)
        kept = [c for c in range(128) if c not in gone]
        assert torch.equal(after["blocks.0.mlp.fc2.weight"][:, kept], weight[:, kept])
        assert not after["blocks.0.mlp.fc2.weight"][:, gone].any()
        torch.testing.assert_close(after["blocks.0.mlp.fc2.bias"].double(), expected, atol=1e-5, rtol=1e-5)


def test_without_a_bias_infinite_damping_changes_nothing() -> None:
    network, gone = _vit(), [1, 2, 3]
    network.get_submodule("blocks.0.mlp.fc2").bias = None
    group = _group(network, HIDDEN)
    compensator = _compensator(network, [group], _images(), damping=float("inf"))
    assert compensator.readers.readers["blocks.0.mlp.fc2"].fixed_bias
    with mask_units(network, group, gone), torch.no_grad():
        plain = network(_images())
    assert torch.equal(_cut(network, group, gone, compensator), plain)


@pytest.mark.parametrize("build", [_vit, _swin])
def test_turning_heads_leaves_the_function(build: Callable[[], nn.Module]) -> None:
    network = build()
    with torch.no_grad():
        before, images = network(_images()), _images()
        _compensator(network, _groups(network, "head_dim"), images)
        after = network(images)
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


@pytest.mark.parametrize("size", [0.0, 1e-18])
def test_heads_that_compute_nothing_stay_as_they_are(size: float) -> None:
    """Their queries, keys and values have no second moment, or next to none."""
    network, images = _vit(), _images()
    for each in network.blocks[0].norm1.parameters():
        nn.init.constant_(each, size)
    nn.init.zeros_(network.blocks[0].attn.qkv.bias)
    with torch.no_grad():
        before = network(images)
        _compensator(network, _groups(network, "head_dim"), images)
        after = network(images)
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_of_many_rows_a_part_turns_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def counted(network: nn.Module, heads: Heads, moments: HeadMoments, read: Tensor) -> Tensor:
        counts.append(moments.rows)
        return turn(network, heads, moments, read)

    monkeypatch.setattr(compensator_module, "turn", counted)
    for most in (10**6, 200):
        monkeypatch.setattr(compensator_module, "MOST_ROWS", most)
        network, images = _vit(), _images(32)
        before = network(images)
        _compensator(network, _groups(network, "head_dim"), images)
        assert float((network(images) - before).detach().abs().max()) < 1e-4
    assert counts[:2] == [32 * 17] * 2
    assert all(100 < count < 300 for count in counts[2:])


def _mask(network: nn.Module, *names: str) -> dict[str, Tensor]:
    """Masks a random third of some weights."""
    register_masks(network, names)
    for seed, name in enumerate(names):
        shape = network.get_parameter(name).shape
        set_mask(network, name, torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.33)
    return {name: mask.clone() for name, (_, mask) in masked_parameters(network).items()}


@pytest.mark.parametrize("layer", ["qkv", "proj"])
def test_heads_are_not_turned_where_that_would_fill_masked_weights(layer: str) -> None:
    network, images = _vit(), _images()
    masks = _mask(network, f"blocks.0.attn.{layer}.weight")
    before = _state(network)
    _compensator(network, _groups(network, "head_dim"), images)
    after = _state(network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("blocks.1.attn.") for name in changed)
    assert changed
    for name, mask in masks.items():
        assert not network.get_parameter(name)[~mask].count_nonzero()


@pytest.mark.parametrize("shrink", ["round", "end"])
def test_what_is_solved_again_keeps_masked_weights_at_zero(shrink: Any) -> None:
    network, images = _vit(), _images(256)
    _mask(network, "blocks.0.mlp.fc2.weight", "blocks.1.attn.proj.weight")
    config = SpaceConfig(kinds=("mlp", "heads"), compensation="ridge", shrink=shrink)
    space = StructuredSpace(config, None, compensator_for(config, [images]))
    space.prepare(network)
    removal = {HIDDEN: list(range(0, 128, 3)), "blocks.1.attn.heads": [0]}
    plain = StructuredSpace(SpaceConfig(kinds=("mlp", "heads")))
    with torch.no_grad():
        wanted = network(images)
        with plain.masked(network, removal):
            lost = float((network(images) - wanted).norm())
        with space.masked(network, removal):
            assert float((network(images) - wanted).norm()) < 0.7 * lost
            tried = network(images)
        space.commit(network, removal)
        torch.testing.assert_close(network(images), tried, atol=1e-5, rtol=1e-4)
    refuse_filled_masks(network, "test")
    assert len(masked_parameters(network)) >= 2


def test_dimensions_that_are_masked_stay_so_when_heads_are_turned_again() -> None:
    network, images = _vit(), _images()
    config = SpaceConfig(kinds=("head_dim",), compensation="ridge", shrink="end")
    space = StructuredSpace(config, None, compensator := compensator_for(config, [images]))
    space.prepare(network)
    space.commit(network, {DIMENSIONS: [0, 3, 4]})
    compensator.forget()
    with torch.no_grad():
        wanted = network(images)
        space.prepare(network)
        torch.testing.assert_close(network(images), wanted, atol=1e-4, rtol=1e-4)
    refuse_filled_masks(network, "test")
    assert gone_units(network, _group(network, DIMENSIONS)) == (0, 3, 4)


def test_the_last_axes_of_heads_carry_least() -> None:
    network = _vit()
    group = _group(network, DIMENSIONS)
    with torch.no_grad():
        wanted = network(_images())
    compensator = _compensator(network, [group], _images(256))
    last = _cut(network, group, list(range(8, 16)), compensator)
    first = _cut(network, group, list(range(8)), compensator)
    assert float((last - wanted).square().mean()) < 0.2 * float((first - wanted).square().mean())
    errors = compensator.removal_errors(group)
    assert errors is not None
    assert set(errors.argsort()[:4].tolist()) <= set(range(8, 16))


def test_a_head_of_low_rank_loses_its_other_dimensions_for_nothing() -> None:
    network, images = _vit(), _images()
    with torch.no_grad():
        qkv = network.get_submodule("blocks.0.attn.qkv")
        for start in range(0, 96, 16):  # every head's q, k and v have rank 4
            mixture = torch.randn(16, 4) @ torch.randn(4, 33) * 0.1
            qkv.weight[start : start + 16], qkv.bias[start : start + 16] = mixture[:, :32], mixture[:, 32]
        wanted = network(images)
    group = _group(network, DIMENSIONS)
    found = _cut(network, group, list(range(5, 16)), _compensator(network, [group], images, damping=1e-10))
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


def test_only_plain_attention_has_a_free_basis() -> None:
    torch.manual_seed(0)
    gated = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5, qk_norm=True
    )
    assert not any(group.free_basis for group in adapter_for(gated).groups(gated))
    assert _group(_vit(), DIMENSIONS).free_basis
    assert not _group(_vit(), HIDDEN).free_basis


def test_a_trial_leaves_no_trace_and_trials_nest() -> None:
    network, images = _vit(), _images()
    groups = _groups(network, "heads", "mlp", "head_dim")
    compensator = _compensator(network, groups, images)
    before = _state(network)
    space = StructuredSpace(SpaceConfig(kinds=("heads", "mlp", "head_dim"), compensation="ridge"), None, compensator)
    with torch.no_grad():
        with space.masked(network, {"blocks.0.attn.heads": [0]}), space.masked(network, {DIMENSIONS: [14, 15]}):
            one_by_one = network(images)
        with space.masked(network, {"blocks.0.attn.heads": [0], DIMENSIONS: [14, 15]}):
            together = network(images)
        assert not torch.equal(one_by_one, network(images))
    torch.testing.assert_close(one_by_one, together)
    assert _equal(_state(network), before)


def test_a_trial_that_fails_leaves_no_trace() -> None:
    network = _vit()
    compensator = _compensator(network, _groups(network, "mlp"), _images())
    space = StructuredSpace(SpaceConfig(kinds=("mlp",), compensation="ridge"), None, compensator)
    before = _state(network)
    with pytest.raises(KeyboardInterrupt), space.masked(network, {HIDDEN: [0, 1]}):
        raise KeyboardInterrupt
    assert _equal(_state(network), before)
    with space.masked(network, {HIDDEN: [0, 1]}):
        assert not _equal(_state(network), before)


@pytest.mark.parametrize("shrink", ["round", "end"])
def test_what_is_committed_computes_what_the_trial_did_and_can_be_undone(shrink: str) -> None:
    network, images = _vit(), _images()
    config = SpaceConfig(kinds=("heads", "mlp"), compensation="ridge", shrink=shrink)  # type: ignore[arg-type]
    space = StructuredSpace(config, None, compensator_for(config, [images]))
    space.prepare(network)
    removal = {"blocks.0.attn.heads": [1], HIDDEN: list(range(0, 128, 2)), "blocks.1.mlp.channels": [3, 4]}
    before = _state(network)
    with torch.no_grad(), space.masked(network, removal):
        tried = network(images)
    change = space.commit(network, removal)
    with torch.no_grad():
        torch.testing.assert_close(network(images), tried, atol=1e-5, rtol=1e-4)
    revert(network, change)
    assert _equal(_state(network), before)


@pytest.mark.parametrize("shrink", ["round", "end"])
def test_rounds_remember_what_the_network_was(shrink: str) -> None:
    """Two cuts, one after the other, give the weights of one: the sums are those of the unpruned network."""
    config = SpaceConfig(kinds=("mlp",), compensation="ridge", shrink=shrink)  # type: ignore[arg-type]
    images = _images(512)
    outputs = []
    for cuts in ([[5, 6, 7, 8]], [[5, 6], [5, 6] if shrink == "round" else [7, 8]]):
        network = _vit()
        space = StructuredSpace(config, None, Compensator([images], damping=1e-12))
        for units in cuts:
            space.prepare(network)
            space.commit(network, {HIDDEN: units})
        outputs.append(network.get_submodule("blocks.0.mlp.fc2").weight.detach())
    # damping would pull towards what was there before the last cut
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)


def test_a_reader_that_lost_outputs_is_looked_at_again() -> None:
    network, images = _vit(), _images()
    config = SpaceConfig(kinds=("mlp", "embed"), compensation="ridge")
    space = StructuredSpace(config, None, compensator_for(config, [images]))
    space.prepare(network)
    space.commit(network, {HIDDEN: [1, 2], "embed": [0, 5]})
    space.prepare(network)
    with torch.no_grad():
        wanted = network(images)
        with space.masked(network, {HIDDEN: [0]}):
            assert float((network(images) - wanted).norm()) < 0.1 * float(wanted.norm())
    space.commit(network, {HIDDEN: [0]})
    assert network.get_submodule("blocks.0.mlp.fc2").weight.shape == (30, 125)


def test_a_trained_network_is_looked_at_again() -> None:
    network, calls = _vit(), 0

    def predict(net: nn.Module, images: Tensor) -> object:
        nonlocal calls
        calls += 1
        return net(images)

    compensator = Compensator([_images()], predict=predict)
    groups = _groups(network, "mlp")
    compensator.begin_round(network, groups)
    first = calls
    compensator.begin_round(network, groups)
    assert calls == first
    compensator.forget()
    compensator.begin_round(network, groups)
    assert calls == 2 * first


def test_frozen_and_shared_layers_are_left_alone_by_name() -> None:
    network = _vit()
    network.get_submodule("blocks.0.mlp.fc2").weight.requires_grad_(False)
    network.get_submodule("blocks.1.mlp").fc2 = network.get_submodule("blocks.0.mlp.fc2")
    groups = _groups(network, "heads", "mlp")
    with pytest.warns(UserWarning, match=r"blocks.0.mlp.fc2 \(it is frozen"):
        compensator = _compensator(network, groups, _images())
    assert set(compensator.readers.readers) == {"blocks.0.attn.proj", "blocks.1.attn.proj"}
    assert compensator.lost_columns(_group(network, HIDDEN), [0]) == {}
    network = _vit()
    network.get_submodule("blocks.1.mlp").fc2 = network.get_submodule("blocks.0.mlp.fc2")
    with pytest.warns(UserWarning, match="its parameters are shared"):
        _compensator(network, _groups(network, "mlp"), _images())


def test_the_residual_stream_has_no_reader() -> None:
    network = _vit()
    compensator = _compensator(network, _groups(network, "embed"), _images())
    assert not compensator.readers.readers
    assert compensator.removal_errors(_group(network, "embed")) is None
    config = AdaptivePruningConfig(kinds=("embed",), criterion="second_order")
    with pytest.raises(ValueError, match="no layer reads the units of embed as columns"):
        prune(network, lambda _: 90.0, config, calibration=[_images()])


def _unread(**options: Any) -> StructuredSpace:
    options = {"kinds": ("embed", "mlp"), "criterion": "second_order", "compensation": "ridge"} | options
    config = SpaceConfig(**options)
    return StructuredSpace(config, None, compensator_for(config, [_images()]))


def test_groups_that_no_layer_reads_are_named_and_ranked_by_magnitude() -> None:
    network = _vit()
    space = _unread()
    with pytest.warns(UserWarning, match="second_order.*1 groups.*'magnitude' ranks these.*embed"):
        space.prepare(network)
    by_magnitude = StructuredSpace(SpaceConfig(kinds=("embed", "mlp")))
    for target in space.targets(network):
        same = torch.equal(space.scores(network, target, None), by_magnitude.scores(network, target, None))
        assert same == (target.kind == "embed")


@pytest.mark.parametrize("options", [{"ranking": "global"}, {"kinds": ("embed",)}])
def test_groups_that_no_layer_reads_are_refused_where_nothing_else_is_or_all_are_compared(
    options: dict[str, Any],
) -> None:
    network = _vit()
    with pytest.raises(ValueError, match=r"second_order.*no layer reads the units of embed"):
        _unread(**options).prepare(network)


def test_fewer_rows_than_channels_still_give_weights() -> None:
    network, group = _vit(), _group(_vit(), HIDDEN)
    compensator = _compensator(network, [group], _images(2))  # 34 rows for 128 channels
    output = _cut(network, group, list(range(40)), compensator)
    assert bool(output.isfinite().all())


@torch.no_grad()
def test_constant_and_dead_channels_are_no_problem() -> None:
    network, images = _vit(), _images()
    fc1 = network.get_submodule("blocks.0.mlp.fc1")
    fc1.weight[:20] = 0.0
    fc1.bias[:10], fc1.bias[10:20] = 0.0, 3.0  # dead: gelu(0) = 0; constant: gelu(3)
    wanted = network(images)
    group = _group(network, HIDDEN)
    compensator = _compensator(network, [group], images)
    torch.testing.assert_close(_cut(network, group, list(range(20)), compensator), wanted, atol=1e-4, rtol=1e-3)
    errors = compensator.removal_errors(group)
    assert errors is not None
    assert set(errors.argsort()[:20].tolist()) == set(range(20))


def test_a_network_of_nothing_but_constants_keeps_its_weights() -> None:
    moments = Moments.empty(3, 2, torch.device("cpu"))
    moments.add(torch.ones(10, 3))
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    moments.give(weight, torch.zeros(2, dtype=torch.float64))
    kept = torch.tensor([0, 2])
    assert torch.equal(moments.system(intercept=True).solve(weight, kept), weight[:, kept])
    assert moments.intercept(torch.zeros(2, 3, dtype=torch.float64), torch.arange(3)).tolist() == [6.0, 15.0]


def test_values_that_overflow_are_named_with_the_layer() -> None:
    network, before = _vit(), _state(_vit())
    with pytest.raises(CalibrationError, match=r"NaN or infinite values at blocks.0.attn.proj"):
        prune(
            network,
            lambda _: 90.0,
            AdaptivePruningConfig(compensation="ridge"),
            calibration=[torch.full((4, *SHAPE[1:]), 1e30)],
        )
    assert _equal(_state(network), before)


@pytest.mark.parametrize(
    ("calibration", "error", "words"),
    [
        (None, ValueError, "compensation='ridge' needs calibration="),
        ([], ValueError, "calibration has no images"),
        ([torch.zeros(0, 3, 16, 16)], ValueError, "calibration has no images"),
        (["image.jpg"], TypeError, "calibration has a batch of type str"),
        ([({"image": 1}, 2)], TypeError, "calibration has a batch of type dict"),
    ],
)
def test_bad_calibration_is_refused(calibration: object, error: type[Exception], words: str) -> None:
    network, before = _vit(), _state(_vit())
    with pytest.raises(error, match=words):
        prune(network, lambda _: 90.0, AdaptivePruningConfig(compensation="ridge"), calibration=calibration)  # type: ignore[arg-type]
    assert _equal(_state(network), before)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="compensation='lasso'"):
        AdaptivePruningConfig(compensation="lasso")  # type: ignore[arg-type]


def _likeness(network: nn.Module, images: Tensor, wanted: Tensor) -> float:
    """100 less the squared error of the answers, in percent of their variance."""
    with torch.no_grad():
        missed = (network(images) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    return max(0.0, 100.0 * (1.0 - float(missed)))


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("build", [_vit, _swin])
def test_a_search_removes_more_with_compensation(build: Callable[[], nn.Module], ranking: str) -> None:
    images, removed = _images(100), {}
    for method, criterion in (("none", "magnitude"), ("none", "second_order"), ("ridge", "second_order")):
        network = build()
        with torch.no_grad():
            wanted = network(images)
        config = AdaptivePruningConfig(
            tolerance=40.0,
            step=0.2,
            min_step=0.1,
            round_to=2,
            kinds=("mlp", "head_dim"),
            ranking=ranking,  # type: ignore[arg-type]
            compensation=method,  # type: ignore[arg-type]
            criterion=criterion,
        )
        score = partial(_likeness, images=images, wanted=wanted)
        result = prune(network, score, config, input_shape=SHAPE, calibration=[_images(256)])
        assert result.score >= 60.0
        assert result.state.baseline_macs is not None
        removed[method, criterion] = 1 - (result.state.steps[-1].macs or 0) / result.state.baseline_macs
    assert removed["ridge", "second_order"] > max(removed["none", "second_order"], removed["none", "magnitude"])


def test_a_session_goes_on_after_training() -> None:
    network, images = _vit(), _images()
    config = AdaptivePruningConfig(
        tolerance=100.0, kinds=("mlp", "head_dim"), compensation="ridge", criterion="second_order", max_rounds=2
    )
    session = SearchSession(network, lambda _: 90.0, config, calibration=[images])
    session.round()
    with torch.no_grad():
        network.get_submodule("blocks.0.mlp.fc2").weight.mul_(1.5)
        session.network_changed()
        wanted = network(images)
    session.round()
    with torch.no_grad():
        assert float((network(images) - wanted).norm() / wanted.norm()) < 0.5


def test_a_plan_repeats_the_architecture_and_not_the_weights() -> None:
    network = _vit()
    fresh = copy.deepcopy(network)
    config = AdaptivePruningConfig(tolerance=100.0, kinds=("mlp",), compensation="ridge", max_rounds=1)
    result = prune(network, lambda _: 90.0, config, calibration=[_images()])
    apply_plan(fresh, PruningPlan.from_dict(result.plan.to_dict()))
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(_images()), network(_images()))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.sampled_from([1, 2, 3]))
def test_elimination_gives_the_error_of_the_least_squares_fit(seed: int, width: int) -> None:
    """The errors up to any unit add up to what the best weights on the others miss."""
    draw = torch.Generator().manual_seed(seed)
    units, outputs = 6, 4
    x = torch.randn(200, units * width, generator=draw, dtype=torch.float64)
    weight = torch.randn(outputs, units * width, generator=draw, dtype=torch.float64)
    hessian = x.T @ x / len(x)
    columns = torch.arange(units * width).reshape(units, width)
    errors = removal_errors([(torch.linalg.inv(hessian), weight, columns)])
    order = errors.argsort(stable=True)
    first = columns[order[0]]
    kept = [c for c in range(units * width) if c not in first.tolist()]
    fitted = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution
    missed = float((x @ weight.T - x[:, kept] @ fitted).square().sum()) / len(x)
    assert float(errors[order[0]]) == pytest.approx(missed, rel=1e-6)
    assert bool((errors[order].diff() >= 0).all())


@pytest.mark.parametrize("name", [HIDDEN, "blocks.0.attn.heads", DIMENSIONS])
def test_a_plan_is_applied_with_less_loss(name: str) -> None:
    images, lost = _images(256), {}
    group = _group(_vit(), name)
    plan = PruningPlan.removing([group], {name: range(group.units // 2)})
    with torch.no_grad():
        wanted = _vit()(images)
        for method in ("none", "bias", "ridge"):
            network = _vit()
            applied = compensate(network, plan, [images, (images, "labels")], method=method)  # type: ignore[arg-type]
            assert applied.plan == plan
            assert _group(network, name).units == group.units - group.units // 2
            lost[method] = float((network(images) - wanted).square().mean())
    assert lost["ridge"] < min(lost["none"], lost["bias"])


def test_a_plan_that_does_not_fit_leaves_the_network() -> None:
    network, before = _vit(), _state(_vit())
    with pytest.raises(ValueError, match="made for 64 units, this network has 128"):
        compensate(network, PruningPlan({HIDDEN: (1, 2)}, {HIDDEN: 64}), [_images()])
    assert _equal(_state(network), before)
    with pytest.raises(ValueError, match="method='lasso'"):
        compensate(network, PruningPlan({HIDDEN: (1, 2)}), [_images()], method="lasso")  # type: ignore[arg-type]


def test_a_group_that_the_answers_do_not_feel_is_not_sensitive() -> None:
    network = _vit()
    with torch.no_grad():  # the classifier reads the other half of the stream
        network.get_submodule("blocks.1.mlp.fc2").weight[16:] = 0.0
        network.get_submodule("head").weight[:, :16] = 0.0
        network.norm = nn.Identity()
    compensator = _compensator(network, _groups(network, "mlp"), _images(128))
    first, last = (compensator.sensitivity(network, _group(network, f"blocks.{i}.mlp.channels")) for i in (0, 1))
    assert first > 1e-6
    assert last < 1e-9
    assert compensator.sensitivity(network, _group(network, "embed")) == 1.0


def test_the_sensitivity_predicts_how_far_answers_move() -> None:
    network, images = _vit(), _images(128)
    group = _group(network, HIDDEN)
    compensator = _compensator(network, [group], images)
    errors, before = compensator.removal_errors(group), _state(network)
    assert errors is not None
    sensitivity = compensator.sensitivity(network, group)
    assert _equal(_state(network), before)
    gone = errors.argsort()[:20].tolist()
    with torch.no_grad():
        wanted = network(images)
        with mask_units(network, group, gone), compensator.compensated(network, compensator.lost_columns(group, gone)):
            moved = float(distance(wanted, network(images))) / len(images)
    predicted = sensitivity * float(errors[gone].sum())
    assert predicted / 3 < moved < predicted * 3


def test_distances_of_answers() -> None:
    logits = torch.randn(5, 4)
    assert float(distance(logits, logits)) == 0.0
    assert float(distance(logits, logits + 3.0)) == pytest.approx(0.0, abs=1e-6)  # the classes' probabilities stay
    halves = torch.log(torch.tensor([[0.5, 0.5]]))
    quarter = torch.log(torch.tensor([[0.25, 0.75]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(distance(halves, quarter)) == pytest.approx(expected, rel=1e-6)
    maps = torch.randn(5, 4, 2, 2)
    assert float(distance(maps, maps.mean(0, keepdim=True).expand_as(maps))) == pytest.approx(2.5, rel=1e-5)


def test_a_network_compiled_in_place_is_looked_at_as_it_is() -> None:
    network, images = _vit(), _images()
    network.compile(backend="eager")
    network(images)
    compiled = network._compiled_call_impl
    compensator = _compensator(network, _groups(network, "mlp"), images)
    assert set(compensator.readers.readers) == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert network._compiled_call_impl is compiled


def test_a_network_without_one_answer_has_no_sensitivity() -> None:
    network = _vit()
    compensator = _compensator(network, [_group(network, HIDDEN)], _images(), predict=lambda net, x: [net(x)])
    assert compensator.sensitivity(network, _group(network, HIDDEN)) == 1.0

"""Starting in the middle gives the same bits, and leaves the network alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import SwinTransformer, SwinTransformerV2, VisionTransformer
from torch import Tensor, nn

from swincompress_pl.pruning import count_macs
from swincompress_pl.pruning.evaluation.prefix_cache import PrefixCache
from swincompress_pl.pruning.structure.unit_masks import mask_units
from swincompress_pl.registry import adapter_for

PLENTY = 1 << 28


def _swin(cls: type[nn.Module] = SwinTransformer) -> nn.Module:
    torch.manual_seed(0)
    return cls(
        img_size=16, patch_size=2, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], num_classes=5
    ).eval()


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=5, reg_tokens=2
    ).eval()


BUILDERS: dict[str, Callable[[], nn.Module]] = {"swin": _swin, "swin v2": lambda: _swin(SwinTransformerV2), "vit": _vit}
NETWORKS = {name: build() for name, build in BUILDERS.items()}
IMAGES = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # two batches of three


def _state(network: nn.Module) -> list[Any]:
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__, sorted(m.__dict__))
        for m in network.modules()
    ]


def _tensors(group: Any) -> list[str]:
    return [s.tensor for s in group.slices]


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(NETWORKS)),
    picks=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 1), st.booleans()), min_size=1, max_size=12),
    size_bytes=st.sampled_from([1, 20_000, 60_000, PLENTY]),
    autocast=st.booleans(),
)
@torch.no_grad()
def test_a_pass_from_the_cache_is_equal_to_the_bit(
    name: str, picks: list[tuple[int, int, bool]], size_bytes: int, autocast: bool
) -> None:
    """Random candidates, some of which stay, on random batches: always the logits of a whole pass."""
    network = copy.deepcopy(NETWORKS[name])
    groups = [g for g in adapter_for(network).groups(network) if g.kind in ("heads", "mlp")]
    cache = PrefixCache(network, size_bytes=size_bytes)
    before = _state(network)
    for pick, batch, stays in picks:
        group = groups[pick % len(groups)]
        mask = mask_units(network, group, [pick % group.units])
        mask.__enter__()
        depth = cache.depth(_tensors(group))
        assert depth == adapter_for(network).segments(network).index(group.name.rsplit(".", 2)[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, cost = cache.run(batch, depth, lambda batch=batch: network(IMAGES[batch]))
            assert torch.equal(found, network(IMAGES[batch]))
        assert 0 < cost <= 1
        assert cache.off is None
        assert 0 <= cache.used_bytes <= size_bytes
        assert _state(network) == before
        if stays:
            cache.drop_behind(depth)
        else:
            mask.__exit__(None, None, None)


@pytest.mark.parametrize("name", sorted(NETWORKS))
@torch.no_grad()
def test_the_second_candidate_skips_what_lies_before_it(name: str) -> None:
    network = NETWORKS[name]
    names = adapter_for(network).segments(network)
    cache = PrefixCache(network, size_bytes=PLENTY)
    cache.measure(lambda: network(IMAGES[0][:1]))
    runs = dict.fromkeys(names, 0)

    class Counting:
        def __init__(self, segment: str) -> None:
            self.segment, self.module = segment, network.get_submodule(segment)
            inner = next(m for m in self.module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
            self.handle = inner.register_forward_hook(self.count)

        def count(self, *_: object) -> None:
            runs[self.segment] += 1

    depth = len(names) - 1
    _, whole = cache.run(0, depth, lambda: network(IMAGES[0]))
    counters = [Counting(segment) for segment in names]
    _, part = cache.run(0, depth, lambda: network(IMAGES[0]))
    for counter in counters:
        counter.handle.remove()
    assert whole == 1.0
    assert runs == {segment: int(segment == names[-1]) for segment in names}
    # the parts are those of the multiply-accumulates: a last block alone against all
    assert 0 < part < 0.5
    parts = [cache._part_before[number] for number in range(len(names))]
    assert parts[0] == 0
    assert parts == sorted(parts)
    macs = count_macs(network, (1, 3, 16, 16))
    embedding = count_macs(network.get_submodule("patch_embed"), (1, 3, 16, 16))
    assert parts[1] == pytest.approx(embedding / macs, rel=1e-9)


@torch.no_grad()
def test_what_lies_behind_an_accepted_change_is_forgotten() -> None:
    network = _vit()
    cache = PrefixCache(network, size_bytes=PLENTY)
    cache.run(0, 4, lambda: network(IMAGES[0]))
    held = cache.used_bytes
    cache.drop_behind(2)
    assert sorted(cache._inputs[0]) == [1, 2]
    assert cache.used_bytes == held // 2
    cache.drop_behind(0)
    assert (cache.used_bytes, cache._inputs[0]) == (0, {})


@torch.no_grad()
def test_a_full_cache_keeps_the_deepest_input_of_a_batch_and_runs_other_batches_whole() -> None:
    network = _vit()
    one = 3 * 19 * 32 * 4  # images, tokens with class and registers, channels, bytes
    cache = PrefixCache(network, size_bytes=one)
    cache.run(0, 1, lambda: network(IMAGES[0]))
    cache.run(0, 3, lambda: network(IMAGES[0]))
    assert sorted(cache._inputs[0]) == [3]
    assert cache.used_bytes == one
    found, cost = cache.run(1, 3, lambda: network(IMAGES[1]))
    assert cost == 1.0
    assert cache._inputs.get(1, {}) == {}
    assert torch.equal(found, network(IMAGES[1]))


@torch.no_grad()
def test_an_exception_leaves_no_trace() -> None:
    network = _swin()
    cache = PrefixCache(network, size_bytes=PLENTY)
    cache.run(0, 3, lambda: network(IMAGES[0]))
    before = _state(network)

    def fail() -> Tensor:
        network(IMAGES[0])
        raise KeyboardInterrupt

    for depth in (0, 3):
        with pytest.raises(KeyboardInterrupt):
            cache.run(0, depth, fail)
        assert _state(network) == before
    found, _ = cache.run(0, 3, lambda: network(IMAGES[0]))
    assert torch.equal(found, network(IMAGES[0]))


def test_tensors_outside_the_segments_and_shared_ones_start_at_the_front() -> None:
    network = _vit()
    cache = PrefixCache(network, size_bytes=PLENTY)
    assert cache.depth([]) == 0
    assert cache.depth(["blocks.3.mlp.fc1.weight"]) == 4
    assert cache.depth(["blocks.3.mlp.fc1.weight", "blocks.1.mlp.fc1.bias"]) == 2
    for outside in ("pos_embed", "cls_token", "norm.weight", "head.weight", "patch_embed.proj.weight"):
        assert cache.depth(["blocks.3.mlp.fc1.weight", outside]) == 0
    network.get_submodule("blocks.3.mlp.fc1").weight = network.get_submodule("blocks.1.mlp.fc1").weight
    assert PrefixCache(network, size_bytes=PLENTY).depth(["blocks.3.mlp.fc1.weight"]) == 2
    swin = PrefixCache(_swin(), size_bytes=PLENTY)
    assert swin.depth(["layers.1.blocks.0.attn.relative_position_index"]) == 4


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp\.fc1\.weight: no parameter or buffer of VisionTransformer"):
        PrefixCache(_vit(), size_bytes=1).depth(["blocks.9.mlp.fc1.weight"])


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = _vit()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + self.network(images.flip(3))


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def _hooked() -> nn.Module:
    network = _vit()
    network.get_submodule("norm").register_forward_hook(lambda *_: None)
    return network


def _compiled_in_place() -> nn.Module:
    network = _vit()
    network._compiled_call_impl = network._call_impl  # what network.compile() leaves behind
    return network


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (nn.Linear(3, 3), "no adapter"),
        (_hooked(), "forward hooks"),
        (_compiled_in_place(), "compiled"),
        (torch.compile(_vit(), backend="eager"), "no adapter"),
    ],
)
def test_networks_that_cannot_be_cut_are_run_whole(network: nn.Module, why: str) -> None:
    cache = PrefixCache(network, size_bytes=PLENTY)
    assert cache.off is not None
    assert why in cache.off
    cache.measure(lambda: None)
    assert cache.depth(["whatever"]) == 0
    assert cache.run(0, 0, lambda: "result") == ("result", 1.0)
    cache.drop_behind(0)


def test_no_bytes_no_cache() -> None:
    assert PrefixCache(_vit(), size_bytes=0).off is not None


@torch.no_grad()
def test_a_network_that_runs_twice_a_pass_turns_the_cache_off() -> None:
    twice = _Twice().eval()
    cache = PrefixCache(twice.network, size_bytes=PLENTY)
    depth = cache.depth(["blocks.3.mlp.fc1.weight"])
    for _ in range(2):
        found, cost = cache.run(0, depth, lambda: twice(IMAGES[0]))
        assert torch.equal(found, twice(IMAGES[0]))
        assert cost == 1.0
    assert cache.off is not None
    assert "once" in cache.off
    assert cache.used_bytes == 0


@torch.no_grad()
def test_a_segment_that_works_in_place_turns_the_cache_off() -> None:
    network = _vit()
    network.get_submodule("blocks")[2] = _InPlace()
    cache = PrefixCache(network, size_bytes=PLENTY)
    for _ in range(2):
        found, _ = cache.run(0, 4, lambda: network(IMAGES[0]))
        assert torch.equal(found, network(IMAGES[0]))
    assert cache.off is not None
    assert "in place" in cache.off


@torch.no_grad()
def test_a_segment_with_more_arguments_turns_the_cache_off() -> None:
    network = _vit()
    cache = PrefixCache(network, size_bytes=PLENTY)
    mask = torch.zeros(19, 19)
    for _ in range(2):
        _, cost = cache.run(0, 3, lambda: network.forward_head(network.forward_features(IMAGES[0], attn_mask=mask)))
        assert cost == 1.0
    assert cache.off is not None
    assert "one tensor" in cache.off


@torch.no_grad()
def test_a_forward_of_ones_own_on_a_segment_comes_back() -> None:
    network = _vit()
    block = network.get_submodule("blocks.0")
    own = block.forward
    block.forward = own  # an instance attribute, as accelerate sets it
    cache = PrefixCache(network, size_bytes=PLENTY)
    for _ in range(2):
        cache.run(0, 3, lambda: network(IMAGES[0]))
    assert block.__dict__["forward"] == own

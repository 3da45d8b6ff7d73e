"""Masked weights stay exactly zero through everything that trains, copies, saves or quantizes a network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from swincompress_pl.pruning.structure.apply import history_of
from swincompress_pl.pruning.structure.patterns import parse_granularity
from swincompress_pl.pruning.structure.weight_masks import (
    count_nonzero,
    enforce_masks,
    keep_masks,
    masked_parameters,
    masked_share,
    masked_shares,
    register_masks,
    remove_masks,
    set_mask,
    temporary_mask,
    undo_latest_masks,
)
from swincompress_pl.quant import quantize

FC1, QKV = "blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight"
NAMES = (QKV, FC1)


def _network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)


def _masked(granularity: str = "2:4", network: nn.Module | None = None) -> nn.Module:
    network = network or _network()
    register_masks(network, NAMES)
    pattern = parse_granularity(granularity)
    for name in NAMES:
        weight = network.get_parameter(name).detach()
        set_mask(network, name, pattern.keep_mask(weight.abs(), pattern.units(weight.shape) // 2))
    return network


def _batch(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 16, 16, generator=generator), torch.randint(3, (size,), generator=generator)


def _step(network: Callable[[Tensor], Tensor], optimizer: Optimizer, seed: int = 0) -> None:
    images, labels = _batch(seed)
    functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def _assert_zeros_exact(network: nn.Module, names: Iterable[str] = NAMES) -> None:
    """Masked weights are +0, bit for bit; of the kept ones some are not 0, so that the network is no corpse."""
    masked = masked_parameters(network)
    assert set(masked) == set(names)
    for weight, mask in masked.values():
        assert mask.float().mean() == 0.5
        assert not weight.detach()[~mask].view(torch.int32).any()
        assert bool((weight.detach()[mask] != 0).all())


# ---------------------------------------------------------------- registering


def test_masks_are_buffers_beside_the_weights_and_in_the_history() -> None:
    network = _network()
    weight = network.get_parameter(FC1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert register_masks(network, [FC1]) == (FC1,)
    mask = network.get_buffer(f"{FC1}_mask")
    assert (mask.shape, mask.dtype, bool(mask.all())) == (weight.shape, torch.bool, True)
    assert network.get_parameter(FC1) is weight
    state = network.state_dict()
    assert state.keys() - before.keys() == {f"{FC1}_mask"}
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert history_of(network) == [{"mask": [FC1]}]
    assert masked_parameters(network) == {FC1: (weight, mask)}


def test_registering_again_keeps_the_mask_and_writes_no_history() -> None:
    network = _network()
    register_masks(network, [FC1])
    gone = torch.rand(network.get_parameter(FC1).shape) < 0.5
    set_mask(network, FC1, gone)
    assert register_masks(network, [FC1, QKV, QKV]) == (QKV,)
    assert register_masks(network, [FC1]) == ()
    assert history_of(network) == [{"mask": [FC1]}, {"mask": [QKV]}]
    assert torch.equal(network.get_buffer(f"{FC1}_mask"), gone)


def test_removing_leaves_the_weights_and_frees_them() -> None:
    network = _masked()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = SGD(network.parameters(), lr=0.1)
    keep_masks(optimizer, network)
    remove_masks(network, [FC1])
    assert history_of(network) == [{"mask": list(NAMES)}, {"unmask": [FC1]}]
    assert set(masked_parameters(network)) == {QKV}
    assert not [name for name in network.state_dict() if name == f"{FC1}_mask"]
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    _step(network, optimizer)
    assert bool((network.get_parameter(FC1)[before[FC1] == 0] != 0).any())
    _assert_zeros_exact(network, [QKV])


def test_undoing_takes_the_history_back_step_by_step() -> None:
    network = _masked()
    remove_masks(network, [FC1])
    undo_latest_masks(network)
    assert (set(masked_parameters(network)), history_of(network)) == (set(NAMES), [{"mask": list(NAMES)}])
    undo_latest_masks(network)
    assert (masked_parameters(network), history_of(network)) == ({}, [])
    with pytest.raises(ValueError, match="VisionTransformer: the latest entry of its history is not about masks"):
        undo_latest_masks(network)


def _unchanged(network: nn.Module, act: Callable[[], Any], message: str) -> None:
    state, history = list(network.state_dict()), history_of(network)
    with pytest.raises(ValueError, match=message):
        act()
    assert (list(network.state_dict()), history_of(network)) == (state, history)


def test_parameters_that_cannot_be_masked_are_named_and_nothing_is_touched() -> None:
    network = _network()
    _unchanged(
        network,
        lambda: register_masks(network, [QKV, "blocks.0.mlp.fc3.weight"]),
        r"blocks.0.mlp.fc3.weight: VisionTransformer has no parameter of that name; did you mean blocks.0.mlp.fc[12]",
    )
    nn.utils.parametrizations.weight_norm(network.blocks[0].mlp.fc1)
    _unchanged(network, lambda: register_masks(network, [FC1]), f"{FC1}: .* A parametrization .* removed first")
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    for name in ("a.weight", "b.weight"):
        message = rf"{name}: the parameter is shared \(a.weight, b.weight\), .*give each place its own nn.Parameter"
        _unchanged(tied, lambda name=name: register_masks(tied, [name]), message)
    taken = nn.Linear(4, 4)
    taken.register_buffer("weight_mask", torch.ones(4))
    _unchanged(taken, lambda: register_masks(taken, ["weight"]), "weight: weight_mask is taken by something that is no")
    assert masked_parameters(taken) == {}


def test_changes_of_what_has_no_mask_are_refused() -> None:
    network = _masked()
    shape = network.get_parameter(FC1).shape
    ones = torch.ones(shape, dtype=torch.bool)
    _unchanged(
        network, lambda: remove_masks(network, [FC1, "head.weight"]), "head.weight: it has no mask to remove; mas"
    )
    _unchanged(
        network, lambda: set_mask(network, "head.weight", ones), r"head.weight: it has no mask; register_masks\(network"
    )
    for wrong in (ones.float(), ones.T):
        for act in (set_mask, lambda *a: temporary_mask(*a).__enter__()):
            message = rf"{FC1}: a bool mask of shape \(64, 16\) is expected \(True = kept\), not {wrong.dtype} of shape"
            _unchanged(network, lambda act=act, wrong=wrong: act(network, FC1, wrong), message)
    _assert_zeros_exact(network)


def test_a_parameter_of_the_root_and_a_frozen_one() -> None:
    layer = nn.Linear(4, 2).requires_grad_(False)
    register_masks(layer, ["weight"])
    mask = torch.tensor([[True, False, True, False]] * 2)
    set_mask(layer, "weight", mask)
    assert bool((layer.weight[~mask] == 0).all())
    assert not layer.weight.requires_grad


# ---------------------------------------------------------------- zeros


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_whatever_a_masked_weight_is_becomes_plus_zero_and_the_rest_keeps_its_bits(
    dtype: torch.dtype, transposed: bool
) -> None:
    values = torch.tensor([float("nan"), -float("inf"), -1.0, -0.0, 1e-40, 3.0], dtype=dtype).repeat(4, 2)
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(values.T.clone().T if transposed else values.clone())
    register_masks(layer, ["weight"])
    mask = (torch.arange(12) < 6).repeat(4, 1)
    layer.weight_mask.copy_(mask)
    version = layer.weight._version
    enforce_masks(layer)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[layer.weight.element_size()]
    assert torch.equal(layer.weight.detach().view(bits), values.view(bits) * mask)
    assert layer.weight._version > version, "whoever caches the weights has to see the change"


def test_a_wider_mask_lets_zeros_train_again() -> None:
    network = _masked()
    set_mask(network, FC1, torch.ones_like(network.get_buffer(f"{FC1}_mask")))
    optimizer = SGD(network.parameters(), lr=0.1)
    keep_masks(optimizer, network)
    assert count_nonzero(network) < sum(p.numel() for p in network.parameters()) - 500
    before = int(network.get_parameter(FC1).count_nonzero())
    _step(network, optimizer)
    assert int(network.get_parameter(FC1).count_nonzero()) > before


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "SGD momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_keep_the_zeros(name: str) -> None:
    network = _network()
    optimizer = OPTIMIZERS[name](network.parameters())
    for seed in range(2):  # momentum from before the masks
        _step(network, optimizer, seed)
    keep_masks(optimizer, _masked(network=network))
    for seed in range(3):
        _step(network, optimizer, seed)
        _assert_zeros_exact(network)


def test_accumulation_autocast_clipping_and_a_scaler_keep_the_zeros() -> None:
    network = _masked()
    optimizer = AdamW(network.parameters(), lr=0.01)
    keep_masks([optimizer], network)
    scaler = torch.amp.GradScaler("cpu")
    for seed in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images, labels = _batch(seed)
            loss = functional.cross_entropy(network(images).float(), labels) / 2
        scaler.scale(loss).backward()
        if seed % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        _assert_zeros_exact(network)


def test_masks_that_change_between_steps_are_followed() -> None:
    network = _masked()
    optimizer = SGD(network.parameters(), lr=0.1)
    keep_masks(optimizer, network)
    _step(network, optimizer)
    with torch.no_grad():
        set_mask(network, FC1, ~network.get_buffer(f"{FC1}_mask"))
        network.get_parameter(FC1)[network.get_buffer(f"{FC1}_mask")] = 0.1
    _step(network, optimizer)
    _assert_zeros_exact(network)


def test_a_removed_handle_no_longer_acts_and_attaching_enforces_at_once() -> None:
    network = _masked()
    with torch.no_grad():
        network.get_parameter(FC1).fill_(1.0)
    optimizers = [SGD([network.get_parameter(name)], lr=0.1) for name in NAMES]
    handle = keep_masks(optimizers, network)
    _assert_zeros_exact(network)
    _step(network, optimizers[1])
    handle.remove()
    _assert_zeros_exact(network)
    _step(network, optimizers[0])
    assert bool((network.get_parameter(QKV)[~network.get_buffer(f"{QKV}_mask")] != 0).any())


def test_a_compiled_network_keeps_the_zeros_and_is_not_compiled_again() -> None:
    network = _masked()
    compiled = torch.compile(network, backend="eager")
    optimizer = AdamW(network.parameters(), lr=0.01)
    keep_masks(optimizer, network)
    torch._dynamo.utils.counters.clear()
    for seed in range(3):
        _step(compiled, optimizer, seed)
        set_mask(network, FC1, network.get_buffer(f"{FC1}_mask").clone())
        _assert_zeros_exact(network)
        _assert_zeros_exact(compiled, [f"_orig_mod.{name}" for name in NAMES])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1
    network.eval(), compiled(_batch(0)[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# ---------------------------------------------------------------- copies


def test_a_state_dict_carries_masks_and_weights(tmp_path: Path) -> None:
    network, other = _masked(), _network()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_mask"):
        other.load_state_dict(state)
    register_masks(other, NAMES)
    other.load_state_dict(state)
    _assert_zeros_exact(other)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


def test_copies_have_masks_and_a_history_of_their_own() -> None:
    network = _masked()
    twin = copy.deepcopy(network)
    _assert_zeros_exact(twin)
    remove_masks(twin, [FC1])
    set_mask(twin, QKV, torch.ones_like(twin.get_buffer(f"{QKV}_mask")))
    _assert_zeros_exact(network)
    assert history_of(network) == [{"mask": list(NAMES)}]
    optimizer = SGD(network.parameters(), lr=0.1)
    keep_masks(optimizer, network)
    _step(network, optimizer)
    _assert_zeros_exact(network)


def test_averaged_weights_are_exact_once_enforced() -> None:
    network = _masked()
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = SGD(network.parameters(), lr=0.1)
    keep_masks(optimizer, network)
    for seed in range(2):
        _step(network, optimizer, seed)
        average.update_parameters(network)
    _assert_zeros_exact(average, [f"module.{name}" for name in NAMES])


def test_half_precision_keeps_masks_bool() -> None:
    network = _masked().to(torch.bfloat16)
    assert network.get_buffer(f"{FC1}_mask").dtype == torch.bool
    enforce_masks(network)
    assert masked_share(network) == 0.5


# ---------------------------------------------------------------- quantization


def _quantized() -> tuple[Any, Tensor]:
    images = _batch(0, size=8)[0].clamp(-1, 1)
    return quantize(
        _masked(), [images], method="searched", search={"rows": 32}, preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3}
    ), images


def _assert_integer_zeros(quantized: Any) -> None:
    program = quantized.to_program()
    operations = {operation.name: operation for operation in program.operations}
    for name, (_, mask) in masked_parameters(quantized.network).items():
        weight_q = torch.from_numpy(program.tensors[operations[name.removesuffix(".weight")].tensors["weight"]].copy())
        assert not weight_q[~mask].any()
        assert weight_q[mask].any()


def test_masked_weights_are_zero_in_the_integer_network_and_stay_so_in_training() -> None:
    quantized, images = _quantized()
    assert history_of(quantized)[0] == {"mask": list(NAMES)}
    assert [list(entry) for entry in history_of(quantized)] == [["mask"], ["quantize"]]
    _assert_integer_zeros(quantized)
    optimizer = AdamW(quantized.parameters(), lr=0.01)
    keep_masks(optimizer, quantized)
    before = quantized.eval().integer_logits(quantized.pixels(images))
    for _ in range(2):
        functional.cross_entropy(quantized.train()(images), torch.zeros(8, dtype=torch.int64)).backward()
        optimizer.step()
        _assert_zeros_exact(quantized, [f"network.{name}" for name in NAMES])
        _assert_integer_zeros(quantized.eval())
    assert not torch.equal(quantized.integer_logits(quantized.pixels(images)), before)
    quantized(images)


def test_the_integer_network_follows_a_mask() -> None:
    quantized, images = _quantized()
    pixels = quantized.pixels(images)
    before = quantized.eval().integer_logits(pixels)
    set_mask(quantized, f"network.{FC1}", torch.zeros_like(quantized.network.get_buffer(f"{FC1}_mask")))
    assert not torch.equal(quantized.integer_logits(pixels), before)


def test_a_wrapper_without_a_history_of_its_own_is_refused() -> None:
    quantized, _ = _quantized()
    for act in (register_masks, remove_masks):
        _unchanged(
            quantized,
            lambda act=act: act(quantized, [f"network.{FC1}"]),
            r"QuantizedNetwork wraps a network and keeps no history of its own; change the masks of its .network",
        )


# ---------------------------------------------------------------- for a while


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_a_temporary_mask_leaves_no_trace(seed: int, depth: int) -> None:
    network = nn.Linear(6, 4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.weight[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    bits = network.weight.detach().clone().view(torch.int32)

    def nest(levels: int, kept: Tensor) -> None:
        if not levels:
            return
        mask = torch.rand(4, 6, generator=generator) < 0.6
        outside = network.weight.detach().clone().view(torch.int32)
        with temporary_mask(network, "weight", mask):
            now = kept & mask
            assert not network.weight.detach()[~now].view(torch.int32).any()
            assert torch.equal(network.weight.detach().view(torch.int32)[now], bits[now])
            mask.fill_(False)  # the caller's own
            nest(levels - 1, now)
        assert torch.equal(network.weight.detach().view(torch.int32), outside)

    nest(depth, torch.ones(4, 6, dtype=torch.bool))
    assert torch.equal(network.weight.detach().view(torch.int32), bits)
    assert masked_parameters(network) == {}


def test_a_temporary_mask_ends_with_an_exception_too() -> None:
    network = _masked()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    none = torch.zeros_like(network.get_buffer(f"{FC1}_mask"))

    def fail() -> None:
        with temporary_mask(network, FC1, none):
            assert not network.get_parameter(FC1).any()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="fc9: VisionTransformer has no parameter of that name"):
        temporary_mask(network, "fc9", none).__enter__()


def test_counts_for_reports() -> None:
    network = _network()
    total = count_nonzero(network)
    assert (masked_share(network), masked_shares(network)) == (0.0, {})
    _masked("2:4", network)
    sizes = [network.get_parameter(name).numel() for name in NAMES]
    assert masked_shares(network) == {QKV: 0.5, FC1: 0.5}
    assert masked_share(network) == 0.5
    assert count_nonzero(network) == total - sum(sizes) // 2
    set_mask(network, FC1, torch.ones_like(network.get_buffer(f"{FC1}_mask")))
    assert masked_share(network) == pytest.approx(0.5 * sizes[0] / sum(sizes))


# ---------------------------------------------------------------- several processes


def _train_on_rank(rank: int, store: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = _masked()
    wrapped = DistributedDataParallel(network)
    optimizer = AdamW(network.parameters(), lr=0.01)
    keep_masks(optimizer, network)
    for seed in range(3):
        _step(wrapped, optimizer, 10 * rank + seed)
        _assert_zeros_exact(network)
    torch.save(wrapped.module.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_stay_equal_and_keep_the_zeros(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_on_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

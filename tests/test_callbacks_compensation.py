"""Compensation inside a fit: with an audit, resumed to the same bits, on several ranks, and on a quantized network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import qat_cases
from support.callback_cases import Plain, data, greedy, loader, make_trainer, search_of, vit
from support.prime_cases import SHAPE, network_of
from support.rank_cases import on_ranks
from torch import Tensor, distributed

from swincompress_pl.callbacks import AdaptiveIterativePruning, PrimeSVT
from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.quant import QuantizedNetwork
from swincompress_pl.registry import adapter_for

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:PrimeSVT. no candidate keeps both"),
    pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out"),
    pytest.mark.filterwarnings("ignore:.*cannot resolve a tolerance"),
]


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ("mlp", "head_dim"), "criterion": "second_order", "ranking": "global", "audit": 0.4},
        {"kinds": ("heads", "mlp"), "shrink": "end", "max_rounds": 2},
        {"granularity": "weight", "criterion": "second_order"},
    ],
    ids=str,
)
def test_a_resumed_fit_goes_on_to_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"tolerance": 60.0, "round_to": 2, "compensation": "ridge", **options}
    whole, save, module = greedy(**options), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), Plain()
    make_trainer(tmp_path, 3, whole, save).fit(module, loader(), loader())
    state = whole.search_state
    assert state is not None
    assert any(step.accepted for step in state.steps)
    resumed, second = greedy(**options), Plain()
    make_trainer(tmp_path, 3, resumed).fit(
        second, loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    assert search_of(resumed) == search_of(whole)
    for key, value in module.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_primesvt_compensates_in_a_fit(tmp_path: Path) -> None:
    images = torch.randn(24, *SHAPE[1:])
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, torch.randint(0, 3, (24,))), batch_size=8
    )
    prune = PrimeSVT(tolerance=90.0, min_memory_saving=0.05, compensation="ridge", criterion="second_order", round_to=2)
    make_trainer(tmp_path, 1, prune).fit(Plain(network_of), batches, batches)
    assert prune.result is not None
    assert prune.result.saving > 0.05
    assert any(block.name == "embed" for block in prune.result.blocks)


def test_ranks_solve_with_the_images_of_all(tmp_path: Path) -> None:
    images = data(32).tensors[0]

    def solved(rank: int, ranks: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = vit().eval()
        groups = [g for g in adapter_for(network).groups(network) if g.kind in ("mlp", "head_dim")]
        if ranks > 1:
            distributed.init_process_group("gloo", rank=rank, world_size=ranks)
        try:
            compensator = Compensator([images[rank::ranks]])
            compensator.begin_round(network, groups)
            moved = [compensator.sensitivity(network, group) for group in groups]
            for group in groups:
                compensator.settle(network, compensator.lost_columns(group, range(group.units // 2)))
            return {**network.state_dict(), "sensitivities": torch.tensor(moved)}
        finally:
            if ranks > 1:
                distributed.destroy_process_group()

    first, second = on_ranks(tmp_path, 2, lambda rank: solved(rank, 2))
    alone = solved(0, 1)
    for key, value in first.items():
        assert torch.equal(second[key], value), key
        if "qkv" not in key and "proj" not in key:  # axes may point either way
            torch.testing.assert_close(alone[key], value, atol=1e-4, rtol=1e-3)


def test_ranks_sort_spiking_heads_alike(tmp_path: Path) -> None:
    images = torch.randn(16, *SHAPE[1:], generator=torch.Generator().manual_seed(0))

    def ordered(rank: int, ranks: int) -> dict[str, Tensor]:
        network = network_of().eval()
        groups = [group for group in adapter_for(network).groups(network) if group.kind in ("qk", "v", "mlp")]
        if ranks > 1:
            distributed.init_process_group("gloo", rank=rank, world_size=ranks)
        try:
            compensator = Compensator([images[rank::ranks]])
            compensator.begin_round(network, groups)
            errors = {g.name: e for g in groups if (e := compensator.removal_errors(g)) is not None}
            return {**network.state_dict(), **errors}
        finally:
            if ranks > 1:
                distributed.destroy_process_group()

    first, second = on_ranks(tmp_path, 2, lambda rank: ordered(rank, 2))
    alone = ordered(0, 1)
    assert any(key.endswith(".qk") for key in first)
    for key, value in first.items():
        assert torch.equal(second[key], value), key
        torch.testing.assert_close(alone[key], value, atol=1e-6, rtol=1e-6)


def test_a_quantized_network_is_compensated_in_its_float_weights(tmp_path: Path) -> None:
    weights = {}
    for method in ("none", "ridge"):
        prune = AdaptiveIterativePruning(
            tolerance=100.0, step=0.25, kinds=("mlp",), compensation=method, start_epoch=1, round_to=2,  # type: ignore[arg-type]
            model_attribute="backbone",
        )  # fmt: skip
        module = qat_cases.Plain()
        qat_cases.fit(module, tmp_path, 2, qat_cases.qat(start_epoch=0), prune)
        assert prune.search_state is not None
        assert all(step.accepted for step in prune.search_state.steps)
        assert isinstance(module.backbone, QuantizedNetwork)
        weights[method] = module.backbone.network.get_parameter("blocks.0.mlp.fc2.weight").detach()
    assert weights["ridge"].shape == weights["none"].shape
    assert not torch.allclose(weights["ridge"], weights["none"], atol=1e-3)

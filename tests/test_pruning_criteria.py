"""Saliency by each criterion against its formula, gradients that leave nothing behind, and bad input that is named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.pruning.criteria import (
    CRITERIA,
    Gradients,
    collect_gradients,
    estimates_loss,
    lowest_units,
    needs_gradients,
    saliency,
    unit_scores,
    weight_scores,
)
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.quant import quantize
from swincompress_pl.registry import adapter_for

QKV, PROJ = "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"


def _network(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**{**options, **kwargs})


def _batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 16, 16, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def _group(network: nn.Module, kind: str) -> Group:
    return next(g for g in adapter_for(network).groups(network) if g.kind == kind)


def _by_hand(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    found = []
    for images, labels in batches:
        network.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        found.append({name: p.grad.clone() for name, p in network.named_parameters()})
    network.zero_grad()
    return found


# ---------------------------------------------------------------- gradients


def test_gradients_are_the_means_over_the_first_batches() -> None:
    network, batches = _network().eval(), _batches(4)
    expected = _by_hand(network, batches[:3])
    found = collect_gradients(network, iter(batches), max_batches=3)
    assert found.batches == 3
    assert found.absolute.keys() == found.squared.keys() == dict(network.named_parameters()).keys()
    for name in found.absolute:
        torch.testing.assert_close(found.absolute[name], sum(g[name].abs() for g in expected) / 3)
        torch.testing.assert_close(found.squared[name], sum(g[name].square() for g in expected) / 3)


def test_only_as_many_batches_are_drawn_as_are_used() -> None:
    drawn = iter(_batches(4))
    collect_gradients(_network(), drawn, max_batches=3)
    assert len(list(drawn)) == 1


def test_the_network_is_left_as_it_was() -> None:
    network = _network(proj_drop_rate=0.5)
    network.train()
    network.blocks[0].mlp.eval()
    network.blocks[0].attn.requires_grad_(False)
    network.head.weight.grad = torch.ones_like(network.head.weight)
    modes = [m.training for m in network.modules()]
    trainable = [p.requires_grad for p in network.parameters()]
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    found = collect_gradients(network, _batches())
    again = collect_gradients(network, _batches())
    with pytest.raises(ValueError, match="no batches"):
        collect_gradients(network, [])

    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == trainable
    assert [name for name, p in network.named_parameters() if p.grad is not None] == ["head.weight"]
    assert bool((network.head.weight.grad == 1).all())
    assert all(torch.equal(network.state_dict()[name], weights[name]) for name in weights)
    assert bool(found.squared[QKV].any()), "frozen parameters have statistics too"
    assert all(torch.equal(found.absolute[name], again.absolute[name]) for name in found.absolute), "no dropout"


def test_an_exception_leaves_the_network_as_it_was_too() -> None:
    network = _network()
    network.train()
    network.head.requires_grad_(False)

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield from _batches(1)
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        collect_gradients(network, broken())
    assert all(m.training for m in network.modules())
    assert [p.requires_grad for p in network.head.parameters()] == [False, False]


def test_no_global_random_generator_moves() -> None:
    images, labels = (torch.cat(parts) for parts in zip(*_batches(), strict=True))

    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            random.random(), np.random.rand()
            return super().__getitem__(index)

    loader = DataLoader(Noisy(images, labels), batch_size=4, shuffle=True)
    network = _network()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    collect_gradients(network, loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[union-attr]


def test_it_works_inside_a_validation_loop() -> None:
    network = _network()
    expected = collect_gradients(network, _batches())
    for surroundings in (torch.no_grad, torch.inference_mode):
        with surroundings():
            found = collect_gradients(network, _batches())
        torch.testing.assert_close(found.squared[QKV], expected.squared[QKV])
        assert not found.squared[QKV].is_inference()


def test_own_loss_and_prediction() -> None:
    network, seen = _network().eval(), []

    def predict(images: Tensor) -> Tensor:
        seen.append(len(images))
        return network.forward_features(images)

    found = collect_gradients(network, _batches(2), predict=predict, loss=lambda outputs, _: outputs.square().mean())
    assert seen == [4, 4]
    assert not found.squared["head.weight"].any()
    assert found.squared[QKV].any()


def test_a_shared_parameter_has_its_statistics_under_both_names() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    found = collect_gradients(network, [(torch.ones(2, 4), torch.tensor([0, 1]))])
    assert found.absolute["2.weight"] is found.absolute["0.weight"]
    assert saliency(network, "2.weight", "taylor", found).shape == (4, 4)


def test_bad_input_for_gradients_is_named() -> None:
    network = _network()
    with pytest.raises(ValueError, match="max_batches=0: it has to be 1 or more"):
        collect_gradients(network, _batches(), max_batches=0)
    with pytest.raises(ValueError, match=r"a batch is a Tensor; a pair \(inputs, targets\) is expected"):
        collect_gradients(network, [torch.zeros(2, 3, 16, 16)])
    with pytest.raises(ValueError, match="a batch is a list of length 3; a pair"):
        collect_gradients(network, [[1, 2, 3]])
    with pytest.raises(ValueError, match="the loss is not finite; look for NaN weights or NaN images"):
        collect_gradients(network, [(torch.full((2, 3, 16, 16), float("nan")), torch.tensor([0, 1]))])
    # a finite loss whose gradient is not: the root at 0
    steep = nn.Sequential(nn.Flatten(), nn.Linear(768, 3, bias=False))
    nn.init.zeros_(steep[1].weight)
    with pytest.raises(ValueError, match=r"1\.weight: its gradient is not finite; look for NaN weights"):
        collect_gradients(steep, _batches(1), loss=lambda outputs, _: outputs.abs().sqrt().sum())


def test_a_network_without_a_gradient_is_refused_with_the_remedy() -> None:
    network, images = _network(), [images.clamp(-1, 1) for images, _ in _batches(1)]
    quantized = quantize(network, images, method="max", preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3})
    batch = [(images[0], torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ValueError, match=r"the loss carries no gradient; .*\(collect from its .network\)"):
        collect_gradients(quantized, batch)
    assert collect_gradients(quantized.network, batch).squared[QKV].any()
    assert collect_gradients(quantized, batch, predict=quantized.fake_quantized).squared[f"network.{QKV}"].any()


def _collect_on_rank(rank: int, store: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = _network()
    batches = _batches(3)
    found = collect_gradients(network, batches[:2] if rank == 0 else batches[2:])
    torch.save((found.batches, dict(found.absolute), dict(found.squared)), f"{folder}/{rank}.pt")
    bad = [(torch.full((2, 3, 16, 16), float("nan")), torch.tensor([0, 1]))]
    for mine, message in ((batches if rank == 0 else bad, "loss is not finite"), ([], "no batches")):
        with pytest.raises(ValueError, match=message):
            collect_gradients(network, mine)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_get_the_mean_over_all_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_collect_on_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    expected = collect_gradients(_network(), _batches(3))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[0] == second[0] == 3
    for name in expected.absolute:
        assert torch.equal(first[1][name], second[1][name])
        assert torch.equal(first[2][name], second[2][name])
        torch.testing.assert_close(first[1][name], expected.absolute[name])
        torch.testing.assert_close(first[2][name], expected.squared[name])


# ---------------------------------------------------------------- saliency


def test_criteria_are_their_formulas() -> None:
    network = _network()
    gradients = collect_gradients(network, _batches())
    weight = network.get_parameter(QKV).detach().double()
    absolute, squared = gradients.absolute[QKV], gradients.squared[QKV]
    expected = {
        "l1": weight.abs(),
        "l2": weight**2,
        "magnitude": weight**2,
        "taylor": weight.abs() * absolute,
        "fisher": weight**2 * squared / 2,
        "layer_fisher": weight**2 * squared.double().mean() / 2,
    }
    assert expected.keys() == CRITERIA.keys()
    for criterion, values in expected.items():
        found = saliency(network, QKV, criterion, gradients)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, values, rtol=1e-12, atol=0)


def test_fisher_is_the_loss_that_a_quadratic_gains() -> None:
    # loss = 1/2 sum(h (w - w0)^2) near its minimum, with gradients of variance h as the empirical Fisher has.
    weight, h = torch.tensor([[0.5, -2.0]]), torch.tensor([[4.0, 0.25]])
    network = nn.Linear(2, 1, bias=False)
    network.weight.data = weight.clone()
    gradients = Gradients(absolute={"weight": h.sqrt()}, squared={"weight": h}, batches=1)
    gained = torch.stack([0.5 * (h * (torch.tensor(w) - weight).square()).sum() for w in ([0.0, -2.0], [0.5, 0.0])])
    torch.testing.assert_close(saliency(network, "weight", "fisher", gradients)[0].float(), gained)


def test_which_criteria_need_gradients() -> None:
    def mine(name: str, weight: Tensor, gradients: Gradients | None) -> Tensor:
        return weight.abs()

    assert {c for c in CRITERIA if needs_gradients(c)} == {"taylor", "fisher", "layer_fisher"}
    assert not needs_gradients(mine)
    assert {c for c in CRITERIA if estimates_loss(c)} == {"fisher", "layer_fisher"}
    assert not estimates_loss(mine)
    mine.needs_gradients = True  # type: ignore[attr-defined]
    assert needs_gradients(mine)
    with pytest.raises(ValueError, match="criterion 'tailor' is unknown; there are magnitude, l1, l2, taylor, fisher"):
        needs_gradients("tailor")


def test_missing_and_stale_gradients_are_named() -> None:
    network = _network()
    gradients = collect_gradients(network, _batches(1))
    other = _network(embed_dim=8)
    with pytest.raises(ValueError, match=f"{QKV}: criterion 'taylor' needs gradients; pass those of collect_gradients"):
        saliency(network, QKV, "taylor")
    with pytest.raises(ValueError, match="criterion 'fisher' needs gradients"):
        CRITERIA["fisher"](QKV, torch.zeros(1), None)
    with pytest.raises(
        ValueError, match=rf"{QKV}: the gradients for criterion 'fisher' have shape \(48, 16\), the parameter \(24, 8\)"
    ):
        saliency(other, QKV, "fisher", gradients)


def test_a_users_function_is_checked_and_named() -> None:
    network = _network()

    def mine(name: str, weight: Tensor, gradients: Gradients | None) -> Tensor:
        return weight + 1 if name == QKV else weight.flatten()

    with pytest.raises(ValueError, match=rf"{PROJ}: criterion 'mine' gave shape \(256,\), \(16, 16\) is expected"):
        saliency(network, PROJ, mine)
    with pytest.raises(ValueError, match=rf"{QKV}: criterion '<lambda>' gave -[\d.e+-]+; a saliency is 0 or more"):
        saliency(network, QKV, lambda _name, weight, _gradients: weight)
    assert torch.equal(saliency(network, QKV, mine).float(), network.get_parameter(QKV).detach() + 1)
    with pytest.raises(ValueError, match=r"blocks\.7\.weight: VisionTransformer has no parameter of that name"):
        saliency(network, "blocks.7.weight", "l1")
    nn.init.constant_(network.blocks[0].attn.proj.weight, float("nan"))
    with pytest.raises(ValueError, match=f"{PROJ}: criterion 'magnitude' gave a saliency that is not finite"):
        unit_scores(network, _group(network, "heads"))


# ---------------------------------------------------------------- scores


def _owned(network: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """The sums over what each of the two heads owns."""
    parts = [values[QKV].view(3, 2, -1), values["blocks.0.attn.qkv.bias"].view(3, 2, -1)]
    return sum(p.sum((0, 2)) for p in parts) + values[PROJ].view(16, 2, 8).sum((0, 2))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_units_score_is_the_sum_over_all_that_it_owns(criterion: str) -> None:
    network = _network()
    gradients = collect_gradients(network, _batches())
    values = {name: saliency(network, name, criterion, gradients) for name, _ in network.named_parameters()}
    expected = _owned(network, values)
    if criterion in ("magnitude", "l2"):
        expected = expected.sqrt()
    group = _group(network, "heads")
    raw = unit_scores(network, group, criterion, gradients, normalize=False)
    assert (raw.dtype, raw.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(raw, expected.float())
    normalized = unit_scores(network, group, criterion, gradients, normalize=True)
    torch.testing.assert_close(normalized, (expected / expected.mean()).float())
    default = unit_scores(network, group, criterion, gradients)
    assert torch.equal(default, raw if criterion in ("taylor", "fisher", "layer_fisher") else normalized)


def test_a_users_function_scores_units_by_its_sum() -> None:
    network = _network()
    group = _group(network, "heads")
    ones = unit_scores(network, group, lambda _n, weight, _g: torch.ones_like(weight), normalize=False)
    assert ones.tolist() == [3 * 8 * 16 + 3 * 8 + 16 * 8] * 2
    zeros = unit_scores(network, group, lambda _n, weight, _g: torch.zeros_like(weight))
    assert zeros.tolist() == [0.0, 0.0]


def test_weights_are_compared_to_what_is_left_of_their_layer() -> None:
    network = nn.Linear(4, 1, bias=False)
    network.weight.data = torch.tensor([[3.0, -1.0, 0.0, 0.0]])
    assert weight_scores(network, "weight", "l1").tolist() == [[1.5, 0.5, 0.0, 0.0]]
    torch.testing.assert_close(weight_scores(network, "weight"), torch.tensor([[1.8, 0.2, 0.0, 0.0]]))
    assert weight_scores(network, "weight", normalize=False).tolist() == [[9.0, 1.0, 0.0, 0.0]]
    gradients = Gradients(absolute={"weight": torch.ones(1, 4)}, squared={"weight": torch.ones(1, 4)}, batches=1)
    assert weight_scores(network, "weight", "taylor", gradients).tolist() == [[3.0, 1.0, 0.0, 0.0]]
    network.weight.data.zero_()
    assert weight_scores(network, "weight").tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_of_equal_units_the_lower_index_goes_first() -> None:
    scores = torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0])
    assert lowest_units(scores, 2) == (1, 3)
    assert lowest_units(scores, 0) == ()

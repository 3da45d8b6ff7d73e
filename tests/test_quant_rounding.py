"""Rounding with regard to other weights: never worse than nearest in its own metric, and on the grid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quant_cases import NETWORKS, PREPROCESSING, network_and_images
from torch import Tensor, nn

from swincompress_pl.pruning.space import prunable_weights
from swincompress_pl.pruning.structure.weight_masks import register_masks, set_mask
from swincompress_pl.quant import WeightedNode, quantize
from swincompress_pl.quant.graph import Passthrough, Run
from swincompress_pl.quant.quantizers import quantize_weight
from swincompress_pl.quant.rounding import _sensitivities, second_order_rounding
from swincompress_pl.registry import adapter_for


def problem(rows: int, columns: int, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, steps and a gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    gram = x.T @ x + torch.eye(columns, dtype=torch.float64) * 1e-6
    return weight, weight.abs().amax(1) / 7, gram


def cost(difference: Tensor, gram: Tensor) -> Tensor:
    return ((difference @ gram) * difference).sum()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(8, 40), columns=st.integers(1, 12), outputs=st.integers(1, 6), bits=st.integers(3, 8),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_second_order_rounding_stays_on_the_grid(rows: int, columns: int, outputs: int, bits: int, seed: int) -> None:
    weight, _, gram = problem(rows, columns, outputs, seed)
    q_max = 2 ** (bits - 1) - 1
    step = weight.abs().amax(1) / q_max
    rounded = second_order_rounding(weight, step, gram, q_max)
    codes = rounded / step[:, None]
    assert torch.equal(codes.round().abs().clamp(max=q_max), codes.round().abs())
    torch.testing.assert_close(codes, codes.round(), atol=1e-9, rtol=0)


def test_it_costs_less_than_nearest_where_inputs_are_correlated() -> None:
    better = 0
    for seed in range(20):
        weight, step, gram = problem(64, 16, 8, seed)
        nearest = quantize_weight(weight, step, 7) * step[:, None]
        rounded = second_order_rounding(weight, step, gram, 7)
        better += bool(cost(rounded - weight, gram) < 0.9 * cost(nearest - weight, gram))
    assert better == 20


def test_independent_inputs_leave_nearest() -> None:
    weight, step, _ = problem(64, 16, 8, 0)
    rounded = second_order_rounding(weight, step, torch.eye(16, dtype=torch.float64), 7)
    assert torch.equal(rounded, quantize_weight(weight, step, 7) * step[:, None])


def test_groups_are_rounded_each_by_itself() -> None:
    problems = [problem(64, 16, 8, seed) for seed in range(3)]
    weight, step, gram = (torch.stack(parts) for parts in zip(*problems, strict=True))
    together = second_order_rounding(weight, step, gram, 7)
    for each, rounded in zip(problems, together, strict=True):
        torch.testing.assert_close(rounded, second_order_rounding(*each, 7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_cover_the_graph_and_each_has_weights(name: str) -> None:
    network, _, _ = network_and_images(name)
    graph = adapter_for(network).graph(network, PREPROCESSING)
    blocks = graph.blocks()
    assert [number for block in blocks for number in block] == list(range(len(graph.nodes)))
    assert all(any(isinstance(graph.nodes[n], WeightedNode) for n in block) for block in blocks)
    assert len(blocks) > 4


def distance(quantized: nn.Module, images: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return float((quantized(images) - expected).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin", "vit registers"])
def test_rounding_block_by_block_comes_closer_to_float(name: str) -> None:
    network, _, images = network_and_images(name)
    with torch.no_grad():
        expected = network(images)
    found = {}
    for rounding in ("nearest", "second_order", "learned"):
        options: dict[str, Any] = {"rows": 128, "rounding": rounding}
        if rounding == "learned":
            options["learning"] = {"iterations": 60, "batch_images": 6}
        quantized = quantize(
            copy.deepcopy(network), [images[:6], images[6:]], bits="W4A8", preprocessing=PREPROCESSING, search=options
        )
        found[rounding] = distance(quantized.eval(), images, expected)
    if name == "swin":  # the others' few random tokens are all but independent: there is nothing to compensate
        assert found["second_order"] < found["nearest"]
    assert found["learned"] < found["nearest"]


def test_learning_that_makes_it_worse_is_taken_back() -> None:
    network, pixels, images = network_and_images("swin")
    logits = []
    for options in ({"rounding": "second_order"}, {"rounding": "learned", "learning": {"iterations": 3, "lr": 1e3}}):
        quantized = quantize(
            copy.deepcopy(network), [images], bits="W4A8", preprocessing=PREPROCESSING, search={"rows": 64, **options}
        )
        logits.append(quantized.eval().integer_logits(pixels))
    assert torch.equal(*logits)


def test_what_was_rounded_is_found_again_by_nearest() -> None:
    network, pixels, images = network_and_images("vit registers")  # has layer scale
    options = {"rows": 128, "rounding": "second_order"}
    quantized = quantize(network, [images], bits="W4A8", preprocessing=PREPROCESSING, search=options).eval()
    for node in quantized.graph.weighted_nodes:
        scale = quantized.scales.weight_quantizer(node)
        spec = quantized.graph.spec_of(node.inputs[0])
        equalization = None if spec is None else quantized.scales.equalizations.get(spec.name)
        codes = node.folded_weight(network, equalization).flatten(1) / scale.step[:, None]
        live = scale.step > 0
        torch.testing.assert_close(codes[live], codes[live].round(), atol=1e-3, rtol=0)
    assert quantized.integer_logits(pixels).shape == (len(pixels), 7)


def test_gradients_and_flags_are_as_before() -> None:
    network, _, images = network_and_images("vit")
    frozen = network.blocks[0].mlp.fc1.weight  # type: ignore[index,union-attr]
    frozen.requires_grad_(False)  # type: ignore[union-attr,operator]
    options = {"rows": 64, "rounding": "learned", "learning": {"iterations": 2}}
    quantize(network, [images], preprocessing=PREPROCESSING, search=options)
    assert all(p.grad is None for p in network.parameters())
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["blocks.0.mlp.fc1.weight"]


@pytest.mark.parametrize("learning", [None, {"iterations": 3, "batch_images": 4, "lr": 0.5, "sensitive": True}])
@pytest.mark.parametrize("name", ["vit registers", "swin padded"])
def test_pruned_weights_stay_zero(name: str, learning: dict[str, Any] | None) -> None:
    network, _, images = network_and_images(name)
    names = prunable_weights(network)
    register_masks(network, names)
    generator = torch.Generator().manual_seed(0)
    kept = {each: torch.rand(network.get_parameter(each).shape, generator=generator) < 0.5 for each in names}
    for each, mask in kept.items():
        set_mask(network, each, mask)
    options = {"rows": 64, "rounding": "second_order"}
    if learning is not None:
        options |= {"rounding": "learned", "learning": learning}
    before = copy.deepcopy(network.state_dict())
    quantized = quantize(network, [images], bits="W4A8", preprocessing=PREPROCESSING, search=options).eval()
    for each, mask in kept.items():
        weight = network.get_parameter(each)
        assert not weight[~mask].any()
        assert not torch.equal(weight, before[each])
    assert quantized.integer_logits(torch.zeros(1, *images.shape[2:], 3, dtype=torch.uint8)).any()


def test_a_class_tokens_row_counts_most_in_the_last_block() -> None:
    network, _, images = network_and_images("vit")
    graph = adapter_for(network).graph(network, PREPROCESSING)
    weights = _sensitivities(Run(graph, network.requires_grad_(False), Passthrough()), images.split(5), 0)
    assert len(weights) == len(graph.blocks())
    for squares in weights.values():
        assert squares.shape[0] == 1
        torch.testing.assert_close(squares.mean(), torch.tensor(1.0))
    tokens = next(
        w for w in reversed(weights.values()) if w.ndim == 3 and w.shape[1] > 1
    )  # the stream behind the last block
    assert not tokens[:, 1:].any()
    assert tokens[:, 0].all()

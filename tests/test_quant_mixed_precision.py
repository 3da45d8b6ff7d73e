"""Mixed precision: the losses predict the true divergence, and the solver's choice is brute force's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.diagnosis_cases import NETWORKS, PREPROCESSING, network_and_images
from torch import Tensor, nn

from swincompress_pl.quant import (
    Bits,
    Sensitivity,
    allocate,
    float_logits,
    measure_sensitivity,
    mixed_precision,
    quantize,
)
from swincompress_pl.quant.diagnosis.costs import divergence
from swincompress_pl.quant.graph import Passthrough, Run, WeightedNode
from swincompress_pl.quant.sensitivity import LayerSensitivity
from swincompress_pl.registry import adapter_for


def measured(network: nn.Module, images: Tensor, **kwargs: Any) -> Sensitivity:
    return measure_sensitivity(network, [images], preprocessing=PREPROCESSING, rows=256, **kwargs)


def table_of(losses: list[list[float]], weights: list[int], **kwargs: Any) -> Sensitivity:
    """Layers l0, l1, ...; the losses of each are at 4, 6, 8 bits in this order (or as many of them)."""
    layers = [
        LayerSensitivity(name=f"l{i}", weights=n, macs=3 * n, loss=dict(zip((4, 6, 8), loss, strict=False)))
        for i, (loss, n) in enumerate(zip(losses, weights, strict=True))
    ]
    return Sensitivity(layers=tuple(layers), **kwargs)


def brute_force(table: Sensitivity, sizes: dict[str, dict[int, int]], budget: int) -> float | None:
    best = None
    for widths in itertools.product(*(layer.loss for layer in table.layers)):
        chosen = list(zip(table.layers, widths, strict=True))
        loss = sum(layer.loss[width] for layer, width in chosen)
        if sum(sizes[layer.name][width] for layer, width in chosen) <= budget and (best is None or loss < best):
            best = loss
    return best


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_predict_the_true_divergence_and_add_up(name: str) -> None:
    network, images = network_and_images(name)
    table = measured(network, images, widths=(3, 4, 6), first_and_last=None)
    graph = adapter_for(network).graph(network, PREPROCESSING)
    expected = float_logits(graph, network, images)

    class Rounded(Passthrough):
        """Only some layers, at one width."""

        def __init__(self, names: set[str], bits: int) -> None:
            quantized = quantize(
                network, [images], bits=Bits(weights=bits, first_and_last=bits), preprocessing=PREPROCESSING,
                search={"rows": 256},
            )  # fmt: skip
            self.scales, self.names = quantized.scales, names

        @property
        def equalizations(self) -> dict[str, Tensor]:
            return self.scales.equalizations

        def weight(self, node: WeightedNode, weight: Tensor) -> Tensor:
            return self.scales.weight(node, weight) if node.name in self.names else weight

    def true(names: set[str], bits: int) -> float:
        rounded.names = names
        with torch.no_grad():
            return float(divergence(expected, Run(graph, network, rounded)(images)).mean())

    predicted, found = [], []
    for bits in (3, 4, 6):
        rounded = Rounded(set(), bits)
        predicted += [layer.loss[bits] for layer in table.layers]
        found += [true({layer.name}, bits) for layer in table.layers]
        if bits > 3:  # beyond, the second order is not the whole story
            together = sum(layer.loss[bits] for layer in table.layers)
            assert 0.5 < true({layer.name for layer in table.layers}, bits) / together < 2
    ranks = torch.tensor([predicted, found]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.95
    ratios = torch.tensor(predicted) / torch.tensor(found)
    assert 0.5 < float(ratios.median()) < 2


def test_the_table_counts_weights_and_macs() -> None:
    network, images = network_and_images(count=8)
    modes = [module.training for module in network.modules()]
    table = measured(network, images, widths=(4, 8))
    layers = {layer.name: layer for layer in table.layers}
    assert [*layers][:: len(layers) - 1] == ["patch_embed.proj", "head"]
    assert layers["patch_embed.proj"].weights == 16 * 3 * 4 * 4
    assert layers["patch_embed.proj"].macs == 16 * 16 * 3 * 4 * 4  # 16 patches
    assert layers["blocks.0.attn.qkv"].macs == 17 * 16 * 48  # with the class token
    assert layers["head"].macs == layers["head"].weights == 16 * 7
    assert list(layers["head"].loss) == [8]  # fixed
    assert list(layers["blocks.1.mlp.fc1"].loss) == [4, 8]
    assert all(layer.loss[4] >= layer.loss[8] for layer in table.layers[1:-1])
    assert Sensitivity.from_dict(table.to_dict()) == table
    assert "| blocks.0.attn.qkv " in str(table)
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_a_quantized_network_is_measured_like_its_float_one() -> None:
    network, images = network_and_images(count=8)
    quantized = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    assert measured(quantized, images, widths=(4,)) == measured(network, images, widths=(4,))


@given(st.data())
@settings(max_examples=60)
def test_the_choice_is_that_of_brute_force_and_monotone(data: Any) -> None:
    layers = data.draw(st.integers(1, 4))
    counts = data.draw(st.lists(st.integers(1, 10**7), min_size=layers, max_size=layers))
    loss = st.lists(st.integers(0, 1000).map(lambda n: n / 997), min_size=1, max_size=3)
    table = table_of(data.draw(st.lists(loss, min_size=layers, max_size=layers)), counts)
    sizes = table.bit_operations() if data.draw(st.booleans()) else table.sizes_bytes()
    last = None
    for budget in sorted(data.draw(st.lists(st.integers(1, 2 * 10**8), min_size=1, max_size=4))):
        best = brute_force(table, sizes, budget)
        if best is None:
            with pytest.raises(ValueError, match="least size"):
                allocate(table, sizes, budget)
            continue
        bits = allocate(table, sizes, budget)
        used = table.bit_operations_of(bits) if sizes == table.bit_operations() else table.size_bytes_of(bits)
        assert used <= budget
        assert table.loss_of(bits) == pytest.approx(best, abs=1e-7)
        assert last is None or table.loss_of(bits) <= last + 1e-7
        last = table.loss_of(bits)


def test_a_hundred_layers_are_solved_and_never_above_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (10 ** (3 + 3 * torch.rand(100, generator=generator))).long().tolist()
    scale = (10 ** (-6 + 5 * torch.rand(100, generator=generator))).tolist()
    table = table_of([[s, s / 16, s / 256] for s in scale], sizes)
    budget = sum(sizes) * 5 // 8
    bits = allocate(table, table.sizes_bytes(), budget)
    assert 0.999 * budget < table.size_bytes_of(bits) <= budget


def test_room_for_everything_leaves_every_layer_at_the_widest() -> None:
    table = table_of([[0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0]], [8, 8, 8, 8], first_and_last=4)
    bits = allocate(table, table.sizes_bytes(), 4 + 8 + 8 + 4)
    assert bits == Bits(weights=8, first_and_last=4)
    assert allocate(table, table.sizes_bytes(), 4 + 8 + 4 + 4).layers == {"l2": 4}  # the dead one goes first


def test_free_outer_layers_are_named() -> None:
    table = table_of([[9.0, 8.0, 7.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [8, 8, 8], first_and_last=None)
    bits = allocate(table, table.sizes_bytes(), 8 + 8 + 4)
    assert (bits.weights, bits.first_and_last, bits.layers) == (8, 8, {"l2": 4})
    assert table.size_bytes_of(bits) == 20


@pytest.mark.parametrize("first_and_last", [8, None])
def test_mixed_precision_fills_bits_that_quantize_takes(first_and_last: int | None) -> None:
    network, images = network_and_images(count=16)
    kwargs: dict[str, Any] = {"preprocessing": PREPROCESSING, "first_and_last": first_and_last}
    bits = mixed_precision(network, [images], size_part=0.18, activations=6, **kwargs)
    assert bits.activations == 6
    assert set(bits.layers.values()) <= {4, 6}
    quantized = quantize(network, [images], bits=bits, method="max", preprocessing=PREPROCESSING)
    nodes = quantized.graph.weighted_nodes
    codes = [
        (quantized.scales.weight_quantizer(node).bits, node.folded_weight(network, None).numel()) for node in nodes
    ]
    values = sum(count for _, count in codes)
    assert 0.15 * 4 * values < sum((bits * count + 7) // 8 for bits, count in codes) <= 0.18 * 4 * values
    assert mixed_precision(network, [images], size_bytes=10**9, **kwargs).layers == {}
    least = sum(layer.macs for layer in measured(network, images, widths=(8,)).layers)
    assert mixed_precision(network, [images], bit_operations=7 * least, **kwargs).layers


def test_refusals_name_the_remedy() -> None:
    network, images = network_and_images(count=4)
    for budget in ({}, {"size_bytes": 100, "size_part": 0.5}, {"size_bytes": 0}, {"size_part": float("nan")}):
        with pytest.raises(ValueError, match="give one of size_bytes, size_part, bit_operations, above 0"):
            mixed_precision(network, [images], **budget)
    with pytest.raises(ValueError, match=r"least size of these widths is \d+ bytes, of \d+ in float32"):
        mixed_precision(network, [images], size_part=0.1, preprocessing=PREPROCESSING)
    for widths in ((), (4, 9), (True,)):
        with pytest.raises(ValueError, match="integers from 2 to 8"):
            measured(network, images, widths=widths)
    with pytest.raises(ValueError, match="calibration is empty"):
        measured(network, images[:0])
    with pytest.raises(ValueError, match="how the images are normalized"):
        measure_sensitivity(nn.Linear(2, 2), [images])


def test_bad_tables_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="l0: a loss of nan"):
        table_of([[float("nan")]], [1])
    with pytest.raises(ValueError, match="widths are 2 to 8"):
        LayerSensitivity(name="x", weights=1, macs=1, loss={9: 0.0})
    with pytest.raises(ValueError, match="each with a name of its own"):
        Sensitivity(layers=())
    table = table_of([[1.0, 0.0]], [8])
    with pytest.raises(ValueError, match="the size of l0 at 6 bits is None"):
        allocate(table, {"l0": {4: 4}}, 100)

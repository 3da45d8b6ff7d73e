"""Codes that stand for the value plus a constant: who may have one, who absorbs it, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quant_cases import PREPROCESSING, network_and_images
from torch import Tensor, nn

from swincompress_pl import accel, spec
from swincompress_pl.quant import QuantizedNetwork, quantize
from swincompress_pl.quant.lower import lower
from swincompress_pl.quant.search import best_centered_scale, best_equalization, best_value_scale, fake_quantize


def searched(name: str, **search: object) -> tuple[QuantizedNetwork, nn.Module, Tensor, Tensor]:
    network, pixels, images = network_and_images(name)
    with torch.no_grad():  # LayerNorm outputs and hidden values that do not lie around 0
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.bias.add_(1.0)
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, search={"rows": 64, **search}).eval()
    return quantized, network, pixels, images


@pytest.mark.parametrize("name", ["swin", "swin padded", "vit"])
def test_shifted_codes_are_absorbed_exactly(name: str) -> None:
    quantized, _, pixels, images = searched(name)
    shifted = [
        spec for spec in quantized.graph.quantizers.values() if spec.can_center and _shift(quantized, spec.name).any()
    ]
    assert {spec.name.rsplit(".", 1)[-1] for spec in shifted} >= {"fc1", "act", "norm2"}
    assert quantized.unsigned
    assert all(name.endswith(".act") for name in quantized.unsigned)
    program = quantized.to_program()
    expected = spec.run(program, pixels.numpy())
    assert (quantized.integer_logits(pixels).numpy() == expected).all()
    assert (accel.Engine(program, threads=1).run_integer(pixels.numpy()) == expected).all()
    simulated = quantized.fake_quantized(images).detach()
    assert float((simulated - quantized(images)).abs().max()) < 0.05 * float(simulated.abs().max())


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_shifting_brings_the_network_closer(name: str) -> None:
    errors = []
    for center in (False, True):
        quantized, network, _, images = searched(name, center=center)
        assert center == any(_shift(quantized, value).any() for value in quantized.graph.quantizers)
        errors.append(float((quantized(images) - network(images)).square().mean()))
    assert errors[1] < errors[0]


def test_rows_of_padding_must_mean_zero() -> None:
    padded, plain = (searched(name)[0] for name in ("swin padded", "swin"))
    assert not padded.graph.quantizers["layers.0.blocks.0.norm1"].can_center
    assert plain.graph.quantizers["layers.0.blocks.0.norm1"].can_center
    for graph in (padded.graph, plain.graph):
        assert graph.quantizers["layers.0.blocks.0.mlp.act"].can_center
        assert not any(
            spec.can_center for name, spec in graph.quantizers.items() if name.endswith(("qkv", "attention"))
        )
        assert not any(spec.can_center for spec in graph.quantizers.values() if not spec.searched)


def test_a_shift_that_nobody_absorbs_is_refused() -> None:
    quantized, network, _, _ = searched("vit")
    name = "blocks.0.attn.qkv"
    spec = replace(quantized.graph.quantizers[name], can_center=True)
    quantized.graph = replace(quantized.graph, quantizers={**quantized.graph.quantizers, name: spec})
    quantized.scales.activation_quantizer(spec).register_buffer("centering", torch.ones(1))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.attention: operation 'attention' cannot absorb"):
        lower(quantized.graph, network, quantized.scales, preprocessing=quantized.preprocessing)


def test_a_state_dict_says_which_codes_have_a_sign() -> None:
    quantized, network, pixels, _ = searched("vit")
    fresh = QuantizedNetwork(network, preprocessing=PREPROCESSING).eval()
    assert fresh.unsigned == ()
    nn.ModuleDict({"net": fresh}).load_state_dict(
        {f"net.{key}": value for key, value in quantized.state_dict().items()}
    )
    assert set(fresh.unsigned) == set(quantized.unsigned)
    assert torch.equal(fresh.integer_logits(pixels), quantized.integer_logits(pixels))


@settings(max_examples=30, deadline=None)
@given(low=st.floats(-3, 0), high=st.floats(4, 30), seed=st.integers(0, 100))
def test_a_range_to_one_side_gets_finer_steps(low: float, high: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = low + (high - low) * torch.rand(64, 32, generator=generator)
    weight = torch.ones(())
    scale, shift = best_centered_scale(values, weight, q_max=127, bounds=(float(values.min()), float(values.max())))
    symmetric = best_value_scale(values, weight, q_max=127, signed=True, magnitude=float(values.abs().max()))
    errors = [
        (fake_quantize(values + by, torch.tensor(step), 127) - by - values).square().mean()
        for step, by in ((scale, shift), (symmetric, 0.0))
    ]
    assert errors[0] < errors[1]


@settings(max_examples=20, deadline=None)
@given(constant=st.floats(-100, 100), width=st.sampled_from([0.0, 1e-30, 1e-6]))
def test_constant_values_get_no_tiny_steps(constant: float, width: float) -> None:
    values = torch.full((8, 4), constant) + width
    ends = float(values.min()), float(values.max())
    scale, shift = best_centered_scale(values, torch.ones(()), q_max=127, bounds=ends)
    assert scale > 0
    assert abs(shift) <= 127 * 8 * scale + 1e-30
    bounds = torch.full((4,), ends[0]), torch.full((4,), ends[1])
    ratios, shifts = best_equalization(values, torch.ones(2, 4), torch.ones(8, 2), bounds, center=True)
    assert torch.equal(ratios, torch.ones(4))
    assert not shifts.any()


def _shift(quantized: QuantizedNetwork, name: str) -> Tensor:
    spec = quantized.graph.quantizers[name]
    return quantized.scales.activation_quantizer(spec).centering if spec.can_center else torch.zeros(1)

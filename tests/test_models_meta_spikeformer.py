"""Meta-SpikeFormer: the published sizes, its layers against arithmetic of their own, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from swincompress_pl.models import factory
from swincompress_pl.models.factory import create_model, recreate_model
from swincompress_pl.models.meta_spikeformer import network as meta_spikeformer
from swincompress_pl.models.meta_spikeformer.network import (
    Attention,
    BatchNormPad,
    Block,
    ConvBlock,
    MetaSpikeFormer,
    RepConv,
)

NARROW: dict[str, Any] = {
    "T": 2,
    "num_classes": 5,
    "embed_dims": [8, 12, 16, 24],
    "depths": [1, 1, 1, 2, 1],
    "num_heads": 4,
    "mlp_ratio": 2,
    "conv_mlp_ratio": 1.5,
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def lively(network: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorms far enough from their start that neurons fire and borders are not zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.0, 3.0)
            nn.init.uniform_(module.bias, 0.0, 1.0)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.2, 0.8)
    return network.eval()


def answer(network: nn.Module, images: Tensor) -> Tensor:
    functional.reset_net(network)
    with torch.no_grad():
        logits: Tensor = network(images)
    return logits


@pytest.mark.parametrize(
    ("name", "published", "exact"),
    [
        ("meta_spikeformer_8_256", 15.1e6, 15_112_208),
        ("meta_spikeformer_8_384", 31.3e6, 31_333_864),
        ("meta_spikeformer_8_512", 55.4e6, 55_350_248),
    ],
)
def test_parameters_are_as_many_as_published(name: str, published: float, exact: int) -> None:
    with torch.device("meta"):
        network = create_model(name, T=1)
        smaller = create_model(name, num_classes=10)
    assert parameters(network) == pytest.approx(published, rel=0.01)
    assert parameters(network) == exact
    assert network.creation == {"name": name, "kwargs": {"T": 1}}
    assert (network.T, smaller.T) == (1, 4)
    assert parameters(smaller) == exact - 990 * (network.head.in_features + 1)


def test_blocks_and_strides_of_the_published_models() -> None:
    with torch.device("meta"):
        network = meta_spikeformer.meta_spikeformer_8_256(T=1)
        shapes: list[tuple[int, ...]] = []
        for stage in network.stages:
            stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
        assert network(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert [len(stage.blocks) for stage in network.stages] == [1, 1, 2, 6, 2]
    assert [shape[2:] for shape in shapes] == [
        (32, 112, 112),
        (64, 56, 56),
        (128, 28, 28),
        (256, 14, 14),
        (360, 14, 14),
    ]


def test_neurons_are_the_papers() -> None:
    network = MetaSpikeFormer(**NARROW)
    neurons = {name: module for name, module in network.named_modules() if isinstance(module, neuron.BaseNode)}
    # four a convolution block, seven a transformer block, one a down-sampling but the first, one before the head
    assert len(neurons) == 3 * 4 + 3 * 7 + 4 + 1
    for name, module in neurons.items():
        assert (module.tau, module.v_reset, module.detach_reset, module.step_mode) == (2.0, 0.0, True, "m")
        assert module.v_threshold == (0.5 if name.endswith("attn_lif") else 1.0)


@pytest.mark.parametrize("name", ["MetaSpikeFormer", "metaspikeformer", "METASPIKEFORMER"])
def test_class_by_name_survives_json(name: str) -> None:
    network = lively(create_model(name, **NARROW))
    again = recreate_model(json.loads(json.dumps(network.creation)))
    again.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(answer(network, images), answer(again.eval(), images))
    assert answer(network, images).shape == (2, 5)


def test_every_neuron_gives_zeros_and_ones() -> None:
    network = lively(MetaSpikeFormer(**NARROW))
    rates: dict[str, float] = {}

    def check(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert set(output.unique().tolist()) <= {0.0, 1.0}, name
            rates[name] = output.mean().item()

        return hook

    for name, module in network.named_modules():
        if isinstance(module, neuron.BaseNode):
            module.register_forward_hook(check(name))
    answer(network, torch.randn(4, 3, 32, 32))
    assert len(rates) == 38
    assert all(0 < rate < 1 for rate in rates.values()), rates


def test_membranes_stay_until_reset() -> None:
    network = lively(MetaSpikeFormer(**NARROW))
    images = torch.randn(2, 3, 32, 32)
    first = answer(network, images)
    with torch.no_grad():
        assert not torch.equal(network(images), first)
    assert torch.equal(answer(network, images), first)


def test_images_are_sequences_that_repeat_them() -> None:
    network = lively(MetaSpikeFormer(**NARROW))
    images = torch.randn(2, 3, 32, 32)
    sequence = images.repeat(2, 1, 1, 1, 1)
    assert torch.equal(answer(network, images), answer(network, sequence))
    longer = torch.cat([sequence, torch.randn(1, 2, 3, 32, 32)])
    assert not torch.allclose(answer(network, images), answer(network, longer))


def test_logits_are_the_mean_over_time_of_the_head_on_spikes() -> None:
    network = lively(MetaSpikeFormer(**NARROW))
    spikes: list[Tensor] = []
    network.head_lif.register_forward_hook(lambda module, inputs, output: spikes.append(output))
    logits = answer(network, torch.randn(2, 3, 32, 32))
    assert spikes[0].shape == (2, 2, 24)
    torch.testing.assert_close(logits, network.head(spikes[0]).mean(0))


def test_the_border_is_what_batchnorm_makes_of_zero() -> None:
    layer = lively(BatchNormPad(6))
    x = torch.randn(2, 3, 6, 5, 4)
    bn = layer.bn
    expected = F.batch_norm(
        F.pad(x.flatten(0, 1), (1, 1, 1, 1)), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps
    )
    torch.testing.assert_close(layer(x), expected.unflatten(0, (2, 3)))
    assert layer(x)[0, 0, :, 0, 0].abs().min() > 0


def test_in_training_the_border_comes_from_the_updated_running_statistics() -> None:
    layer = lively(BatchNormPad(6)).train()
    x = torch.randn(2, 3, 6, 5, 4)
    padded = layer(x)
    zero = torch.zeros(1, 1, 6, 1, 1)
    torch.testing.assert_close(padded[0, 0, :, 0, 2], layer.eval().bn(zero).flatten())
    batch = x.flatten(0, 1)
    centred = (batch - batch.mean((0, 2, 3), keepdim=True)) / (batch.var((0, 2, 3), keepdim=True, correction=0)).sqrt()
    normed = centred * layer.bn.weight[:, None, None] + layer.bn.bias[:, None, None]
    torch.testing.assert_close(padded[..., 1:-1, 1:-1].flatten(0, 1), normed, rtol=1e-4, atol=1e-4)


def test_no_gradient_flows_through_the_border() -> None:
    layer = BatchNormPad(6)
    padded = layer(torch.randn(2, 3, 6, 5, 4))
    padded[..., 1:-1, 1:-1] = 0
    padded.sum().backward()
    assert layer.bn.weight.grad is not None
    assert not layer.bn.weight.grad.any()
    assert not layer.bn.bias.grad.any()


def test_rep_conv_folds_into_one_convolution() -> None:
    """With zeros padded before the first BatchNorm, a RepConv is affine in a 3 x 3 patch, the same one everywhere."""
    part = lively(RepConv(4, 6)).double()
    with torch.no_grad():
        bias = part(torch.zeros(1, 1, 4, 3, 3, dtype=torch.double))[0, 0, :, 1, 1]
        kernel = torch.empty(6, 4, 3, 3, dtype=torch.double)
        for channel in range(4):
            for row in range(3):
                for column in range(3):
                    patch = torch.zeros(1, 1, 4, 3, 3, dtype=torch.double)
                    patch[0, 0, channel, row, column] = 1
                    kernel[:, channel, row, column] = part(patch)[0, 0, :, 1, 1] - bias
        x = torch.randn(2, 3, 4, 5, 6, dtype=torch.double)
        torch.testing.assert_close(part(x).flatten(0, 1), F.conv2d(x.flatten(0, 1), kernel, bias, padding=1))


@pytest.mark.parametrize("scale", [0.125, 1.0])
def test_attention_counts_spikes_head_by_head(scale: float) -> None:
    attention = lively(Attention(12, num_heads=3, scale=scale))
    seen: dict[str, Tensor] = {}
    for name in ("q_lif", "k_lif", "v_lif"):
        attention.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output.flatten(3))
        )
    attention.attn_lif.register_forward_hook(lambda module, inputs, output: seen.__setitem__("current", inputs[0]))
    assert answer(attention, 2 * torch.rand(2, 3, 12, 4, 5)).shape == (2, 3, 12, 4, 5)
    q, k, v = seen["q_lif"], seen["k_lif"], seen["v_lif"]
    expected = torch.empty_like(q)
    for start in range(0, 12, 4):
        of = slice(start, start + 4)
        agreement = torch.einsum("tncx,tncy->tnxy", q[:, :, of], k[:, :, of])
        expected[:, :, of] = torch.einsum("tnxy,tncy->tncx", agreement, v[:, :, of]) * scale
    assert expected.any()
    assert torch.equal(seen["current"], expected.unflatten(-1, (4, 5)))


def test_blocks_are_residual() -> None:
    x = torch.randn(1, 2, 3, 4, 4)
    assert torch.equal(Block(nn.Identity(), nn.Identity())(x), 4 * x)


def test_convolution_block_in_plain_functions() -> None:
    """One time step: from rest, a neuron of tau 2 and threshold 1 fires where its input reaches 2."""
    block = lively(ConvBlock(4, ratio=3))
    x = 3 * torch.randn(1, 2, 4, 9, 8)

    def normed(name: str, images: Tensor) -> Tensor:
        bn: Any = block.get_submodule(name)
        return F.batch_norm(images, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    def convolved(name: str, images: Tensor, **options: int) -> Tensor:
        return F.conv2d(images, block.get_submodule(name).weight, **options)  # type: ignore[arg-type]

    images = x[0]
    y = normed("mixer.bn1", convolved("mixer.conv1", (images >= 2).float()))
    y = convolved("mixer.conv2", convolved("mixer.depthwise", (y >= 2).float(), padding=3, groups=8))
    images = images + normed("mixer.bn2", y)
    y = normed("mlp.bn1", convolved("mlp.conv1", (images >= 2).float(), padding=1))
    images = images + normed("mlp.bn2", convolved("mlp.conv2", (y >= 2).float(), padding=1))
    torch.testing.assert_close(answer(block, x), images[None])


def test_every_parameter_gets_a_gradient() -> None:
    network = MetaSpikeFormer(**NARROW)
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 1, 3, 32, 32)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    network = MetaSpikeFormer(**NARROW)
    with pytest.raises(ValueError, match=r"input of shape \(.*3, 32, 32\); give images \(N, C, H, W\)"):
        network(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 0}, r"T=0; it must be at least 1"),
        ({"in_channels": 0}, r"in_channels=0; it"),
        ({"num_classes": 0}, r"num_classes=0; it"),
        ({"num_heads": 0}, r"num_heads=0; it"),
        ({"embed_dims": [8, 16, 24]}, r"embed_dims=\[8, 16, 24\]; give four widths"),
        ({"embed_dims": [8, 0, 16, 24]}, r"embed_dims=\[8, 0, 16, 24\]; give four widths"),
        ({"embed_dims": [7, 12, 16, 24]}, r"the first one even"),
        ({"embed_dims": [8, 12, 18, 24]}, r"with num_heads=4; the last two widths must be multiples"),
        ({"embed_dims": [8, 12, 16, 22]}, r"with num_heads=4; the last two widths must be multiples"),
        ({"depths": [1, 1, 2, 6]}, r"depths=\[1, 1, 2, 6\]; give five"),
        ({"depths": [1, 1, 2, 6, 0]}, r"depths=\[1, 1, 2, 6, 0\]; give five"),
        ({"strides": [2, 2, 2, 1]}, r"strides=\[2, 2, 2, 1\]; give five"),
        ({"strides": [2, 2, 2, 1, 0]}, r"strides=\[2, 2, 2, 1, 0\]; give five"),
        ({"attention_scale": 0.0}, r"attention_scale=0.0; it must be above 0"),
        ({"attention_scale": -1.0}, r"attention_scale=-1.0; it must be above 0"),
        ({"mlp_ratio": 0.06}, r"mlp_ratio=0.06 leaves the MLP at width 16 no hidden channel"),
        ({"conv_mlp_ratio": 0.2}, r"conv_mlp_ratio=0.2 leaves the MLP at width 4 no hidden channel"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("MetaSpikeFormer", **{**NARROW, **arguments})


def test_strides_set_the_sizes_of_the_stages() -> None:
    network = create_model("MetaSpikeFormer", **{**NARROW, "strides": [1, 2, 1, 2, 2], "attention_scale": 0.5})
    sizes: list[int] = []
    for stage in network.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    network(torch.randn(1, 3, 32, 32))
    assert sizes == [32, 16, 16, 8, 4]
    assert all(m.scale == 0.5 for m in network.modules() if isinstance(m, Attention))


def test_arguments_that_a_builder_fixes_are_refused() -> None:
    with pytest.raises(TypeError, match="embed_dims"):
        create_model("meta_spikeformer_8_256", embed_dims=[8, 12, 16, 24])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta_spikeformer_8_265", "did you mean .*meta_spikeformer_8_256"),
        ("MetaSpikFormer", "did you mean .*MetaSpikeFormer"),
        ("???", "examples: .*meta_spikeformer_8_512, MetaSpikeFormer"),
    ],
)
def test_misspelled_names_lead_to_it(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        create_model(name)


def test_there_are_no_published_weights() -> None:
    with pytest.raises(ValueError, match="MetaSpikeFormer: there are no published weights"):
        create_model("MetaSpikeFormer", pretrained=True, **NARROW)


def test_importing_the_factory_does_not_import_spikingjelly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == "spikingjelly" or name == meta_spikeformer.__name__:
            monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("factory_again", factory.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    with pytest.raises(ModuleNotFoundError, match=r"meta_spikeformer"):
        again.create_model("MetaSpikeFormer", **NARROW)

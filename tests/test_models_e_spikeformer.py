"""E-SpikeFormer: the published sizes, its layers against arithmetic of their own, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.spiking_cases import COUNTING, lively
from torch import Tensor, nn

from swincompress_pl.models import factory
from swincompress_pl.models.e_spikeformer import network as e_spikeformer
from swincompress_pl.models.e_spikeformer.network import Attention, ConvBlock, ESpikeFormer, Mlp, block_paths
from swincompress_pl.models.factory import create_model, recreate_model
from swincompress_pl.models.spiking.memory import watching_spikes
from swincompress_pl.models.spiking.multi_spike import MultiSpike
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

NARROW: dict[str, Any] = {
    "num_classes": 5,
    "embed_dims": [8, 12, 16, 24],
    "depths": [1, 1, 3, 2, 1],
    "num_heads": 4,
    "mlp_ratio": 2,
    "strides": [2, 2, 1, 1, 1],
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shaken(network: nn.Module) -> Any:
    """In eval mode, with BatchNorms far enough from their start that neurons give every count."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 2.0, 6.0)
            nn.init.uniform_(module.bias, 0.0, 1.0)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.2, 0.8)
    return network.eval()


def counts(x: Tensor) -> Tensor:
    """What neurons of four spikes give."""
    return x.clamp(0, 4).round() / 4


def normed(module: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)


# MultiSpike


def test_counts_are_rounded_and_clamped() -> None:
    """Halves go to the even neighbor."""
    x = torch.tensor([-3.0, -0.5, 0.0, 0.49, 0.5, 0.51, 1.5, 2.5, 3.5, 3.7, 4.4, 9.0])
    whole = torch.tensor([0.0, 0, 0, 0, 0, 1, 2, 2, 4, 4, 4, 4])
    assert torch.equal(MultiSpike()(x), whole / 4)
    assert torch.equal(MultiSpike(4, norm=1)(x), whole)
    assert torch.equal(MultiSpike(3)(x), whole.clamp(max=3) / 3)
    assert torch.equal(MultiSpike(1)(x), whole.clamp(max=1))
    assert str(MultiSpike(4, norm=1)).startswith("MultiSpike(\n  D=4, norm=1")


@pytest.mark.parametrize("norm", [1, 4])
def test_the_gradient_is_that_of_x_in_the_range_of_counts(norm: int) -> None:
    x = torch.tensor([-1.0, -1e-6, 0.0, 0.3, 2.5, 4.0, 4.1, 7.0], requires_grad=True)
    MultiSpike(4, norm=norm)(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]) / norm)  # type: ignore[arg-type]


@pytest.mark.parametrize("most", [0, -1, 256, 300, True, 2.0, "4", None])
def test_neurons_of_other_counts_are_refused(most: Any) -> None:
    with pytest.raises(ValueError, match=rf"MultiSpike: D={most!r}; a neuron gives at most D spikes, from 1 to 255"):
        MultiSpike(most)


@pytest.mark.parametrize("norm", [0, 2, 8])
def test_other_factors_of_counts_are_refused(norm: int) -> None:
    with pytest.raises(ValueError, match=rf"norm={norm} with D=4; .* belongs in the weights of the next layer"):
        MultiSpike(4, norm=norm)


# Sizes


@pytest.mark.parametrize(
    ("name", "published", "exact"),
    [
        ("e_spikeformer_tiny", None, 2_702_048),
        ("e_spikeformer_small", 5.1e6, 5_105_608),
        ("e_spikeformer_medium", 10.0e6, 10_023_112),
        ("e_spikeformer_large", 19.0e6, 18_987_504),
    ],
)
def test_parameters_are_as_many_as_published(name: str, published: float | None, exact: int) -> None:
    with torch.device("meta"):
        network = create_model(name)
        smaller = create_model(name, num_classes=10)
    assert published is None or parameters(network) == pytest.approx(published, rel=0.01)
    assert parameters(network) == exact
    assert network.creation == {"name": name, "kwargs": {}}
    assert parameters(smaller) == exact - 990 * (network.head.in_features + 1)


def test_blocks_and_strides_of_the_published_models() -> None:
    with torch.device("meta"):
        network = e_spikeformer.e_spikeformer_large()
        shapes: list[tuple[int, ...]] = []
        for downsample, _ in block_paths(network):
            network.get_submodule(downsample).register_forward_hook(
                lambda module, inputs, output: shapes.append(tuple(output.shape))
            )
        assert network(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert [len(blocks) for _, blocks in block_paths(network)] == [1, 1, 2, 6, 2]
    assert [shape[1:] for shape in shapes] == [
        (32, 112, 112),
        (64, 56, 56),
        (128, 28, 28),
        (256, 14, 14),
        (360, 14, 14),
    ]


def test_a_third_stage_of_another_depth_keeps_one_block_in_its_first_list() -> None:
    paths = dict(block_paths(ESpikeFormer(**NARROW)))
    assert paths["downsample2"] == ["ConvBlock2_1.0", "ConvBlock2_2.0", "ConvBlock2_2.1"]
    one = dict(block_paths(ESpikeFormer(**{**NARROW, "depths": [1, 1, 1, 1, 1]})))
    assert one["downsample2"] == ["ConvBlock2_1.0"]


def test_strides_set_the_sizes_of_the_stages() -> None:
    network = create_model("ESpikeFormer", **{**NARROW, "strides": [1, 2, 1, 2, 2]})
    sizes: list[int] = []
    for downsample, _ in block_paths(network):
        network.get_submodule(downsample).register_forward_hook(
            lambda module, inputs, output: sizes.append(output.shape[-1])
        )
    network(torch.randn(1, 3, 32, 32))
    assert sizes == [32, 16, 16, 8, 4]


def test_neurons_are_the_papers() -> None:
    neurons = {name: m for name, m in ESpikeFormer(**NARROW).named_modules() if isinstance(m, MultiSpike)}
    # five a convolution block, ten a transformer block, one a down-sampling but the first, one before the head
    assert len(neurons) == 5 * 5 + 3 * 10 + 4 + 1
    assert {name: (m.D, m.norm) for name, m in neurons.items()} == {
        name: (4, 1 if name == "spike" else 4) for name in neurons
    }


# Arithmetic


def test_every_neuron_gives_counts_and_spikes() -> None:
    network, images = lively(COUNTING["e-spikeformer, three spikes"], 1, trained_statistics=True)
    found: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, MultiSpike):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: found.__setitem__(name, output * module.norm)
            )
    with torch.no_grad(), watching_spikes(network) as rates:
        network(images)
    assert all(set(spikes.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0} for spikes in found.values())
    assert rates == pytest.approx({name: float(spikes.mean()) / 3 for name, spikes in found.items()})
    assert sum(0.02 < rate < 0.98 for rate in rates.values()) > 0.9 * len(rates)


def test_convolution_block_in_plain_functions() -> None:
    block = shaken(ConvBlock(4, 12, D=4))
    x = 3 * torch.randn(2, 4, 9, 8)
    conv = block.Conv
    y = normed(conv.pwconv1[1], F.conv2d(counts(x), conv.pwconv1[0].weight))
    y = normed(conv.dwconv[1], F.conv2d(counts(y), conv.dwconv[0].weight, padding=3, groups=8))
    images = x + normed(conv.pwconv2[1], F.conv2d(counts(y), conv.pwconv2[0].weight))
    y = normed(block.bn1, F.conv2d(counts(images), block.conv1.weight, padding=1))
    images = images + normed(block.bn2, F.conv2d(counts(y), block.conv2.weight, padding=1))
    with torch.no_grad():
        torch.testing.assert_close(block(x), images)


def test_attention_counts_head_by_head() -> None:
    attention = shaken(Attention(12, num_heads=3, D=4))
    seen: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        attention.get_submodule(f"{name}_spike").register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output.flatten(2))
        )
    attention.attn_spike.register_forward_hook(lambda module, inputs, output: seen.__setitem__("current", inputs[0]))
    x = 4 * torch.rand(2, 12, 4, 5)
    with torch.no_grad():
        result = attention(x)
    q, k, v = seen["q"], seen["k"], seen["v"]
    assert v.shape == (2, 48, 20)
    assert torch.equal(
        q, counts(normed(attention.q_conv[1], F.conv2d(counts(x), attention.q_conv[0].weight))).flatten(2)
    )
    expected = torch.empty_like(v)
    for head in range(3):
        of, wide = slice(4 * head, 4 * head + 4), slice(16 * head, 16 * head + 16)
        agreement = torch.einsum("ncx,ncy->nxy", q[:, of], k[:, of])
        expected[:, wide] = torch.einsum("nxy,ncy->ncx", agreement, v[:, wide]) * 2 / 4**0.5
    assert expected.any()
    torch.testing.assert_close(seen["current"], expected.unflatten(-1, (4, 5)))
    spikes = counts(seen["current"])
    torch.testing.assert_close(result, normed(attention.proj_conv[1], F.conv2d(spikes, attention.proj_conv[0].weight)))


def test_mlp_in_plain_functions() -> None:
    mlp = shaken(Mlp(4, 12, D=4))
    x = 3 * torch.randn(2, 4, 3, 5)
    y = normed(mlp.fc1_bn, F.conv1d(counts(x.flatten(2)), mlp.fc1_conv.weight, mlp.fc1_conv.bias))
    y = normed(mlp.fc2_bn, F.conv1d(counts(y), mlp.fc2_conv.weight, mlp.fc2_conv.bias))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), y.unflatten(-1, (3, 5)))


def test_every_branch_is_residual() -> None:
    network = ESpikeFormer(**NARROW)
    for name, module in network.named_modules():
        if name.endswith((".Conv", ".conv", ".attn", ".mlp", ".bn2")):
            module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    for _, blocks in block_paths(network):
        block: Any = network.get_submodule(blocks[0])
        width = (block.Conv.pwconv1 if hasattr(block, "Conv") else block.conv.pwconv1)[0].in_channels
        x = torch.randn(1, width, 4, 4)
        assert torch.equal(block(x), x)


def test_the_head_reads_counts_of_the_mean() -> None:
    network = shaken(ESpikeFormer(**NARROW))
    seen: list[Tensor] = []
    network.spike.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    with torch.no_grad():
        logits = network(torch.randn(2, 3, 32, 32))
    assert seen[0].shape == (2, 24)
    assert torch.equal(seen[1], seen[0].clamp(0, 4).round())
    torch.testing.assert_close(logits, F.linear(seen[1], network.head.weight, network.head.bias))


def test_every_parameter_gets_a_gradient() -> None:
    network = ESpikeFormer(**NARROW)
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


# Names and arguments


@pytest.mark.parametrize("name", ["ESpikeFormer", "espikeformer", "ESPIKEFORMER"])
def test_class_by_name_survives_json(name: str) -> None:
    network = shaken(create_model(name, **NARROW, D=2))
    again = recreate_model(json.loads(json.dumps(network.creation)))
    again.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), again.eval()(images))
        assert network(images).shape == (2, 5)
    assert {module.D for module in again.modules() if isinstance(module, MultiSpike)} == {2}


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 3, 32, 32)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    message = (
        r"input of shape \(.*3, 32, 32\); it takes images \(N, C, H, W\).*give the frames of a sequence one by one"
    )
    with pytest.raises(ValueError, match=message):
        ESpikeFormer(**NARROW)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 4}, r"T=4; the network has no time steps besides the D of its neurons. Leave T out"),
        ({"T": 0}, r"T=0; the network has no time steps"),
        ({"D": 0}, r"D=0; a neuron gives at most D spikes"),
        ({"D": 300}, r"D=300; a neuron gives at most D spikes"),
        ({"D": True}, r"D=True; a neuron gives at most D spikes"),
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
        ({"mlp_ratio": 0.2}, r"mlp_ratio=0.2 leaves the MLP at width 4 no hidden channel"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("ESpikeFormer", **{**NARROW, **arguments})


def test_one_time_step_is_accepted() -> None:
    assert parameters(create_model("ESpikeFormer", **NARROW, T=1)) == parameters(ESpikeFormer(**NARROW))


def test_arguments_that_a_builder_fixes_are_refused() -> None:
    with pytest.raises(TypeError, match="embed_dims"):
        create_model("e_spikeformer_small", embed_dims=[8, 12, 16, 24])


def test_frames_of_events_have_no_graph() -> None:
    events = {"mean": [0.0] * 2, "std": [1 / 255] * 2, "height": 32, "width": 32, "time_steps": 3}
    network = ESpikeFormer(2, **NARROW)
    with pytest.raises(UnsupportedNetworkError, match="it has no time steps; give the frames of a sequence one by one"):
        adapter_for(network).graph(network, events)


@pytest.mark.parametrize("change", [{"D": 2}, {"surrogate_function": nn.ReLU()}, {"surrogate_function": nn.Identity()}])
def test_other_counts_have_no_graph(change: dict[str, Any]) -> None:
    network, _ = lively(COUNTING["e-spikeformer"], 0, trained_statistics=True)
    neuron = network.get_submodule("block3.0.mlp.fc1_spike")
    for name, value in change.items():
        setattr(neuron, name, value)
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "height": 32, "width": 32}
    message = r"block3.0.mlp.fc1_spike gives .* spikes for .* the input, rounded and clamped to 0 to [24]"
    with pytest.raises(UnsupportedNetworkError, match=message):
        adapter_for(network).graph(network.float(), half)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e_spikeformer_smal", "did you mean .*e_spikeformer_small"),
        ("ESpikFormer", "did you mean .*ESpikeFormer"),
    ],
)
def test_misspelled_names_lead_to_it(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        create_model(name)


def test_there_are_no_published_weights() -> None:
    with pytest.raises(ValueError, match="ESpikeFormer: there are no published weights"):
        create_model("ESpikeFormer", pretrained=True, **NARROW)


def test_importing_the_factory_does_not_import_spikingjelly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == "spikingjelly" or name == e_spikeformer.__name__:
            monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("factory_again", factory.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    with pytest.raises(ModuleNotFoundError, match="e_spikeformer"):
        again.create_model("ESpikeFormer", **NARROW)


# Groups


def test_groups_have_every_parameter_but_the_heads_bias() -> None:
    network = ESpikeFormer(**NARROW)
    groups = adapter_for(network).groups(network)
    covered = {part.tensor for group in groups for part in group.slices}
    assert {name for name, _ in network.named_parameters()} - covered == {"head.bias"}
    assert [group.name for group in groups if group.kind == "embed"] == [
        f"{name}.embed" for name, _ in block_paths(network)
    ]
    assert {group.kind: group.units for group in groups if group.name.startswith("block4.0")} == {
        "conv": 48, "heads": 4, "qk": 6, "v": 24, "mlp": 48,
    }  # fmt: skip

"""The graph is compared with the network: what is exact is folded, with a message, the rest is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from support.altered_cases import (
    FOLDED,
    PREPROCESSING,
    REFUSED,
    VIT,
    LoraLinear,
    Wrapped,
    images,
    patch_forward,
    put,
    swin,
    vit,
)
from support.qat_cases import PREPROCESSING as QAT_PREPROCESSING
from support.qat_cases import Plain, loader, trainer
from support.spiking_cases import ALL, FAMILIES, SIZE_PX, lively, no_membranes
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.models import create_model
from swincompress_pl.quant import QuantizedNetwork, float_logits, quantize
from swincompress_pl.quant.fidelity import check_graph
from swincompress_pl.quant.folding import with_plain_layers
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

SPIKING: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "height": SIZE_PX, "width": SIZE_PX}


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_exact_is_folded(name: str) -> None:
    named, alter = FOLDED[name]
    network = vit()
    alter(network)
    network.eval()
    with torch.no_grad():
        expected = network(images())
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=named):
        quantized = quantize(network, [images()], method="max", preprocessing=PREPROCESSING)
    assert torch.equal(torch.get_rng_state(), state)
    found = float_logits(quantized.graph, network, images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(network(images()), expected, rtol=1e-4, atol=1e-5)
    assert {p for p, _ in network.named_parameters()} == {p for p, _ in vit().named_parameters()}


def check_network(network: Any, preprocessing: dict[str, Any]) -> None:
    """Against its own graph, on random images."""
    check_graph(adapter_for(network).graph(network, preprocessing), network)


def test_adapters_everywhere_are_folded_with_one_message() -> None:
    network = swin()
    paths = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    for path in paths:
        put(network, path, Wrapped)
    with torch.no_grad():
        expected = network(images(32))
    with pytest.warns(UserWarning, match=rf"{len(paths)} in total") as caught:
        quantized = quantize(network, [images(32)], method="max", preprocessing=PREPROCESSING)
    assert len(caught) == 1
    torch.testing.assert_close(float_logits(quantized.graph, network, images(32)), expected, rtol=1e-4, atol=1e-5)


def test_a_folded_layer_keeps_mode_and_type_and_what_is_frozen() -> None:
    network = vit().double().requires_grad_(False).train()
    put(network, "blocks.0.attn.qkv", lambda base: LoraLinear(base).double().requires_grad_(False))
    network.blocks[0].attn.qkv.train()
    with pytest.warns(UserWarning, match="qkv"):
        with_plain_layers(network, lambda: QuantizedNetwork(network, preprocessing=PREPROCESSING))
    layer = network.blocks[0].attn.qkv
    assert type(layer) is nn.Linear
    assert (layer.weight.dtype, layer.training, layer.weight.requires_grad) == (torch.float64, True, False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integer_form_is_refused_by_name(name: str) -> None:
    named, alter = REFUSED[name]
    network = vit()
    alter(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UnsupportedNetworkError, match=named):
        quantize(network, [images()], method="max", preprocessing=PREPROCESSING)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_dead_head_hides_nothing() -> None:
    """Logits of 0 are equal whatever stands before them."""
    network = vit()
    nn.init.zeros_(network.head.weight)
    network.blocks[1].mlp.register_forward_hook(lambda _module, _inputs, output: 0.9 * output)
    with pytest.raises(UnsupportedNetworkError, match=r"blocks\.1\.mlp \(Mlp\): it has hooks"):
        check_network(network, PREPROCESSING)


def test_a_patched_swin_block_is_named() -> None:
    network = swin()
    patch_forward(network, "layers.0.blocks.1")
    with pytest.raises(UnsupportedNetworkError, match=r"in layers\.0\.blocks\.1 \(SwinTransformerBlock\): its forward"):
        check_network(network, PREPROCESSING)


def test_hooks_that_change_nothing_and_harmless_subclasses_are_taken() -> None:
    network, seen = vit(), []
    network.blocks[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    network.blocks[0].attn.proj.__class__ = nn.modules.linear.NonDynamicallyQuantizableLinear
    network.blocks[0].mlp.act = nn.GELU(approximate="tanh")
    with pytest.warns(UserWarning, match=r"do not fire once it is quantized: blocks\.0 ") as told:
        quantize(network, [images()], method="max", preprocessing=PREPROCESSING)
    assert seen
    assert len(told) == 1


@pytest.mark.parametrize("compressed", ["bfloat16", "float16", "float64"])
def test_other_precisions_are_compared_exactly(compressed: str) -> None:
    network = vit().to(getattr(torch, compressed))
    check_network(network, PREPROCESSING)
    assert next(network.parameters()).dtype == getattr(torch, compressed)
    patch_forward(network, "blocks.0")
    with pytest.raises(UnsupportedNetworkError, match=r"blocks\.0 "):
        check_network(network, PREPROCESSING)


class _Counting(nn.GELU):
    """Changes its buffers in evaluation as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[operator]
        torch.rand(1)
        return super().forward(x)


@pytest.mark.parametrize("inference", [False, True])
def test_the_network_is_left_as_it_was(inference: bool) -> None:
    network = vit(drop_path_rate=0.2).train()
    network.blocks[0].mlp.act = _Counting()
    network.blocks[1].eval()
    network.head.requires_grad_(False)
    network.norm.weight.grad = torch.ones(32)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    before = {name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()}
    modes, state = [module.training for module in network.modules()], torch.get_rng_state()
    graph = adapter_for(network).graph(network, PREPROCESSING)
    with torch.inference_mode(inference):
        check_graph(graph, network, images())
    after = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert all(after[name] is tensor for name, (tensor, _, _) in before.items())
    assert all(torch.equal(after[n], value) and after[n].requires_grad is w for n, (_, value, w) in before.items())
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network.norm.weight.grad, torch.ones(32))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("name", ALL)
def test_spiking_networks_are_their_graphs(name: str) -> None:
    network, _ = lively(ALL[name], 3, trained_statistics=True)
    network = network.float()
    counts = {n: b.clone() for n, b in network.named_buffers() if "num_batches" in n}
    check_network(network, SPIKING)
    assert no_membranes(network)
    assert all(torch.equal(dict(network.named_buffers())[n], count) for n, count in counts.items())


def test_what_cancels_out_is_compared_without_its_rounding() -> None:
    """Behind silent inputs, a BatchNorm takes the bias of a layer away, up to rounding."""
    network, _ = lively(FAMILIES["maxformer"], 3, trained_statistics=True)
    network = network.float()
    mlp = network.get_submodule("stage3.0.mlp")
    layer, norm = mlp.fc2, mlp.bn2
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))
        norm.running_mean.copy_(layer.bias)
        norm.running_var.zero_()
        norm.bias.zero_()
    check_network(network, SPIKING)
    with torch.no_grad():
        norm.running_mean += 1e-6  # which is more than rounding
    norm.register_forward_hook(lambda _, __, y: torch.zeros_like(y))
    with pytest.raises(UnsupportedNetworkError, match=r"stage3\.0\.mlp\.bn2"):
        check_network(network, SPIKING)


class _Ternary(nn.Module):
    spiking = True

    def forward(self, x: Tensor) -> Tensor:
        return (x >= 0).to(x) - (x <= -1).to(x)


class _Doubled(surrogate.ATan):  # type: ignore[misc]  # spikingjelly is not typed
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 2 * super().forward(x)
        return result


class _Graded(surrogate.ATan):  # type: ignore[misc]  # spikingjelly is not typed
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) * (1 + (x > 3).to(x))
        return result


@pytest.mark.parametrize("kind", [_Ternary, _Doubled, _Graded])
def test_spikes_are_0_and_1(kind: type[nn.Module]) -> None:
    network, _ = lively(FAMILIES["spikformer"], 3, trained_statistics=True)
    for module in network.modules():
        if isinstance(module, neuron.BaseNode):
            module.surrogate_function = kind()
    with pytest.raises(UnsupportedNetworkError, match=rf"patch_embed\.stages\.0\.neuron: .*{kind.__name__} gives"):
        check_network(network, SPIKING)


@pytest.mark.parametrize("how", ["patched", "hooked", "another threshold"])
def test_neurons_that_do_something_else_are_refused_by_name(how: str) -> None:
    network, _ = lively(FAMILIES["spikformer"], 3, trained_statistics=True)
    node: Any = network.get_submodule("blocks.0.attn.qkv_lif")
    if how == "patched":
        patched = node.multi_step_forward
        node.multi_step_forward = lambda x: patched(1.5 * x)
    elif how == "hooked":
        node.register_forward_hook(lambda _module, _inputs, output: output / 2)
    else:
        node.register_forward_pre_hook(lambda module, _inputs: setattr(module, "v_threshold", 0.3))
    with pytest.raises(UnsupportedNetworkError, match=r"blocks\.0\.attn\.qkv_lif"):
        check_network(network, SPIKING)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_linear_layer_among_dropout_is_a_head(name: str) -> None:
    network = vit() if name == "vit" else swin()
    size, path = (16, "head") if name == "vit" else (32, "head.fc")
    with torch.no_grad():
        expected = network(images(size))
    put(network, path, lambda fc: nn.Sequential(nn.Dropout(0.5), nn.Identity(), fc, nn.Dropout(0.25)))
    quantized = quantize(network, [images(size)], method="max", preprocessing=PREPROCESSING)
    torch.testing.assert_close(float_logits(quantized.graph, network, images(size)), expected)
    regularizers = [path for node in quantized.graph.nodes for path in node.regularizers]
    assert regularizers[-2:] == [f"{path}.0", f"{path}.3"]
    torch.manual_seed(0)
    assert not torch.equal(quantized.train()(images(size)), quantized(images(size)))  # they act in training


class Tuned(Plain):
    def __init__(self, alter: Any) -> None:
        super().__init__()
        alter(self.backbone)


@pytest.mark.parametrize("name", ["a subclass with an adapter", "weight_norm", "torch.nn.utils.prune"])
def test_nothing_is_folded_in_a_fit(name: str, tmp_path: Any) -> None:
    path, alter = FOLDED[name]
    module = Tuned(alter)
    callback = QuantizationAwareTraining(
        start_epoch=1, calibration_images=8, preprocessing=QAT_PREPROCESSING, model_attribute="backbone"
    )
    before = copy.deepcopy(module.backbone.state_dict())
    with pytest.raises(UnsupportedNetworkError, match=path):
        trainer(tmp_path, 2, callback).fit(module, loader(), loader())
    assert all(torch.equal(before[key], value) for key, value in module.backbone.state_dict().items())


def test_a_fit_compares_before_its_first_epoch(tmp_path: Any) -> None:
    module = Tuned(lambda network: patch_forward(network, "blocks.0"))
    callback = QuantizationAwareTraining(
        start_epoch=1, calibration_images=8, preprocessing=QAT_PREPROCESSING, model_attribute="backbone"
    )
    fit = trainer(tmp_path, 2, callback)
    with pytest.raises(UnsupportedNetworkError, match=r"blocks\.0 \(Block\): its forward was replaced"):
        fit.fit(module, loader(), loader())
    assert fit.global_step == 0


def test_the_head_of_another_family_is_refused_by_name() -> None:
    network = create_model("vit", **{**VIT, "num_classes": 5})
    network.head = nn.Bilinear(1, 1, 5)
    with pytest.raises(UnsupportedNetworkError, match=r"head is Bilinear.*nn\.Linear for a head"):
        check_network(network, PREPROCESSING)


class Reparametrizing(Tuned):
    """Normalizes weights from its second epoch on."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 0:
            parametrizations.weight_norm(self.backbone.blocks[0].mlp.fc1)


def test_what_is_altered_within_a_fit_is_refused_when_it_is_quantized(tmp_path: Any) -> None:
    callback = QuantizationAwareTraining(
        start_epoch=1, calibration_images=8, preprocessing=QAT_PREPROCESSING, model_attribute="backbone"
    )
    with pytest.raises(UnsupportedNetworkError, match=r"blocks\.0\.mlp\.fc1 .*a parametrization computes its weight"):
        trainer(tmp_path, 2, callback).fit(Reparametrizing(lambda _: None), loader(), loader())

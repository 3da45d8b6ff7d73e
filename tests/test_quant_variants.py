"""Variants of timm's ViT and Swin and heads of a user's own: their integers, or a refusal at the start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.quant_cases import SWIN, VIT, draw_weights
from timm.layers.classifier import ClNormMlpClassifierHead, NormMlpClassifierHead
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from swincompress_pl import export, load, spec
from swincompress_pl.cli import main
from swincompress_pl.models import create_model
from swincompress_pl.quant import QuantizedNetwork, float_logits, quantize
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

Build = Callable[[], nn.Module]
Change = Callable[[Any], None]


def vit(change: Change | None = None, kind: str = "VisionTransformer", **options: Any) -> Build:
    return lambda: changed(create_model(kind, **{**VIT, "num_classes": 7, **options}), change)


def swin(change: Change | None = None, **options: Any) -> Build:
    return lambda: changed(
        create_model("SwinTransformer", **{"img_size": 16, **SWIN, "num_classes": 7, **options}), change
    )


def changed(network: Any, change: Change | None) -> nn.Module:
    torch.manual_seed(0)
    if change is not None:
        change(network)
    draw_weights(network)
    with torch.no_grad():
        for module in network.modules():
            if (
                isinstance(module, nn.BatchNorm1d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                module.running_mean.normal_(std=0.5)
                module.running_var.uniform_(0.5, 2)
    evaluated: nn.Module = network.eval()
    return evaluated


def head(make: Callable[[int], nn.Module]) -> Change:
    def change(network: Any) -> None:
        if hasattr(network.head, "fc"):
            network.head.fc = make(network.num_features)
        else:
            network.head = make(network.num_features)

    return change


def activations(make: Callable[[int], nn.Module]) -> Change:
    def change(network: Any) -> None:
        for module in network.modules():
            if isinstance(module, Mlp):
                module.act = make(module.fc1.out_features)  # type: ignore[arg-type]

    return change


def mlps(make: Callable[[int], nn.Module]) -> Change:
    def change(network: Any) -> None:
        for module in network.modules():
            if isinstance(getattr(module, "mlp", None), Mlp):
                module.mlp = make(module.mlp.fc1.in_features)

    return change


def norm_before_head(network: Any) -> None:
    network.fc_norm = nn.LayerNorm(network.embed_dim)


def batch_norm_before_head(network: Any) -> None:
    network.fc_norm = nn.BatchNorm1d(network.embed_dim, affine=False)


def two_heads(network: Any) -> None:
    network.head, network.head_dist = HEADS["mlp"](16), HEADS["mlp"](16)


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "layer norm": lambda width: nn.Sequential(nn.Dropout(0.1), nn.LayerNorm(width), nn.Identity(), nn.Linear(width, 7)),
    "mlp": lambda width: nn.Sequential(
        nn.Flatten(), nn.Linear(width, 20), nn.GELU(), nn.Dropout(0.1), nn.Linear(20, 7)
    ),
    "timm mlp": lambda width: Mlp(width, 20, 7, act_layer=nn.Tanh, drop=0.1, norm_layer=nn.LayerNorm),
    "linear layers": lambda width: nn.Sequential(nn.Linear(width, 20), nn.Linear(20, 7, bias=False)),
    "norms": lambda width: nn.Sequential(nn.LayerNorm(width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 7)),
    "nested": lambda width: nn.Sequential(
        nn.Sequential(nn.Tanh(), nn.Linear(width, 20), nn.ReLU()), nn.LayerNorm(20), nn.Linear(20, 7)
    ),
    "batch norm before": lambda width: nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, 7)),
    "batch norms": lambda width: nn.Sequential(
        nn.BatchNorm1d(width), nn.Linear(width, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 7)
    ),
}
VARIANTS: dict[str, Build] = {
    "prr": vit(global_pool="prr"),
    "prr of averages": vit(global_pool="prr", class_token=False),
    "prr, features": vit(global_pool="prr", num_classes=0),
    "map": vit(global_pool="map"),
    "map, no class token, no biases": vit(global_pool="map", class_token=False, qkv_bias=False),
    "map, features": vit(global_pool="map", num_classes=0),
    "no final norm": vit(final_norm=False),
    "no final norm, average": vit(final_norm=False, global_pool="avg"),
    "no final norm, features": vit(final_norm=False, num_classes=0),
    "two norms": vit(norm_before_head),
    "two norms, average": vit(norm_before_head, global_pool="avg", fc_norm=False),
    "batch norm as fc_norm": vit(batch_norm_before_head),
    "dynamic size": vit(dynamic_img_size=True),
    "dynamic size and padding, not square": vit(dynamic_img_size=True, dynamic_img_pad=True, img_size=(16, 24)),
    "one channel": vit(in_chans=1),
    "four channels, not square": vit(in_chans=4, img_size=(12, 20)),
    "distilled": vit(kind="VisionTransformerDistilled"),
    "distilled, heads of two layers": vit(
        two_heads,
        kind="VisionTransformerDistilled",
    ),
    "distilled, features": vit(kind="VisionTransformerDistilled", num_classes=0),
    "PReLU": vit(activations(lambda width: nn.PReLU())),
    **{f"head: {name}": vit(head(make)) for name, make in HEADS.items()},
    "swin, one channel, any size": swin(in_chans=1, strict_img_size=False),
    "swin, four channels, not square": swin(in_chans=4, img_size=(12, 20)),
    "swin, PReLU": swin(activations(lambda width: nn.PReLU())),
    "swin, ClNormMlpClassifierHead": swin(
        lambda network: setattr(network, "head", ClNormMlpClassifierHead(24, 7, hidden_size=20))
    ),
    "swin, ClNormMlpClassifierHead without MLP": swin(
        lambda network: setattr(network, "head", ClNormMlpClassifierHead(24, 7))
    ),
    **{f"swin, head: {name}": swin(head(HEADS[name])) for name in ("layer norm", "timm mlp", "batch norms")},
}


def pixels_and_images(network: Any, count: int = 12) -> tuple[Tensor, Tensor, dict[str, Any]]:
    channels = network.patch_embed.proj.in_channels
    pixels = torch.randint(0, 256, (count, *network.patch_embed.img_size, channels), dtype=torch.uint8)
    half = {"mean": [0.5] * channels, "std": [0.5] * channels}
    return pixels, (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5, half


@pytest.mark.parametrize("name", VARIANTS)
def test_the_graph_is_the_network_and_the_engine_the_reference(name: str, tmp_path: Path) -> None:
    network: Any = VARIANTS[name]()
    pixels, images, half = pixels_and_images(network)
    with torch.no_grad():
        expected = network(images)
    assert torch.allclose(float_logits(adapter_for(network).graph(network, half), network, images), expected, atol=2e-5)
    embeds = network.num_classes == 0
    quantized = quantize(network, [images], method="max", preprocessing=half, embeddings=embeds).eval()
    with torch.no_grad():
        found = quantized(images)
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.995
    export(quantized, tmp_path / "variant.safetensors")
    engine, reference = load(tmp_path / "variant.safetensors"), spec.run(quantized.to_program(), pixels.numpy())
    assert np.array_equal(engine.run_integer(pixels.numpy()), reference)
    assert np.array_equal(quantized.integer_logits(pixels).numpy(), reference)


def test_an_artifact_says_that_it_gives_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network: Any = vit(num_classes=0)()
    _, images, half = pixels_and_images(network)
    quantized = quantize(network, [images], method="max", preprocessing=half, classes=["a"] * 16, embeddings=True)
    path = tmp_path / "features.safetensors"
    export(quantized, path)
    engine = load(path)
    assert (engine.outputs[0].name, engine.classes, engine.num_classes) == ("features", None, 16)
    with pytest.raises(ValueError, match="the engine gives 16 features per picture"):
        engine.classify("picture.png")
    assert main(["inspect", str(path)]) == 0
    assert "features: int32" in (printed := capsys.readouterr().out)
    assert "classes: " not in printed


REFUSED: dict[str, tuple[Build, str]] = {
    "GluMlp": (swin(mlps(lambda width: GluMlp(width, 2 * width))), "mlp is GluMlp.*a gated MLP"),
    "SwiGLU": (swin(mlps(lambda width: SwiGLU(width, 2 * width))), "mlp is SwiGLU"),
    "GluMlp of a ViT": (vit(mlps(lambda width: GluMlp(width, 2 * width))), "mlp is GluMlp"),
    "PReLU": (vit(activations(nn.PReLU)), r"mlp.act \(PReLU\) does not map each value alone.*one slope"),
    "GLU": (swin(activations(lambda width: nn.GLU())), r"mlp.act \(GLU\) does not map each value alone"),
    "Softmax": (vit(activations(lambda width: nn.Softmax(-1))), r"mlp.act \(Softmax\) does not map each value"),
    "max": (vit(global_pool="max"), "global_pool='max'.*reset_classifier"),
    "avgmax": (vit(global_pool="avgmax"), "global_pool='avgmax'"),
    "no pooling": (vit(global_pool=""), "global_pool=''"),
    "swin, max": (swin(global_pool="max"), "global pooling 'max'.*reset_classifier"),
    "padding": (
        vit(dynamic_img_size=True, dynamic_img_pad=True, img_size=(18, 24)),
        r"dynamic_img_pad=True.*set_input_size\(\(20, 24\)\)",
    ),
    "hybrid": (
        lambda: VisionTransformer(
            **VIT, embed_layer=lambda **_: HybridEmbed(nn.Conv2d(3, 16, 3, 2, 1), 16, 4, embed_dim=16)
        ),
        "patch_embed is HybridEmbed",
    ),
    "distilled training": (
        vit(lambda network: network.set_distilled_training(), kind="VisionTransformerDistilled"),
        r"set_distilled_training\(False\)",
    ),
    "distilled without norm": (vit(kind="VisionTransformerDistilled", final_norm=False), "final_norm=True"),
    "distilled, other heads": (
        vit(lambda network: setattr(network, "head", HEADS["norms"](16)), kind="VisionTransformerDistilled"),
        "head and head_dist begin with other layers",
    ),
    "head that ends otherwise": (
        vit(head(lambda width: nn.Sequential(nn.Linear(width, 7), nn.Sigmoid()))),
        "head.1 is Sig",
    ),
    "head of a norm": (vit(head(nn.LayerNorm)), "head is LayerNorm in the head"),
    "head of a softmax": (
        vit(head(lambda width: nn.Sequential(nn.Softmax(-1), nn.Linear(width, 7)))),
        "head.0 is Softmax in the head, and it does not map each value alone",
    ),
    "batch norm alone": (
        vit(head(lambda width: nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 7)))),
        "head.0 is BatchNorm1d in the head, and head.1 stands behind it",
    ),
    "batch norm without statistics": (
        vit(head(lambda width: nn.Sequential(nn.BatchNorm1d(width, track_running_stats=False), nn.Linear(width, 7)))),
        "track_running_stats=True",
    ),
    "two batch norms": (
        vit(head(lambda width: nn.Sequential(nn.BatchNorm1d(width), nn.BatchNorm1d(width), nn.Linear(width, 7)))),
        "two of them stand before one nn.Linear",
    ),
    "dropout behind a batch norm": (
        vit(head(lambda width: nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.1), nn.Linear(width, 7)))),
        "head.1 is Dropout in the head, and it stands between head.0 and the nn.Linear",
    ),
    "swin, head of another class": (
        swin(lambda network: setattr(network, "head", NormMlpClassifierHead(24, 7))),
        "its head is NormMlpClassifierHead; timm's ClassifierHead or ClNormMlpClassifierHead",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integers_is_refused_before_it_runs(name: str) -> None:
    build, message = REFUSED[name]
    network: Any = build()
    channels = network.patch_embed.proj.in_channels
    with pytest.raises(UnsupportedNetworkError, match=message):
        adapter_for(network).graph(network, {"mean": [0.5] * channels, "std": [0.5] * channels})


def test_hidden_channels_that_meet_in_the_activation_are_not_removed() -> None:
    with pytest.raises(UnsupportedNetworkError, match="act is a Softmax, which does not map each value alone"):
        adapter_for(network := vit(activations(lambda width: nn.Softmax(-1)))()).groups(network)


@pytest.mark.parametrize("name", ["PReLU", "head: mlp", "swin, PReLU"])
def test_groups_are_found_without_values(name: str) -> None:
    network = VARIANTS[name]()
    with torch.device("meta"):
        assert [group.units for group in adapter_for(network).groups(copy.deepcopy(network).to("meta"))] == [
            group.units for group in adapter_for(network).groups(network)
        ]


def test_a_head_with_batch_norms_trains_as_the_float_network_does() -> None:
    network: Any = vit(head(HEADS["batch norms"]))()
    _, images, half = pixels_and_images(network, 24)
    before = network.head[0].running_mean.clone()
    quantized: QuantizedNetwork = quantize(network, [images], method="max", preprocessing=half).train()
    found = quantized(images)
    found.square().sum().backward()
    assert (network.head[0].running_mean - before).abs().max() > 1e-3
    assert network.head[1].weight.grad.abs().max() > 0
    assert network.head[2].bias.grad.abs().max() > 0
    with torch.no_grad():
        expected = network.train()(images)
    assert (found - expected).abs().mean() < 0.1 * expected.std()


def test_the_query_of_attention_pooling_trains() -> None:
    network: Any = vit(global_pool="map")()
    _, images, half = pixels_and_images(network)
    quantized = quantize(network, [images], method="searched", preprocessing=half, search={"rows": 64})
    quantized.train()(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.attn_pool.parameters())
    assert network.attn_pool.latent.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["map", "distilled", "head: batch norms"])
def test_every_rounding_keeps_the_network(name: str) -> None:
    network: Any = VARIANTS[name]()
    _, images, half = pixels_and_images(network)
    with torch.no_grad():
        expected = network(images)
    search = {"rows": 64, "rounding": "second_order", "bias_correction": False}
    quantized = quantize(network, [images], preprocessing=half, search=search).eval()
    with torch.no_grad():
        assert (quantized(images) - expected).abs().mean() < 0.1 * expected.std()


def test_a_size_set_later_is_the_size_of_the_integers() -> None:
    network: Any = vit(dynamic_img_size=True)()
    with torch.no_grad():
        other = torch.randn(2, 3, 24, 16)
        by_itself = network(other)
        network.set_input_size((24, 16))
        assert torch.allclose(network(other), by_itself, atol=1e-4)
    _, images, half = pixels_and_images(network)
    quantized = quantize(network, [images], method="max", preprocessing=half).eval()
    assert (quantized.to_program().input.height, quantized.to_program().input.width) == (24, 16)
    with pytest.raises(ValueError, match=r"takes \(N, 3, 24, 16\)"):
        quantized(torch.zeros(1, 3, 16, 16))

"""Networks whose modules do not compute what their family's modules do: adapters, subclasses, patches, hooks."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from swincompress_pl.models import create_model

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
PREPROCESSING: dict[str, Any] = {"mean": MEAN, "std": STD}
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
SWIN: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    network = create_model("vit", **{**VIT, **options})
    nn.init.normal_(network.head.weight, std=0.5)
    return network.eval()


def swin() -> Any:
    torch.manual_seed(0)
    return create_model("swin", **SWIN, window_size=4, num_classes=5).eval()


def images(size: int = 16, count: int = 8) -> Tensor:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    return (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def put(network: nn.Module, path: str, make: Callable[[Any], nn.Module]) -> None:
    """What `make` makes of the module at `path` takes its place."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, make(network.get_submodule(path)).eval())


class LoraLinear(nn.Linear):
    """In loralib's style: a subclass with the adapter's matrices beside its own."""

    def __init__(self, base: nn.Linear, *, rank: int = 2, scale: float = 0.3) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * scale)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank) * scale)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Wrapped(nn.Module):
    """In PEFT's style: the layer inside, the adapter beside it."""

    def __init__(self, base: nn.Linear, between: nn.Module | None = None) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.between = between or nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.lora_B["default"](self.between(self.lora_A["default"](x)))
        return self.base_layer(x) + adapted  # type: ignore[no-any-return]


class DecomposedLinear(Wrapped):
    """DoRA: direction and magnitude of each row apart."""

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base_layer
        weight = base.weight + self.lora_B["default"].weight @ self.lora_A["default"].weight
        return F.linear(x, 1.1 * weight / weight.norm(dim=1, keepdim=True), base.bias)


class Scaled(nn.Module):
    """IA3: a factor for every channel of the output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.factor = base, nn.Parameter(torch.rand(base.out_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) * self.factor
        return result


class Mixing(Wrapped):
    """Looks at all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.mean(1, keepdim=True))


class RmsNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class ResidualMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) + 0.5 * x
        return result


class LouderPatches(PatchEmbed):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) * 1.1
        return result


class MlpWithAdapter(Mlp):
    """A fresh adapter beside the MLP: it gives 0 until it is trained."""

    def __init__(self, base: Mlp) -> None:
        super().__init__(base.fc1.in_features, base.fc1.out_features)
        self.load_state_dict(base.state_dict())
        self.adapter = nn.Linear(base.fc1.in_features, base.fc1.in_features)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) + self.adapter(x)
        return result


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def patch_forward(network: nn.Module, path: str) -> None:
    module = network.get_submodule(path)
    before = module.forward
    module.forward = lambda x, *more, **options: 1.5 * before(x, *more, **options)


def bind_forward(network: nn.Module, path: str) -> None:
    def forward(self: Any, x: Tensor, *more: Any, **options: Any) -> Any:
        return type(self).forward(self, 1.5 * x, *more, **options)

    module = network.get_submodule(path)
    module.forward = types.MethodType(forward, module)


def patch_linear(network: nn.Module, path: str) -> None:
    layer: Any = network.get_submodule(path)
    layer.forward = lambda x: F.linear(x, layer.weight / 2, layer.bias)


FOLDED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a subclass with an adapter": ("blocks.0.attn.qkv", lambda n: put(n, "blocks.0.attn.qkv", LoraLinear)),
    "a wrapper with an adapter": ("blocks.1.mlp.fc1", lambda n: put(n, "blocks.1.mlp.fc1", Wrapped)),
    "a wrapper around the head": ("head", lambda n: put(n, "head", Wrapped)),
    "DoRA": ("blocks.0.attn.proj", lambda n: put(n, "blocks.0.attn.proj", DecomposedLinear)),
    "IA3": ("blocks.0.mlp.fc2", lambda n: put(n, "blocks.0.mlp.fc2", Scaled)),
    "a replaced forward": ("blocks.0.mlp.fc2", lambda n: patch_linear(n, "blocks.0.mlp.fc2")),
    "weight_norm": ("blocks.0.mlp.fc1", lambda n: parametrizations.weight_norm(n.blocks[0].mlp.fc1)),
    "weight_norm of a convolution": ("patch_embed.proj", lambda n: parametrizations.weight_norm(n.patch_embed.proj)),
    "weight_norm by hooks": ("blocks.0.mlp.fc1", lambda n: nn.utils.weight_norm(n.blocks[0].mlp.fc1)),
    "spectral_norm": ("blocks.0.mlp.fc1", lambda n: parametrizations.spectral_norm(n.blocks[0].mlp.fc1)),
    "spectral_norm by hooks": ("blocks.0.mlp.fc1", lambda n: nn.utils.spectral_norm(n.blocks[0].mlp.fc1)),
    "torch.nn.utils.prune": ("blocks.1.mlp.fc2", lambda n: prune.l1_unstructured(n.blocks[1].mlp.fc2, "weight", 0.5)),
    "a parametrized LayerNorm": (
        "blocks.0.norm1",
        lambda n: parametrize.register_parametrization(n.blocks[0].norm1, "weight", Halved()),
    ),
    "a parametrized position embedding": (
        "the network itself",
        lambda n: parametrize.register_parametrization(n, "pos_embed", Halved()),
    ),
}
"""What quantization folds: the path that its message names, and what is done to a ViT."""

REFUSED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a nonlinear adapter": (
        "blocks.0.attn.qkv",
        lambda n: put(n, "blocks.0.attn.qkv", lambda b: Wrapped(b, nn.ReLU())),
    ),
    "an adapter over tokens": ("blocks.0.attn.qkv", lambda n: put(n, "blocks.0.attn.qkv", Mixing)),
    "random in evaluation": (
        "blocks.0.attn.qkv",
        lambda n: put(n, "blocks.0.attn.qkv", lambda b: Wrapped(b, _AlwaysDropout())),
    ),
    "another norm": ("blocks.0.norm1", lambda n: put(n, "blocks.0.norm1", lambda _: RmsNorm(32))),
    "another MLP": ("blocks.0.mlp", lambda n: setattr(n.blocks[0].mlp, "__class__", ResidualMlp)),
    "another patch embedding": ("patch_embed", lambda n: setattr(n.patch_embed, "__class__", LouderPatches)),
    "a fresh adapter": ("blocks.1.mlp.adapter", lambda n: put(n, "blocks.1.mlp", MlpWithAdapter)),
    "a patched block": ("blocks.0", lambda n: patch_forward(n, "blocks.0")),
    "a patched attention": ("blocks.1.attn", lambda n: bind_forward(n, "blocks.1.attn")),
    "a hook on a block": ("blocks.0", lambda n: n.blocks[0].register_forward_hook(lambda _m, _i, y: 0.9 * y)),
    "a hook on a layer": (
        "blocks.1.norm2",
        lambda n: n.blocks[1].norm2.register_forward_hook(lambda _m, _i, y: 0.9 * y),
    ),
    "a hook on the logits": ("VisionTransformer itself", lambda n: n.register_forward_hook(lambda _m, _i, y: 2 * y)),
    "a hook on the images": (
        "VisionTransformer itself",
        lambda n: n.register_forward_pre_hook(lambda _m, i: (i[0] / 2,)),
    ),
    "a softmax for the activation": ("blocks.0.mlp.act", lambda n: setattr(n.blocks[0].mlp, "act", nn.Softmax(-1))),
    "a head with a softmax": (
        "head",
        lambda n: setattr(n, "head", nn.Sequential(nn.Linear(32, 8), nn.Softmax(-1), nn.Linear(8, 5))),
    ),
}
"""What has no integer form: what the message names, and what is done to a ViT."""


class _AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)

"""E-SpikeFormer (Spike-driven Transformer V3; Yao et al., TPAMI 2025, arXiv 2411.16061), trained with integers.

Its structure, and the names and shapes of its weights, are those of the authors' published code for the models of up to
19 M parameters (SDT_V3/Classification/Model_Base/models.py), of which no line is copied. So published files load, and
files written here load there. These details also follow that code: biases only in the down-samplings, the transformer
blocks' MLPs and the head; no drop path (the code builds it and never calls it); truncated normal weights (0.02) in the
head, and torch's defaults elsewhere. Depths, strides and the ratios are arguments here, and constants there.

Neurons give counts of spikes (Luo et al., ECCV 2024, arXiv 2407.20708). A count of c up to D stands for c spikes in D
binary time steps; `MultiSpike` says how. There are no other time steps. The larger published models (83 M and 173 M)
have another layout; docs/reference/families.md says what is missing.

Importing this module imports spikingjelly, which takes seconds; `factory.create_model` does so on use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from swincompress_pl.models.spiking.multi_spike import MultiSpike

_EXPANSION = 2  # of the separable convolutions
_V_EXPANSION = 4  # of the values of an attention
# Names that only the larger published models have.
_LARGER = ("ConvBlock1_1.0.conv1.0.0.", "block3.0.attn.q_conv.0.conv1.", "block3.0.layer_scale", "head_kd.")


def _conv_norm(inputs: int, outputs: int, kernel_size: int, *, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size of the image, without bias, and BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class DownSampling(nn.Module):
    """Neuron, convolution with bias, and BatchNorm; the first one sees the image and has no neuron."""

    def __init__(self, inputs: int, outputs: int, *, kernel_size: int, stride: int, D: int | None):  # noqa: N803
        super().__init__()
        if D is not None:
            self.encode_spike = MultiSpike(D)
        self.encode_conv = nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2)
        self.encode_bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        if hasattr(self, "encode_spike"):
            x = self.encode_spike(x)
        x = self.encode_bn(self.encode_conv(x))
        return x


class SeparableConv(nn.Module):
    """1 x 1 to twice the channels, a convolution per channel, 1 x 1 back; neurons before each, BatchNorm after each."""

    def __init__(self, dim: int, *, kernel_size: int, D: int):  # noqa: N803
        super().__init__()
        hidden = _EXPANSION * dim
        self.spike1 = MultiSpike(D)
        self.pwconv1 = _conv_norm(dim, hidden, 1)
        self.spike2 = MultiSpike(D)
        self.dwconv = _conv_norm(hidden, hidden, kernel_size, groups=hidden)
        self.spike3 = MultiSpike(D)
        self.pwconv2 = _conv_norm(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        x = self.pwconv1(self.spike1(x))
        x = self.dwconv(self.spike2(x))
        x = self.pwconv2(self.spike3(x))
        return x


class ConvBlock(nn.Module):
    """Separable convolution, then two 3 x 3 convolutions through `hidden` channels, each with a residual connection."""

    def __init__(self, dim: int, hidden: int, *, D: int):  # noqa: N803
        super().__init__()
        self.Conv = SeparableConv(dim, kernel_size=7, D=D)
        self.spike1 = MultiSpike(D)
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.spike2 = MultiSpike(D)
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        x = x + self.Conv(x)
        x = x + self.bn2(self.conv2(self.spike2(self.bn1(self.conv1(self.spike1(x))))))
        return x


class Attention(nn.Module):
    """Attention of counts in `num_heads` heads, without softmax; values are four times as wide.

    k and v are multiplied first, so the cost is linear in the tokens. `scale` is 2 / sqrt(dimensions of q per head),
    and stays as it is when dimensions are removed.
    """

    def __init__(self, dim: int, num_heads: int, *, D: int):  # noqa: N803
        super().__init__()
        wide = _V_EXPANSION * dim
        self.num_heads = num_heads
        self.scale = 2 * (dim // num_heads) ** -0.5
        self.head_spike = MultiSpike(D)
        self.q_conv, self.q_spike = _conv_norm(dim, dim, 1), MultiSpike(D)
        self.k_conv, self.k_spike = _conv_norm(dim, dim, 1), MultiSpike(D)
        self.v_conv, self.v_spike = _conv_norm(dim, wide, 1), MultiSpike(D)
        self.attn_spike = MultiSpike(D)
        self.proj_conv = _conv_norm(wide, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        x = self.head_spike(x)
        q = self._heads(self.q_spike(self.q_conv(x)))
        k = self._heads(self.k_spike(self.k_conv(x)))
        v = self._heads(self.v_spike(self.v_conv(x)))
        attended = (v @ k.transpose(-1, -2)) @ q
        x = self.attn_spike(self.scale * attended.flatten(1, 2).unflatten(-1, x.shape[-2:]))
        x = self.proj_conv(x)
        return x

    def _heads(self, x: Tensor) -> Tensor:
        """Splits (N, C, H, W) into (N, heads, C / heads, H * W)."""
        heads: Tensor = x.flatten(2).unflatten(1, (self.num_heads, -1))
        return heads


class Mlp(nn.Module):
    """Channel mixer of the transformer blocks: neuron, 1 x 1 convolution with bias, BatchNorm, twice."""

    def __init__(self, dim: int, hidden: int, *, D: int):  # noqa: N803
        super().__init__()
        self.fc1_spike = MultiSpike(D)
        self.fc1_conv = nn.Conv1d(dim, hidden, 1)
        self.fc1_bn = nn.BatchNorm1d(hidden)
        self.fc2_spike = MultiSpike(D)
        self.fc2_conv = nn.Conv1d(hidden, dim, 1)
        self.fc2_bn = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        size = x.shape[-2:]
        x = self.fc1_bn(self.fc1_conv(self.fc1_spike(x.flatten(2))))
        x = self.fc2_bn(self.fc2_conv(self.fc2_spike(x)))
        image: Tensor = x.unflatten(-1, size)
        return image


class TransformerBlock(nn.Module):
    """Separable convolution, attention and MLP, each with a residual connection around it."""

    def __init__(self, dim: int, hidden: int, num_heads: int, *, D: int):  # noqa: N803
        super().__init__()
        self.conv = SeparableConv(dim, kernel_size=3, D=D)
        self.attn = Attention(dim, num_heads, D=D)
        self.mlp = Mlp(dim, hidden, D=D)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        x = x + self.conv(x)
        x = x + self.attn(x)
        x = x + self.mlp(x)
        return x


STAGES = (
    ("downsample1_1", ("ConvBlock1_1",)),
    ("downsample1_2", ("ConvBlock1_2",)),
    ("downsample2", ("ConvBlock2_1", "ConvBlock2_2")),
    ("downsample3", ("block3",)),
    ("downsample4", ("block4",)),
)
"""The published names of each stage: its down-sampling, and the lists of its blocks."""


def block_paths(network: nn.Module) -> list[tuple[str, list[str]]]:
    """The path of the down-sampling of each stage, and the paths of its blocks."""
    return [
        (downsample, [f"{part}.{name}" for part in lists for name, _ in network.get_submodule(part).named_children()])
        for downsample, lists in STAGES
    ]


class ESpikeFormer(nn.Module):
    """An E-SpikeFormer that maps images (N, C, H, W) to logits.

    Five stages, each a down-sampling and blocks at its width: convolution blocks at widths e0 / 2, e0 and e1, and
    transformer blocks at e2 and e3. Neurons keep nothing between calls.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of logits.
        embed_dims: Widths e0 to e3; e0 is even, e2 and e3 are multiples of `num_heads`.
        depths: Number of blocks in each of the five stages. The published models have two lists of one block in the
            third; other depths put all but one into the second list.
        num_heads: Heads of each attention.
        mlp_ratio: Hidden channels of all MLPs over their width.
        strides: Strides of the five down-samplings. The default is for 224 pixels; it leaves 2 x 2 tokens of 32 pixels.
        D: The most spikes of a neuron, 1 to 255.
        T: 1, as there are no time steps.

    Raises:
        ValueError: If an argument is outside its range, or, in a call, the input is not (N, C, H, W).
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 360),
        depths: Sequence[int] = (1, 1, 2, 6, 2),
        num_heads: int = 8,
        mlp_ratio: float = 4,
        strides: Sequence[int] = (2, 2, 2, 2, 1),
        D: int = 4,  # noqa: N803
        *,
        T: int = 1,  # noqa: N803
    ):
        super().__init__()
        _check(T, in_channels, num_classes, embed_dims, depths, num_heads, mlp_ratio, strides)
        e0, e1, e2, e3 = embed_dims
        widths = (e0 // 2, e0, e1, e2, e3)
        for number, (inputs, width) in enumerate(zip((in_channels, *widths), widths, strict=False)):
            name, lists = STAGES[number]
            first = number == 0
            downsample = DownSampling(
                inputs, width, kernel_size=7 if first else 3, stride=strides[number], D=None if first else D
            )
            self.add_module(name, downsample)
            hidden = int(width * mlp_ratio)
            blocks = [
                ConvBlock(width, hidden, D=D) if number < 3 else TransformerBlock(width, hidden, num_heads, D=D)
                for _ in range(depths[number])
            ]
            for position, part in enumerate(lists):
                end = position + 1 if position + 1 < len(lists) else len(blocks)
                self.add_module(part, nn.ModuleList(blocks[position:end]))
        self.head = nn.Linear(e3, num_classes)
        self.spike = MultiSpike(D, norm=1)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to logits (N, num_classes)."""
        if x.ndim != 4:
            raise ValueError(
                f"ESpikeFormer: input of shape {tuple(x.shape)}; it takes images (N, C, H, W). It has no time steps: "
                "give the frames of a sequence one by one, or their sum."
            )
        for downsample, blocks in block_paths(self):
            x = self.get_submodule(downsample)(x)
            for block in blocks:
                x = self.get_submodule(block)(x)
        x = self.head(self.spike(x.flatten(2).mean(2)))
        return x

    @staticmethod
    def whose_weights(names: Collection[str]) -> str | None:
        """What a refusal says about a file with these names, if they are those of the larger published models."""
        if not any(f".{part}" in f".{name}" for name in names for part in _LARGER):
            return None
        return (
            "they are those of a larger published E-SpikeFormer (83 M or 173 M parameters). Its layout, with "
            "re-parameterized convolutions, layer scales and a second head for distillation, is not supported; the "
            "published files of the models of 5.1 M, 10.0 M and 19.0 M parameters fit e_spikeformer_small, "
            "e_spikeformer_medium and e_spikeformer_large."
        )


def _check(
    T: int,  # noqa: N803
    in_channels: int,
    num_classes: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: int,
    mlp_ratio: float,
    strides: Sequence[int],
) -> None:
    if T != 1:
        raise ValueError(
            f"ESpikeFormer: T={T}; the network has no time steps besides the D of its neurons. Leave T out, and set D "
            "for more or fewer spikes."
        )
    for name, count in {"in_channels": in_channels, "num_classes": num_classes, "num_heads": num_heads}.items():
        if count < 1:
            raise ValueError(f"ESpikeFormer: {name}={count}; it must be at least 1.")
    if len(embed_dims) != 4 or min(embed_dims) < 1 or embed_dims[0] % 2:
        raise ValueError(
            f"ESpikeFormer: embed_dims={list(embed_dims)}; give four widths of at least 1, the first one even."
        )
    if any(width % num_heads for width in embed_dims[2:]):
        raise ValueError(
            f"ESpikeFormer: embed_dims={list(embed_dims)} with num_heads={num_heads}; the last two widths must be "
            "multiples of num_heads."
        )
    for name, numbers in {"depths": depths, "strides": strides}.items():
        if len(numbers) != 5 or min(numbers) < 1:
            raise ValueError(f"ESpikeFormer: {name}={list(numbers)}; give five, each at least 1.")
    if int(embed_dims[0] // 2 * mlp_ratio) < 1:
        raise ValueError(
            f"ESpikeFormer: mlp_ratio={mlp_ratio} leaves the MLP at width {embed_dims[0] // 2} no hidden channel."
        )


def e_spikeformer_tiny(
    in_channels: int = 3,
    num_classes: int = 1000,
    D: int = 4,  # noqa: N803
    *,
    T: int = 1,  # noqa: N803
) -> ESpikeFormer:
    """The smallest published configuration."""
    return ESpikeFormer(in_channels, num_classes, embed_dims=(24, 48, 96, 128), D=D, T=T)


def e_spikeformer_small(
    in_channels: int = 3,
    num_classes: int = 1000,
    D: int = 4,  # noqa: N803
    *,
    T: int = 1,  # noqa: N803
) -> ESpikeFormer:
    """The model of 5.1 M parameters with 1000 classes."""
    return ESpikeFormer(in_channels, num_classes, embed_dims=(32, 64, 128, 192), D=D, T=T)


def e_spikeformer_medium(
    in_channels: int = 3,
    num_classes: int = 1000,
    D: int = 4,  # noqa: N803
    *,
    T: int = 1,  # noqa: N803
) -> ESpikeFormer:
    """The model of 10.0 M parameters with 1000 classes: 78.5 % on ImageNet."""
    return ESpikeFormer(in_channels, num_classes, embed_dims=(48, 96, 192, 240), D=D, T=T)


def e_spikeformer_large(
    in_channels: int = 3,
    num_classes: int = 1000,
    D: int = 4,  # noqa: N803
    *,
    T: int = 1,  # noqa: N803
) -> ESpikeFormer:
    """The model of 19.0 M parameters with 1000 classes: 79.8 % on ImageNet."""
    return ESpikeFormer(in_channels, num_classes, embed_dims=(64, 128, 256, 360), D=D, T=T)

"""Meta-SpikeFormer (Spike-driven Transformer V2; Yao et al., ICLR 2024, arXiv 2404.03663) on spikingjelly's layers.

Its structure is that of the authors' published code (github.com/BICLab/Spike-Driven-Transformer-V2,
classification/models.py), of which no line is copied. The parameter counts are those of the paper. These details also
follow that code: biases only in the down-samplings and the transformer blocks' MLPs; two BatchNorms after a
re-parameterized convolution, its own and one more; the constant scale 0.125 (here an argument, as are the strides); no
drop path (the code builds it and never calls it); truncated normal weights (0.02) in the head, and torch's defaults
elsewhere. This implementation differs as follows:

- The head sees spikes: mean over space, neuron, Linear. The published code computes these spikes but gives them only to
  its distillation head; its ordinary head gets the mean before the neuron, which is not spike-driven.
- The mean over time comes before the head. As the head is affine, the logits are the same with 1 / T of the work.
- The distillation head of the T = 4 fine-tuning is left out; with it, the counts would exceed those of the paper.
- The MLPs are 1 x 1 convolutions of images, not Conv1d over tokens. The arithmetic is the same, with weights
  (out, in, 1, 1).
- The widths of the smallest model come from the published segmentation configuration of the "15M" model, as the
  classification code only lists larger ones.

Importing this module imports spikingjelly, which takes seconds; `factory.create_model` does so on use. Sequences are
(T, N, C, H, W) throughout: time steps, images, channels, rows, columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

_EXPANSION = 2  # of the separable convolutions
_ATTENTION_THRESHOLD = 0.5


def _lif(v_threshold: float = 1.0) -> nn.Module:
    node: nn.Module = neuron.LIFNode(tau=2.0, v_threshold=v_threshold, detach_reset=True, step_mode="m")
    return node


def _conv(inputs: int, outputs: int, kernel_size: int, *, bias: bool = False, groups: int = 1) -> nn.Module:
    """A convolution that keeps the size of the image."""
    conv: nn.Module = layer.Conv2d(
        inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias, groups=groups, step_mode="m"
    )
    return conv


def _norm(channels: int) -> nn.Module:
    norm: nn.Module = layer.BatchNorm2d(channels, step_mode="m")
    return norm


class DownSampling(nn.Module):
    """Neuron, convolution with bias, and BatchNorm; the first one sees the image and has no neuron.

    The kernel size is odd.
    """

    def __init__(self, inputs: int, outputs: int, *, kernel_size: int, stride: int, first: bool):
        super().__init__()
        self.lif = nn.Identity() if first else _lif()
        self.conv = layer.Conv2d(
            inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=True, step_mode="m"
        )
        self.bn = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, inputs, H, W) to (T, N, outputs, ceil(H / stride), ceil(W / stride))."""
        x = self.bn(self.conv(self.lif(x)))
        return x


class SeparableConv(nn.Module):
    """Token mixer of the convolution blocks: 1 x 1 to twice the channels, 7 x 7 per channel, 1 x 1 back; no biases."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = _EXPANSION * dim
        self.lif1 = _lif()
        self.conv1 = _conv(dim, hidden, 1)
        self.bn1 = _norm(hidden)
        self.lif2 = _lif()
        self.depthwise = _conv(hidden, hidden, 7, groups=hidden)
        self.conv2 = _conv(hidden, dim, 1)
        self.bn2 = _norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, C, H, W) to the same shape."""
        x = self.bn1(self.conv1(self.lif1(x)))
        x = self.bn2(self.conv2(self.depthwise(self.lif2(x))))
        return x


class Mlp(nn.Module):
    """Channel mixer of every block: neuron, convolution, BatchNorm, twice."""

    def __init__(self, dim: int, hidden: int, *, kernel_size: int, bias: bool):
        super().__init__()
        self.lif1 = _lif()
        self.conv1 = _conv(dim, hidden, kernel_size, bias=bias)
        self.bn1 = _norm(hidden)
        self.lif2 = _lif()
        self.conv2 = _conv(hidden, dim, kernel_size, bias=bias)
        self.bn2 = _norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, C, H, W) to the same shape."""
        x = self.bn1(self.conv1(self.lif1(x)))
        x = self.bn2(self.conv2(self.lif2(x)))
        return x


class BatchNormPad(nn.Module):
    """BatchNorm, then a border of one pixel with what the running statistics make of a zero.

    The border equals padding with zeros before the BatchNorm, so the layers of a RepConv fold into one convolution. No
    gradient flows through it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.bn = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, C, H, W) to (T, N, C, H + 2, W + 2)."""
        x = self.bn(x)
        padded = self._border().to(x.dtype).expand(*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 2).clone()
        padded[..., 1:-1, 1:-1] = x
        return padded

    @torch.no_grad()
    def _border(self) -> Tensor:
        """The value of the border, (C, 1, 1)."""
        bn: Any = self.bn
        border: Tensor = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        return border[:, None, None]


class RepConv(nn.Module):
    """A 3 x 3 convolution in parts: 1 x 1, BatchNorm with border, 3 x 3 per channel, 1 x 1, BatchNorm; no biases."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = _conv(inputs, inputs, 1)
        self.bn1 = BatchNormPad(inputs)
        self.depthwise = layer.Conv2d(inputs, inputs, 3, bias=False, groups=inputs, step_mode="m")
        self.conv2 = _conv(inputs, outputs, 1)
        self.bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, inputs, H, W) to (T, N, outputs, H, W)."""
        x = self.bn2(self.conv2(self.depthwise(self.bn1(self.conv1(x)))))
        return x


class Attention(nn.Module):
    """Token mixer of the transformer blocks: attention of spikes in num_heads heads, without softmax.

    k and v are multiplied first, so the cost is linear in the tokens. The products are counts of spikes, exact in
    floats.
    """

    def __init__(self, dim: int, num_heads: int, scale: float):
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.lif = _lif()
        self.q_conv, self.q_bn, self.q_lif = RepConv(dim, dim), _norm(dim), _lif()
        self.k_conv, self.k_bn, self.k_lif = RepConv(dim, dim), _norm(dim), _lif()
        self.v_conv, self.v_bn, self.v_lif = RepConv(dim, dim), _norm(dim), _lif()
        self.attn_lif = _lif(_ATTENTION_THRESHOLD)
        self.proj_conv, self.proj_bn = RepConv(dim, dim), _norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, C, H, W) to the same shape."""
        x = self.lif(x)
        q = self._heads(self.q_lif(self.q_bn(self.q_conv(x))))
        k = self._heads(self.k_lif(self.k_bn(self.k_conv(x))))
        v = self._heads(self.v_lif(self.v_bn(self.v_conv(x))))
        counts = (v @ k.transpose(-1, -2)) @ q
        x = self.attn_lif(self.scale * counts.flatten(2, 3).unflatten(-1, x.shape[-2:]))
        x = self.proj_bn(self.proj_conv(x))
        return x

    def _heads(self, x: Tensor) -> Tensor:
        """Splits (T, N, C, H, W) into (T, N, heads, C / heads, H * W)."""
        heads: Tensor = x.flatten(3).unflatten(2, (self.num_heads, -1))
        return heads


class Block(nn.Module):
    """A token mixer and a channel mixer, each with a residual connection around it (figure 1)."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module):
        super().__init__()
        self.mixer = mixer
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, C, H, W) to the same shape."""
        x = x + self.mixer(x)
        x = x + self.mlp(x)
        return x


class ConvBlock(Block):
    """Separable convolution, then 3 x 3 convolutions through ratio times the channels."""

    def __init__(self, dim: int, ratio: float):
        super().__init__(SeparableConv(dim), Mlp(dim, int(dim * ratio), kernel_size=3, bias=False))


class TransformerBlock(Block):
    """Attention, then 1 x 1 convolutions through ratio times the channels."""

    def __init__(self, dim: int, ratio: float, num_heads: int, attention_scale: float):
        super().__init__(
            Attention(dim, num_heads, attention_scale), Mlp(dim, int(dim * ratio), kernel_size=1, bias=True)
        )


class Stage(nn.Module):
    """Down-sampling and the blocks at its width."""

    def __init__(self, downsample: DownSampling, blocks: Sequence[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, C, H, W) to the width and size of this stage."""
        x = self.blocks(self.downsample(x))
        return x


class MetaSpikeFormer(nn.Module):
    """A spiking transformer that maps images, or sequences of them, to logits, the mean over time.

    `stages` has five entries, as the paper's first stage scales down twice: convolution blocks at widths e0 / 2, e0 and
    e1, and transformer blocks at e2 and e3. The membrane potentials stay in the neurons: call spikingjelly's
    `functional.reset_net` before each new batch, or use `models.without_memory`.

    The default of `attention_scale` is for the 196 tokens of 224 pixels and for heads of 32 to 80 channels. With few
    tokens or narrow heads, hardly a count reaches 0.5 / 0.125 = 4, and the attention never spikes. The BatchNorms
    behind it then divide by no more than their eps, and gradients explode. In such networks, use a scale of up to 1.

    Args:
        T: Time steps that an image is shown, 1 or more.
        in_channels: Channels of the images.
        num_classes: Number of logits.
        embed_dims: Widths e0 to e3 of the paper's four stages; e0 is even, e2 and e3 are multiples of `num_heads`.
        depths: Number of blocks in each of the five stages.
        num_heads: Heads of each attention.
        mlp_ratio: Hidden channels of the MLPs in the last two stages, over their width.
        conv_mlp_ratio: Hidden channels of the MLPs in the first three stages, over their width.
        strides: Strides of the five down-samplings. The default is for 224 pixels; it leaves 2 x 2 tokens of 32 pixels.
        attention_scale: Factor of q (k^T v) before its neurons, whose threshold is 0.5; above 0.

    Raises:
        ValueError: If an argument is outside its range, or, in a call, the input has neither four nor five axes.
    """

    def __init__(
        self,
        T: int = 4,  # noqa: N803  # as in spikingjelly's models
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 360),
        depths: Sequence[int] = (1, 1, 2, 6, 2),
        num_heads: int = 8,
        mlp_ratio: float = 4,
        conv_mlp_ratio: float = 4,
        strides: Sequence[int] = (2, 2, 2, 2, 1),
        attention_scale: float = 0.125,
    ):
        super().__init__()
        _check_counts(T=T, in_channels=in_channels, num_classes=num_classes, num_heads=num_heads)
        _check_widths(embed_dims, depths, num_heads)
        _check_ratios(embed_dims, mlp_ratio, conv_mlp_ratio)
        _check_strides(strides)
        if not 0 < attention_scale < math.inf:
            raise ValueError(f"MetaSpikeFormer: attention_scale={attention_scale}; it must be above 0, e.g. 0.125.")
        self.T = T
        e0, e1, e2, e3 = embed_dims
        widths = (e0 // 2, e0, e1, e2, e3)
        self.stages = nn.Sequential()
        for number, (inputs, width, depth, stride) in enumerate(
            zip((in_channels, *widths), widths, depths, strides, strict=False)
        ):
            first = number == 0
            downsample = DownSampling(inputs, width, kernel_size=7 if first else 3, stride=stride, first=first)
            blocks = [
                ConvBlock(width, conv_mlp_ratio)
                if number < 3
                else TransformerBlock(width, mlp_ratio, num_heads, attention_scale)
                for _ in range(depth)
            ]
            self.stages.append(Stage(downsample, blocks))
        self.head_lif = _lif()
        self.head = nn.Linear(e3, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, C, H, W) or sequences (T, N, C, H, W) to logits (N, num_classes)."""
        x = self.stages(self._sequence(x))
        x = self.head_lif(x.flatten(3).mean(-1))
        x = self.head(x.mean(0))
        return x

    def _sequence(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return x.expand(self.T, *x.shape)
        if x.ndim == 5:
            return x
        raise ValueError(
            f"MetaSpikeFormer: input of shape {tuple(x.shape)}; give images (N, C, H, W) or sequences (T, N, C, H, W)."
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"MetaSpikeFormer: {name}={count}; it must be at least 1.")


def _check_widths(embed_dims: Sequence[int], depths: Sequence[int], num_heads: int) -> None:
    if len(embed_dims) != 4 or min(embed_dims) < 1 or embed_dims[0] % 2:
        raise ValueError(
            f"MetaSpikeFormer: embed_dims={list(embed_dims)}; give four widths of at least 1, the first one even."
        )
    if any(width % num_heads for width in embed_dims[2:]):
        raise ValueError(
            f"MetaSpikeFormer: embed_dims={list(embed_dims)} with num_heads={num_heads}; the last two widths must be "
            f"multiples of num_heads."
        )
    if len(depths) != 5 or min(depths) < 1:
        raise ValueError(f"MetaSpikeFormer: depths={list(depths)}; give five numbers of blocks, each at least 1.")


def _check_strides(strides: Sequence[int]) -> None:
    if len(strides) != 5 or min(strides) < 1:
        raise ValueError(f"MetaSpikeFormer: strides={list(strides)}; give five, each at least 1.")


def _check_ratios(embed_dims: Sequence[int], mlp_ratio: float, conv_mlp_ratio: float) -> None:
    narrowest = {"conv_mlp_ratio": embed_dims[0] // 2, "mlp_ratio": min(embed_dims[2:])}
    for name, ratio in {"conv_mlp_ratio": conv_mlp_ratio, "mlp_ratio": mlp_ratio}.items():
        if int(narrowest[name] * ratio) < 1:
            raise ValueError(
                f"MetaSpikeFormer: {name}={ratio} leaves the MLP at width {narrowest[name]} no hidden channel; "
                f"raise it to at least 1 / {narrowest[name]}."
            )


def meta_spikeformer_8_256(
    T: int = 4,  # noqa: N803
    in_channels: int = 3,
    num_classes: int = 1000,
) -> MetaSpikeFormer:
    """The smallest ImageNet model: 15.1 M parameters with 1000 classes."""
    return MetaSpikeFormer(T, in_channels, num_classes, embed_dims=(64, 128, 256, 360))


def meta_spikeformer_8_384(
    T: int = 4,  # noqa: N803
    in_channels: int = 3,
    num_classes: int = 1000,
) -> MetaSpikeFormer:
    """The middle ImageNet model: 31.3 M parameters with 1000 classes."""
    return MetaSpikeFormer(T, in_channels, num_classes, embed_dims=(96, 192, 384, 480))


def meta_spikeformer_8_512(
    T: int = 4,  # noqa: N803
    in_channels: int = 3,
    num_classes: int = 1000,
) -> MetaSpikeFormer:
    """The largest ImageNet model: 55.4 M parameters with 1000 classes."""
    return MetaSpikeFormer(T, in_channels, num_classes, embed_dims=(128, 256, 512, 640))

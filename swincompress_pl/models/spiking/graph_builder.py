"""The pieces from which the graphs of spiking networks are built; importing this module imports spikingjelly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spikingjelly.activation_based import layer
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from swincompress_pl.layer_types import alteration
from swincompress_pl.models.spiking.multi_spike import MultiSpike
from swincompress_pl.quant import Graph, GraphBuilder, Node, QuantizerSpec
from swincompress_pl.quant.graph.conv_norm import ConvNormNode
from swincompress_pl.quant.graph.heads import Head
from swincompress_pl.quant.graph.neurons import Neuron, require_plain_counts, require_plain_neuron
from swincompress_pl.quant.graph.nodes import AddNode, MeanNode
from swincompress_pl.quant.graph.quantizer_spec import LOGIT_BITS
from swincompress_pl.quant.graph.spiking_nodes import (
    BlockSumNode,
    CountNode,
    GateNode,
    MaxPoolNode,
    NeuronNode,
    RequantizeNode,
    SpikeAttentionNode,
    WidenNode,
)

_IMAGES = "images"  # the value with which every graph begins
# Steps of a stream of membrane potentials up to the lowest threshold: the error of a sum is at most 1 / 8192 of it.
_STREAM_STEPS = 4096


@dataclass(frozen=True, kw_only=True)
class _Value:
    """What is known about a value: its shape, whether it has time, and the largest of spikes and their sums."""

    height: int
    width: int
    channels: int
    timed: bool
    largest: int | None = None

    @property
    def tokens(self) -> int:
        return self.height * self.width


class SpikingBuilder(GraphBuilder):
    """A builder whose methods append nodes and return the name of the value that these make.

    `preprocessing` has mean and std, the height and width of the images if the network does not say them, and
    time_steps if the network reads that many frames of events. Mean 0 and std 1 / 255 leave counts of events as they
    are.
    """

    def __init__(
        self, network: nn.Module, preprocessing: Mapping[str, Any], size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(network)
        self.preprocessing = preprocessing
        self._event_steps = preprocessing.get("time_steps")
        if self._event_steps is not None and (type(self._event_steps) is not int or self._event_steps < 1):
            raise ValueError(f"time_steps is {self._event_steps!r}; events have 1 time step or more")
        self.steps = int(getattr(network, "T", 1) if self._event_steps is None else self._event_steps)
        if size is None:
            size = _size_of(preprocessing)
        self.refuse(
            size is None,
            "the size of its images is unknown; give preprocessing 'height' and 'width', in pixels",
        )
        assert size is not None
        self._values = {
            _IMAGES: _Value(
                height=size[0], width=size[1], channels=len(preprocessing["mean"]), timed=self._event_steps is not None
            )
        }
        thresholds = [float(m.v_threshold) for m in network.modules() if isinstance(m, BaseNode)]
        thresholds += [1.0 for m in network.modules() if isinstance(m, MultiSpike)]
        self._stream_scale = min(thresholds) / _STREAM_STEPS

    def finished(self) -> Graph:
        """The graph of everything that was appended."""
        image = self._values[_IMAGES]
        return self.graph(height=image.height, width=image.width, channels=image.channels, time_steps=self._event_steps)

    def of(self, value: str) -> _Value:
        """What is known about a value."""
        return self._values[value]

    def _made(self, node: Node, value: _Value) -> str:
        self._values[node.output] = value
        return self.add(node)

    def _whole(self, name: str, channels: int, largest: int, scale: float = 1.0) -> str:
        """A quantizer of spikes (largest 1), or of sums of spikes, each of which is `scale`."""
        self.refuse(largest > 255, f"{name} sums up to {largest} spikes; counts of at most 255 have an integer form")
        return self.quantizer(
            QuantizerSpec(name=name, segments=(channels,), bits=largest.bit_length(), signed=False, fixed_scale=scale)
        )

    def _wide(self, name: str, channels: int, scale: float = 1.0) -> str:
        """A quantizer of int32, for currents or for a stream with its scale."""
        return self.quantizer(QuantizerSpec(name=name, segments=(channels,), bits=LOGIT_BITS, fixed_scale=scale))

    # Layers

    def conv(
        self,
        path: str,
        norms: Sequence[str],
        x: str,
        *,
        neuron: str | None = None,
        spec: QuantizerSpec | None = None,
        rows: tuple[int, int] | None = None,
        part: str = "",
        border: str | None = None,
    ) -> str:
        """A convolution with its BatchNorms, whose output is the current of `neuron`, as `spec` says, or a stream."""
        module: Any = self.plain(path, _ConvNd, or_else=" (nn.Conv1d or nn.Conv2d)")
        dilation = module.dilation if isinstance(module.dilation, tuple) else (module.dilation,)
        plain = all(value == 1 for value in dilation) and module.padding_mode == "zeros"
        plain = plain and (module.weight.ndim == 4 or tuple(module.kernel_size) == (1,))
        self.refuse(not plain, f"{path} is {module}; convolutions without dilation, padded with zeros, are supported")
        for norm in (*norms, *([] if border is None else [border])):
            self._require_foldable(norm)
        name, first, given = f"{path}{part}", x == _IMAGES, self.of(x)
        counts = neuron is not None and isinstance(self.network.get_submodule(neuron), MultiSpike)
        channels = module.out_channels if rows is None else rows[1] - rows[0]
        if spec is not None:
            placed = self.quantizer(replace(spec, name=name, segments=(channels,)))
        else:
            placed = self._wide(name, channels, 1.0 if neuron else self._stream_scale)
        node = ConvNormNode(
            name=name,
            inputs=(x,),
            quantizer=placed,
            module=path,
            norms=tuple(norms),
            rows=rows,
            neuron=None if counts else neuron,
            counts=counts,
            mean=tuple(self.preprocessing["mean"]) if first else None,
            std=tuple(self.preprocessing["std"]) if first else None,
            border=border,
            size=None if first else (given.height, given.width),
        )
        kernel, stride, padding, _ = node.geometry(self.network)
        height, width = (
            (size + 2 * p - k) // s + 1
            for size, p, k, s in zip((given.height, given.width), padding, kernel, stride, strict=True)
        )
        return self._made(node, _Value(height=height, width=width, channels=channels, timed=given.timed))

    def _require_foldable(self, path: str) -> None:
        norm: Any = self.network.get_submodule(path)
        self.refuse(
            isinstance(norm, nn.SyncBatchNorm),
            f"{path} is SyncBatchNorm, whose sums over all processes quantization does not follow; leave the "
            "BatchNorms as they were built",
        )
        passes = (nn.BatchNorm2d.forward, layer.BatchNorm1d.forward, layer.BatchNorm2d.forward)
        known = isinstance(norm, _BatchNorm) and type(norm).forward in passes
        if known and alteration(norm) is not None:
            self.plain(path, _BatchNorm)  # raises with the reason
        self.refuse(
            not known or norm.weight is None or norm.bias is None or norm.running_mean is None,
            f"{path} is {norm}; BatchNorm1d and BatchNorm2d can be folded, with affine=True and running statistics",
        )

    def max_pool(self, path: str, x: str) -> str:
        """A max pooling."""
        pool: Any = self.network.get_submodule(path)
        sizes = (pool.kernel_size, pool.stride, pool.padding)
        plain = all(isinstance(size, int) for size in sizes) and pool.dilation == 1 and not pool.ceil_mode
        self.refuse(not plain, f"{path} is {pool}; square poolings without dilation or ceil_mode are supported")
        given = self.of(x)
        height, width = (
            (size + 2 * pool.padding - pool.kernel_size) // pool.stride + 1 for size in (given.height, given.width)
        )
        node = MaxPoolNode(name=path, inputs=(x,), module=path)
        return self._made(node, replace(given, height=height, width=width))

    def neuron(self, path: str, x: str, *, gain: float = 1.0, part: str = "") -> str:
        """The spikes of neurons; a value without time is their current at every step, unless they give counts."""
        module = self.network.get_submodule(path)
        if isinstance(module, MultiSpike):
            return self._counts_of(path, module, x, gain)
        Neuron.of(path, module)  # refuses now what has no integer form
        require_plain_neuron(path, module)
        name, given = f"{path}{part}", self.of(x)
        node = NeuronNode(
            name=name,
            inputs=(x,),
            quantizer=self._whole(name, given.channels, 1),
            module=path,
            steps=self.steps,
            repeated=not given.timed,
            gain=gain,
        )
        return self._made(node, replace(given, timed=True, largest=1))

    def _counts_of(self, path: str, module: MultiSpike, x: str, gain: float) -> str:
        """The counts of neurons, without time."""
        require_plain_counts(path, module)
        given = self.of(x)
        node = CountNode(
            name=path,
            inputs=(x,),
            quantizer=self._whole(path, given.channels, module.D, 1 / module.norm),
            module=path,
            largest=module.D,
            norm=module.norm,
            gain=gain,
        )
        return self._made(node, replace(given, largest=module.D))

    def conv_neuron(self, conv: str, norm: str, neuron: str, x: str, *, pool: str | None = None) -> str:
        """A convolution, its BatchNorm, a pooling if there is one, and neurons."""
        y = self.conv(conv, [norm], x, neuron=neuron)
        return self.neuron(neuron, y if pool is None else self.max_pool(pool, y))

    # Sums

    def count(self, name: str, a: str, b: str) -> str:
        """The sum of two values of spikes or counts."""
        left, right = self.of(a).largest, self.of(b).largest
        assert left is not None
        assert right is not None
        quantizer = self._whole(name, self.of(a).channels, left + right)
        return self._made(
            AddNode(name=name, inputs=(a, b), quantizer=quantizer),
            replace(self.of(a), largest=left + right),
        )

    def stream(self, name: str, x: str, branch: str) -> str:
        """The sum of two streams; one of them may lack time."""
        first, second = (x, branch) if self.of(x).timed else (branch, x)
        value = self.of(first)
        quantizer = self._wide(name, value.channels, self._stream_scale)
        return self._made(AddNode(name=name, inputs=(first, second), quantizer=quantizer), value)

    def widened(self, x: str) -> str:
        """Spikes converted to a stream."""
        given, name = self.of(x), f"{x}.stream"
        y = f"{x}.wide"
        self.add(
            WidenNode(name=y, inputs=(x,), quantizer=self._wide(y, given.channels), rows=self.steps * given.tokens)
        )
        quantizer = self._wide(name, given.channels, self._stream_scale)
        return self._made(RequantizeNode(name=name, inputs=(y,), quantizer=quantizer), replace(given, largest=None))

    def real(self, name: str, x: str) -> str:
        """A stream converted to bytes, for a layer that reads real values."""
        quantizer = self.quantizer(QuantizerSpec(name=name, segments=(self.of(x).channels,)))
        return self._made(RequantizeNode(name=name, inputs=(x,), quantizer=quantizer), self.of(x))

    def block_sum(self, name: str, x: str, *, heads: int | None = None) -> str:
        """The sum over the tokens of a time step, or over the channels of each head."""
        given = self.of(x)
        value = replace(given, height=1, width=1) if heads is None else replace(given, channels=heads)
        node = BlockSumNode(
            name=name,
            inputs=(x,),
            quantizer=self._wide(name, value.channels),
            over="tokens" if heads is None else "channels",
            rows=self.steps * value.tokens,
            groups=value.channels,
        )
        return self._made(node, replace(value, largest=None))

    # Attentions

    def gate(self, name: str, x: str, gate: str) -> str:
        """The product of spikes and gating spikes."""
        quantizer = self._whole(name, self.of(x).channels, 1)
        return self._made(GateNode(name=name, inputs=(x, gate), quantizer=quantizer), self.of(x))

    def parts(self, pair: str, neuron: str, x: str, widths: Sequence[int], letters: str) -> list[str]:
        """The parts (q, k, v) of one layer, the convolution and BatchNorm in `pair`, each through its neurons."""
        found, first = [], 0
        for letter, width in zip(letters, widths, strict=True):
            rows = (first, first + width)
            y = self.conv(f"{pair}.0", [f"{pair}.1"], x, neuron=neuron, rows=rows, part=f".{letter}")
            found.append(self.neuron(neuron, y, part=f".{letter}"))
            first += width
        return found

    def spike_attention(self, path: str, q: str, k: str, v: str, *, scale: float, neuron: str = "attn_lif") -> str:
        """The spikes of the neurons in the attention at `path`."""
        name, given = f"{path}.attention", self.of(v)
        node = SpikeAttentionNode(
            name=name,
            inputs=(q, k, v),
            quantizer=self._wide(name, given.channels),
            module=path,
            steps=self.steps,
            tokens=given.tokens,
        )
        y = self._made(node, replace(given, largest=None))
        return self.neuron(f"{path}.{neuron}", y, gain=scale)

    def self_attention(self, path: str, x: str, pair: str, projection: str) -> str:
        """Spiking self-attention whose q, k and v are one layer; v has the width that the projection reads."""
        module: Any = self.network.get_submodule(path)
        layer: Any = self.network.get_submodule(f"{pair}.0")
        projected: Any = self.network.get_submodule(f"{projection}.0")
        v_width = projected.in_channels
        qk_width = (layer.out_channels - v_width) // 2
        q, k, v = self.parts(pair, f"{path}.qkv_lif", x, (qk_width, qk_width, v_width), "qkv")
        return self.spike_attention(path, q, k, v, scale=float(getattr(module, "scale", 0.125)))

    # Heads

    def head_on_counts(self, path: str, x: str) -> None:
        """The mean over time and tokens, then the classifier."""
        given = self.of(x)
        head = Head(self.network, path)
        spec = head.operand("pool", given.channels)
        if spec.operand and spec.bits <= 8:  # a mean of counts, which a product reads, needs no sign
            exact = not given.timed and given.tokens == 1  # one count, which is its own mean
            spec = replace(spec, signed=False, fixed_scale=1.0 if exact else None)
        node = MeanNode(name="pool", inputs=(x,), quantizer=self.quantizer(spec), rows=self.steps * given.tokens)
        self.head(head, self._made(node, given))

    def head_on_stream(self, path: str, neuron: str, x: str) -> None:
        """Neurons on the mean over tokens, the mean of their spikes over time, then the classifier."""
        tokens = self.of(x).tokens
        spikes = self.neuron(neuron, self.block_sum("pooled", x), gain=1 / tokens)
        self.head_on_counts(path, spikes)


def _size_of(preprocessing: Mapping[str, Any]) -> tuple[int, int] | None:
    if "height" in preprocessing and "width" in preprocessing:
        return int(preprocessing["height"]), int(preprocessing["width"])
    size = preprocessing.get("input_size")  # timm's, (C, H, W)
    return (int(size[1]), int(size[2])) if size else None

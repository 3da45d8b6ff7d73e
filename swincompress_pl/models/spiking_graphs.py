"""The quantizable graphs of the spiking networks. Importing this imports spikingjelly; adapters do so on use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from swincompress_pl.quant import AddNode, Graph, GraphBuilder, MeanNode, Site
from swincompress_pl.quant.graph import LOGIT_BITS
from swincompress_pl.quant.spiking_nodes import ConvNormNode, MaxPoolNode, NeuronNode, SpikeAttentionNode


class SpikingBuilder(GraphBuilder):
    """Pieces of spiking networks; every method appends nodes and gives the name of the value they make."""

    def __init__(self, network: nn.Module, preprocessing: Mapping[str, Any]) -> None:
        super().__init__(network)
        self.preprocessing = preprocessing
        self.steps = int(network.T)  # type: ignore[arg-type]
        self._largest: dict[str, int] = {}  # of values that are spikes or sums of them

    def whole(self, name: str, channels: int, largest: int) -> str:
        """A site of spikes (largest 1) or of sums of spikes."""
        self._largest[name] = largest
        bits = max(1, largest.bit_length())
        self.refuse(bits > 8, f"{name} sums up to {largest} spikes; counts of at most 255 have an integer form")
        return self.site(Site(name=name, segments=(channels,), bits=bits, signed=False, fixed_scale=1.0))

    def currents(self, name: str, channels: int) -> str:
        return self.site(Site(name=name, segments=(channels,), bits=LOGIT_BITS, fixed_scale=1.0))

    def conv(
        self,
        path: str,
        norms: Sequence[str],
        x: str,
        *,
        neuron: str,
        rows: tuple[int, int] | None = None,
        part: str = "",
    ) -> str:
        """A convolution with its BatchNorms, as the current of `neuron`."""
        module: Any = self.network.get_submodule(path)
        dilation = module.dilation if isinstance(module.dilation, tuple) else (module.dilation,)
        plain = all(value == 1 for value in dilation) and module.padding_mode == "zeros"
        plain = plain and (module.weight.ndim == 4 or module.kernel_size == (1,))
        self.refuse(not plain, f"{path} is {module}; convolutions without dilation, padded with zeros, are supported")
        name, first = f"{path}{part}", x == "images"
        channels = module.out_channels if rows is None else rows[1] - rows[0]
        return self.add(
            ConvNormNode(
                name=name,
                inputs=(x,),
                output=name,
                site=self.currents(name, channels),
                module=path,
                norms=tuple(norms),
                rows=rows,
                neuron=neuron,
                mean=tuple(self.preprocessing["mean"]) if first else None,
                std=tuple(self.preprocessing["std"]) if first else None,
            )
        )

    def neuron(
        self, path: str, x: str, channels: int, *, repeated: bool = False, gain: float = 1.0, part: str = ""
    ) -> str:
        name = f"{path}{part}"
        return self.add(
            NeuronNode(
                name=name,
                inputs=(x,),
                output=name,
                site=self.whole(name, channels, 1),
                module=path,
                steps=self.steps,
                repeated=repeated,
                gain=gain,
            )
        )

    def max_pool(self, path: str, x: str) -> str:
        return self.add(MaxPoolNode(name=path, inputs=(x,), output=path, module=path))

    def count(self, name: str, a: str, b: str, channels: int) -> str:
        """The sum of two values of spikes or counts."""
        largest = self._largest[a] + self._largest[b]
        site = self.whole(name, channels, largest)
        return self.add(AddNode(name=name, inputs=(a, b), output=name, site=site))

    def spiking_self_attention(self, path: str, x: str, *, pair: str, tokens: int) -> str:
        """q, k and v from one layer, the convolution and BatchNorm in `pair`: what the attention's neurons give."""
        conv, norm = f"{pair}.0", f"{pair}.1"
        module: Any = self.network.get_submodule(path)
        layer: Any = self.network.get_submodule(conv)
        v_width = self._attended_width(path)
        qk_width = (layer.out_channels - v_width) // 2
        ends = [0, qk_width, 2 * qk_width, layer.out_channels]
        parts = []
        for letter, first, last in zip("qkv", ends, ends[1:], strict=False):
            neuron = f"{path}.qkv_lif"
            y = self.conv(conv, [norm], x, neuron=neuron, rows=(first, last), part=f".{letter}")
            parts.append(self.neuron(neuron, y, last - first, part=f".{letter}"))
        counts = self.add(
            SpikeAttentionNode(
                name=f"{path}.attention",
                inputs=tuple(parts),
                output=f"{path}.attention",
                site=self.currents(f"{path}.attention", v_width),
                module=path,
                steps=self.steps,
                tokens=tokens,
            )
        )
        scale = float(getattr(module, "scale", 0.125))
        return self.neuron(f"{path}.attn_lif", counts, v_width, gain=scale)

    def _attended_width(self, path: str) -> int:
        """Input channels of the projection behind an attention."""
        module: Any = self.network.get_submodule(path)
        projection = module.proj_conv_bn if hasattr(module, "proj_conv_bn") else module.proj
        return int(projection[0].in_channels)

    def spike_head(self, path: str, x: str, rows: int, channels: int) -> None:
        """The mean over time and tokens, then the classifier."""
        site = self.site(Site(name="pool", segments=(channels,), signed=False))
        y = self.add(MeanNode(name="pool", inputs=(x,), output="pool", site=site, rows=rows))
        self.head(path, y)


def spikformer_graph(network: Any, preprocessing: Mapping[str, Any]) -> Graph:
    """spikingjelly's Spikformer."""
    build = SpikingBuilder(network, preprocessing)
    stem, width = network.patch_embed, network.blocks[0].attn.qkv_conv_bn[0].in_channels
    x, repeated = "images", True
    for number in range(len(stem.stages)):
        x = _stem_stage(build, f"patch_embed.stages.{number}", x, repeated=repeated)
        repeated = False
    y = _stem_stage(build, "patch_embed.positional_encoding", x)
    x = build.count("patch_embed.add", y, x, width)
    tokens = stem.num_patches
    for number in range(len(network.blocks)):
        path = f"blocks.{number}"
        attn = f"{path}.attn"
        y = build.spiking_self_attention(attn, x, pair=f"{attn}.qkv_conv_bn", tokens=tokens)
        y = _conv_neuron(build, f"{attn}.proj_conv_bn", f"{attn}.proj_lif", y)
        x = build.count(f"{path}.add1", x, y, width)
        y = _conv_neuron(build, f"{path}.mlp.fc1", f"{path}.mlp.neuron1", x)
        y = _conv_neuron(build, f"{path}.mlp.fc2", f"{path}.mlp.neuron2", y)
        x = build.count(f"{path}.add2", x, y, width)
    build.spike_head("head", x, build.steps * tokens, width)
    height, width_px = stem.image_size
    return build.graph(height=height, width=width_px, channels=stem.stages[0].conv_bn.block[0].in_channels)


def _stem_stage(build: SpikingBuilder, path: str, x: str, *, repeated: bool = False) -> str:
    """SpikformerConv2dBNLIF: convolution, BatchNorm, perhaps a pooling, neuron."""
    block = f"{path}.conv_bn.block"
    layers: Any = build.network.get_submodule(block)
    y = build.conv(f"{block}.0", [f"{block}.1"], x, neuron=f"{path}.neuron")
    if len(layers) > 2:
        y = build.max_pool(f"{block}.2", y)
    return build.neuron(f"{path}.neuron", y, layers[0].out_channels, repeated=repeated)


def _conv_neuron(build: SpikingBuilder, pair: str, neuron: str, x: str) -> str:
    """A container of convolution and BatchNorm, then a neuron."""
    layers: Any = build.network.get_submodule(pair)
    y = build.conv(f"{pair}.0", [f"{pair}.1"], x, neuron=neuron)
    return build.neuron(neuron, y, layers[0].out_channels)


GRAPHS: dict[str, Callable[[Any, Mapping[str, Any]], Graph]] = {"Spikformer": spikformer_graph}

"""The pieces from which adapters build their graphs: layers, and the halves of a transformer block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from swincompress_pl._deprecated import renamed, renamed_attributes
from swincompress_pl.layer_types import alteration, full_name, maps_each_value
from swincompress_pl.quant.graph.graph import Graph, Node
from swincompress_pl.quant.graph.head_nodes import NormedLinearNode
from swincompress_pl.quant.graph.heads import OR_A_HEAD, Head
from swincompress_pl.quant.graph.nodes import (
    ActivationNode,
    AddNode,
    AttentionNode,
    EmbeddingNode,
    GatherNode,
    LayerNormNode,
    LinearNode,
    PixelConvNode,
)
from swincompress_pl.quant.graph.outputs import GraphOutput
from swincompress_pl.quant.graph.quantizer_spec import (
    EMBEDDING,
    LOGIT_BITS,
    QuantizerSpec,
    collect_specs,
    residual_spec,
)
from swincompress_pl.registry import UnsupportedNetworkError

_ADDING = (LayerNormNode, LinearNode, ActivationNode)
_SUBTRACTING = (LinearNode, ActivationNode)
IndexArray = npt.NDArray[np.int32]
Layer = TypeVar("Layer", bound=nn.Module)


class AlteredLayerError(UnsupportedNetworkError):
    """The layer at `path` is not a plain one of the class `wanted`, which the graph computes."""

    def __init__(self, message: str, *, path: str, wanted: type[nn.Module]) -> None:
        super().__init__(message)
        self.path, self.wanted = path, wanted


@renamed_attributes(site="quantizer")
class GraphBuilder:
    """Gathers nodes and quantizer specs for a graph.

    The methods that add layers append nodes, and return the name of the value that the last one makes.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.nodes: list[Node] = []
        self._specs: list[QuantizerSpec] = []

    def graph(
        self,
        *,
        height: int,
        width: int,
        channels: int,
        time_steps: int | None = None,
        outputs: Sequence[GraphOutput] = (),
    ) -> Graph:
        """Makes the graph of what was gathered.

        Args:
            height: Height of the images, in pixels.
            width: Width of the images, in pixels.
            channels: Channels of the images, or polarities of events.
            time_steps: Number of time steps of events; None for images.
            outputs: The named outputs; () if the last node makes logits or features.

        Returns:
            The graph. Its quantizers can center wherever all makers and readers of their values absorb a constant.

        Raises:
            ValueError: If two different quantizers have the same name, or the nodes contradict each other.
        """
        return _with_centering(
            Graph(
                quantizers=collect_specs(self._specs),
                nodes=tuple(self.nodes),
                height=height,
                width=width,
                channels=channels,
                time_steps=time_steps,
                outputs=tuple(outputs),
            )
        )

    def quantizer(self, spec: QuantizerSpec) -> str:
        """Declares a quantizer.

        Args:
            spec: The quantizer.

        Returns:
            Its name.
        """
        self._specs.append(spec)
        return spec.name

    def residual(self, name: str, channels: int) -> str:
        """Declares the quantizer of a residual stream, with 16 bits.

        Args:
            name: Its name.
            channels: Width of the stream.

        Returns:
            Its name.
        """
        return self.quantizer(residual_spec(name, channels))

    def add(self, node: Node) -> str:
        """Appends a node.

        Args:
            node: The node.

        Returns:
            The name of its output.
        """
        self.nodes.append(node)
        return node.output

    def cut_after(self, value: str) -> None:
        """Removes the nodes behind the one that makes a value, and the quantizers that no other node has.

        Args:
            value: Name of the value.
        """
        last = next(number for number, node in enumerate(self.nodes) if node.output == value)
        del self.nodes[last + 1 :]
        used = {node.quantizer for node in self.nodes}
        self._specs = [spec for spec in self._specs if spec.name in used]

    def active(self, *paths: str) -> tuple[str, ...]:
        """Selects the dropout-like modules that do something in training.

        Args:
            *paths: Paths of modules.

        Returns:
            The paths whose module is not an `nn.Identity`.
        """
        return tuple(path for path in paths if not isinstance(self.network.get_submodule(path), nn.Identity))

    @renamed(site="quantizer")
    def pixel_conv(
        self,
        path: str,
        *,
        quantizer: str,
        mean: Sequence[float],
        std: Sequence[float],
        regularizers: tuple[str, ...] = (),
    ) -> str:
        """Adds the convolution that reads the pixels, such as a patch embedding.

        Args:
            path: Path of the nn.Conv2d; it must have no padding, groups or dilation.
            quantizer: Name of the quantizer of its output.
            mean: Mean of the images per channel, for pixels in [0, 1].
            std: Standard deviation of the images per channel.
            regularizers: Paths of modules that act on the output in training.

        Returns:
            The name of the output, (N, rows, channels).

        Raises:
            UnsupportedNetworkError: If the layer is another one, or not a plain one.
            ValueError: If `mean` or `std` has another length than the image has channels.
        """
        conv = self.plain(path, nn.Conv2d)
        plain = (conv.groups, *conv.dilation, *_pair(conv.padding)) == (1, 1, 1, 0, 0)
        self.refuse(
            not plain, f"{path} is {conv}; the first layer must be an nn.Conv2d without padding, groups or dilation"
        )
        if len(mean) != conv.in_channels or len(std) != conv.in_channels:
            raise ValueError(
                f"preprocessing has {len(mean)} means for the {conv.in_channels} input channels of {path}; pass "
                "preprocessing={'mean': [...], 'std': [...]} with one number per channel"
            )
        return self.add(
            PixelConvNode(
                name=path,
                inputs=("images",),
                quantizer=quantizer,
                module=path,
                mean=tuple(mean),
                std=tuple(std),
                regularizers=regularizers,
            )
        )

    @renamed(site="quantizer")
    def layer_norm(self, path: str, x: str, *, quantizer: str | None = None, regularizers: tuple[str, ...] = ()) -> str:
        """Adds a LayerNorm.

        Args:
            path: Path of the nn.LayerNorm.
            x: Name of the value that it reads.
            quantizer: Name of the quantizer of its output; None for an equalized 8-bit one of its own, for the linear
                layer that follows.
            regularizers: Paths of modules that act on the output in training.

        Returns:
            The name of the output.

        Raises:
            UnsupportedNetworkError: If the layer is another one, or not a plain one.
        """
        norm = self.plain(path, nn.LayerNorm)
        if quantizer is None:
            quantizer = self.quantizer(QuantizerSpec(name=path, segments=(norm.normalized_shape[0],), equalized=True))
        return self.add(
            LayerNormNode(name=path, inputs=(x,), quantizer=quantizer, module=path, regularizers=regularizers)
        )

    @renamed(site="quantizer")
    def linear(
        self, path: str, x: str, *, quantizer: str, layer_scale: str | None = None, regularizers: tuple[str, ...] = ()
    ) -> str:
        """Adds a linear layer.

        Args:
            path: Path of the nn.Linear.
            x: Name of the value that it reads.
            quantizer: Name of the quantizer of its output.
            layer_scale: Path of a parameter (M,) that multiplies the output; None for none.
            regularizers: Paths of modules that act on the output in training.

        Returns:
            The name of the output.

        Raises:
            UnsupportedNetworkError: If the layer is another one, or not a plain one.
        """
        self.plain(path, nn.Linear)
        return self.add(
            LinearNode(
                name=path,
                inputs=(x,),
                quantizer=quantizer,
                module=path,
                layer_scale=layer_scale,
                regularizers=regularizers,
            )
        )

    def gather(self, name: str, x: str, index: IndexArray) -> str:
        """Adds a rearrangement of tokens, such as a window partition.

        Args:
            name: Name of the node and of its output.
            x: Name of the value that it reads.
            index: Numbers (rows, joined) of the tokens that each new token joins along its channels; -1 is a token of
                zeros.

        Returns:
            The name of the output.
        """
        return self.add(GatherNode(name=name, inputs=(x,), index=np.ascontiguousarray(index, dtype=np.int32)))

    def attention(
        self,
        path: str,
        x: str,
        *,
        head_dim: int,
        heads: int,
        windows: int = 1,
        bias_index: IndexArray | None = None,
        region: npt.NDArray[np.uint8] | None = None,
    ) -> str:
        """Adds the layer `qkv` and multi-head attention inside windows, without the projection behind it.

        Args:
            path: Path of the attention module, which has `qkv`, `num_heads` and `scale`.
            x: Name of the value that it reads, with its tokens in the order of the windows.
            head_dim: Channels per head.
            heads: Number of heads.
            windows: Number of windows; 1 for attention between all tokens.
            bias_index: Rows (length, length) of the module's `relative_position_bias_table` to add to the logits; None
                for no bias.
            region: Labels (windows, length); tokens attend only to tokens with their own label. None for no mask.

        Returns:
            The name of the output, in the order of the windows.

        Raises:
            UnsupportedNetworkError: If `qkv` is not a plain nn.Linear.
        """
        width = heads * head_dim
        qkv_quantizer = self.quantizer(QuantizerSpec(name=f"{path}.qkv", segments=(width, width, width)))
        qkv = self.linear(f"{path}.qkv", x, quantizer=qkv_quantizer)
        dropout = self.active(f"{path}.attn_drop")
        return self.add(
            AttentionNode(
                name=f"{path}.attention",
                inputs=(qkv,),
                quantizer=self.quantizer(QuantizerSpec(name=f"{path}.attention", segments=(width,))),
                module=path,
                windows=windows,
                qk_dim=head_dim,
                v_dim=head_dim,
                bias_index=bias_index,
                region=region,
                dropout=dropout[0] if dropout else None,
            )
        )

    def activation(self, path: str, x: str, *, quantizer: str, regularizers: tuple[str, ...] = ()) -> str:
        """Adds an activation function, as a table of values.

        Args:
            path: Path of the module.
            x: Name of the value that it reads.
            quantizer: Name of the quantizer of its output.
            regularizers: Paths of modules that act on the output in training.

        Returns:
            The name of the output.

        Raises:
            UnsupportedNetworkError: If it does not map each value alone, such as a softmax, a GLU, or a PReLU with a
                slope per channel.
        """
        function = self.network.get_submodule(path)
        self.refuse(
            not maps_each_value(function, self._channels_of(x)),
            f"{path} ({full_name(type(function))}) does not map each value alone, so it cannot become a table of "
            "values; use an elementwise activation, e.g. nn.GELU, or nn.PReLU with one slope",
        )
        return self.add(
            ActivationNode(name=path, inputs=(x,), module=path, quantizer=quantizer, regularizers=regularizers)
        )

    def mlp(
        self, block: str, x: str, *, norm: str, residual: str, layer_scale: str | None, drop_path: str | None
    ) -> str:
        """Adds the MLP of a block with its residual connection: x + fc2(act(fc1(norm(x)))).

        Args:
            block: Path of the block; the MLP is its `mlp`.
            x: Name of the value that it reads.
            norm: Path of the LayerNorm.
            residual: Name of the quantizer of the residual stream.
            layer_scale: Path of a parameter that multiplies the output of fc2; None for none.
            drop_path: Path of the module of stochastic depth; None for none.

        Returns:
            The name of the sum.

        Raises:
            UnsupportedNetworkError: If the MLP is another one, or its layers are not plain ones.
        """
        path = f"{block}.mlp"
        mlp = self.network.get_submodule(path)
        plain = all(isinstance(getattr(mlp, name, None), nn.Module) for name in ("fc1", "act", "fc2"))
        plain = plain and not hasattr(mlp, "gate_norm") and isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity)
        self.refuse(
            not plain,
            f"{path} is {full_name(type(mlp))}; only fc1 - activation - fc2 without norm and gate is supported, such "
            "as timm's Mlp",
        )
        hidden = self.plain(f"{path}.fc1", nn.Linear).out_features
        read = self.plain(f"{path}.fc2", nn.Linear).in_features
        self.refuse(
            read != hidden,
            f"{path} is {full_name(type(mlp))}, whose fc2 reads {read} of the {hidden} outputs of fc1; a gated MLP is "
            "not supported, timm's Mlp is",
        )
        y = self.layer_norm(norm, x)
        inner = QuantizerSpec(name=f"{path}.fc1", segments=(hidden,), operand=False)
        y = self.linear(f"{path}.fc1", y, quantizer=self.quantizer(inner))
        y = self.activation(
            f"{path}.act",
            y,
            quantizer=self.quantizer(QuantizerSpec(name=f"{path}.act", segments=(hidden,))),
            regularizers=self.active(f"{path}.drop1"),
        )
        y = self.linear(
            f"{path}.fc2",
            y,
            quantizer=residual,
            layer_scale=layer_scale,
            regularizers=self.active(f"{path}.drop2", *([] if drop_path is None else [drop_path])),
        )
        return self.residual_add(f"{block}.add2", x, y, residual)

    def residual_add(self, name: str, x: str, branch: str, residual: str) -> str:
        """Adds a branch to the residual stream.

        Args:
            name: Name of the node and of its output.
            x: Name of the stream's value.
            branch: Name of the branch's value, in the unit of the stream.
            residual: Name of the quantizer of the stream.

        Returns:
            The name of the sum.
        """
        return self.add(AddNode(name=name, inputs=(x, branch), quantizer=residual))

    def head(self, path: str | Head, x: str, *, factor: float = 1.0) -> str:
        """Adds the end of the network.

        Args:
            path: Path of the classifier: an nn.Linear; an nn.Sequential or timm Mlp of nn.Linear, nn.LayerNorm,
                nn.BatchNorm1d, elementwise activations and dropout; or an nn.Identity for a network that gives
                features. Or the `Head` of several modules.
            x: Name of the value that it reads, of the quantizer that `Head.operand` describes.
            factor: What the logits are multiplied with.

        Returns:
            The name of the logits or features.

        Raises:
            UnsupportedNetworkError: If the classifier is another layer.
        """
        head = Head(self.network, path) if isinstance(path, str) else path
        if head.regularizers:
            maker = next(index for index, node in enumerate(self.nodes) if node.output == x)
            regularizers = (*self.nodes[maker].regularizers, *head.regularizers)
            self.nodes[maker] = replace(self.nodes[maker], regularizers=regularizers)
        for number in range(len(head.steps)):
            last = number == len(head.steps) - 1 and not head.embeds
            x = self._head_step(head, number, x, factor if last else 1.0)
        return self._embedding(head.path, x) if head.embeds else x

    def _head_step(self, head: Head, number: int, x: str, factor: float) -> str:
        step, after = head.steps[number], number + 1
        regularizers = tuple(step.regularizers)
        if step.kind == "layer_norm":
            channels = self.plain(step.path, nn.LayerNorm).normalized_shape[0]
            made = self.quantizer(head.operand(step.path, channels, normed=True, reader=after))
            return self.layer_norm(step.path, x, quantizer=made, regularizers=regularizers)
        if step.kind == "activation":
            made = self.quantizer(head.operand(step.path, self._channels_of(x), reader=after))
            return self.activation(step.path, x, quantizer=made, regularizers=regularizers)
        linear = self.plain(step.path, nn.Linear, or_else=OR_A_HEAD)
        made = self.quantizer(head.operand(step.path, linear.out_features, reader=after))
        if step.norm_before is None and step.norm_after is None:
            return self.add(
                LinearNode(
                    name=step.path,
                    inputs=(x,),
                    quantizer=made,
                    module=step.path,
                    factor=factor,
                    regularizers=regularizers,
                )
            )
        self.refuse(factor != 1.0, f"{step.path} has an nn.BatchNorm1d beside it, and its logits are averaged")
        return self.add(
            NormedLinearNode(
                name=step.path,
                inputs=(x,),
                quantizer=made,
                module=step.path,
                norm_before=step.norm_before,
                norm_after=step.norm_after,
                regularizers=regularizers,
            )
        )

    def _channels_of(self, value: str) -> int:
        """The width of a value, which has the quantizer of the value that its maker reads if it has none itself."""
        node = next(node for node in self.nodes if node.output == value)
        if node.quantizer is None:
            joined = node.index.shape[1] if isinstance(node, GatherNode) else 1
            return joined * self._channels_of(node.inputs[0])
        return next(spec for spec in self._specs if spec.name == node.quantizer).channels

    def plain(self, path: str, wanted: type[Layer], *, or_else: str = "") -> Layer:
        """Finds a layer, and makes sure that it computes what its class does.

        Args:
            path: Path of the layer.
            wanted: The class that it must have.
            or_else: What else may stand there, for the message.

        Returns:
            The layer.

        Raises:
            AlteredLayerError: If the layer is of another class, or has a computed weight, a replaced method, a forward
                of its own or more parameters. This is an UnsupportedNetworkError.
        """
        layer = self.network.get_submodule(path)
        reason = alteration(layer) if isinstance(layer, wanted) else f"an nn.{wanted.__name__}{or_else} is needed there"
        if reason is not None:
            raise AlteredLayerError(
                f"{type(self.network).__name__}: {path} is {full_name(type(layer))}, which its integer form does not "
                f"follow: {reason} (after training, quant.quantize folds it where that is exact)",
                path=path,
                wanted=wanted,
            )
        assert isinstance(layer, wanted)
        return layer

    def _embedding(self, path: str, x: str) -> str:
        channels = self._channels_of(x)
        quantizer = self.quantizer(QuantizerSpec(name=EMBEDDING, segments=(channels,), bits=LOGIT_BITS))
        return self.add(EmbeddingNode(name=path, inputs=(x,), quantizer=quantizer, module=path, channels=channels))

    def refuse(self, condition: bool, message: str) -> None:
        """Refuses the network if a condition holds.

        Args:
            condition: Whether to refuse it.
            message: What is wrong; the name of the network's class is put in front.

        Raises:
            UnsupportedNetworkError: If the condition holds.
        """
        if condition:
            raise UnsupportedNetworkError(f"{type(self.network).__name__}: {message}")


def _with_centering(graph: Graph) -> Graph:
    """`graph` with quantizers that can center if all makers and readers of their values absorb a constant."""
    fixed = {spec.name for spec in graph.quantizers.values() if not spec.searched}
    fixed |= {spec.name for output in graph.outputs if (spec := graph.spec_of(output.value)) is not None}
    for node in graph.nodes:
        # A padded gather adds rows of code 0, which have to mean 0, and one that joins rows changes the channels.
        moves = isinstance(node, GatherNode) and node.index.shape[1] == 1 and not node.pads
        for kinds, values in ((_ADDING, (node.output,)), (_SUBTRACTING, node.inputs)):
            found = [spec for value in values if (spec := graph.spec_of(value)) is not None]
            fixed |= {spec.name for spec in found if not (moves or isinstance(node, kinds))}
    specs = {name: replace(spec, can_center=name not in fixed) for name, spec in graph.quantizers.items()}
    return replace(graph, quantizers=specs)


def _pair(padding: object) -> tuple[object, ...]:
    return tuple(padding) if isinstance(padding, tuple | list) else (padding,)

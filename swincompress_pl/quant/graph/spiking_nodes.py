"""The kinds of graph nodes of spiking networks; see `nodes.py`.

Values are channels-last: (N, H, W, C) before the first neuron, and (N, T, H, W, C) after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from swincompress_pl.quant.graph.conv_norm import FRACTION_BITS_MAX
from swincompress_pl.quant.graph.graph import Current, FloatArray, Lowering, Node, Run
from swincompress_pl.quant.graph.neurons import Neuron, spikes
from swincompress_pl.spec.spiking import CURRENT_MAX, DECAY_BITS, THRESHOLD_MAX


@dataclass(frozen=True, kw_only=True)
class NeuronNode(Node):
    """The neurons at `module`, over `steps` time steps.

    Their input is multiplied by `gain` to become a current; it is the scale of an attention, or one over a number of
    tokens. With `repeated` the input has no time steps, and the neurons read it at every step.
    """

    module: str
    steps: int
    repeated: bool = False
    gain: float = 1.0

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps values (N, T, ..., C), or (N, ..., C) if repeated, to spikes (N, T, ..., C)."""
        module = run.network.get_submodule(self.module)
        currents = inputs[0] if self.gain == 1.0 else inputs[0] * self.gain
        return spikes(module, Neuron.of(self.module, module), currents, self.steps, repeated=self.repeated)

    def lower(self, lowering: Lowering) -> None:
        """Writes a `lif` operation; a ValueError is raised for currents or parameters that leave its ranges."""
        neuron = Neuron.of(self.module, lowering.network.get_submodule(self.module))
        current = lowering.current(self.inputs[0])
        bits = min(FRACTION_BITS_MAX, math.floor(math.log2(CURRENT_MAX / max(current.reach, 1))))
        if bits < 0:
            raise ValueError(f"currents may reach {current.reach:.3g}, beyond {CURRENT_MAX}; the layer is too wide")
        unit = current.unit * self.gain / 2**bits
        tensors = self._in_units(neuron, current, unit)
        lowering.emit(
            self,
            "lif",
            attributes={
                "steps": self.steps,
                "repeated": int(self.repeated),
                "decay": self._decay(neuron),
                "input_decay": int(neuron.input_decay),
                "soft_reset": int(neuron.soft_reset),
                "fraction_bits": bits,
            },
            tensors=tensors,
        )

    def _in_units(self, neuron: Neuron, current: Current, unit: FloatArray) -> dict[str, npt.NDArray[np.int32]]:
        """Threshold, reset and bias, (C,) each, in whole units of each channel; a ValueError outside their ranges."""
        threshold = np.rint(neuron.threshold / unit)
        if not ((threshold >= 1) & (threshold <= THRESHOLD_MAX)).all():
            worst = int(np.argmax(np.abs(np.log(unit))))
            raise ValueError(
                f"channel {worst} has a unit of {unit[worst]:.3g}, of which the threshold of {neuron.threshold:g} is "
                "not a whole number from 1 to 2**28; recalibrate, or prune the channel"
            )
        reset = np.rint(neuron.reset / unit)
        if (np.abs(reset) > THRESHOLD_MAX).any():
            worst = int(np.abs(reset).argmax())
            raise ValueError(
                f"v_reset={neuron.reset:g} is beyond 2**28 units of {unit[worst]:.3g} (channel {worst}); bring it "
                f"nearer to the threshold of {neuron.threshold:g}"
            )
        bias = np.rint(current.bias * self.gain / unit)
        if (np.abs(bias) > CURRENT_MAX).any():
            worst = int(np.abs(bias).argmax())
            raise ValueError(
                f"channel {worst} has a bias of {current.bias[worst] * self.gain:.3g}, beyond {CURRENT_MAX} units of "
                f"{unit[worst]:.3g}; recalibrate"
            )
        whole = {"threshold": threshold, "reset": reset, "bias": bias}
        return {role: values.astype(np.int32) for role, values in whole.items()}

    def _decay(self, neuron: Neuron) -> int:
        """The decay 1 / tau in fixed point; a ValueError is raised outside 0 to 1."""
        rate = float(torch.as_tensor(neuron.decay).detach())
        if not 0 <= rate <= 1:
            raise ValueError(f"1 / tau is {rate}; it has to be in [0, 1]. Check the learned w of the neuron")
        decay: int = round(rate * 2**DECAY_BITS)
        return decay


@dataclass(frozen=True, kw_only=True)
class CountNode(Node):
    """The neurons at `module`, which give counts of 0 to `largest` spikes, divided by `norm`.

    Their input is multiplied by `gain`, as in `NeuronNode`. Floats round halves to even, as the published network does,
    and the integers round them up; a current is a whole number of halves of the threshold only by chance.
    """

    module: str
    largest: int
    norm: int
    gain: float = 1.0

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps values of any shape to counts over `norm`."""
        currents = inputs[0] if self.gain == 1.0 else inputs[0] * self.gain
        counts: Tensor = run.network.get_submodule(self.module)(currents)
        return counts

    def lower(self, lowering: Lowering) -> None:
        """Writes the layer that they read with its results as counts, or else a `requantize` operation."""
        bound, one = {"largest": self.largest}, self.norm * lowering.scales(self.output)
        layer = lowering.held.pop(self.inputs[0], None)
        if layer is not None:
            factors = lowering.requantization(layer.unit * self.gain / one)
            node = replace(layer.node, output=self.output)
            tensors = {**layer.tensors, **factors}
            lowering.emit(node, layer.kind, attributes={**layer.attributes, **bound}, tensors=tensors)
            return
        unit = lowering.current(self.inputs[0]).unit
        lowering.emit(self, "requantize", attributes=bound, tensors=lowering.requantization(unit * self.gain / one))


@dataclass(frozen=True, kw_only=True)
class MaxPoolNode(Node):
    """The nn.MaxPool2d at `module`, on currents, streams or spikes."""

    module: str

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps (..., H, W, C) to fewer rows and columns."""
        x = inputs[0]
        pool: Any = run.network.get_submodule(self.module)
        images = x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)
        y = F.max_pool2d(images, pool.kernel_size, pool.stride, pool.padding).permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    def lower(self, lowering: Lowering) -> None:
        """Writes a `max_pool` operation."""
        pool: Any = lowering.network.get_submodule(self.module)
        pairs = {
            key: [value, value] if isinstance(value, int) else list(value)
            for key, value in (("kernel", pool.kernel_size), ("stride", pool.stride), ("padding", pool.padding))
        }
        lowering.pass_current(self.inputs[0], self.output)
        lowering.emit(self, "max_pool", attributes=pairs)


@dataclass(frozen=True, kw_only=True)
class SpikeAttentionNode(Node):
    """The counts q (k^T v) of spikes, per time step with `tokens` tokens.

    The module at `module` has `num_heads`. Channels are ordered by head, then dimension.
    """

    module: str
    steps: int
    tokens: int

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps q, k and v, each (N, T, ..., C), or (N, ..., C) if neurons give counts, to counts of the shape of v."""
        module: Any = run.network.get_submodule(self.module)
        heads, shape = int(module.num_heads), inputs[2].shape
        q, k, v = (x.reshape(len(x), self.steps, -1, heads, x.shape[-1] // heads).transpose(2, 3) for x in inputs)
        attended: Tensor = (q @ (k.transpose(-2, -1) @ v)).transpose(2, 3).reshape(shape)
        return attended

    def lower(self, lowering: Lowering) -> None:
        """Writes a `spike_attention` operation."""
        heads: Any = lowering.network.get_submodule(self.module).num_heads
        q, v = lowering.spec(self.inputs[0]), lowering.spec(self.inputs[2])
        unit = math.prod(lowering.scalar_scale(value) for value in self.inputs)
        lowering.counted(self.output, v.channels, reach=self.tokens * q.channels / heads, unit=unit)
        lowering.emit(self, "spike_attention", attributes={"windows": self.steps, "heads": int(heads)})


@dataclass(frozen=True, kw_only=True)
class BlockSumNode(Node):
    """Sums over all tokens of a time step (`over="tokens"`), or over the channels of each head (`over="channels"`).

    `rows` is the number of rows of the integer result, time steps times tokens that are left, and `groups` is its
    number of channels.
    """

    over: str
    rows: int
    groups: int

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Maps (N, T, H, W, C) to (N, T, 1, 1, C), or to (N, T, H, W, groups); T may be missing."""
        x = inputs[0]
        if self.over == "tokens":
            return x.sum(dim=(-3, -2), keepdim=True)
        by_head: Tensor = x.unflatten(-1, (self.groups, -1)).sum(-1)
        return by_head

    def lower(self, lowering: Lowering) -> None:
        """Writes a `block_sum` operation."""
        spec = lowering.spec(self.inputs[0])
        unit = lowering.scales(self.inputs[0])[: self.groups]
        reach = float(CURRENT_MAX) if spec.bits > 8 else 2.0**16  # for counts; only the fraction bits depend on it
        lowering.currents[self.output] = Current(unit=unit, bias=np.zeros(len(unit)), reach=reach)
        lowering.emit(self, "block_sum", attributes={"rows": self.rows, "channels": self.groups})


@dataclass(frozen=True, kw_only=True)
class GateNode(Node):
    """Spikes times spikes; the second input has one spike for all tokens of a step, or for all channels of a head."""

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """Multiplies the first input by the second one, repeated to its shape."""
        x, gate = inputs
        if gate.shape[-1] != x.shape[-1]:
            gate = gate.repeat_interleave(x.shape[-1] // gate.shape[-1], dim=-1)
        return x * gate

    def lower(self, lowering: Lowering) -> None:
        """Writes a `multiply` operation."""
        lowering.emit(self, "multiply")


@dataclass(frozen=True, kw_only=True)
class RequantizeNode(Node):
    """A stream, converted to the unit of another quantizer."""

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """The input as it is."""
        return inputs[0]

    def lower(self, lowering: Lowering) -> None:
        """Writes a `requantize` operation."""
        factor = lowering.scales(self.inputs[0]) / lowering.scales(self.output)
        lowering.emit(self, "requantize", tensors=lowering.requantization(factor))


@dataclass(frozen=True, kw_only=True)
class WidenNode(Node):
    """Spikes as int32, before they join a stream; `rows` is time steps times tokens."""

    rows: int

    def forward(self, run: Run, *inputs: Tensor) -> Tensor:
        """The input as it is."""
        return inputs[0]

    def lower(self, lowering: Lowering) -> None:
        """Writes a `block_sum` operation over blocks of one value."""
        channels = lowering.spec(self.inputs[0]).channels
        lowering.emit(self, "block_sum", attributes={"rows": self.rows, "channels": channels})

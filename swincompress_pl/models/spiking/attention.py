"""spikingjelly's attentions for any number and width of heads, with the same state and the same function.

spikingjelly takes the width of a head from that of the input, so its attentions cannot lose dimensions. Pruning changes
the class of the modules that it cuts to one of these, which take widths from the weights.
"""

from __future__ import annotations

from spikingjelly.activation_based.layer.attention import QKAttention, SpikeDrivenSelfAttention, SpikingSelfAttention
from spikingjelly.activation_based.model.maxformer import _MaxCifarSSA
from torch import Tensor, nn

MaxCifarSelfAttention: type[nn.Module] = _MaxCifarSSA


class ResizableSpikingSelfAttention(SpikingSelfAttention):  # type: ignore[misc]  # spikingjelly is not typed
    """Self-attention whose qkv has rows of q and k of one width, and of v with the width that the projection reads."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """Maps (T, N, C, L) to spikes of the same shape."""
        q, k, v = _heads(self.qkv_lif(self.qkv_conv_bn(x_seq)), self.num_heads, self.proj_conv_bn[0].in_channels)
        # The products are in spikingjelly's order; over spikes either order is exact.
        attended = v @ k.transpose(-2, -1) @ q * self.scale
        spikes = self.attn_lif(attended).flatten(2, 3)
        result: Tensor = self.proj_lif(self.proj_conv_bn(spikes))
        return result


class ResizableMaxCifarSelfAttention(_MaxCifarSSA):  # type: ignore[misc]  # spikingjelly is not typed
    """Self-attention whose qkv has rows of q and k of one width, and of v with the width that the projection reads."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, C, L) to real values of the same shape."""
        q, k, v = _heads(self.qkv_lif(self.qkv(self.input_lif(x))), self.num_heads, self.proj[0].in_channels)
        attended = v @ k.transpose(-2, -1) @ q * 0.125
        result: Tensor = self.proj(self.attn_lif(attended.flatten(2, 3)))
        return result


class ResizableQKAttention(QKAttention):  # type: ignore[misc]  # spikingjelly is not typed
    """Attention whose qk has rows of q, and then of k with the width that the projection reads."""

    def forward(self, x_seq: Tensor) -> Tensor:
        """Maps (T, N, C, L) to spikes of the same shape."""
        qk = self.qk_lif(self.qk_conv_bn(x_seq))
        width = self.proj_conv_bn[0].in_channels
        q, k = (part.unflatten(2, (self.num_heads, -1)) for part in qk.split([qk.shape[2] - width, width], dim=2))
        gate = self.attn_lif(q.sum(self.sum_dim, keepdim=True))
        result: Tensor = self.proj_lif(self.proj_conv_bn((gate * k).flatten(2, 3)))
        return result


class ResizableSpikeDrivenSelfAttention(SpikeDrivenSelfAttention):  # type: ignore[misc]  # spikingjelly is not typed
    """Attention of each channel separately; heads play no part in the arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, N, C, H, W) to real values of the same shape."""
        spikes = self.shortcut_lif(x)
        q = self.q_lif(self.q_bn(self.q_conv(spikes)))
        k = self.k_lif(self.k_bn(self.k_conv(spikes)))
        v = self.v_lif(self.v_bn(self.v_conv(spikes)))
        gate = self.attn_lif((k * v).sum((-2, -1), keepdim=True))
        result: Tensor = self.proj_bn(self.proj_conv(q * gate)) + x
        return result


def _heads(qkv: Tensor, heads: int, v_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N, q | k | v, L) -> three (T, N, heads, dimensions, L)."""
    width = (qkv.shape[2] - v_width) // 2
    q, k, v = (part.unflatten(2, (heads, -1)) for part in qkv.split([width, width, v_width], dim=2))
    return q, k, v

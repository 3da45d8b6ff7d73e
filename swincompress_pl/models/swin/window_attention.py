"""timm's Swin v2 attention for any number and width of heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor

_MAX_LOG_SCALE = math.log(100.0)


class ResizableWindowAttention(WindowAttention):
    """timm's v2 `WindowAttention` for an output of another width than its input; state and function are the same.

    timm's forward reshapes the heads to the width of the input, so it cannot lose heads, dimensions of heads, or
    channels of the stream. Pruning changes the class of the modules that it cuts to this one.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps (windows, tokens, channels) to the same; the logits get `mask` (windows per image, tokens, tokens)."""
        windows, tokens, _ = x.shape
        qkv = self._qkv(x).reshape(windows, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = cosine * self.logit_scale.clamp(max=_MAX_LOG_SCALE).exp() + self._position_bias()
        if mask is not None:
            images = logits.reshape(-1, mask.shape[0], self.num_heads, tokens, tokens) + mask[:, None]
            logits = images.reshape(-1, self.num_heads, tokens, tokens)
        attended = self.attn_drop(self.softmax(logits)) @ v
        projected: Tensor = self.proj_drop(self.proj(attended.transpose(1, 2).reshape(windows, tokens, -1)))
        return projected

    def _qkv(self, x: Tensor) -> Tensor:
        if self.q_bias is None or self.k_bias is None or self.v_bias is None:
            bias = None
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if bias is None or self.qkv_bias_separate:
            qkv: Tensor = self.qkv(x)
            return qkv if bias is None else qkv + bias
        return F.linear(x, self.qkv.weight, bias)

    def _position_bias(self) -> Tensor:
        """(heads, tokens, tokens), between 0 and 16."""
        table = self.cpb_mlp(self.relative_coords_table).reshape(-1, self.num_heads)
        bias: Tensor = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        return bias

"""What the pruning groups of several families have in common.

Four kinds of group. "heads": q, k and v rows, the projection's columns, the position bias; the attention scale stays.
"head_dim": one dimension of all heads of an attention, of q, k and v; the scale stays that of the whole head. "mlp":
hidden channels. "embed": channels of a residual stream (a stage of Swin, all of a ViT), with the LayerNorms on it.
Proven by `masked == sliced` in the tests. A variant whose couplings are not written down is refused by name rather
than cut wrongly, or, where heads and channels are known but the rest is not, lacks the other kinds.
"""

"""What the pruning groups of several families have in common.

There are four kinds of group:

- "heads": rows of q, k and v, columns of the projection, and the position bias. The attention's scale stays.
- "head_dim": one dimension of q, k and v in all heads of an attention. The scale stays that of the whole head.
- "mlp": hidden channels.
- "embed": channels of a residual stream (a stage of Swin, all of a ViT), with the LayerNorms on it.

The tests prove the groups by `masked == sliced`. A variant with unknown couplings is refused by name, so that nothing
is cut wrongly. If only heads and channels are known, the variant lacks the other kinds.
"""

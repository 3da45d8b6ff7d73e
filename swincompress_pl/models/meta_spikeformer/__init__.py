"""Meta-SpikeFormer (Spike-driven Transformer v2): the network itself, adapter, pruning groups, graph."""

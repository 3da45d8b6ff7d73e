"""Meta-SpikeFormer (Spike-driven Transformer v2): the network itself and its pruning groups."""

from swincompress_pl._deprecated import find_old_name

__all__: list[str] = []


def __getattr__(name: str) -> object:
    return find_old_name("models.meta_spikeformer", name)

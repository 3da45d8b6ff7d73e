"""Compression of vision transformers, standard and spiking, that ends in an integer engine.

The rooms are imported by name (`swincompress_pl.callbacks`, `.models`, `.quant`, `.accel`, ...); this module imports
none of them, so that `import swincompress_pl.accel` needs neither torch nor lightning.
"""

from swincompress_pl._deprecated import install as _find_old_modules

__version__ = "0.1.0"

_find_old_modules()

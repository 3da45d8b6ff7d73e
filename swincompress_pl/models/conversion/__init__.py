"""Networks of torchvision and Hugging Face transformers as networks of timm, which the package compresses.

Neither library is imported here for this: classes are recognized by their names.
"""

from swincompress_pl.models.conversion import published  # noqa: F401  # it registers their names for create_model
from swincompress_pl.models.conversion.convert import to_timm

__all__ = ["to_timm"]

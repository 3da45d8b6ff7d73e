"""Networks of torchvision and Hugging Face transformers as networks of timm, which the package compresses.

Classes are recognized by their names. transformers is imported only where `create_model` is given one of its networks.
"""

from swincompress_pl.models.conversion import published  # noqa: F401  # it registers their names for create_model
from swincompress_pl.models.conversion.convert import to_timm

__all__ = ["to_timm"]

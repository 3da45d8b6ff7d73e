"""A Program in the formats of other runtimes.

`to_onnx` writes ONNX whose integers equal the specification's to the bit. It needs the package onnx
(`pip install swincompress_pl[onnx]`); to run what it wrote, onnxruntime.

Example::

    interop.to_onnx(accel.load("model.safetensors").program, "model.onnx")
    session = onnxruntime.InferenceSession("model.onnx")
    logits, integer_logits = session.run(None, {"images": images})  # uint8 (N, H, W, 3)
"""

from __future__ import annotations

from swincompress_pl.interop.files import FORMS, describe_onnx, to_onnx

__all__ = ["FORMS", "describe_onnx", "to_onnx"]


def __dir__() -> list[str]:
    return __all__

"""Artifacts made by hand, right or wrong in any part, with a right checksum over whatever they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from swincompress_pl import spec
from swincompress_pl.accel import artifact

Array = npt.NDArray[Any]
CODES = {"int8": "I8", "uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64"}


def container(header: Any, payload: bytes = b"") -> bytes:
    """A safetensors file with this header, JSON-able or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def header_of(tensors: Mapping[str, Array], metadata: str) -> tuple[dict[str, Any], bytes]:
    """(header, payload) of tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {artifact.METADATA_KEY: metadata}}
    payload = b""
    for key, tensor in tensors.items():
        offsets = [len(payload), len(payload) + tensor.nbytes]
        header[key] = {"dtype": CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
        payload += tensor.tobytes()
    return header, payload


def described(description: Any, tensors: Mapping[str, Array], layout: Any = None) -> str:
    """The metadata entry; `tensors` are as in memory, `layout` says how they are stored."""
    content = {"format": artifact.FORMAT, "version": 1, "description": description}
    content["sha256"] = artifact.checksum(description, tensors)
    if layout is not None:
        content |= {"version": 3 if "sparse" in layout else 2, "storage": layout}
    return json.dumps(content)


def sealed(description: Any, tensors: Mapping[str, Array], stored: Any = None, layout: Any = None) -> bytes:
    """An artifact whose checksum is right; `stored` is what lies in the file where that differs."""
    return container(*header_of(tensors if stored is None else stored, described(description, tensors, layout)))


def parts(program: spec.Program) -> tuple[dict[str, Any], dict[str, Array]]:
    """(description, tensors), both free to be changed."""
    return json.loads(json.dumps(program.describe())), {key: np.array(t) for key, t in program.tensors.items()}

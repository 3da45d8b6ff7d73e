"""Compressed artifacts that take more than they should: what each is, and what every reader has to say."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from typing import Any

import numpy as np

from support.artifact_bytes import container, header_of
from swincompress_pl.accel import artifact, storage


def coded(description: bytes, streams: dict[str, bytes] | None = None, size_bytes: Any = None) -> bytes:
    """A compressed artifact with this text as its description and storage, and streams of these bytes."""

    def stream(data: bytes) -> Any:
        return np.frombuffer(lzma.compress(data, lzma.FORMAT_RAW, filters=storage._LZMA_FILTERS), np.uint8)

    declared = {"coder": "lzma", "size_bytes": len(description) if size_bytes is None else size_bytes}
    text = json.dumps({"format": artifact.FORMAT, "version": 2, "sha256": "0" * 64, "content": declared})
    tensors = {"content": stream(description)} | {name: stream(data) for name, data in (streams or {}).items()}
    return container(*header_of(tensors, text))


def one_stream(key: str = "w", size: int = 64, bits: int = 8) -> bytes:
    entry = {"coder": "lzma", "dtype": "int8", "bits": bits, "tensors": [[key, [size]]]}
    return json.dumps({"description": {}, "storage": {"streams": [entry]}}).encode()


def noise(count: int) -> bytes:
    """Text that does not compress: what it declares is within its ratio."""
    return np.random.default_rng(0).integers(97, 123, count).astype(np.uint8).tobytes()


LARGE = 2**24 - 1000
EVIL: dict[str, tuple[Callable[[], bytes], str]] = {
    "long": (lambda: coded(b"[" + b"[]," * (LARGE // 3) + b"[]]"), "at most [0-9]+ are read"),
    "declared": (lambda: coded(b"{}", size_bytes=2**63), "at most [0-9]+ are read"),
    "boolean": (lambda: coded(b"{", size_bytes=True), "at most [0-9]+ are read"),
    "negative": (lambda: coded(b"{}", size_bytes=-1), "declaration is wrong"),
    "values": (
        lambda: coded(b'{"noise":"' + noise(2**19) + b'","x":[' + b"[]," * (2**22) + b"0]}"),
        "more than 1048576 values",
    ),
    "objects": (
        lambda: coded(b'{"noise":"' + noise(2**19) + b'","x":[' + b'{"a":0},' * (2**20) + b"0]}"),
        "more than 1048576 values",
    ),
    "nested": (lambda: coded(b"[" * 2**20), "not JSON: nested deeper than 64"),
    "nested less": (lambda: coded(b"[" * 2**19 + b"]" * 2**19), "not JSON"),
    "quotes": (lambda: coded(b'"' + b'\\"' * 2**19), "not JSON"),
    "digits": (lambda: coded(b'{"x":' + b"1" * 2**20 + b"}"), "does not say how its tensors are stored"),
    "digits of bits": (lambda: coded(b'{"storage":{"streams":' + b"1" * 2**20 + b"}}"), "truncated or damaged"),
    "twice": (lambda: coded(b'{"storage":{},"storage":{"streams":[]}}'), 'not JSON: key "storage" is given twice'),
    "name": (lambda: coded(one_stream("n" * 2**20), {"stream0": bytes(64)}), "name of (more than 1024|1048576) bytes"),
    "zeros": (lambda: coded(one_stream(size=2**26), {"stream0": bytes(2**26)}), "coded bytes declare 67108864"),
    "zeros of 2 bits": (
        lambda: coded(one_stream(size=2**26, bits=2), {"stream0": bytes(2**24)}),
        "coded bytes declare 67108864",
    ),
    "shape": (lambda: coded(one_stream(size=2**63), {"stream0": bytes(64)}), "coded bytes declare|has shape"),
}

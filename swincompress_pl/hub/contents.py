"""The files of a published folder, and config.json, which lists them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
NETWORK = "network.safetensors"
ARTIFACT = "artifact.safetensors"
REPORT = "report.json"
CARD = "README.md"
FILES = (NETWORK, ARTIFACT, REPORT, CARD)
"""All files but config.json, which is written last."""
LIBRARY = "swincompress_pl"
FORMAT = 1
_BLOCK = 1 << 20


def digest(file: Path) -> str | None:
    """The SHA-256 of a file; None if there is none."""
    found = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                found.update(block)
    except FileNotFoundError:
        return None
    return found.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json that `save_pretrained` wrote; an error names what is wrong with it."""
    file = folder / CONFIG
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder}: there is no {CONFIG} of {LIBRARY} in it; give a folder that save_pretrained wrote, or "
            "OWNER/NAME of the Hugging Face Hub"
        ) from error
    except PermissionError as error:
        raise PermissionError(f"{file}: cannot be read ({error.strerror}); give read access to it") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); it is damaged, so save the network again") from error
    if not isinstance(content, dict) or content.get("library_name") != LIBRARY:
        raise ValueError(f"{file}: not of {LIBRARY}; models.create_model takes networks of timm and transformers")
    if content.get("format") != FORMAT or not isinstance(content.get("files"), Mapping):
        raise ValueError(f"{file}: format {content.get('format')!r}, this version reads {FORMAT}; update {LIBRARY}")
    return content


def altered(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The files that are others than config.json lists: those of a save that was interrupted, or edited by hand."""
    listed = config["files"]
    return [name for name in FILES if digest(folder / name) != listed.get(name)]

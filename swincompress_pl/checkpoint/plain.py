"""Saves and loads a compressed network without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.checkpoint.compiled_keys import follow_compilation
from swincompress_pl.checkpoint.networks import difference_from, record_of_network, restored_network
from swincompress_pl.checkpoint.record import UNNAMED, CompressionRecord, read_checkpoint
from swincompress_pl.files import write_file
from swincompress_pl.interrupts import all_or_nothing


def save_network(network: nn.Module, path: str | Path) -> Path:
    """Saves a network with what was done to it, so that `load_network` can load it into a fresh network.

    The file is a checkpoint of plain data and tensors, as Lightning writes it. It appears complete or not at all.

    Args:
        network: A network that was pruned, masked, quantized, all of these or none; compiled or not.
        path: The file to write. An existing file is replaced.

    Returns:
        `path`.

    Raises:
        OSError: If the file cannot be written.
    """
    network = _uncompiled(network)
    checkpoint: dict[str, Any] = {"state_dict": network.state_dict()}
    CompressionRecord(networks={UNNAMED: record_of_network(network)}).write(checkpoint)
    return write_file(path, lambda file: torch.save(checkpoint, file))


def load_network(network: nn.Module, path: str | Path) -> nn.Module:
    """Loads what `save_network` saved, or the one compressed network of a Lightning checkpoint.

    Args:
        network: A fresh network, made as the saved one was before it was compressed. It gets the widths, masks and
            weights of the file. If the file cannot be loaded, it is left as it was.
        path: The file.

    Returns:
        The compressed network: `network` itself, or a `QuantizedNetwork` that wraps it. It is not compiled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, has no compression record or several, or is of another network.
    """
    return restored_with(network, read_checkpoint(path), str(path))


def restored_with(network: nn.Module, checkpoint: Mapping[str, Any], path: str) -> nn.Module:
    """The fresh `network` as the one network of a checkpoint was, see `load_network`; `path` is for messages."""
    networks = CompressionRecord.read(checkpoint).networks if isinstance(checkpoint, Mapping) else {}
    if len(networks) != 1:
        held = f"records of {len(networks)} networks, {', '.join(networks)}" if networks else "no compression record"
        remedy = "load it into its LightningModule" if networks else "load plain weights with load_state_dict"
        raise ValueError(f"{path} has {held}; load_network reads what save_network wrote: {remedy}")
    ((place, record),) = networks.items()
    network = _uncompiled(network)
    with all_or_nothing(written=[network]):
        restored = restored_network(network, record)
        _load(restored, _weights(checkpoint, place), path)
        different = difference_from(restored, record)
        if different is not None:
            raise ValueError(
                f"the network of {path} computes something else than the given {type(network).__name__}, though their "
                f"weights have the same names: {different}. Make the network as it was when it was saved"
            )
        return restored


def _uncompiled(network: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(network, "_orig_mod", network)  # of torch.compile
    return inner


def _weights(checkpoint: Mapping[str, Any], place: str) -> dict[str, Tensor]:
    """The weights of the network that the checkpoint's module held at `place`."""
    prefix = f"{place}." if place else ""
    state = checkpoint.get("state_dict", {})
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _load(network: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    loaded: dict[str, Any] = {"state_dict": weights}
    follow_compilation(network, loaded)
    try:
        network.load_state_dict(loaded["state_dict"])
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ValueError(
            f"the weights of {path} do not fit the given {type(network).__name__}: {reasons[0]} Make the network as it "
            "was when it was saved"
        ) from error

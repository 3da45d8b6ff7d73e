"""`save_pretrained` and `from_pretrained`: a compressed network as a folder of files, as the Hub holds them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from lightning import LightningModule
from torch import nn

from swincompress_pl import accel
from swincompress_pl.accel.pictures import with_preprocessing
from swincompress_pl.checkpoint.holder import float_network
from swincompress_pl.checkpoint.networks import record_of_network
from swincompress_pl.checkpoint.plain import restored_with
from swincompress_pl.checkpoint.record import UNNAMED, CompressionRecord
from swincompress_pl.files import write_file
from swincompress_pl.history import class_names_of, creation_of, history_of, set_class_names
from swincompress_pl.hub.card import Described, model_card
from swincompress_pl.hub.contents import (
    ARTIFACT,
    CARD,
    CONFIG,
    FILES,
    FORMAT,
    LIBRARY,
    NETWORK,
    REPORT,
    digest,
    read_config,
)
from swincompress_pl.hub.remote import download
from swincompress_pl.models.changes import changes_since_creation
from swincompress_pl.models.factory import recreate_model
from swincompress_pl.pictures import resolved
from swincompress_pl.quant.network import QuantizedNetwork
from swincompress_pl.report.record import RunRecord

_KEY = "swincompress_pl"
_VERSION = 1


def save_pretrained(
    network: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    license: str | None = None,
    report: RunRecord | str | Path | None = None,
    base_model: str | None = None,
    preprocessing: Any = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Saves a network with all that others need to use it.

    The folder gets these files, each complete or not at all:

    - network.safetensors: the float weights with what was done to them, for `from_pretrained`;
    - artifact.safetensors: the integer network for `accel.load`, if the network is quantized;
    - report.json: the report, if one is given;
    - README.md: a model card with the figures of the report. One that was edited by hand is left as it is;
    - config.json: the architecture, the input, the classes and the list of files.

    A folder of an earlier save is replaced file by file; other files in it stay.

    Args:
        network: A network of `create_model` or `to_timm`, as it is, pruned, masked, quantized or all of these.
        folder: The folder; it is made if needed.
        name: Name of the network, for its card; None for the name of the folder.
        license: License of the weights, as the Hub calls it, such as "apache-2.0". None leaves a placeholder in the
            card, which you replace before you publish.
        report: The record of the run, or the folder or file of a report. The card takes its figures from it.
        base_model: Repository of the network that was compressed, such as "timm/deit_tiny_patch16_224.fb_in1k".
        preprocessing: How a picture becomes pixels; see `accel.export`. None for what the network says.
        class_names: The names of the classes; None for those that the network has.

    Returns:
        The folder.

    Raises:
        TypeError: If `network` is no network, such as a LightningModule that holds one.
        ValueError: If nothing says how to build the network again, it was changed in another way than by this package,
            there is not one name per class, or the preprocessing does not fit.
        FileNotFoundError: If there is no report.
        report.RecordError: If the report cannot be read.
        OSError: If a file cannot be written.
    """
    network = _plain(network)
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: it is a file, and a network is saved in a folder; name another one")
    record = report if report is None or isinstance(report, RunRecord) else RunRecord.load(report)
    names = _names(network, class_names)
    program = None
    images = _images(network, preprocessing)
    if isinstance(network, QuantizedNetwork):
        program = network.to_program()
        if preprocessing is not None:
            program = with_preprocessing(program, preprocessing)
        images = dict(program.input.preprocessing)
    inner: Any = float_network(network)
    stated = preprocessing is not None or getattr(inner, "preprocessing", None) is not None
    stored: dict[str, Any] = {
        "creation": creation_of(inner),
        "class_names": names,
        "preprocessing": images if stated else None,
    }
    described = Described(
        name=name or target.resolve().name,
        license=license,
        base_model=base_model,
        architecture=stored["creation"]["name"],
        num_classes=int(getattr(inner, "num_classes", 0)),
        class_names=names or (),
        preprocessing=images,
        history=history_of(network),
        quantization=None if program is None else {"method": network.method, "bits": str(network.bits)},
        report=record,
    )
    card = model_card(described)
    target.mkdir(parents=True, exist_ok=True)
    edited = _edited_card(target)
    _write_network(network, target / NETWORK, stored)
    _write_or_remove(target / ARTIFACT, None if program is None else partial(accel.export, _named(program, names)))
    _write_or_remove(target / REPORT, None if record is None else record.save)
    if not edited:
        _write_text(target / CARD, card)
    _write_config(target, described, edited)
    return target


def from_pretrained(
    place: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, token: str | None = None
) -> nn.Module:
    """Loads what `save_pretrained` saved.

    Args:
        place: A folder, or "OWNER/NAME" of the Hugging Face Hub.
        revision: Branch, tag or commit of the repository.
        cache_dir: Where downloads are kept; None for huggingface_hub's cache.
        token: Token of the Hub; None for the one that you logged in with.

    Returns:
        The network in evaluation: a network of timm, or a `QuantizedNetwork`, with the names of its classes and its
        preprocessing.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no network.
        PermissionError: If a file may not be read.
        ValueError: If a file is damaged or of another library, or the repository does not exist.
        ConnectionError: If the repository is not in the cache and cannot be fetched.
        ImportError: If a repository needs huggingface_hub, and it is not installed.
    """
    folder = download(place, (CONFIG, NETWORK), revision=revision, cache_dir=cache_dir, token=token)
    config = read_config(folder)
    file = folder / NETWORK
    if digest(file) != config["files"].get(NETWORK):
        warnings.warn(
            f"{file} is another file than {CONFIG} lists, such as of a save that was interrupted; it is whole, but the "
            "card and the artifact beside it may be of another network. Save the network again",
            stacklevel=2,
        )
    weights, stored = _read_network(file)
    network: Any = restored_with(recreate_model(stored["creation"]), weights, str(file))
    inner = float_network(network)
    names, images = stored.get("class_names"), stored.get("preprocessing")
    if isinstance(names, list) and len(names) == getattr(inner, "num_classes", None):
        set_class_names(inner, [str(each) for each in names])
    if isinstance(images, dict) and images.get("mean"):
        network.preprocessing = images
    return network.eval()  # type: ignore[no-any-return]


def _plain(network: Any) -> nn.Module:
    inner = getattr(network, "_orig_mod", network)  # of torch.compile
    if not isinstance(inner, nn.Module) or isinstance(inner, LightningModule):
        raise TypeError(
            f"{type(inner).__name__} is saved as it is held: give the network itself, such as module.net of a "
            "LightningModule"
        )
    creation = creation_of(float_network(inner))
    if creation is None:
        raise ValueError(
            f"{type(float_network(inner)).__name__}: nothing says how to build this network again; make it with "
            "models.create_model or models.to_timm"
        )
    changes_since_creation(float_network(inner))
    return inner


def _names(network: Any, given: Sequence[str] | None) -> list[str] | None:
    inner: Any = float_network(network)
    found = given if given is not None else getattr(network, "classes", None) or class_names_of(inner)
    if found is None:
        return None
    if isinstance(found, str) or len(found) != inner.num_classes:
        raise ValueError(f"class_names has {len(found)} names for {inner.num_classes} classes; give one per class")
    return [str(each) for each in found]


def _images(network: Any, given: Any) -> dict[str, Any]:
    """How the images are prepared, as far as it is known; empty for unknown."""
    inner: Any = float_network(network)
    told = given if given is not None else getattr(inner, "preprocessing", None) or getattr(inner, "pretrained_cfg", {})
    plain = told.to_dict() if hasattr(told, "to_dict") else told
    size = getattr(getattr(inner, "patch_embed", None), "img_size", None)
    if not isinstance(plain, Mapping) or not plain or size is None:
        return {}
    return resolved(plain, height=size[0], width=size[1])


def _named(program: Any, names: list[str] | None) -> Any:
    return program if names is None else dataclasses.replace(program, classes=tuple(names))


def _edited_card(folder: Path) -> bool:
    """Whether the folder has a card that `save_pretrained` did not write."""
    if not (folder / CARD).exists():
        return False
    try:
        edited = bool(digest(folder / CARD) != read_config(folder)["files"].get(CARD))
    except (ValueError, FileNotFoundError):
        edited = True
    if edited:
        warnings.warn(f"{folder / CARD} was edited, and stays; remove it for a new card", stacklevel=3)
    return edited


def _write_or_remove(file: Path, write: Callable[[Path], Any] | None) -> None:
    """Writes a file, or removes that of an earlier save."""
    if write is None:
        file.unlink(missing_ok=True)
    else:
        write(file)


def _write_config(folder: Path, described: Described, edited: bool) -> None:
    """Writes config.json, which lists the other files; an edited card has no digest."""
    files = {each: found for each in FILES if (found := digest(folder / each))}
    if edited:
        files[CARD] = "edited"
    content = {"library_name": LIBRARY, "format": FORMAT, **described.to_dict(), "files": files}
    _write_text(folder / CONFIG, json.dumps(content, indent=1) + "\n")


def _write_network(network: nn.Module, file: Path, stored: Mapping[str, Any]) -> None:
    record: dict[str, Any] = {}
    CompressionRecord(networks={UNNAMED: record_of_network(network)}).write(record)
    text = json.dumps({"version": _VERSION, **stored, "record": record}, allow_nan=False)
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    content = safetensors.torch.save(tensors, {_KEY: text})
    write_file(file, lambda stream: stream.write(content))


def _read_network(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(checkpoint with the weights and the record, what else is stored) of a network file; errors name it."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # it is no mapping
        stored = json.loads(text) if text else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: there is no such file; save the network again, or fetch it again") from error
    except PermissionError as error:
        raise PermissionError(f"{file}: cannot be read ({error.strerror}); give read access to it") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error}); fetch it again, or save the network again") from error
    if not isinstance(stored, dict) or stored.get("version") != _VERSION or not isinstance(stored.get("record"), dict):
        raise ValueError(f"{file}: no network that save_pretrained of this version wrote; save it again")
    return {"state_dict": tensors, **stored["record"]}, stored


def _write_text(file: Path, text: str) -> None:
    write_file(file, lambda stream: stream.write(text.encode("utf-8")))

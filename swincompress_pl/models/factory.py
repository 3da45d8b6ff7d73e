"""Networks by name: models and four classes of timm, spiking networks, and networks of hubs and other libraries."""

from __future__ import annotations

import difflib
import importlib
import reprlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from swincompress_pl.arguments import text
from swincompress_pl.checkpoint.compiled_keys import masks_as_named_in
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.history import note_size, set_class_names, set_creation
from swincompress_pl.models.downloads import announced
from swincompress_pl.models.sources import Source, split_name
from swincompress_pl.models.spiking.memory import without_memory
from swincompress_pl.models.stored_arguments import checked_creation, is_restoring, restoring, storable
from swincompress_pl.models.weights import load_weights
from swincompress_pl.pictures import CROP_MODES, INTERPOLATIONS, resolved
from swincompress_pl.registry import size_of
from swincompress_pl.stored_data import reading
from swincompress_pl.structure import set_attributes

# Lower-case name -> class of timm, for small inputs that no registered model has.
_CLASSES: dict[str, type[nn.Module]] = {
    "swintransformer": timm.models.SwinTransformer,
    "swin": timm.models.SwinTransformer,
    "swintransformerv2": timm.models.SwinTransformerV2,
    "visiontransformer": timm.models.VisionTransformer,
    "vit": timm.models.VisionTransformer,
    "visiontransformerdistilled": timm.models.VisionTransformerDistilled,
}
_CLASS_NAMES = ("SwinTransformer", "SwinTransformerV2", "VisionTransformer", "VisionTransformerDistilled")
_THEIRS = "spikingjelly.activation_based.model"
_OURS = "swincompress_pl.models"
# Name -> module with the builder or class of that name
_SPIKING = {
    "spikformer_ti": f"{_THEIRS}.spikformer",
    "spikformer_s": f"{_THEIRS}.spikformer",
    "spikformer_cifar10": f"{_THEIRS}.spikformer",
    "qkformer_10_384": f"{_THEIRS}.qkformer",
    "sdt_8_384": f"{_THEIRS}.spike_driven_transformer",
    "maxformer_10_384": f"{_THEIRS}.maxformer",
    "maxformer_cifar": f"{_THEIRS}.maxformer",
    "meta_spikeformer_8_256": f"{_OURS}.meta_spikeformer.network",
    "meta_spikeformer_8_384": f"{_OURS}.meta_spikeformer.network",
    "meta_spikeformer_8_512": f"{_OURS}.meta_spikeformer.network",
    "MetaSpikeFormer": f"{_OURS}.meta_spikeformer.network",
    "e_spikeformer_tiny": f"{_OURS}.e_spikeformer.network",
    "e_spikeformer_small": f"{_OURS}.e_spikeformer.network",
    "e_spikeformer_medium": f"{_OURS}.e_spikeformer.network",
    "e_spikeformer_large": f"{_OURS}.e_spikeformer.network",
    "ESpikeFormer": f"{_OURS}.e_spikeformer.network",
    "Spikformer": f"{_THEIRS}.spikformer",
    "QKFormer": f"{_THEIRS}.qkformer",
    "SpikeDrivenTransformer": f"{_THEIRS}.spike_driven_transformer",
    "MaxFormer": f"{_THEIRS}.maxformer",
}
_SPIKING_CLASSES = {name.lower(): name for name in _SPIKING if not name.islower()}


def create_model(
    name: str, *, pretrained: bool = False, checkpoint_path: str | Path | None = None, **kwargs: Any
) -> nn.Module:
    """Makes a network by name.

    The network remembers its arguments as `network.creation`, {"name": str, "kwargs": JSON data}. With these and a
    state dict it can be built again. Arguments that only say where weights come from are left out
    (`pretrained_cfg_overlay={"file": ...}`, `cache_dir`). Spiking networks forget between calls and answer once per
    call; see `models.without_memory`.

    Args:
        name: One of these:

            - a model of timm, with a tag or without, such as "swin_tiny_patch4_window7_224";
            - "SwinTransformer" ("swin"), "SwinTransformerV2", "VisionTransformer" ("vit") or
              "VisionTransformerDistilled", in any case, with the arguments of timm's class;
            - a model of spikingjelly, such as "spikformer_ti", of `meta_spikeformer`, such as "meta_spikeformer_8_256",
              or of `e_spikeformer`, such as "e_spikeformer_small";
            - a spiking class, "Spikformer", "QKFormer", "SpikeDrivenTransformer", "MaxFormer", "MetaSpikeFormer" or
              "ESpikeFormer", in any case, with its own arguments;
            - "hf-hub:OWNER/NAME" or "local-dir:FOLDER", a network of timm on the Hugging Face Hub or in a folder;
            - "hf:OWNER/NAME" or "hf:FOLDER", the same of transformers, which is converted as by `to_timm`;
            - "torchvision:NAME", such as "torchvision:swin_t", converted alike.

            The last three kinds say where to look, once. `network.creation` has the name and the arguments of timm's
            model or class that was found, so nothing is fetched to build it again. What they say of class names and of
            the images comes along, as `network.class_names` and for `preprocessing_for`.
        pretrained: Whether to take the published weights, which are downloaded if the cache has them not. What is
            fetched is logged first.
        checkpoint_path: File with weights to load instead: safetensors, torch or sharded, with this network alone or
            inside a checkpoint. None for random weights.
        **kwargs: Arguments of the network, as JSON-able data. Of torchvision, also `weights`, the name of published
            weights, such as "IMAGENET1K_V1"; `pretrained=True` takes the default ones.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: If the name is unknown (the message lists the closest known ones), an argument is not JSON-able
            data, `pretrained` has no published weights or stands beside `checkpoint_path`, or the weights of the file
            do not fit or are not finite; or if a repository or folder holds no network of its library.
        registry.UnsupportedNetworkError: If a network of transformers or torchvision has no conversion.
        TypeError: If the network does not take an argument.
        FileNotFoundError: If there is no file at `checkpoint_path`, or no folder at the place in `name`.
        PermissionError: If a file may not be read.
        ConnectionError: If what is published is not in the cache and cannot be fetched.
        ImportError: If "hf:" needs transformers, and it is not installed.
    """
    name = text("name", name, "the name of a model")
    source, place = split_name(name)
    if (pretrained or (source and kwargs.get("weights"))) and checkpoint_path is not None:
        given = "pretrained=True" if pretrained else f"weights={kwargs['weights']}"
        raise ValueError(f"{name}: {given} and checkpoint_path={checkpoint_path} are both given; choose one.")
    if source is not None:
        return _from_source(source, name, place, pretrained, checkpoint_path, kwargs)
    recorded = storable(name, kwargs)
    with reading(f"{name}: the stored arguments") if is_restoring() else nullcontext():
        build = _builder(name, pretrained)
        with announced(name, kwargs) if pretrained else nullcontext():
            network = build(**kwargs)
    if checkpoint_path is not None:
        load_weights(network, Path(checkpoint_path))
    _note_creation(network, name, recorded)
    return network


def _from_source(
    source: Source, name: str, place: str, pretrained: bool, checkpoint_path: str | Path | None, kwargs: dict[str, Any]
) -> nn.Module:
    """The network at a place where networks are published."""
    if is_restoring():
        raise ValueError(
            f"{ascii(reprlib.repr(name))[1:-1]} names a place, and a stored network is never fetched; files of this "
            "package name an architecture"
        )
    if not (pretrained or kwargs.get("weights") or checkpoint_path is not None):
        rank_zero_info(f"{name}: random weights; pretrained=True takes the published ones")
    found = source(name, place, pretrained, kwargs)
    if checkpoint_path is not None:
        load_weights(found.network, Path(checkpoint_path))
    _note_creation(found.network, found.name, found.arguments)
    if found.class_names:
        set_class_names(found.network, found.class_names)
    return found.network.train()


def _note_creation(network: nn.Module, name: str, arguments: Mapping[str, Any]) -> None:
    set_creation(network, name, arguments)
    note_size(network, size_of(network))


def recreate_model(creation: Mapping[str, Any]) -> nn.Module:
    """Makes the network that `network.creation` describes, with random weights; nothing is fetched, no file is read."""
    name, kwargs = checked_creation(creation)
    with restoring():
        return create_model(name, **kwargs)


def rebuild(origin: Mapping[str, Any]) -> nn.Module:
    """Rebuilds the float network that a Program's `origin` describes: pruned, and with random weights.

    Args:
        origin: {"network": `creation` of the network, "history": entries, "attributes": those changed by hand}. Entries
            of quantization in the history are passed over.

    Returns:
        The network.

    Raises:
        ValueError: If the origin does not say how its network was created, or an entry is damaged or unknown.
    """
    if not origin.get("network"):
        raise ValueError("the origin does not say how its network was created; build networks with models.create_model")
    history = [entry for entry in origin.get("history") or [] if "quantize" not in entry]
    network = recreate_model(origin["network"])
    set_attributes(network, origin.get("attributes") or {})  # before pruning, which follows the changes
    return restore_from_history(network, masks_as_named_in(network, history))


def _builder(name: str, pretrained: bool) -> Callable[..., nn.Module]:
    if timm.is_model(name.split(".")[0]):
        return lambda **kwargs: timm.create_model(name, pretrained=pretrained, **kwargs)
    builder: Callable[..., nn.Module]
    if name.lower() in _CLASSES:
        builder = _described(_CLASSES[name.lower()])
    elif name in _SPIKING or name.lower() in _SPIKING_CLASSES:
        builder = _spiking_builder(_SPIKING_CLASSES.get(name.lower(), name))
    else:
        raise ValueError(_unknown(name))
    if pretrained:
        raise ValueError(
            f"{name}: there are no published weights under this name; use checkpoint_path, or a model name of timm."
        )
    return builder


def _described(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    """A class of timm that takes `pretrained_cfg` as timm's models do: how images are prepared for its weights."""

    def build(*, pretrained_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> nn.Module:
        network: Any = kind(**kwargs)
        if pretrained_cfg:
            network.pretrained_cfg = dict(pretrained_cfg)
        return network  # type: ignore[no-any-return]

    return build


def _spiking_builder(name: str) -> Callable[..., nn.Module]:
    # Imported on use, because spikingjelly takes seconds to import and most networks do not spike.
    builder: Callable[..., nn.Module] = getattr(importlib.import_module(_SPIKING[name]), name)
    return lambda **kwargs: without_memory(builder(**kwargs))


def _unknown(name: str) -> str:
    known = [*_CLASS_NAMES, *_SPIKING, *timm.list_models()]
    by_lower = {entry.lower(): entry for entry in known}
    close = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=5)]
    hint = (
        f"did you mean {', '.join(close)}?"
        if close
        else f"examples: swin_tiny_patch4_window7_224, {', '.join(_SPIKING)}."
    )
    return (
        f"unknown model {name!r}; {hint} timm.list_models() lists timm's names; "
        f"{', '.join(_CLASS_NAMES)} take the arguments of timm's class."
    )


def preprocessing_for(network: nn.Module) -> dict[str, Any]:
    """How timm prepares images for a network.

    Args:
        network: A model of timm, with its `pretrained_cfg`.

    Returns:
        The fields of `data.Preprocessing`: sizes in pixels, mean and std in [0, 1] units.

    Raises:
        ValueError: If the network has no such description (timm's classes built directly, spiking networks), or needs a
            crop mode or an interpolation that Preprocessing does not have.
    """
    described = getattr(network, "pretrained_cfg", None)
    if not described:
        raise ValueError(
            f"{type(network).__name__}: has no preprocessing of its own; take that of the data "
            "(datamodule.preprocessing)."
        )
    found: dict[str, Any] = timm.data.config.resolve_data_config(model=network)  # type: ignore[no-untyped-call]
    _, height, width = found["input_size"]
    fields = resolved(found, height=height, width=width)
    for key, known in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS)):
        if fields[key] not in known:
            raise ValueError(
                f"{type(network).__name__}: {key} {fields[key]!r} is not supported, only {', '.join(known)}. "
                "Pass a Preprocessing of your own to the data."
            )
    return fields

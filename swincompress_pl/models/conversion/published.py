"""Published networks of transformers and torchvision by name, for `create_model`: found, converted, and described."""

from __future__ import annotations

import importlib
import typing
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from timm.models import load_pretrained
from torch import Tensor, nn

from swincompress_pl.history import class_names_of, creation_of, note_attributes, noted_attributes
from swincompress_pl.models.conversion.convert import family_of, to_timm
from swincompress_pl.models.conversion.description import Images, images_of_processor, images_of_weights
from swincompress_pl.models.conversion.family import pair
from swincompress_pl.models.downloads import announced_source, fetching
from swincompress_pl.models.factory import create_model
from swincompress_pl.models.sources import Published, checked_repository, read_config, register_source
from swincompress_pl.structure import set_attributes

_WITH_POOLER = ("ViTModel", "DeiTModel")  # timm has no pooler; they are made without it
_CLASSIFIERS = {
    "VisionTransformer": ["head"],
    "VisionTransformerDistilled": ["head", "head_dist"],
    "SwinTransformer": ["head.fc"],
    "SwinTransformerV2": ["head.fc"],
}


def _transformers(name: str, place: str, pretrained: bool, kwargs: Mapping[str, Any]) -> Published:
    folder = Path(place).expanduser()
    cache, kwargs = kwargs.get("cache_dir"), {key: value for key, value in kwargs.items() if key != "cache_dir"}
    is_folder = folder.exists() or place.startswith((".", "/", "~"))
    if is_folder:
        read_config(name, folder, "model_type")
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    else:
        repository, _, revision = checked_repository(name, place).partition("@")
        where = {"pretrained_model_name_or_path": repository} | ({"revision": revision} if revision else {})
    where |= {"cache_dir": cache} if cache else {}
    library = _library(name)
    with fetching(name, "config.json"):
        config = library.AutoConfig.from_pretrained(**where)
    kind = _class_of(name, library, config)
    _require_conversion(name, kind)
    own = {"add_pooling_layer": False} if kind.__name__ in _WITH_POOLER else {}
    if not pretrained:
        return _converted(name, kind(config, **own), _processor(name, library, where), None, kwargs)
    with fetching(name, "the weights") if is_folder else announced_source(name, f"the weights {place}"):
        original, report = kind.from_pretrained(
            **where, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **own
        )
    _check_report(name, kind, report)
    return _converted(name, original, _processor(name, library, where), None, kwargs)


def _check_report(name: str, kind: type, report: Mapping[str, Any]) -> None:
    """Refuses weights that are others than those of the class, which transformers replaces by random ones."""
    missing = [f"{key} missing" for key in sorted(report["missing_keys"])]
    other = [
        f"{key} {tuple(found)} instead of {tuple(wanted)}" for key, found, wanted in sorted(report["mismatched_keys"])
    ]
    if missing or other:
        raise ValueError(
            f"{name}: its weights are not those of the {kind.__name__} that config.json describes: "
            f"{', '.join([*missing, *other][:4])}; correct `architectures`, the sizes or `id2label` in config.json"
        )


def _require_conversion(name: str, kind: type) -> None:
    """Refuses a class before anything is made or fetched."""
    try:
        family_of(kind)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{name}: transformers cannot be imported ({error}); pip install transformers") from error


def _class_of(name: str, library: Any, config: Any) -> Any:
    """The class that a configuration says, or else its class for classification; weights are not needed for that."""
    told = next(iter(config.architectures or ()), None)
    found = getattr(library, told, None) if told else _for_classification(library, config)
    if found is None:
        raise ValueError(
            f"{name}: its config.json says architectures={config.architectures} and model_type={config.model_type!r}, "
            f"which transformers {library.__version__} has no class for; update transformers, or choose another network"
        )
    return found


def _for_classification(library: Any, config: Any) -> Any:
    known = library.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    named = known.get(config.model_type)
    return getattr(library, named[0] if isinstance(named, tuple) else named, None) if named else None


def _processor(name: str, library: Any, where: Mapping[str, Any]) -> Images | None:
    """What the image processor says; None, with a warning, if there is none or it prepares images in another way."""
    try:
        return images_of_processor(library.AutoImageProcessor.from_pretrained(**where))
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
    warnings.warn(
        f"{name}: how its images are prepared is not known ({reason}); pass a preprocessing where one is needed",
        stacklevel=5,
    )
    return None


def _torchvision(name: str, place: str, pretrained: bool, kwargs: Mapping[str, Any]) -> Published:
    models, asked = torchvision.models, kwargs.get("weights")
    try:
        builder = models.get_model_builder(place)
    except ValueError as error:
        known = ", ".join(models.list_models(module=models, include=["vit_*", "swin_*"]))
        raise ValueError(
            f"{name}: torchvision {torchvision.__version__} has no such model; these are converted: {known}"
        ) from error
    _require_conversion(name, typing.get_type_hints(builder)["return"])
    weights = _weights(name, models.get_model_weights(place), asked) if asked or pretrained else None
    with announced_source(name, f"the weights {weights} of torchvision") if weights else nullcontext():
        original = builder(weights=weights)
    rest = {key: value for key, value in kwargs.items() if key != "weights"}
    return _converted(name, original, images_of_weights(weights) if weights else None, weights, rest)


def _weights(name: str, known: Any, asked: Any) -> Any:
    """The published weights of a name such as "IMAGENET1K_V1" or "Swin_T_Weights.IMAGENET1K_V1"; None for default."""
    wanted = "DEFAULT" if asked is None else str(asked).removeprefix(f"{known.__name__}.")
    if wanted not in known.__members__:
        names = ", ".join(known.__members__)
        raise ValueError(f"{name}: there are no weights {asked!r}; choose one of {names}")
    return known[wanted]


def _converted(
    name: str, original: nn.Module, images: Images | None, weights: Any, kwargs: Mapping[str, Any]
) -> Published:
    """The network of timm, with other arguments than its own if there are some."""
    size = pair(kwargs["img_size"]) if kwargs.get("img_size") else None
    family = family_of(type(original))
    if images is not None and size is None:
        size = images.size if family.any_size else None
    try:
        network: Any = to_timm(original, image_size=size if family.any_size else None)
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from error
    creation = creation_of(network)
    assert creation is not None
    if weights is not None and not hasattr(network, "class_names"):
        network.class_names = tuple(weights.meta["categories"])
    wanted = creation["kwargs"] | dict(kwargs)
    if images is not None and wanted["in_chans"] == len(images.mean):  # what is known is for its own channels
        height, width = pair(wanted["img_size"])
        described = images.pretrained_cfg() | {"num_classes": creation["kwargs"]["num_classes"]}
        wanted["pretrained_cfg"] = described | {"input_size": [len(images.mean), height, width]}
    made = _rebuilt(creation["name"], network, wanted)
    stored = creation_of(made)
    assert stored is not None
    names = class_names_of(network) if made.num_classes == network.num_classes else None
    return Published(network=made, name=stored["name"], arguments=stored["kwargs"], class_names=names or ())


def _rebuilt(name: str, network: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """`network` with other arguments. Weights of another size are resampled, and another head is new, as in timm."""
    made: Any = create_model(name, **arguments)
    attributes = noted_attributes(network)
    set_attributes(made, attributes)
    note_attributes(made, attributes)
    weights, wanted = network.state_dict(), made.state_dict()
    if {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in wanted.items()}:
        made.load_state_dict(weights)
        return made  # type: ignore[no-any-return]
    described = {
        "state_dict": weights,
        "num_classes": network.num_classes,
        "input_size": [network.patch_embed.proj.in_channels, 1, 1],
        "first_conv": "patch_embed.proj",
        "classifier": _CLASSIFIERS[name],
        "architecture": name,
    }
    channels = made.patch_embed.proj.in_channels
    load_pretrained(made, described, num_classes=made.num_classes, in_chans=channels, filter_fn=_resampled)
    return made  # type: ignore[no-any-return]


def _resampled(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Timm's filter for the network, which resamples what follows the image size."""
    module = importlib.import_module(type(network).__module__)
    head = {} if "head.fc.weight" in weights else {"head.fc.weight": torch.zeros(0)}  # Swin's filter looks for it
    found = module.checkpoint_filter_fn(weights | head if "swin" in module.__name__ else weights, network)
    return {key: value for key, value in found.items() if key not in head}


register_source("hf", _transformers)
register_source("torchvision", _torchvision)

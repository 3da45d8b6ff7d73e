"""Names that say where a network is: "hf-hub:org/name", "local-dir:folder", "hf:org/name", "torchvision:swin_t".

A source finds the architecture and its arguments first. Only these are stored, so nothing is fetched to build the
network again. The sources of other libraries register themselves: see `conversion.published`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from swincompress_pl.arguments import shown
from swincompress_pl.models.downloads import fetching
from swincompress_pl.models.stored_arguments import storable


@dataclass(frozen=True, kw_only=True)
class Published:
    """A network from a source.

    Attributes:
        network: The network.
        name: Name for `create_model`, without a source.
        arguments: The arguments that make the same architecture, as JSON data.
        class_names: The names of its classes, one per class; empty if the source does not name them.
    """

    network: nn.Module
    name: str
    arguments: dict[str, Any]
    class_names: tuple[str, ...] = ()


_HINTS = {  # key of config.json: what to do without it
    "architecture": "it is none of timm; for a network of transformers give hf:OWNER/NAME or hf:FOLDER",
    "model_type": "it is none of transformers; for a network of timm give hf-hub:OWNER/NAME or local-dir:FOLDER",
}

Source = Callable[[str, str, bool, Mapping[str, Any]], Published]
"""(whole name, the part after the source, whether with weights, arguments) -> the network."""


def register_source(scheme: str, source: Source) -> None:
    """Adds the source of names that start with `scheme` and a colon."""
    SOURCES[scheme] = source


def split_name(name: str) -> tuple[Source | None, str]:
    """The source of a name and the place there; None if it has none. A ValueError names the sources there are."""
    scheme, colon, place = name.partition(":")
    if not colon:
        return None, name
    source = SOURCES.get(scheme.lower().replace("_", "-"))
    if source is None or not place:
        problem = f"unknown source {scheme!r}" if source is None else f"nothing follows {scheme!r}:"
        raise ValueError(
            f"{name}: {problem}; there are hf-hub:OWNER/NAME and local-dir:FOLDER of timm, hf:OWNER/NAME and hf:FOLDER "
            "of transformers, and torchvision:NAME"
        )
    return source, place


def _timm_hub(name: str, place: str, pretrained: bool, kwargs: Mapping[str, Any]) -> Published:
    checked_repository(name, place)
    with fetching(name, "config.json"):
        try:
            found = load_model_config_from_hf(place)
        except KeyError as error:
            raise ValueError(f"{name}: its config.json has no {error}; {_HINTS['architecture']}") from error
    return _of_timm(name, found, pretrained, kwargs)


def _timm_folder(name: str, place: str, pretrained: bool, kwargs: Mapping[str, Any]) -> Published:
    folder = Path(place).expanduser()
    read_config(name, folder, "architecture")
    return _of_timm(f"local-dir:{folder}", load_model_config_from_path(folder), pretrained, kwargs)


def read_config(name: str, folder: Path, key: str) -> dict[str, Any]:
    """The config.json of a folder with a published network; an error names what is wrong with it.

    A ValueError is raised for a file without `key`, which libraries use to say what the network is.
    """
    file = folder / "config.json"
    try:
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: {folder} is no folder; give one with config.json and weights")
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        if not error.filename:
            raise
        raise FileNotFoundError(f"{name}: {folder} has no config.json; give the folder of one network") from error
    except PermissionError as error:
        raise PermissionError(f"{name}: {file} cannot be read ({error.strerror}); give read access to it") from error
    except ValueError as error:
        raise ValueError(f"{name}: {file} is not JSON ({error}); it is damaged, so fetch it again") from error
    if not isinstance(content, dict) or not content.get(key):
        raise ValueError(f"{name}: {file} has no {key!r}; {_HINTS[key]}")
    return content


def checked_repository(name: str, place: str) -> str:
    """`place`; a ValueError unless it is a repository of the Hub, with a revision or without."""
    repository, _, revision = place.partition("@")
    if not all(repository.split("/")) or repository.count("/") > 1 or "@" in revision:
        raise ValueError(f"{name}: {place!r} is no repository; give OWNER/NAME, or OWNER/NAME@REVISION")
    return place


def _of_timm(name: str, found: tuple[Any, str, Any], pretrained: bool, kwargs: Mapping[str, Any]) -> Published:
    """The network that a configuration of timm describes; timm itself applies the arguments in it."""
    described, architecture, arguments = found
    if not timm.is_model(architecture):
        raise ValueError(
            f"{name}: its architecture {shown(architecture)} is no model of timm {timm.__version__}; update timm, or "
            "choose another repository"
        )
    if "pretrained_cfg" in kwargs:
        raise ValueError(f"{name}: the repository has its own pretrained_cfg; change fields by pretrained_cfg_overlay")
    stored = storable(architecture, {"pretrained_cfg": dict(described), **(arguments or {}), **kwargs})
    with fetching(name, "the weights") if pretrained else nullcontext():
        network: Any = timm.create_model(name, pretrained=pretrained, **kwargs)
    labels = label_names(name, described) if described.get("num_classes") == network.num_classes else ()
    return Published(network=network, name=architecture, arguments=stored, class_names=labels)


def label_names(name: str, described: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a configuration of timm, in their order; empty if there are none.

    A ValueError is raised unless there is one per class.
    """
    names, count = described.get("label_names"), described.get("num_classes")
    if isinstance(names, Mapping):  # the class numbers are strings, as in all JSON
        names = [names[key] for key in sorted(names, key=int)]
    if not names:
        return ()
    if len(names) != count:
        raise ValueError(
            f"{name}: its configuration has {len(names)} label_names for num_classes={count}; give one name per class"
        )
    return tuple(str(each) for each in names)


SOURCES: dict[str, Source] = {"hf-hub": _timm_hub, "local-dir": _timm_folder}

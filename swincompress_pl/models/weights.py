"""Loads weights from files of other tools: prefixes of wrappers, averaged weights, official layouts."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swincompress_pl.checkpoint.record import histories_in
from swincompress_pl.models.weights_file import is_shard, read_weights_file

# Wrappers that add their name to the names of what they wrap, at any depth.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Where training scripts put a network: the keys of a checkpoint, the attributes of a module.
_USUAL = {"state_dict", "model_state_dict", "model_state", "module", "model", "net", "backbone", "student"}
_AVERAGED = re.compile(r"(^|_)(ema|averaged?|swa)(_|$)|^ema", re.IGNORECASE)
# Buffers that older timm versions saved and newer ones compute: the only keys of a file that may be left over.
_RECOMPUTED = ("relative_position_index", "attn_mask")
# Tensors whose shape follows the size of image or window; timm's filters resample them.
_SIZED = ("pos_embed", "relative_position_bias_table")


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a file that may be the network's: those under the prefix `place`, which their names leave out."""

    place: str
    tensors: Mapping[str, Tensor]
    problems: Mapping[str, list[str]]

    @property
    def rank(self) -> int:
        """Averaged weights come first, then the places where training scripts put a network, and a teacher last."""
        words = self.place.split(".")[:-1]
        if any(_AVERAGED.search(word) for word in words):
            return 0
        if "teacher" in words:
            return 3
        return 1 if _USUAL.issuperset(words) else 2

    @property
    def num_problems(self) -> int:
        """How many tensors do not fit."""
        return sum(map(len, self.problems.values()))


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads a file of weights into `network`, all or nothing.

    The state dict may lie in a checkpoint (of Lightning, of timm's `train.py`, ...), under any prefixes of wrappers
    (`module.`, `model.`, `net.`, `_orig_mod.`, nested). If a file has averaged weights (EMA) and trained ones, the
    averaged ones are taken, as timm does. Files in another layout (official Swin, DeiT III) are renamed by timm's own
    filter. A warning says which weights were taken if there was a choice.

    Args:
        network: The network whose parameters and buffers are filled.
        path: A file or folder that `read_weights_file` reads.

    Raises:
        FileNotFoundError: If the file, or a shard of it, is missing.
        ValueError: If a tensor is missing, left over, of another shape or type, or not finite (the message names it);
            if several networks in the file fit; or if the file is not one of weights.
    """
    content = read_weights_file(path)
    _refuse_compressed(content, path)
    places = list(_dicts_of_tensors(content))
    if not places:
        raise ValueError(
            f"{path}: holds no state dict (names -> tensors), neither at the top nor under 'state_dict' or 'model'."
        )
    chosen = _choose(_candidates(network, places, path), path)
    if chosen.num_problems:
        raise ValueError(_refusal(network, chosen, places, path))
    _tell(chosen, content, path)
    network.load_state_dict({key: chosen.tensors[key] for key in network.state_dict()})


def _refuse_compressed(content: Any, path: Path) -> None:
    if isinstance(content, Mapping) and any(histories_in(content).values()):
        raise ValueError(
            f"{path}: is a checkpoint of a compressed network, which its tensors alone cannot rebuild; load it with "
            "load_from_checkpoint of its LightningModule (CompressibleClassifier, or yours with CompressionMixin)."
        )


def _dicts_of_tensors(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each dictionary in `content` with tensors by name, and the keys that lead to it, such as "model_ema."."""
    if not isinstance(content, Mapping) or depth > 4:
        return
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        yield from _dicts_of_tensors(value, f"{place}{key}.", depth + 1)


def _candidates(network: nn.Module, places: list[tuple[str, dict[str, Tensor]]], path: Path) -> list[_Candidate]:
    """The tensors under each prefix that has half of the network's names; if none has, the largest dictionary."""
    expected = network.state_dict()
    stripped = [(place, _without_wrappers(state, path)) for place, state in places]
    found = [
        (place + prefix, {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)})
        for place, state in stripped
        for prefix, count in _prefixes(state, expected).items()
        if 2 * count >= len(expected)
    ]
    candidates = []
    for place, state in found or [max(stripped, key=lambda each: len(each[1]))]:
        # What has another prefix (a teacher, metrics) does not belong to the network.
        tensors = _in_names_of(network, state)
        candidates.append(_Candidate(place, tensors, _problems(expected, tensors)))
    return candidates


def _prefixes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Counter[str]:
    """How many of the expected names lie under each prefix."""
    found: Counter[str] = Counter()
    for key in state:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        found.update(key[:start] for start in starts if key[start:] in expected)
    return found


def _without_wrappers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = ".".join(word for word in key.split(".") if word not in _WRAPPERS)
        if name in plain and not _equal(plain[name], tensor):
            raise ValueError(
                f"{path}: holds {name!r} with and without a wrapper's prefix, and they differ. Save the state dict of "
                "the unwrapped network to a file of its own: torch.save(network.state_dict(), ...)."
            )
        plain[name] = tensor
    return plain


def _in_names_of(network: nn.Module, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """`state`, renamed by timm's filter for the network's family if its names differ; no tensor is resampled."""
    expected = network.state_dict()
    rename = _filter_of(network)
    if rename is None or expected.keys() <= state.keys():
        return state
    sized = {key: tensor for key, tensor in state.items() if key in expected and key.endswith(_SIZED)}
    try:
        renamed = rename({key: tensor for key, tensor in state.items() if key not in sized}, network)
    except Exception:  # a filter presumes its layout, and may raise anything for another one
        return state
    renamed |= sized
    for key in renamed.keys() & state.keys():
        # A filter resizes positions and patches to the network's size. That changes the network, so refuse it instead.
        if renamed[key].numel() != state[key].numel() or renamed[key].shape == state[key].shape:
            renamed[key] = state[key]
    fits_better = len(expected.keys() - renamed.keys()) < len(expected.keys() - state.keys())
    return renamed if fits_better else state


def _filter_of(network: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """`checkpoint_filter_fn` of the timm module that defines the network's class."""
    for base in type(network).__mro__:
        found = getattr(sys.modules[base.__module__], "checkpoint_filter_fn", None)
        if base.__module__.startswith("timm.models.") and found is not None:
            scale = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(found).parameters else {}
            return lambda state, network: found(state, network, **scale)
    return None


def _problems(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    shared = [key for key in expected if key in tensors]
    fitting = [key for key in shared if tensors[key].shape == expected[key].shape]
    plain = [key for key in fitting if _is_plain(tensors[key], expected[key])]
    return {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(key for key in tensors.keys() - expected.keys() if not key.endswith(_RECOMPUTED)),
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in shared
            if tensors[key].shape != expected[key].shape
        ],
        "of another type": [
            f"{key} {tensors[key].dtype} instead of {expected[key].dtype}" for key in fitting if key not in plain
        ],
        "with NaN or infinity": [key for key in plain if not _is_finite(tensors[key])],
    }


def _is_plain(tensor: Tensor, expected: Tensor) -> bool:
    """Whether `tensor` can be copied into `expected`: it is not quantized, sparse or of another kind of number."""
    same_kind = tensor.is_floating_point() == expected.is_floating_point() and not tensor.is_complex()
    return same_kind and tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def _choose(candidates: list[_Candidate], path: Path) -> _Candidate:
    """The candidate of the best rank; if there are several, the one that fits."""
    best = min(each.rank for each in candidates)
    likely = [each for each in candidates if each.rank == best]
    fitting = [each for each in likely if not each.num_problems]
    if not fitting:
        return min(likely, key=lambda each: each.num_problems)
    first, *others = fitting
    for other in others:
        if not all(_equal(first.tensors[key], other.tensors[key]) for key in first.tensors.keys() & other.tensors):
            raise ValueError(
                f"{path}: two networks in it fit, {first.place!r} and {other.place!r}, and they differ. Save the one "
                "that you want to a file of its own: torch.save(network.state_dict(), ...)."
            )
    return first


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _tell(chosen: _Candidate, content: Any, path: Path) -> None:
    """Warns which weights were taken if a file leaves a choice."""
    lightning_averaged = isinstance(content, Mapping) and "current_model_state" in content
    if chosen.rank == 0 or (lightning_averaged and chosen.place.startswith("state_dict.")):
        what = "the averaged weights (EMA) are taken, as timm does"
    elif chosen.rank > 1:
        what = "the weights are taken"
    else:
        return
    warnings.warn(
        f"{path}: {what}, those under {chosen.place!r}; for others, save their state dict to a file of its own",
        stacklevel=4,
    )


def _refusal(network: nn.Module, chosen: _Candidate, places: list[tuple[str, dict[str, Tensor]]], path: Path) -> str:
    found = [
        f"{len(names)} {what} ({', '.join(map(_shown, names[:3]))}{', ...' if names[3:] else ''})"
        for what, names in chosen.problems.items()
        if names
    ]
    where = f" under {chosen.place!r}" if chosen.place else ""
    whose = getattr(network, "whose_weights", lambda _: None)(chosen.tensors)
    if whose is not None:
        return f"{path}: its tensors{where} do not fit {type(network).__name__}: {whose}"
    every = [place + key for place, state in places for key in state]
    return (
        f"{path}: its tensors{where} do not fit {type(network).__name__}: {'; '.join(found)}. "
        f"{_nearest(chosen, every)}{_remedy(chosen, path)}"
    )


def _nearest(chosen: _Candidate, every: list[str]) -> str:
    """Names in the file that resemble the missing ones."""
    pairs = []
    for name in chosen.problems["missing"][:3]:
        close = [key for key in every if f".{key}".endswith(f".{name}")]
        close = close or difflib.get_close_matches(name, chosen.problems["unexpected"], n=1)
        pairs += [f"{name} may be {_shown(key)!r} there" for key in close[:1]]
    return f"{'; '.join(pairs)}. " if pairs else ""


def _remedy(chosen: _Candidate, path: Path) -> str:
    if is_shard(path):
        return "The file is one of several shards: pass their index (*.index.json) or their folder."
    missing, left_over = chosen.problems["missing"], chosen.problems["unexpected"]
    differing = [text.split(" ")[0] for text in chosen.problems["of another shape"]]
    kinds = {kind for kind, names in chosen.problems.items() if names}
    if kinds == {"of another shape"} and all(map(_is_of_head, differing)):
        classes = chosen.tensors[differing[0]].shape[0]
        return f"Its head is for another number of classes: pass num_classes={classes}."
    if kinds == {"of another shape"} and all(key.endswith(_SIZED) for key in differing):
        return "It is of another image or window size: create the network with that size, then call its set_input_size."
    if kinds == {"unexpected"} and all(map(_is_of_head, left_over)):
        classes = chosen.tensors[left_over[0]].shape[0]
        return f"The file has a head and the network has none: pass num_classes={classes}."
    if kinds == {"missing"} and all(map(_is_of_head, missing)):
        return "The file has no head there: pass num_classes=0 for the network without one."
    return "Check the model's name and arguments (num_classes, depths, ...) against the file."


def _shown(name: str) -> str:
    """A name from an untrusted file, cut short and without control characters."""
    return (name if name.isprintable() else ascii(name)[1:-1])[:200]


def _is_of_head(name: str) -> bool:
    return name.startswith(("head.", "head_dist.", "fc.", "classifier."))

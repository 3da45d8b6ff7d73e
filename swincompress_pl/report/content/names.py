"""Names of layers as a person would say them."""

from __future__ import annotations

import re

# Whole parts of a path, in the networks of timm and spikingjelly; numbers of lists count from 1 for a reader.
LISTS = {"layers": "stage", "stages": "stage", "blocks": "block", "block": "block"}
_WORDS = {
    "patch_embed": "patch embedding",
    "patch_embed1": "patch embedding 1",
    "patch_embed2": "patch embedding 2",
    "patch_embed3": "patch embedding 3",
    "pos_embed": "position embedding",
    "positional_encoding": "positional encoding",
    "prefix_tokens": "prefix tokens",
    "cls_token": "class token",
    "attn": "attention",
    "mlp": "MLP",
    "proj": "projection",
    "act": "activation",
    "downsample": "downsampling",
    "conv_bn": "convolution",
    "qkv_conv_bn": "qkv",
    "proj_conv_bn": "projection",
    "qkv_lif": "qkv neuron",
    "proj_lif": "projection neuron",
    "attn_lif": "neuron",
    "add1": "residual 1",
    "add2": "residual 2",
}
# Parts that are places of their own, before a comma.
_PLACES = frozenset(
    {"patch_embed", "patch_embed1", "patch_embed2", "patch_embed3", "positional_encoding", "downsample"}
)
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def readable(name: str) -> str:
    """A path such as layers.1.blocks.0.mlp.fc1 as "stage 2, block 1, MLP fc1"; any other text as it is.

    Operations that ran as one, joined by "+", share what they have in common. A note behind a path, such as
    " (weight)", stays.
    """
    path, space, note = name.partition(" ")
    parts = path.split("+")
    if not all(_PATH.fullmatch(part) for part in parts):
        return name
    places, words = zip(*map(_said, parts), strict=True)
    shown = places[0]
    if len(set(places)) == 1:
        shown += _joined(words)
        return ", ".join(shown) + space + note
    said = (", ".join(filter(None, (*place, word))) for place, word in zip(places, words, strict=True))
    return " + ".join(said) + space + note


def _said(path: str) -> tuple[tuple[str, ...], str]:
    """(numbered places, the rest in words): ("stage 2", "block 1"), "MLP fc1"."""
    places: list[str] = []
    words: list[str] = []
    parts = path.split(".")
    number = 0
    while number < len(parts):
        part = parts[number]
        follows = parts[number + 1] if number + 1 < len(parts) else ""
        if part in LISTS and follows.isdecimal() and len(follows) < 6:
            counted = f"{LISTS[part]} {int(follows) + 1}"
            if part == "block" and words:  # a list of modules inside a layer
                words += [follows] * (follows != "0")
            else:
                places += [*([" ".join(words)] if words else []), counted]
                words = []
            number += 2
            continue
        word = _WORDS.get(part, _spaced(part))
        if part in _PLACES and follows:
            places += [*([" ".join(words)] if words else []), word]
            words = []
        elif part != "0" and word not in words[-1:]:  # the first of a list inside a layer is mostly its only one
            words.append(word)
        number += 1
    return tuple(places), " ".join(words)


def _spaced(part: str) -> str:
    """norm1 as "norm 1"; fc1 and qkv are names of their own."""
    if re.fullmatch(r"(norm|neuron)\d+", part):
        return re.sub(r"(\d+)$", r" \1", part)
    return part.replace("_", " ") if part.strip("_") else part


def _joined(words: tuple[str, ...]) -> tuple[str, ...]:
    """("MLP fc1", "MLP activation") as "MLP fc1 + activation"."""
    first, *later = [word.split(" ") for word in words]
    shown = " ".join(first)
    for other in later:
        shared = 0
        while shared < min(len(first), len(other)) - 1 and first[shared] == other[shared]:
            shared += 1
        shown += " + " + " ".join(other[shared:])
    return (shown,) if shown else ()

"""Weights of files that others wrote: wrappers' prefixes, averages, arguments beside them, official layouts, shards."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from swincompress_pl.models import create_model
from swincompress_pl.models.weights_file import read_weights_file

State = dict[str, Tensor]
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 4}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_classes": 4,
}
WORDS = ("_orig_mod", "module", "model", "net", "backbone", "student")


def vit(seed: int = 0, **changed: Any) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("vit", **{**VIT, **changed})


NETWORK = vit()
WANTED: State = NETWORK.state_dict()
OTHER: State = vit(1).state_dict()


def under(prefix: str, state: State = WANTED) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def load(path: Path, content: Any, name: str = "vit", **arguments: Any) -> State:
    torch.save(content, path)
    return create_model(name, checkpoint_path=path, **(arguments or VIT)).state_dict()


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@settings(max_examples=15, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=4), inner=st.booleans(), wrapped=st.booleans())
def test_prefixes_in_any_order(words: list[str], inner: bool, wrapped: bool) -> None:
    state = under("".join(f"{word}." for word in words))
    if inner:
        state = {key.replace("blocks.0.", "blocks.0._orig_mod."): tensor for key, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        content = {"state_dict": state, "epoch": 3} if wrapped else state
        assert equal(load(Path(folder) / "weights.pth", content), WANTED)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {**under("net."), **under("teacher.", OTHER)}},
        {"student": under("module.backbone."), "teacher": under("module.backbone.", OTHER)},
        {"state_dict": {**under("net."), **under("model.")}},  # one network under two names
        {"model": WANTED, "optimizer": torch.optim.AdamW(NETWORK.parameters()).state_dict(), "scaler": {}},
    ],
    ids=["teacher", "DINO", "twice", "optimizer"],
)
def test_what_lies_beside_the_network_is_left(tmp_path: Path, content: Any, recwarn: pytest.WarningsRecorder) -> None:
    assert equal(load(tmp_path / "w.pth", content), WANTED)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"state_dict": OTHER, "state_dict_ema": WANTED}, "state_dict_ema"),
        ({"model": OTHER, "model_ema": {"n_averaged": torch.tensor(3), **under("module.")}}, "model_ema.module"),
        ({"state_dict": {**under("net.", OTHER), **under("ema.module.")}}, "state_dict.ema.module"),
        ({"state_dict": under("net."), "current_model_state": under("net.", OTHER)}, "state_dict.net"),
        ({"state_dict": under("net.", OTHER), "callbacks": {"EMA": {"weights": under("net.")}}}, "callbacks.EMA"),
    ],
    ids=["timm", "torchvision", "attribute", "Lightning", "callback"],
)
def test_averaged_weights_are_taken_and_said(tmp_path: Path, content: Any, place: str) -> None:
    with pytest.warns(UserWarning, match=rf"averaged weights \(EMA\) are taken.*'{place}"):
        assert equal(load(tmp_path / "w.pth", content), WANTED)


def test_averaged_weights_that_do_not_fit_are_not_passed_over(tmp_path: Path) -> None:
    part = {key: tensor for key, tensor in WANTED.items() if "norm" not in key}
    with pytest.raises(ValueError, match=r"under 'state_dict_ema\.' do not fit .* may be 'state_dict\.blocks"):
        load(tmp_path / "w.pth", {"state_dict": WANTED, "state_dict_ema": part})


@pytest.mark.parametrize("prefix", ["visual.trunk.", "teacher."])
def test_unusual_places_are_said(tmp_path: Path, prefix: str) -> None:
    with pytest.warns(UserWarning, match=f"the weights are taken, those under '{prefix}'"):
        assert equal(load(tmp_path / "w.pth", under(prefix)), WANTED)


def test_two_networks_that_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two networks in it fit, 'net\.' and 'model\.', and they differ"):
        load(tmp_path / "w.pth", {**under("net."), **under("model.", OTHER)})
    with pytest.raises(ValueError, match="with and without a wrapper's prefix"):
        load(tmp_path / "w.pth", {**under("net."), **under("net._orig_mod.", OTHER)})


@pytest.mark.parametrize(
    "arguments", [argparse.Namespace(lr=0.1, betas=(0.9, 0.99)), argparse.Namespace(inner=argparse.Namespace(a=None))]
)
def test_arguments_of_a_script_beside_the_weights(tmp_path: Path, arguments: argparse.Namespace) -> None:
    content = {"epoch": 3, "arch": "vit", "state_dict": WANTED, "args": arguments, "metric": 71.2}
    assert equal(load(tmp_path / "w.pth", content), WANTED)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Runs:
    """Unpickled, it would leave a file behind."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize(
    "hide",
    [
        lambda bad: {"state_dict": WANTED, "args": bad},
        lambda bad: {"state_dict": WANTED, "args": argparse.Namespace(out=bad)},
        lambda bad: {"state_dict": {**WANTED, "head.bias": bad}},
        lambda bad: [bad],
    ],
    ids=["beside", "in a Namespace", "as a tensor", "in a list"],
)
def test_no_file_runs_code(tmp_path: Path, hide: Callable[[Any], Any]) -> None:
    trace = tmp_path / "ran"
    for call, arguments in (
        (pathlib.Path.touch, (trace,)),
        (exec, (f"open({str(trace)!r}, 'w')",)),
        (open, ("x", "w")),
    ):
        with pytest.raises(ValueError, match=r"w\.pth: not a torch file of plain tensors: it holds .*save the state"):
            load(tmp_path / "w.pth", hide(Runs(call, *arguments)))  # type: ignore[arg-type]
    assert not trace.exists()


@pytest.mark.parametrize(
    ("other", "named"),
    [(pathlib.PurePosixPath("runs"), "pathlib.PurePosixPath"), (types.SimpleNamespace(a=1), "types.SimpleNamespace")],
)
def test_other_types_are_named(tmp_path: Path, other: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"holds .*{named}"):
        load(tmp_path / "w.pth", {"state_dict": WANTED, "args": argparse.Namespace(other=other)})


def official(state: State) -> State:
    """As microsoft/Swin-Transformer names it, with its buffers."""
    renamed = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): tensor
        for key, tensor in state.items()
    }
    return {**renamed, "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


def deit_iii(state: State) -> State:
    return {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize(
    ("name", "arguments", "layout"),
    [
        ("swin", SWIN, official),
        ("swinv2_tiny_window8_256", SWIN, official),
        (
            "vit",
            {**VIT, "init_values": 0.1},
            deit_iii,
        ),
        ("deit_tiny_distilled_patch16_224", VIT, dict),
    ],
    ids=["Swin", "Swin v2", "DeiT III", "DeiT"],
)  # fmt: skip
def test_official_layouts(
    tmp_path: Path, name: str, arguments: dict[str, Any], layout: Callable[[State], State], prefix: str
) -> None:
    state = create_model(name, **arguments).state_dict()
    assert equal(load(tmp_path / "w.pth", {"model": under(prefix, layout(state))}, name, **arguments), state)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (vit(num_classes=10).state_dict(), VIT, r"head.weight \(10, 32\) instead of \(4, 32\).* pass num_classes=10"),
        (WANTED, {**VIT, "num_classes": 0}, r"the network has none: pass num_classes=4"),
        (vit(num_classes=0).state_dict(), VIT, r"2 missing \(head\.bias, head\.weight\).*num_classes=0"),
        (vit(img_size=64).state_dict(), VIT, r"pos_embed \(1, 65, 32\) instead of \(1, 17, 32\).*set_input_size"),
        (
            {key.replace("qkv", "in_proj"): tensor for key, tensor in WANTED.items()},
            VIT,
            r"blocks\.0\.attn\.qkv\.bias may be 'blocks\.0\.attn\.in_proj\.bias'",
        ),
        ({key: (tensor * 99).to(torch.int8) for key, tensor in WANTED.items()}, VIT, r"32 of another type \(.*int8"),
        ({**WANTED, "\x1b[31mred": torch.zeros(1)}, VIT, r"1 unexpected \(\\x1b\[31mred\)"),
    ],
    ids=["head", "no head wanted", "no head there", "size", "names", "integers", "escapes"],
)
def test_what_does_not_fit_is_refused_with_the_remedy(
    tmp_path: Path, content: State, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "w.pth", content, **arguments)


def test_an_official_head_or_window_of_another_size_is_refused(tmp_path: Path) -> None:
    state = official(create_model("swin", **SWIN).state_dict())
    with pytest.raises(ValueError, match=r"head\.fc\.weight \(4, 32\) instead of \(9, 32\).*pass num_classes=4"):
        load(tmp_path / "w.pth", {"model": state}, "swin", **{**SWIN, "num_classes": 9})
    with pytest.raises(ValueError, match=r"bias_table \(49, 2\) instead of \(225, 2\).*set_input_size"):
        load(tmp_path / "w.pth", {"model": state}, "swin", **{**SWIN, "window_size": 8, "img_size": 64})


def test_a_checkpoint_of_a_compressed_network_is_refused(tmp_path: Path) -> None:
    record = {"version": 1, "history": [{"mask": ["head.weight"]}]}
    with pytest.raises(ValueError, match=r"compressed network.*load_from_checkpoint"):
        load(tmp_path / "w.ckpt", {"state_dict": under("net."), "swincompress_pl": record})


def sharded(folder: Path, kind: str, **entries: Any) -> Path:
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map: dict[str, Any] = {}
    for number in range(2):
        name = f"{stem}-{number + 1:05d}-of-00002.{ending}"
        part = {key: WANTED[key].contiguous() for key in list(WANTED)[number::2]}
        save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map | entries}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_files(tmp_path: Path, kind: str) -> None:
    index = sharded(tmp_path, kind)
    for path in (index, tmp_path):
        assert equal(create_model("vit", checkpoint_path=path, **VIT).state_dict(), WANTED)
    shard = min(tmp_path.glob("*-of-*"))
    with pytest.raises(ValueError, match=r"missing.*one of several shards: pass their index"):
        create_model("vit", checkpoint_path=shard, **VIT)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        create_model("vit", checkpoint_path=index, **VIT)


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "a\\b.bin", "..", "", "x.index.json"])
def test_shards_lie_beside_their_index(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="names the shard"):
        read_weights_file(sharded(tmp_path, "bin", **{"head.bias": name}))


def test_folders_and_indexes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder with 0 files of weights.*consolidate_checkpoint"):
        read_weights_file(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "{", "[" * 100_000):
        index.write_text(text)
        with pytest.raises(ValueError, match="not the index of a sharded file"):
            read_weights_file(index)
    with pytest.raises(ValueError, match=r"lacks 1 of its tensors \(more\)"):
        read_weights_file(sharded(tmp_path, "safetensors", more="model-00001-of-00002.safetensors"))

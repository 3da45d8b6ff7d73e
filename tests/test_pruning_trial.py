"""Cuts go on trial before anything is cut, and layers that compute something else are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from spikingjelly.activation_based import neuron
from support.altered_cases import (
    FOLDED,
    LoraLinear,
    MlpWithAdapter,
    Wrapped,
    bind_forward,
    images,
    patch_forward,
    put,
    swin,
    vit,
)
from support.callback_cases import Plain, loader, make_trainer
from support.spiking_cases import FAMILIES, lively
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.history import history_of
from swincompress_pl.models.shared import parts
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, PrimeSVTConfig, primesvt
from swincompress_pl.pruning import prune as adaptive
from swincompress_pl.pruning.structure.groups import Group
from swincompress_pl.pruning.structure.trial import FirstInputs, check_cuts
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for

ALL = ("heads", "mlp", "head_dim", "embed")


def search(network: nn.Module, *kinds: str, size: int = 16, **options: Any) -> None:
    config = AdaptivePruningConfig(tolerance=90, step=0.25, round_to=1, max_rounds=1, kinds=kinds or ALL, **options)
    adaptive(network, HoldOut.from_batches([(images(size), torch.arange(8) % 5)]), config)


def groups_of(network: nn.Module) -> list[Group]:
    found: list[Group] = adapter_for(network).groups(network)
    return found


@pytest.mark.parametrize("build", [vit, swin, lambda: vit(init_values=0.1).bfloat16()], ids=["vit", "swin", "bfloat16"])
def test_a_trial_leaves_the_network_as_it_was(build: Callable[[], Any]) -> None:
    network = build().train()
    network.norm.eval()

    def state() -> Any:
        whole = {path: {k: v for k, v in vars(m).items() if isinstance(v, int)} for path, m in network.named_modules()}
        return whole, [type(module) for module in network.modules()], torch.get_rng_state().tolist()

    tensors, before = {**dict(network.named_parameters()), **dict(network.named_buffers())}, state()
    shown = images(network.patch_embed.img_size[0], 2).to(network.norm.weight.dtype)
    check_cuts(network, groups_of(network), (shown,))
    after = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert state() == before
    assert not history_of(network)


def test_a_group_that_forgets_a_tensor_is_named() -> None:
    network = vit()
    groups = {group.name: group for group in groups_of(network)}
    heads = groups["blocks.1.attn.heads"]
    shifted = tuple(replace(s, offsets=(0,)) if "qkv" in s.tensor else s for s in heads.slices)  # q, but not k and v
    groups["blocks.1.attn.heads"] = replace(heads, slices=shifted, attributes=heads.attributes[:1])
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.heads: "):
        check_cuts(network, list(groups.values()), (images(),))


def test_an_activation_over_all_channels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    network = vit()
    network.blocks[1].mlp.act = nn.Softmax(-1)
    with pytest.raises(UnsupportedNetworkError, match=r"blocks\.1\.mlp\.act is a Softmax, which does not map each"):
        search(network)
    monkeypatch.setattr(parts, "maps_each_value", lambda *_: True)  # the trial finds it, too
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.channels: the sliced network differs from the one with"):
        search(network)
    assert network.blocks[0].mlp.fc1.out_features == 128


@pytest.mark.parametrize("kinds", [("embed",), ("mlp", "embed")])
def test_an_adapter_beside_the_stream_is_named(kinds: tuple[str, ...]) -> None:
    network = vit()
    put(network, "blocks.1.mlp", MlpWithAdapter)
    before = {name: tensor.shape for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"embed: without a unit of it, blocks\.1\.mlp\.adapter \(Linear\) fails"):
        search(network, *kinds)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == before
    search(network, "mlp", "heads")  # which the adapter has no part in
    assert network.blocks[1].mlp.fc1.out_features < 128


class WithThreshold(neuron.LIFNode):  # type: ignore[misc]  # spikingjelly is not typed
    """One value per channel beside what a neuron has."""

    def __init__(self, channels: int) -> None:
        super().__init__(step_mode="m")
        self.theta = nn.Parameter(torch.ones(channels, 1))

    def multi_step_forward(self, x_seq: Tensor, *more: Any) -> Tensor:
        spikes: Tensor = super().multi_step_forward(x_seq / self.theta, *more)
        return spikes


@pytest.mark.parametrize("method", ["adaptive", "primesvt"])
def test_neurons_with_a_value_per_channel_are_named(method: str) -> None:
    network, shown = lively(FAMILIES["spikformer"], 3, trained_statistics=True)
    mlp: Any = network.get_submodule("blocks.0.mlp")
    mlp.neuron1 = WithThreshold(mlp.fc1[0].out_channels).double()
    before = {name: tensor.shape for name, tensor in network.state_dict().items()}
    holdout = HoldOut.from_batches([(shown, torch.tensor([0, 1]))])
    searches: dict[str, Callable[[], object]] = {
        "adaptive": lambda: adaptive(network, holdout, AdaptivePruningConfig(tolerance=90, round_to=1, kinds=("mlp",))),
        "primesvt": lambda: primesvt(network, holdout, PrimeSVTConfig(tolerance=50, round_to=1)),
    }
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.channels: .*blocks\.0\.mlp\.neuron1 .*WithThreshold"):
        searches[method]()
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == before


@pytest.mark.parametrize("scored", ["by a function", "elsewhere"])
def test_a_trial_needs_no_holdout(scored: str) -> None:
    """The images are those that the function shows the network, or random ones of `input_shape`."""
    network = vit()
    put(network, "blocks.1.mlp", MlpWithAdapter)

    def evaluate(candidate: nn.Module) -> float:
        return 50.0 if scored == "elsewhere" else 50.0 + float(candidate(images()).argmax(1).float().mean())

    config = AdaptivePruningConfig(tolerance=90, round_to=1, kinds=("embed",))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.adapter"):
        adaptive(network, evaluate, config, input_shape=(1, 3, 16, 16) if scored == "elsewhere" else None)


def test_random_images_that_the_network_does_not_take_are_no_trial() -> None:
    assert FirstInputs().or_random(vit(), (1, 16, 16, 3)) is None
    assert FirstInputs().or_random(vit(), None) is None
    heard, network = FirstInputs(), vit()
    with heard.of(network):
        network(x=images())  # not by position
    assert heard.arguments is None
    with heard.of(network):
        network(images())
    assert [tuple(value.shape) for value in heard.or_random(network, None) or ()] == [(1, 3, 16, 16)]


@pytest.mark.parametrize("granularity", ["structured", "weight", "2:4", "block", "filter"])
@pytest.mark.parametrize(
    "name", ["a subclass with an adapter", "a replaced forward", "weight_norm by hooks", "weight_norm"]
)
def test_computed_weights_and_altered_layers_are_refused(name: str, granularity: str) -> None:
    path, alter = FOLDED[name]
    network = vit()
    alter(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises((ValueError, UnsupportedNetworkError), match=path.replace(".", r"\.")):
        search(network, "heads", "mlp", granularity=granularity)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_remedy_for_masks_of_torch_is_named() -> None:
    network = vit()
    prune.l1_unstructured(network.blocks[0].mlp.fc1, "weight", 0.5)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1 .*torch\.nn\.utils\.prune\.remove\(layer, 'weight'\)"):
        search(network, granularity="weight")
    prune.remove(network.blocks[0].mlp.fc1, "weight")
    search(network, granularity="weight")


def test_layers_that_are_left_out_may_be_anything() -> None:
    network = vit()
    put(network, "blocks.0.attn.qkv", LoraLinear)
    parametrizations.weight_norm(network.blocks[0].mlp.fc1)
    search(network, "mlp", layers=("blocks.1.*",))
    search(network, granularity="weight", layers=("blocks.1.*",))
    assert network.blocks[1].mlp.fc1.out_features < 128


@pytest.mark.parametrize("alter", [patch_forward, bind_forward])
def test_a_patched_block_is_cut_with_the_rest_or_named(alter: Callable[[nn.Module, str], None]) -> None:
    network = vit()
    alter(network, "blocks.0")
    holdout = HoldOut.from_batches([(images(), torch.arange(8) % 5)])
    config = AdaptivePruningConfig(tolerance=90, step=0.25, round_to=1, max_rounds=1, kinds=ALL)
    if alter is patch_forward:  # a closure of the block itself: a copy of the network calls the block of the original
        with pytest.raises(ValueError, match=r"MACs cannot be counted .*blocks\.0"):
            adaptive(network, holdout, config, input_shape=(1, 3, 16, 16))
        return
    adaptive(network, holdout, config, input_shape=(1, 3, 16, 16))
    assert network.embed_dim < 32
    network(images())


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "dropout before": lambda width: nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 5)),
    "two layers": lambda width: nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 5)),
}


@pytest.mark.parametrize("build", [vit, swin])
@pytest.mark.parametrize("name", HEADS)
def test_heads_that_begin_with_a_linear_layer_follow_the_stream(name: str, build: Callable[[], Any]) -> None:
    network, size = build(), 16 if build is vit else 32
    put(network, "head" if build is vit else "head.fc", lambda _: HEADS[name](32).eval())
    search(network, "embed", size=size)
    assert network.num_features < 32
    assert network(images(size)).shape == (8, 5)


def test_a_head_on_a_spiking_network_follows_the_stream() -> None:
    network, shown = lively(FAMILIES["spikformer"], 3, trained_statistics=True)
    put(network, "head", lambda head: nn.Sequential(nn.Dropout(0.1), head))
    check_cuts(network, groups_of(network), (shown,))
    assert "head.1.weight" in {part.tensor for group in groups_of(network) for part in group.slices}


@pytest.mark.parametrize(
    ("path", "make", "named"),
    [
        ("head", Wrapped, r"head is .*Wrapped; an nn\.Linear"),
        ("blocks.1.norm1", lambda _: nn.RMSNorm(32), r"blocks\.1\.norm1, a RMSNorm"),
    ],
)
def test_why_there_is_no_group_of_a_kind(path: str, make: Callable[[Any], nn.Module], named: str) -> None:
    network = vit()
    put(network, path, make)
    with pytest.raises(ValueError, match=rf"no group of kind 'embed', .*{named}"):
        search(network, "embed")


def test_a_fit_refuses_before_its_first_epoch(tmp_path: Path) -> None:
    module: LightningModule = Plain()
    network: Any = next(child for child in module.children() if hasattr(child, "blocks"))
    put(network, "blocks.1.mlp", MlpWithAdapter)
    name = next(name for name, child in module.named_children() if child is network)
    callback = AdaptiveIterativePruning(start_epoch=1, tolerance=90, round_to=1, kinds=("embed",), model_attribute=name)
    fit = make_trainer(tmp_path, 2, callback)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.adapter"):
        fit.fit(module, loader(), loader())
    assert fit.global_step == 0

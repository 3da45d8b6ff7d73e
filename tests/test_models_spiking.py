"""Spiking networks as ordinary classifiers: no call sees the membranes of another."""

from __future__ import annotations

import copy
import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from spikingjelly.activation_based import functional
from support.callback_cases import Plain, greedy, loader, make_trainer, search_of, shapes
from support.ddp_cases import fit
from support.rank_cases import on_ranks
from support.spiking_cases import ALL, COUNTING, FAMILIES, SIZE_PX, SMALL, lively, no_membranes, small_spikformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.history import history_of
from swincompress_pl.models import CompressibleClassifier, create_model
from swincompress_pl.models.spiking.memory import without_memory
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, prune
from swincompress_pl.registry import adapter_for

KINDS = ("mlp", "conv", "heads", "qk", "v", "embed")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_is_what_spikingjelly_gives_after_a_reset(name: str, training: bool) -> None:
    network, images = lively(FAMILIES[name], 0, trained_statistics=True)
    plain = FAMILIES[name]().double()
    plain.load_state_dict(network.state_dict())
    network.train(training)
    plain.train(training)
    given = network(images)
    expected = plain(images)
    assert torch.equal(given, expected.mean(0) if expected.ndim == 3 else expected)
    assert given.shape == (2, 5)
    assert no_membranes(network)
    given.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    copy.deepcopy(network)  # which membranes that are part of a graph would forbid
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(plain)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", COUNTING)
def test_counts_need_no_reset(name: str, training: bool) -> None:
    network, images = lively(COUNTING[name], 0, trained_statistics=True)
    assert without_memory(network) is network
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    given = network.train(training)(images)
    assert given.shape == (2, 5)
    given.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    copy.deepcopy(network)


@pytest.mark.parametrize("name", ALL)
def test_calls_do_not_know_of_each_other(name: str) -> None:
    network, images = lively(ALL[name], 3, trained_statistics=True)
    with torch.no_grad():
        first = network(images)
        other = network(images[:1])  # another batch size, which left-over membranes would not fit
        again = network(images)
    assert torch.equal(first, again)
    torch.testing.assert_close(other, first[:1], rtol=1e-9, atol=1e-9)


def test_a_compiled_network_does_not_depend_on_other_networks() -> None:
    """spikingjelly lists every network that it has reset; a trace that reads this list breaks when one of them dies."""
    torch.compiler.reset()
    small = {**SMALL, "T": 1, "depths": 1}
    others = [create_model("spikformer", num_classes=5, **small) for _ in range(2)]
    for number in range(2):
        functional.reset_net(others[number])
    network = create_model("spikformer", num_classes=5, **small).eval()
    images = torch.rand(2, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    expected, graphs = network(images), []

    def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=counted, fullgraph=True)
    assert torch.equal(compiled(images), expected)
    traced = len(graphs)
    others.clear()
    gc.collect()
    assert torch.equal(compiled(images), expected)
    assert len(graphs) == traced > 0


def test_events_have_time_behind_the_batch() -> None:
    network, _ = lively(FAMILIES["sdt"], 0, trained_statistics=True)
    network.T = 3
    events = torch.randn(2, 3, 3, SIZE_PX, SIZE_PX, dtype=torch.float64)  # N, T, C, H, W
    plain = FAMILIES["sdt"]().double().eval()
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network(events), plain(events.transpose(0, 1)))
        functional.reset_net(plain)
        images = events[:, 0]
        assert torch.equal(network(images), network(images[:, None].expand(-1, 3, -1, -1, -1)))


@pytest.mark.parametrize("name", ["spikformer", "sdt", "qkformer", "maxformer", "meta-spikeformer"])
def test_events_in_the_order_of_spikingjelly_are_refused(name: str) -> None:
    network = without_memory(FAMILIES[name]()).eval()
    events = torch.zeros(2, 5, 3, SIZE_PX, SIZE_PX)  # T, N, C, H, W
    message = r"images have shape \(2, 5, 3, .*takes \(N, 2, C, H, W\).*pass images.transpose\(0, 1\)"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        network(events)
    with torch.no_grad():
        expected = network(events.transpose(0, 1))
        network.T = 5
        assert network(events).shape == (2, 5)  # two recordings of five steps
    assert expected.shape == (5, 5)


def test_any_number_of_time_steps_goes_where_the_network_states_none() -> None:
    network = FAMILIES["sdt"]()
    whole = nn.Sequential(network)  # T is an attribute of the inner network only
    without_memory(whole)
    with torch.no_grad():
        assert whole.eval()(torch.zeros(2, 4, 3, SIZE_PX, SIZE_PX)).shape == (2, 5)


def test_twice_is_once() -> None:
    network = without_memory(without_memory(FAMILIES["sdt"]()))
    assert len(network._forward_hooks) == len(network._forward_pre_hooks) == 1
    assert len(copy.deepcopy(network)._forward_hooks) == 1


@pytest.mark.parametrize("images", [torch.zeros(3, 32, 32), torch.zeros(1, 1, 1, 3, 32, 32), "image"])
def test_wrong_images_are_refused(images: Any) -> None:
    network = without_memory(FAMILIES["sdt"]())
    with pytest.raises(ValueError, match=r"takes images \(N, C, H, W\) or events"):
        network(images)


def test_networks_that_do_not_spike_in_many_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="has no neuron of spikingjelly"):
        without_memory(nn.Linear(3, 3))
    single = FAMILIES["spikformer"]()
    functional.set_step_mode(single, "s")
    with pytest.raises(ValueError, match=r"is in single-step mode; use functional.set_step_mode\(network, 'm'\)"):
        without_memory(single)


def holdout_of(network: nn.Module, images: Tensor, cache_size_bytes: int) -> HoldOut:
    """Images whose labels are what the network says."""
    with torch.no_grad():
        labels = network(images).argmax(1)
    return HoldOut(images, labels, batch_size=20, cache_size_bytes=cache_size_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spikformer", "qkformer", "maxformer, cifar", "e-spikeformer"])
def test_the_round_robin_search_prunes_them_and_begins_in_the_middle(name: str) -> None:
    shallow = partial(ALL[name], depths=(1, 1, 1)) if name in ("qkformer", "maxformer, cifar") else ALL[name]
    network, _ = lively(shallow, 5, trained_statistics=True)
    network.float()
    images = torch.randn(60, 3, SIZE_PX, SIZE_PX)
    results = []
    for cache_size_bytes in (0, 1 << 28):
        holdout = holdout_of(network, images, cache_size_bytes)
        other = copy.deepcopy(network)
        config = AdaptivePruningConfig(tolerance=20.0, kinds=KINDS, step=0.25, min_step=0.25, round_to=1, max_rounds=2)
        result = prune(other, holdout, config, input_shape=(1, 3, SIZE_PX, SIZE_PX))
        results.append((result, other))
    (plain, _), (cached, pruned) = results
    assert [step.accepted for step in plain.state.steps] == [step.accepted for step in cached.state.steps]
    assert cached.state.scoring["image_forwards"] < plain.state.scoring["image_forwards"]
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.parameters())
    assert history_of(pruned)
    assert cached.state.score >= cached.state.baseline_score - 20.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "weight"},
        {"granularity": "2:4", "layers": ("blocks.*",)},
        {"granularity": "block", "layers": ("blocks.*",)},
        {"granularity": "filter"},
        {"shrink": "end", "kinds": ("mlp", "conv", "heads", "v"), "round_to": 1},
    ],
    ids=str,
)
def test_every_granularity_prunes_convolutions(options: dict[str, Any]) -> None:
    network, _ = lively(FAMILIES["spikformer"], 5, trained_statistics=True)
    network.float()
    images = torch.randn(60, 3, SIZE_PX, SIZE_PX)
    before = sum(int(p.count_nonzero()) for p in network.parameters())
    config = AdaptivePruningConfig(tolerance=20.0, step=0.25, min_step=0.25, max_rounds=1, **options)
    prune(network, holdout_of(network, images, 1 << 28), config, input_shape=(1, 3, SIZE_PX, SIZE_PX))
    assert sum(int(p.count_nonzero()) for p in network.parameters()) < 0.95 * before


def test_a_network_with_nothing_to_prune_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swincompress_pl.pruning.space.weights.prunable_weights", lambda _: [])
    network, images = lively(FAMILIES["spikformer"], 5, trained_statistics=True)
    with pytest.raises(ValueError, match="granularity='weight': Spikformer has no linear layer or convolution"):
        prune(network, holdout_of(network, images, 0), AdaptivePruningConfig(granularity="weight"))


class Stop(Callback):
    """Ends the fit after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


class Watched(AdaptiveIterativePruning):
    """Copies the network in mid-fit, as callbacks do."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        assert no_membranes(pl_module.net)
        copy.deepcopy(pl_module.net)


def test_a_fit_prunes_and_its_checkpoint_rebuilds_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CompressibleClassifier("Spikformer", 4, model_kwargs=SMALL)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 4, (32,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    pruning = Watched(tolerance=100.0, kinds=("mlp", "v", "embed"), step=0.5, min_step=0.5, max_rounds=1)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[pruning], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert adapter_for(module.net).groups(module.net)[-1].units == 8
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), module.eval()(images))
    assert no_membranes(loaded.net)


def seeded() -> Plain:
    module = Plain(small_spikformer)
    torch.manual_seed(7)
    return module


@pytest.mark.slow
def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    options = {"tolerance": 60.0, "kinds": ("mlp", "qk", "v", "conv"), "round_to": 1}
    callback, resumed = greedy(**options), greedy(**options)
    whole = seeded()
    make_trainer(tmp_path, 3, callback).fit(whole, loader(shuffle=True), loader())
    first = seeded()
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    make_trainer(tmp_path, 3, greedy(**options), save, Stop(1)).fit(first, loader(shuffle=True), loader())
    second = seeded()
    torch.manual_seed(99)  # another process begins with other numbers
    trainer = make_trainer(tmp_path, 3, resumed)
    trainer.fit(second, loader(shuffle=True), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert shapes(second) == shapes(whole) != shapes(Plain(small_spikformer))
    for key, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert search_of(resumed) == search_of(callback)
    assert history_of(second.net) == history_of(whole.net)


@pytest.mark.slow
def test_ranks_decide_on_the_same_network(tmp_path: Path) -> None:
    """Each rank's BatchNorm has statistics of its own batches; a round begins with rank 0's for all."""

    def work(rank: int) -> Any:
        torch.manual_seed(rank)
        return fit(
            tmp_path / "fit", rank, 2, epochs=3, build=small_spikformer, tolerance=60.0, kinds=("mlp", "qk", "v"),
            round_to=1,
        )  # fmt: skip

    first, second = on_ranks(tmp_path, 2, work)
    assert first["search"] == second["search"]
    assert first["metrics"] == second["metrics"]
    assert first["history"] == second["history"] != []
    starts = [[digest for digest in one["digests"] if digest not in one["steps"]] for one in (first, second)]
    assert len(starts[0]) == 3
    assert starts[0] == starts[1]  # after the round, before the first batch of the epoch
    assert first["steps"] != second["steps"]  # else the ranks' statistics were never different


def test_builders_give_networks_without_memory() -> None:
    network = create_model("spikformer_cifar10", T=1)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert network.eval()(images).shape == (1, 10)
    assert no_membranes(network)

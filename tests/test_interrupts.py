"""An exception at any line of what changes a network leaves the old state or the new one, to the bit."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from support.callback_cases import Restorable, assert_same_state, data, greedy, make_trainer
from support.interrupts import (
    Interrupt,
    Tracer,
    differences,
    interrupted,
    interruptions,
    lines_of,
    run_traced,
    state_of,
)
from support.prime_cases import ALLOCATED, network_of, prime_config
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.evaluation_mode import evaluation_mode, on_trial, standing_still
from swincompress_pl.history import history_of
from swincompress_pl.interrupts import all_or_nothing, put_back_after
from swincompress_pl.pruning import AdaptivePruningConfig, PruningPlan, apply_plan, keep_masks, primesvt, prune
from swincompress_pl.pruning.adaptive.search import SearchSession, finish_search
from swincompress_pl.pruning.evaluation.prefix_cache import PrefixCache
from swincompress_pl.pruning.structure.apply import revert_plan
from swincompress_pl.pruning.structure.change import commit_masks, revert
from swincompress_pl.pruning.structure.cost import count_macs
from swincompress_pl.pruning.structure.optimizer_state import slice_optimizers
from swincompress_pl.pruning.structure.regrow import regrow_latest_plan
from swincompress_pl.pruning.structure.weight_masks import (
    register_masks,
    remove_masks,
    set_mask,
    temporary_mask,
    undo_latest_masks,
)
from swincompress_pl.quant import QuantizedNetwork, quantize
from swincompress_pl.registry import adapter_for

WEIGHT, OTHER = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3}
Call = Callable[[], Any]


def _vit(size_px: int = 8) -> nn.Module:
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=size_px, patch_size=8, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2, num_classes=3
    )
    network.blocks[0].mlp.eval()  # modes and frozen weights that have to come back as well
    network.norm.weight.requires_grad_(False)
    return network


def _plan(network: nn.Module) -> PruningPlan:
    groups = adapter_for(network).groups(network)
    return PruningPlan.removing(groups, {"blocks.0.mlp.channels": [1, 5], "blocks.0.attn.heads": [0]})


def _mask(network: nn.Module, name: str, seed: int) -> Tensor:
    shape = network.get_parameter(name).shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def _stepped(network: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    return optimizer


# Small steps: (the objects that change, the call), made from a fresh network each time. Every line of each is tried.


def _applying(network: nn.Module) -> tuple[list[Any], Call]:
    plan = _plan(network)
    return [network], lambda: apply_plan(network, plan)


def _reverting(network: nn.Module) -> tuple[list[Any], Call]:
    applied = apply_plan(network, _plan(network))
    return [network], lambda: revert_plan(network, applied)


def _regrowing(network: nn.Module) -> tuple[list[Any], Call]:
    apply_plan(network, _plan(network))
    return [network], lambda: regrow_latest_plan(network)


def _slicing(network: nn.Module) -> tuple[list[Any], Call]:
    optimizers = [_stepped(network), torch.optim.SGD(network.parameters(), lr=0.1)]
    applied = apply_plan(network, _plan(network))
    return [network, *optimizers], lambda: slice_optimizers(optimizers, applied)


def _registering(network: nn.Module) -> tuple[list[Any], Call]:
    return [network], lambda: register_masks(network, [WEIGHT, OTHER])


def _removing(network: nn.Module) -> tuple[list[Any], Call]:
    register_masks(network, [WEIGHT, OTHER])
    return [network], lambda: remove_masks(network, [WEIGHT, OTHER])


def _undoing(network: nn.Module) -> tuple[list[Any], Call]:
    register_masks(network, [WEIGHT, OTHER])
    return [network], lambda: undo_latest_masks(network)


def _setting(network: nn.Module) -> tuple[list[Any], Call]:
    register_masks(network, [WEIGHT])
    return [network], lambda: set_mask(network, WEIGHT, _mask(network, WEIGHT, 1))


def _committing(network: nn.Module) -> tuple[list[Any], Call]:
    register_masks(network, [WEIGHT])
    masks = {name: _mask(network, name, 2) for name in (WEIGHT, OTHER)}
    return [network], lambda: commit_masks(network, masks)


def _taking_back(network: nn.Module) -> tuple[list[Any], Call]:
    change = commit_masks(network, {name: _mask(network, name, 2) for name in (WEIGHT, OTHER)})
    return [network], lambda: revert(network, change)


def _keeping(network: nn.Module) -> tuple[list[Any], Call]:
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for _ in range(2)]
    register_masks(network, [WEIGHT])
    return [network, *optimizers], lambda: keep_masks(optimizers, network)


def _finishing(network: nn.Module) -> tuple[list[Any], Call]:
    config = AdaptivePruningConfig(shrink="end", step=0.5, round_to=1, max_rounds=1, kinds=("mlp",))
    SearchSession(network, lambda _: 90.0, config).round()
    return [network], lambda: finish_search(network, config)


def _following(network: nn.Module) -> tuple[list[Any], Call]:
    quantized = QuantizedNetwork(network, preprocessing=PREPROCESSING, learned_scales=True)
    applied = apply_plan(network, _plan(network))
    return [quantized], lambda: quantized.follow({s.name: dict(s.kept) for s in applied.tensors})


STEPS: dict[str, Callable[[nn.Module], tuple[list[Any], Call]]] = {
    step.__name__.strip("_"): step
    for step in (
        _applying,
        _reverting,
        _regrowing,
        _slicing,
        _registering,
        _removing,
        _undoing,
        _setting,
        _committing,
        _taking_back,
        _keeping,
        _finishing,
        _following,
    )
}
# What these call and does not change anything: not tried, for there are a few hundred lines of it.
CHANGING = (
    "pruning/structure/apply", "pruning/structure/change", "pruning/structure/optimizer_state", "history",
    "pruning/structure/regrow", "pruning/structure/weight_masks", "pruning/adaptive/", "quant/network",
    "quant/scale_cut", "quant/scales", "masks",
)  # fmt: skip


def _assert_old_or_new(make: Callable[[], tuple[list[Any], Call]], at: list[int], files: tuple[str, ...]) -> None:
    objects, call = make()
    call()
    new = state_of(*objects)
    for number in at:
        objects, call = make()
        old = state_of(*objects)
        place = interrupted(call, number, files)
        now = state_of(*objects)
        assert now in (old, new), f"{place}: {next(differences(old, now))}; and not new: {next(differences(new, now))}"


def _interrupt_step(step: str, most: int | None) -> None:
    def make() -> tuple[list[Any], Call]:
        return STEPS[step](_vit())

    objects, call = make()
    before = state_of(*objects)
    places = lines_of(call, CHANGING)
    assert before != state_of(*objects)
    at = interruptions(places, most)
    assert len(at) > 3
    _assert_old_or_new(make, at, CHANGING)


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_step_is_done_or_undone(step: str) -> None:
    _interrupt_step(step, 8)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_done_or_undone_at_every_line(step: str) -> None:
    _interrupt_step(step, None)


# Whole searches and quantization


def _scoring() -> Callable[[nn.Module], float]:
    calls = [0]

    def evaluate(_: nn.Module) -> float:
        calls[0] += 1
        return 80.0 if calls[0] % 4 == 3 else 90.0  # some steps are taken back

    return evaluate


def _pruning(**settings: Any) -> Callable[[], tuple[list[Any], Call]]:
    config = AdaptivePruningConfig(**{"tolerance": 1.0, "step": 0.25, "max_rounds": 2, "round_to": 1} | settings)

    def make() -> tuple[list[Any], Call]:
        network = _vit()
        return [network], lambda: prune(network, _scoring(), config, input_shape=(1, 3, 8, 8))

    return make


def _priming() -> tuple[list[Any], Call]:
    network = network_of("spikformer").train()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = prime_config(**ALLOCATED | {"rates": (0.3,)}, min_memory_saving=0.01, kinds=("mlp",))

    def evaluate(candidate: nn.Module) -> float:
        candidate(images)
        return 90.0

    return [network], lambda: primesvt(network, evaluate, config)


def _images() -> Tensor:
    pixels = torch.randint(0, 256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    return (pixels / 255 - 0.5) / 0.5


def _quantizing(half: bool = False, **options: Any) -> Callable[[], tuple[list[Any], Call]]:
    def make() -> tuple[list[Any], Call]:
        network = _vit().half() if half else _vit()
        if half:  # a layer that `quantize` replaces
            network.head = nn.utils.parametrizations.weight_norm(network.head)
        return [network], lambda: quantize(network, [_images()], preprocessing=PREPROCESSING, **options)

    return make


SEARCHES: dict[str, Callable[[], tuple[list[Any], Call]]] = {
    "structured": _pruning(),
    "weights": _pruning(granularity="weight", order="sensitivity"),
    "shrunk at the end": _pruning(shrink="end", kinds=("mlp",)),
    "the stream": _pruning(kinds=("embed", "heads"), step=0.5),
    "primesvt": _priming,
    "quantize": _quantizing(method="max"),
    "quantize a half": _quantizing(half=True, method="max"),
    "quantize, rounding": _quantizing(search={"rows": 64, "rounding": "second_order", "bias_correction": True}),
}


def _interrupt_search(name: str, most: int | None) -> None:
    make = SEARCHES[name]
    _, call = make()
    with suppress(Warning):
        places = lines_of(call)
    _assert_old_or_new(make, interruptions(places, most), ("",))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["structured", "weights", "quantize, rounding"])
def test_an_interrupted_search_leaves_the_network_as_it_was(name: str) -> None:
    _interrupt_search(name, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_that_is_interrupted_anywhere_leaves_the_network_as_it_was(name: str) -> None:
    """At 60 of its thousand lines and more; None instead is all of them, minutes each."""
    _interrupt_search(name, 60)


@pytest.mark.parametrize("granularity", ["structured", "weight"])
def test_a_session_goes_on_after_an_interrupt_as_if_there_had_been_none(granularity: str) -> None:
    config = AdaptivePruningConfig(granularity=granularity, step=0.25, round_to=1)

    def session_of(network: nn.Module) -> SearchSession:
        return SearchSession(network, lambda candidate: 90.0 - float((candidate.head.weight == 0).sum()), config)

    network = _vit()
    session = session_of(network)
    places = lines_of(session.round, ("pruning/adaptive/",))
    session.state.elapsed_s = 0.0
    end = state_of(network, session.state.to_dict())
    for at in interruptions(places, 4):
        network = _vit()
        session = session_of(network)
        if interrupted(session.round, at, ("pruning/adaptive/",)) is not None and not session.state.rounds:
            session.round()
        session.state.elapsed_s = 0.0
        assert state_of(network, session.state.to_dict()) == end


def test_recovering_that_fails_takes_its_round_back() -> None:
    network, states = _vit(), []

    def recover(pruned: nn.Module, _: Any) -> None:
        with torch.no_grad():
            pruned.head.bias.add_(1)
        if states:
            raise Interrupt
        states.append(state_of(pruned))

    with pytest.raises(Interrupt):
        prune(network, lambda _: 90.0, AdaptivePruningConfig(step=0.25, round_to=1), recover=recover)
    assert state_of(network) == states[0]


@pytest.mark.filterwarnings("error:PrimeSVT")
def test_a_warning_that_is_an_error_leaves_the_network_unpruned() -> None:
    objects, _ = _priming()
    old = state_of(*objects)
    config = prime_config(**ALLOCATED, min_memory_saving=0.2, prefer="memory")
    images = torch.zeros(2, 3, 32, 32)
    scores = iter([90.0])

    def evaluate(candidate: nn.Module) -> float:
        candidate(images)
        return next(scores, 10.0)

    with pytest.raises(UserWarning, match="PrimeSVT"):
        primesvt(objects[0], evaluate, config)
    assert state_of(*objects) == old


# Contexts


CONTEXTS: dict[str, Callable[[nn.Module], Any]] = {
    "evaluation_mode": evaluation_mode,
    "standing_still": standing_still,
    "on_trial": on_trial,
    "temporary_mask": lambda network: temporary_mask(network, WEIGHT, _mask(network, WEIGHT, 4)),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_puts_back_although_that_is_interrupted(name: str) -> None:
    files = ("evaluation_mode", "pruning/structure/unit_masks", "pruning/structure/weight_masks")
    network = _vit()
    old = state_of(network)

    def call() -> None:
        with CONTEXTS[name](network):
            pass

    for at in interruptions(lines_of(call, files), 24):
        interrupted(call, at, files)
        assert state_of(network) == old


@pytest.mark.parametrize("cached", [False, True])
def test_counting_is_over_although_it_is_interrupted(cached: bool) -> None:
    """At any line: what counts operations would see all networks after it, and keep torch.compile from compiling."""
    network = _vit()
    old = state_of(network)
    files = ("pruning/evaluation/prefix_cache" if cached else "pruning/structure/cost",)

    def call() -> None:
        with all_or_nothing(network):  # as searches do
            if cached:
                PrefixCache(network, size_bytes=1 << 20).measure(lambda: network(torch.ones(1, 3, 8, 8)))
            else:
                count_macs(network, (1, 3, 8, 8))

    at = interruptions(lines_of(call, files))
    assert len(at) > 8
    for number in at:
        interrupted(call, number, files)
        assert state_of(network) == old


# What it is made of


def _change_everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    network.train(not network.training)
    network.head.register_forward_hook(lambda *_: None)
    network.note = "new"
    network.kept["list"].append(1)
    network.kept.update(more={"x": 1})
    network.names.add("y")
    network.head = nn.utils.skip_init(nn.Linear, 16, 2)
    network.norm.__class__ = type("Other", (nn.LayerNorm,), {})
    network.register_buffer("table", torch.ones(2), persistent=False)
    del network.cls_token
    network.pos_embed.requires_grad_(False)
    network.pos_embed.grad = None
    with torch.no_grad():
        network.blocks[0].mlp.fc1.weight.zero_()
    network.blocks.half()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.state.clear()


def _everything() -> tuple[nn.Module, torch.optim.Optimizer]:
    network = _vit()
    network.kept, network.names = {"list": [0]}, {"x"}
    return network, _stepped(network)


def test_all_or_nothing_brings_everything_back() -> None:
    network, optimizer = _everything()
    old, keys = state_of(network, optimizer), list(network.state_dict())
    with pytest.raises(Interrupt), all_or_nothing(optimizer, written=[network]):  # noqa: PT012
        _change_everything(network, optimizer)
        raise Interrupt
    assert not list(differences(old, state_of(network, optimizer)))
    assert list(network.state_dict()) == keys


def test_all_or_nothing_keeps_what_came_to_its_end() -> None:
    network, optimizer = _everything()
    whole = all_or_nothing(optimizer, written=[network])
    with whole:
        _change_everything(network, optimizer)
    new = state_of(network, optimizer)
    del whole  # and nothing is undone later
    assert state_of(network, optimizer) == new
    assert new != state_of(*_everything())


def test_what_is_put_back_is_put_back_once_more_after_an_exception() -> None:
    calls = []

    def put_back() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise Interrupt

    with pytest.raises(Interrupt), put_back_after(put_back):
        pass
    assert calls == [0, 1]


# Fits


class Noisy(Restorable):
    """Draws random numbers in each step."""

    def __init__(self) -> None:
        super().__init__(lambda: _vit(16))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0] + 0.01 * torch.randn_like(batch[0])), batch[1])


def _loader() -> DataLoader[Any]:
    images, labels = data().tensors
    pixels = ((images * 0.2 + 0.5).clamp(0, 1) * 255).round() / 255
    return DataLoader(TensorDataset((pixels - 0.5) / 0.5, labels), batch_size=8, shuffle=True)


def _qat(**options: Any) -> QuantizationAwareTraining:
    options = {"method": "max", "calibration_images": 8, "preprocessing": PREPROCESSING} | options
    return QuantizationAwareTraining(**options)


def _rounds(**options: Any) -> Callback:
    return greedy(step=0.25, max_rounds=2, round_to=1, **options)


FITS: dict[str, Callable[[], list[Any]]] = {
    "rounds": lambda: [_rounds()],
    "masks": lambda: [_rounds(granularity="weight")],
    "sliced at the end": lambda: [_rounds(shrink="end", kinds=("mlp",))],
    "exchange": lambda: [_qat(start_epoch=1, distillation=0.5)],
    "both": lambda: [_qat(start_epoch=0), _rounds(start_epoch=1)],
}
FOLLOWING = (
    "callbacks/search", "callbacks/whole_change", "callbacks/kept_masks", "callbacks/quantization",
    "callbacks/qat_scales", "callbacks/pruning", "callbacks/training_pass", "callbacks/searched_network",
    "pruning/structure/optimizer_state", "checkpoint/holder",
)  # fmt: skip


@pytest.fixture
def _signals() -> Iterator[None]:
    """Lightning no longer listens to Ctrl-C after the first one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Fit:
    """A fit from a seed; `places`: the lines of FOLLOWING that ran."""

    def __init__(
        self, folder: Path, callbacks: list[Any], ckpt_path: Path | None = None, at: int | None = None
    ) -> None:
        self.module, self.callbacks = Noisy(), callbacks
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        self.trainer = make_trainer(
            folder, 3, OnExceptionCheckpoint(folder), *callbacks, enable_checkpointing=True, num_sanity_val_steps=0
        )
        tracer = Tracer(FOLLOWING, at)
        run_traced(lambda: self.trainer.fit(self.module, _loader(), _loader(), ckpt_path=ckpt_path), tracer)
        self.places = tracer.places

    def end(self) -> dict[str, Any]:
        states = [callback.state_dict() | {"rng": None} for callback in self.callbacks]
        for state in states:
            if state.get("search"):
                state["search"] |= {"elapsed_s": 0.0, "scoring": {}}
        weights, optimizer = dict(self.module.state_dict()), self.trainer.optimizers[0].state_dict()
        return {"weights": weights, "optimizer": optimizer, "states": states, "history": history_of(self.module.net)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("name", FITS)
def test_a_fit_that_is_interrupted_anywhere_resumes_to_the_same_end(tmp_path: Path, name: str) -> None:
    _interrupt_fit(tmp_path, FITS[name], 12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("name", ["rounds", "exchange"])
def test_a_fit_that_was_interrupted_resumes_to_the_same_end(tmp_path: Path, name: str) -> None:
    _interrupt_fit(tmp_path, FITS[name], 3)


def _interrupt_fit(tmp_path: Path, build: Callable[[], list[Any]], most: int) -> None:
    """From the file that is written because of the interrupt, in the middle of a round or of the exchange."""
    whole = Fit(tmp_path / "whole", build())
    end, tried = whole.end(), 0
    for at in interruptions(whole.places, most):
        folder = tmp_path / str(at)
        with suppress(SystemExit):
            Fit(folder, build(), at=at)
        file = folder / "on_exception.ckpt"
        if file.exists():  # not where the fit had ended, or not begun
            comparable = _between_epochs(file)  # in the middle of one Lightning goes on with other batches
            resumed = Fit(folder, build(), file).end()  # which takes the file away at its end
            if comparable:
                tried += 1
                assert_same_state(resumed, end, str(whole.places[at]))
    assert tried


def _between_epochs(file: Path) -> bool:
    """Whether the fit had begun no epoch that is not over."""
    counts = torch.load(file, weights_only=False)["loops"]["fit_loop"]["epoch_progress"]["total"]
    return bool(counts["started"] == counts["completed"])


class _FailingLog(Noisy):
    """A logger that fails, say: when what a round found is logged."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")


def test_a_round_that_cannot_be_logged_is_done(tmp_path: Path) -> None:
    module, callback = _FailingLog(), _rounds()
    with pytest.raises(OSError, match="no space"):
        make_trainer(tmp_path, 3, callback).fit(module, _loader(), _loader())
    assert callback.search_state.rounds == 1
    assert len(history_of(module.net)) == 1


class _Stopping(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise Interrupt


@pytest.mark.usefixtures("_signals")
def test_an_epoch_that_was_interrupted_as_it_began_is_trained(tmp_path: Path) -> None:
    """Lightning alone goes on behind its last batch."""
    save = OnExceptionCheckpoint(tmp_path)
    trainer = make_trainer(tmp_path, 3, save, _rounds(), _Stopping(), enable_checkpointing=True)
    with suppress(SystemExit):
        trainer.fit(Noisy(), _loader(), _loader())
    resumed = make_trainer(tmp_path, 3, _rounds())
    resumed.fit(Noisy(), _loader(), _loader(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert resumed.global_step == 9


def test_copies_of_the_state_are_found_equal_and_changes_unequal() -> None:
    """The tests' own eye."""
    network = _vit()
    assert state_of(network) == state_of(copy.deepcopy(network))
    for change in (lambda n: n.norm.eval(), lambda n: n.head.bias.requires_grad_(False), lambda n: n.head.half()):
        other = copy.deepcopy(network)
        change(other)
        assert state_of(network) != state_of(other)

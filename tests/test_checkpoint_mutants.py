"""Checkpoints whose plain data was changed are refused by name, or read; nothing bare comes out of any door."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from support.callback_cases import Restorable, data, greedy, make_trainer
from support.checkpoint_mutants import mutants
from support.prime_cases import network_of
from timm.models import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl.arguments import number
from swincompress_pl.callbacks import PrimeSVT, QuantizationAwareTraining
from swincompress_pl.checkpoint.hooks import restore_from_checkpoint
from swincompress_pl.checkpoint.record import histories_in
from swincompress_pl.checkpoint.restore import checked_history
from swincompress_pl.cli import export, inspect
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.models.factory import recreate_model
from swincompress_pl.pruning.adaptive.state import SearchState
from swincompress_pl.registry import UnsupportedNetworkError
from swincompress_pl.stored_data import from_plain, reading

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3}


class Own(Restorable):
    def __init__(self) -> None:
        super().__init__(lambda: VisionTransformer(**VIT, num_classes=3))


class Spiking(Restorable):
    def __init__(self) -> None:
        super().__init__(lambda: network_of("spikformer"))


def _classifier() -> CompressibleClassifier:
    return CompressibleClassifier(model="VisionTransformer", num_classes=3, model_kwargs=dict(VIT))


def _pruning(**options: Any) -> Any:
    return greedy(step=0.25, max_rounds=2, round_to=1, **options)


def _qat(**options: Any) -> QuantizationAwareTraining:
    options = {"start_epoch": 0, "method": "max", "calibration_images": 8, "preprocessing": PREPROCESSING} | options
    return QuantizationAwareTraining(**options)


def _prime() -> PrimeSVT:
    return PrimeSVT(tolerance=100.0, min_memory_saving=0.0, rates=(0.3,), kinds=("mlp",), round_to=1)


KINDS: dict[str, tuple[Callable[[], LightningModule], Callable[[], list[Any]]]] = {
    "pruned": (Own, lambda: [_pruning()]),
    "masked": (Own, lambda: [_pruning(granularity="weight")]),
    "quantized": (_classifier, lambda: [_qat(distillation=0.5)]),
    "both": (_classifier, lambda: [_qat(), _pruning()]),
    "spiking": (Spiking, lambda: [_prime()]),
}


def _loader(kind: str) -> DataLoader[Any]:
    images, labels = data(8).tensors
    pixels = ((images * 0.2 + 0.5).clamp(0, 1) * 255).round() / 255
    images = (pixels - 0.5) / 0.5
    if kind == "spiking":
        images, labels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), labels[:4]
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def _trainer(folder: Path, epochs: int, callbacks: list[Any]) -> Any:
    return make_trainer(folder, epochs, *callbacks, num_sanity_val_steps=0, enable_checkpointing=False)


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A kind, and a checkpoint of it."""
    kind, folder = request.param, tmp_path_factory.mktemp("saved")
    module, callbacks = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _trainer(folder, 1, callbacks())
        trainer.fit(module(), _loader(kind), _loader(kind))
    trainer.save_checkpoint(folder / "saved.ckpt")
    return kind, torch.load(folder / "saved.ckpt", weights_only=True)


@contextlib.contextmanager
def _nothing_bare(what: str, door: str) -> Iterator[None]:
    """Errors have to be ours (and so say where), or torch's about weights that do not fit."""
    try:
        yield
    except UnsupportedNetworkError:
        pass
    except Exception as error:
        ours = isinstance(error, ValueError) and "swincompress_pl" in _innermost(error)
        torchs = type(error) is RuntimeError and "state_dict" in str(error)
        if not (ours or torchs):
            pytest.fail(f"{what} through {door}: {error!r} from {_innermost(error)}")


def _innermost(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename


@pytest.mark.filterwarnings("ignore")
def test_what_reads_a_mutant_refuses_it_by_name(saved: tuple[str, dict[str, Any]]) -> None:
    """What the doors call, without what Lightning does around it."""
    kind, checkpoint = saved
    make, callbacks = KINDS[kind]
    trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), world_size=1, callbacks=[])
    tried = 0
    for what, mutant in mutants(checkpoint, 70, seed=1):
        tried += 1
        if not isinstance(mutant.get("callbacks"), dict):
            continue  # Lightning hands nothing on
        module = make()
        with torch.random.fork_rng(), _nothing_bare(what, "on_load_checkpoint"):
            module.on_load_checkpoint(dict(mutant))
            for callback in callbacks():
                state = mutant["callbacks"].get(callback.state_key)
                if state:
                    callback.on_load_checkpoint(trainer, module, mutant)
                    callback.load_state_dict(state)
    assert tried == 70


def _doors(kind: str, file: Path) -> dict[str, Callable[[], Any]]:
    make, callbacks = KINDS[kind]
    module = type(make())

    def resume() -> None:
        _trainer(file.parent, 2, callbacks()).fit(make(), _loader(kind), _loader(kind), ckpt_path=file)

    doors: dict[str, Callable[[], Any]] = {
        "load_from_checkpoint": lambda: module.load_from_checkpoint(file, map_location="cpu", weights_only=True),
        "fit": resume,
        "restore_from_checkpoint": lambda: restore_from_checkpoint(make(), file),
        "inspect": lambda: inspect.main("inspect", [str(file)]),
        "inspect --json": lambda: inspect.main("inspect", [str(file), "--json"]),
    }
    if kind in ("quantized", "both"):
        arguments = [str(file), "-o", str(file.with_suffix(".safetensors")), "--reference-check", "0"]
        doors["export"] = lambda: export.main("export", arguments)
    return doors


def _through_all_doors(saved: tuple[str, dict[str, Any]], folder: Path, count: int, seed: int) -> None:
    kind, checkpoint = saved
    for what, mutant in mutants(checkpoint, count, seed):
        file = folder / "mutant.ckpt"
        try:
            torch.save(mutant, file)
        except RecursionError:  # nested deeper than can be written
            continue
        for door, call in _doors(kind, file).items():
            quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
            with quiet[0], quiet[1], torch.random.fork_rng(), _nothing_bare(what, door):
                call()


@pytest.mark.filterwarnings("ignore")
def test_a_mutant_comes_through_no_door_with_a_bare_error(saved: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    _through_all_doors(saved, tmp_path, 5, seed=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutants_come_through_no_door_with_a_bare_error(saved: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    _through_all_doors(saved, tmp_path, 40, seed=4)


# Each place is named


ENTRIES: dict[str, tuple[Any, str]] = {
    "no list": ("x", "history='x': it has to be a list"),
    "no mapping": ([3], r"history\[0\]=3: it has to be a mapping"),
    "no plan": ([{"mask": ["a"]}, {"prune": 3}], r"history\[1\] \(prune\): a pruning plan of version 1 is expected"),
    "no groups": ([{"prune": {"version": 1}}], r"history\[0\] \(prune\): .*the stored one is damaged"),
    "no units": ([{"prune": {"version": 1, "groups": {"g": {"kept": [0.5]}}}}], r"groups\['g'\].kept\[0\]=0.5"),
    "no names": ([{"mask": [None]}], r"history\[0\] \(mask\): names\[0\]=None: it has to be of type str"),
    "no method": (
        [{"quantize": {"preprocessing": {}}}],
        r"\(quantize\): arguments: method missing; the file is damaged",
    ),
    "no bits": (
        [{"quantize": {"method": "max", "preprocessing": PREPROCESSING, "bits": 9}}],
        r"bits is 9; give 'W8A8'",
    ),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_that_is_none_is_named(case: str) -> None:
    history, message = ENTRIES[case]
    with pytest.raises(ValueError, match=message):
        checked_history(history)


@pytest.mark.parametrize("path", [3, ["x"], {"x": 1}, {}, torch.zeros(2)])
def test_a_record_of_a_network_without_a_path_is_named(path: Any) -> None:
    record = {"version": 1, "network": path, "history": []}
    with pytest.raises(ValueError, match=r"the compression record's network=.*: it has to be of type str"):
        histories_in({"swincompress_pl": record})


@pytest.mark.parametrize("version", [None, 3, "1", True, [1], torch.ones(2)])
def test_a_record_of_another_version_is_refused(version: Any) -> None:
    with pytest.raises(ValueError, match=r"the checkpoint's compression record has version .*, this package reads 1"):
        histories_in({"swincompress_pl": {"version": version, "history": []}})


def _state() -> dict[str, Any]:
    target = {"kind": "mlp", "initial_units": 4, "units": 2, "step": 0.5, "locked": None}
    numbers = {"baseline_parameters": 9, "baseline_prunable": 9, "baseline_bytes": 9, "baseline_macs": None}
    return {
        "version": 2, "granularity": "structured", "baseline_score": 90.0, "tolerance": 1.0,
        "targets": {"a": target}, "initial_units": {"a": 4}, "sensitivity": {"a": [[0.0, 90.0], [0.5, 80.0]]},
        **numbers,
    }  # fmt: skip


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "gone": (lambda s: s.pop("targets"), "search: targets missing"),
    "unknown": (lambda s: s.update(x=1), "search: 'x' unknown"),
    "a step": (lambda s: s["targets"]["a"].update(step="x"), r"search.targets\['a'\].step='x': it has to be a finite"),
    "not finite": (lambda s: s.update(baseline_score=float("nan")), "search.baseline_score=nan"),
    "nothing": (lambda s: s.update(baseline_parameters=0), "search.baseline_parameters=0: it has to be 1 or more"),
    "a part of 2": (lambda s: s.update(sensitivity={"a": [[0, 1], [2, 1]]}), r"sensitivity\['a'\].*a part, 0 to 1"),
    "a pair": (
        lambda s: s.update(sensitivity={"a": [[0]]}),
        r"sensitivity\['a'\]\[0\]=\[0\]: it has to be a list of 2",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_a_search_state_that_is_none_is_named(case: str) -> None:
    change, message = STATES[case]
    state = _state()
    SearchState.from_dict(state)
    change(state)
    with pytest.raises(ValueError, match=message):
        SearchState.from_dict(state)


ARGUMENTS: dict[str, tuple[Any, str]] = {
    "huge": ({"patch_size": -(10**30)}, "argument patch_size holds -1000.*no network is built with more"),
    "endless": ({"depth": 10**6}, "argument depth holds 1000000; no network is built with more than 1,000"),
    "negative": ({"embed_dim": -4}, "VisionTransformer: the stored arguments: "),
    "a type": ({"num_heads": []}, "VisionTransformer: the stored arguments: "),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_stored_arguments_that_build_no_network_are_named(case: str) -> None:
    kwargs, message = ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        recreate_model({"name": "VisionTransformer", "kwargs": VIT | kwargs})


def test_reading_keeps_what_says_enough_and_names_the_rest() -> None:
    for error, message in (
        (KeyError("x"), "the thing: 'x' is missing"),
        (RecursionError(), "the thing: RecursionError"),
    ):
        with pytest.raises(ValueError, match=message), reading("the thing"):
            raise error
    for passing in (UnsupportedNetworkError("no adapter"), FileNotFoundError("no file"), KeyboardInterrupt()):
        with pytest.raises(type(passing)), reading("the thing"):
            raise passing


def test_plain_data_comes_back_by_its_type() -> None:
    assert from_plain(dict[str, tuple[int, ...]] | None, {"a": [1, 2.0]}, "x") == {"a": (1, 2)}
    assert from_plain(list[float] | None, None, "x") is None
    for kind, value in ((int, True), (str, 3), (tuple[int, str], [1]), (dict[str, int], {1: 1}), (bool, 1)):
        with pytest.raises(ValueError, match="x"):
            from_plain(kind, value, "x")
    assert number("x", 1, lambda _: True, "") == 1


# Options of `export` that contradict each other


CONTRADICTIONS: dict[str, tuple[list[str], str]] = {
    "bits": (["--bits", "W8A8"], "--bits W8A8 goes with --quantize: a quantized checkpoint has its"),
    "images": (["--images", "3"], "--images 3 goes with --quantize"),
    "data root": (["--data-root", "x", "--images", "3"], "--images 3 and --data-root x goes with --quantize"),
    "data": (["--data", "x.yaml"], "--quantize and --data go together"),
    "quantize": (["--quantize", "max"], "--quantize and --data go together"),
    "no images": (["--quantize", "max", "--data", "x.yaml", "--images", "0"], "--images is 0; give 1 or more"),
    "affine": (["--quantize", "affine", "--data", "x.yaml"], "--quantize is 'affine'; choose searched or max"),
    "itself": (["-o", "m.ckpt"], "--output m.ckpt is the checkpoint itself, which it would replace"),
    "its data": (["--quantize", "max", "--data", "a", "-o", "./a"], "--output ./a is --data itself"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_options_of_export_that_contradict_each_other_are_refused(case: str) -> None:
    options, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        export.main("export", ["m.ckpt", *([] if "-o" in options else ["-o", "out"]), *options])


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match="is a directory; name a file in it"):
        export.main("export", [str(tmp_path / "m.ckpt"), "-o", str(tmp_path)])

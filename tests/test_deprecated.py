"""The spellings of version 0.1 work, and say the new ones."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import nn

from swincompress_pl._deprecated import MODULES, PACKAGE, current_arguments, old_names, renamed
from swincompress_pl.callbacks import PrimeSVT
from swincompress_pl.models import create_model
from swincompress_pl.pruning import AdaptivePruningConfig, AllocatedPolicy, PrioritizedPolicy, SearchSession


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_is_the_new_one(old: str) -> None:
    new = importlib.import_module(f"{PACKAGE}.{MODULES[old]}")
    parent, _, child = f"{PACKAGE}.{old}".rpartition(".")
    sys.modules.pop(f"{PACKAGE}.{old}", None)
    before = vars(sys.modules.get(parent, sys)).get(child)
    with pytest.warns(DeprecationWarning, match=rf"{PACKAGE}\.{old} is the name .*; use {PACKAGE}\.{MODULES[old]}$"):
        module = importlib.import_module(f"{PACKAGE}.{old}")
    public = [name for name in vars(new) if not name.startswith("_")]
    assert all(getattr(module, name) is getattr(new, name) for name in public)
    assert set(public) <= set(dir(module))
    if before is not None:  # such as the function that has the name of an old module
        setattr(sys.modules[parent], child, before)
    else:  # such as quant.site_errors, where an old name is found only while nothing else has it
        vars(sys.modules[parent]).pop(child, None)


@pytest.mark.filterwarnings("ignore:.*is the name of version 0.1:DeprecationWarning")
@pytest.mark.parametrize(("module", "name", "new"), list(old_names()))
def test_an_old_name_is_the_new_thing(module: str, name: str, new: str) -> None:
    place, _, current = new.partition(":")
    expected = getattr(importlib.import_module(f"{PACKAGE}.{place}"), current)
    assert getattr(importlib.import_module(f"{PACKAGE}.{module}"), name) is expected


def test_the_caller_is_warned() -> None:
    code = "from swincompress_pl.norm.integer import requantize\nimport swincompress_pl.quant.graph as g\ng.parameter"
    ran = subprocess.run(
        [sys.executable, "-W", "default::DeprecationWarning", "-c", code], capture_output=True, text=True, check=True
    )
    ours = [line for line in ran.stderr.splitlines() if "version 0.1" in line]
    assert [line.partition(":")[0] for line in ours] == ["<string>"] * 3, ran.stderr
    assert [line.partition(":")[2].partition(":")[0] for line in ours] == ["1", "1", "3"]


@pytest.mark.filterwarnings("ignore:.*is the name of version 0.1:DeprecationWarning")
def test_a_write_to_an_old_module_reaches_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from swincompress_pl.spec import integer

    monkeypatch.setattr(integer, "requantize", integer.requantize)  # so that it is set back
    importlib.import_module(f"{PACKAGE}.norm.integer").requantize = "patched"  # type: ignore[attr-defined]
    assert integer.requantize == "patched"  # type: ignore[comparison-overlap]


@pytest.mark.filterwarnings("ignore:.*is the name of version 0.1:DeprecationWarning")
def test_a_function_with_the_name_of_an_old_module_goes_on_being_callable() -> None:
    code = (
        "import swincompress_pl.pruning.primesvt, swincompress_pl.pruning as p\n"
        "from swincompress_pl.pruning.primesvt import primesvt\n"
        "try: p.primesvt()\nexcept TypeError as error: assert 'network' in str(error)\nelse: assert False"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_there_never_was_is_not_found() -> None:
    for module in (f"{PACKAGE}.quant.graph", f"{PACKAGE}.models.swin"):
        with pytest.raises(AttributeError, match=r"swincompress_pl\.\w+\.\w+ has no attribute 'nothing'"):
            _ = importlib.import_module(module).nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{PACKAGE}.norm.nothing")


def test_old_arguments_and_values_are_passed_on() -> None:
    @renamed(old="new", values={"new": {"few": "some"}})
    def function(*, new: str = "all", other: int = 0) -> tuple[Any, ...]:
        return new, other

    assert function(new="some", other=1) == ("some", 1)
    with pytest.warns(DeprecationWarning, match=r"function\(old=...\) .*; use new="):
        assert function(old="all", other=2) == ("all", 2)
    with pytest.warns(DeprecationWarning, match=r"function\(new='few'\) .*; use new='some'"):
        assert function(new="few") == ("some", 0)
    with pytest.raises(TypeError, match="got new and old, its former name; give new alone"):
        function(old="all", new="all")


def test_a_class_stays_a_class() -> None:
    @renamed(old="new")
    class Thing:
        def __init__(self, new: int) -> None:
            self.new = new

    assert isinstance(Thing, type)
    assert Thing(new=1).new == 1
    with pytest.warns(DeprecationWarning, match=r"Thing\(old=...\)"):
        assert Thing(old=2).new == 2  # type: ignore[call-arg]


@pytest.mark.filterwarnings("ignore:.*is the name of version 0.1:DeprecationWarning")
def test_rounds_by_the_functions_of_the_first_version_are_those_of_a_session() -> None:
    from swincompress_pl.pruning import begin_search, run_round

    def network() -> nn.Module:
        torch.manual_seed(0)
        return create_model("VisionTransformer", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)

    old, new = network(), network()
    config = AdaptivePruningConfig(tolerance=50.0, step=0.5, max_sparsity=0.5, round_to=1)
    state = begin_search(old, lambda _: 90.0, config)
    outcome = run_round(old, lambda _: 90.0, config, state, unchanged=True)
    expected = SearchSession(new, lambda _: 90.0, config).round()
    assert outcome.applied.plan == expected.applied.plan
    assert outcome.applied.plan
    assert [dataclasses.asdict(step) for step in outcome.steps] == [dataclasses.asdict(s) for s in expected.steps]


def test_a_config_of_the_first_version_is_read_by_the_names_of_today() -> None:
    init: Any = PrimeSVT.__init__
    old = {"max_accuracy_drop": 3.0, "mode": "paper", "policy": "prioritized", "theta": 2.0, "round_to": 4}
    with pytest.warns(DeprecationWarning, match="PrimeSVT's max_accuracy_drop, mode, policy, theta is the name"):
        found = current_arguments(init, old)
    policy = {**dataclasses.asdict(PrioritizedPolicy(theta=2.0))}
    policy |= {name: list(value) for name, value in policy.items() if isinstance(value, tuple)}
    assert found == {"tolerance": 3.0, "granularity": "filter", "policy": policy, "round_to": 4}
    assert current_arguments(init, found) == found  # and says nothing


@pytest.mark.filterwarnings("ignore:.*of version 0.1 and will be removed:DeprecationWarning")
def test_defaults_of_another_policy_that_a_saved_config_holds_do_not_change_the_policy() -> None:
    defaults = dataclasses.asdict(PrioritizedPolicy())
    saved = {**defaults, "target_sets": list(defaults["target_sets"]), "robustness_resolution_points": None}
    found = current_arguments(PrimeSVT.__init__, {**saved, "policy": "allocated"})
    assert found == {"policy": dataclasses.asdict(AllocatedPolicy())}
    assert PrimeSVT(**saved, policy="allocated").config.policy == AllocatedPolicy()
    with pytest.raises(ValueError, match="theta: not a setting of policy='allocated', but of 'prioritized'"):
        current_arguments(PrimeSVT.__init__, {**saved, "theta": 2.0})


@pytest.mark.slow
def test_fit_takes_a_config_of_the_first_version(tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parent.parent / "configs" / "spikformer_cifar10.yaml"
    text = recipe.read_text(encoding="utf-8")
    assert "        tolerance: 3.0" in text
    old = tmp_path / "old.yaml"
    spelled = ("max_accuracy_drop: 3.0", "mode: paper", "policy: prioritized", "theta: 2")
    changed = text.replace("        tolerance: 3.0", "\n".join(f"        {line}" for line in spelled))
    old.write_text(changed.replace("evaluation_cache:", "memo:"), encoding="utf-8")
    code = "import sys; from swincompress_pl.cli import main; main(['fit', '-c', sys.argv[1], '--print_config'])"
    ran = subprocess.run([sys.executable, "-c", code, str(old)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    prime = next(
        callback["init_args"]
        for callback in yaml.safe_load(ran.stdout)["trainer"]["callbacks"]
        if callback["class_path"].endswith("PrimeSVT")
    )
    assert (prime["tolerance"], prime["granularity"], prime["policy"]["theta"]) == (3.0, "filter", 2.0)
    assert prime["evaluation_cache"] == "runs/spikformer/evaluations.jsonl"

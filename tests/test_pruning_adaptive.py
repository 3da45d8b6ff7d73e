"""The search holds its tolerance, ends, and leaves no trace when something goes wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import VisionTransformer
from torch import Tensor, nn

from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.pruning import (
    AdaptivePruningConfig,
    PruningPlan,
    SearchState,
    Step,
    apply_plan,
    collect_gradients,
    count_macs,
    count_parameters,
    prune,
    slice_optimizer,
)
from swincompress_pl.pruning.adaptive.search import SearchSession
from swincompress_pl.pruning.space import prunable_weights, search_space
from swincompress_pl.pruning.structure.apply import AppliedPlan, history_of
from swincompress_pl.pruning.structure.weight_masks import masked_parameters, masked_share
from swincompress_pl.registry import adapter_for

SHAPE = (1, 3, 16, 16)


def _network() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3)


def _alive(network: nn.Module) -> dict[str, int]:
    """{group: units that still do something}, sliced or masked."""
    alive = {}
    for group in adapter_for(network).groups(network):
        if group.kind not in ("heads", "mlp"):
            continue
        (reader,) = group.consumers()
        weight = network.get_parameter(reader.tensor).detach()
        columns = weight.movedim(reader.axis, 0).reshape(group.units, -1)
        alive[group.name] = int(columns.abs().sum(1).count_nonzero())
    return alive


WIDTHS = _alive(_network())


def _score(network: nn.Module, price: dict[str, float], baseline: float = 90.0) -> float:
    """Each group costs up to its price in points, in proportion to what is gone of it."""
    alive = _alive(network)
    return baseline - sum(price.get(name, 0.0) * (1 - alive[name] / WIDTHS[name]) for name in WIDTHS)


def _snapshot(network: nn.Module) -> tuple[dict[str, torch.Tensor], list[object], list[bool]]:
    return copy.deepcopy(network.state_dict()), history_of(network), [m.training for m in network.modules()]


def _assert_same(network: nn.Module, snapshot: tuple[dict[str, torch.Tensor], list[object], list[bool]]) -> None:
    state, history, training = snapshot
    now = network.state_dict()
    assert state.keys() == now.keys()
    assert all(torch.equal(state[key], now[key]) for key in state)
    assert history_of(network) == history
    assert [m.training for m in network.modules()] == training


_prices = st.fixed_dictionaries({name: st.floats(-2, 40) for name in WIDTHS})  # never above 100 points in all


@settings(max_examples=25, deadline=None)
@given(
    price=_prices,
    tolerance=st.floats(0.1, 30),
    step=st.sampled_from([0.05, 0.13, 0.5, 1.0]),
    round_to=st.sampled_from([1, 8, 12, 200]),
    order=st.sampled_from(["fixed", "size"]),
)
def test_rollback_never_exceeds_the_tolerance(
    price: dict[str, float], tolerance: float, step: float, round_to: int, order: str
) -> None:
    network, fresh = _network(), _network()
    config = AdaptivePruningConfig(tolerance=tolerance, step=step, round_to=round_to, order=order, max_sparsity=0.8)  # type: ignore[arg-type]
    result = prune(network, lambda n: _score(n, price), config)
    assert result.score == _score(network, price) >= 90.0 - tolerance - 1e-6
    assert result.stopped == "every target is locked"
    alive = _alive(network)
    for name, width in WIDTHS.items():
        assert alive[name] >= max(1, width * 0.2 - 1e-9)
        if name.endswith("channels") and alive[name] < width:
            assert alive[name] % round_to == 0
    for row in result.steps:
        if row.accepted:
            assert row.score >= 90.0 - tolerance - 1e-6
    apply_plan(fresh, result.plan)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), network.parameters(), strict=True))


def test_free_groups_go_to_the_limit_and_dear_ones_stay() -> None:
    price = {name: 100.0 if "blocks.0" in name else 0.0 for name in WIDTHS}
    network = _network()
    result = prune(
        network, lambda n: _score(n, price), AdaptivePruningConfig(tolerance=1.0, step=0.25, max_sparsity=0.75)
    )
    assert _alive(network) == {
        "blocks.0.attn.heads": 4,
        "blocks.0.mlp.channels": 128,
        "blocks.1.attn.heads": 1,
        "blocks.1.mlp.channels": 32,
    }
    reasons = {name: entry.locked for name, entry in result.state.targets.items()}
    assert reasons["blocks.0.attn.heads"] == "no smaller step is within the tolerance"
    assert "as narrow as" in str(reasons["blocks.1.attn.heads"])


def test_steps_halve_until_they_fit() -> None:
    """12.5 % of the channels is the tolerance: 50 % and 25 % fail, 12.5 % fits, more does not."""
    price = {name: 8.0 if name == "blocks.0.mlp.channels" else 80.0 for name in WIDTHS}
    result = prune(
        _network(), lambda n: _score(n, price), AdaptivePruningConfig(tolerance=1.0, step=0.5, min_step=0.05)
    )
    tried = [(r.units_before, r.units_after, r.accepted) for r in result.steps if r.target == "blocks.0.mlp.channels"]
    assert tried == [(128, 64, False), (128, 96, False), (128, 112, True), (112, 96, False), (112, 104, False)]


def test_keep_overshoots_once_and_locks() -> None:
    price = dict.fromkeys(WIDTHS, 20.0)
    network = _network()
    result = prune(
        network, lambda n: _score(n, price), AdaptivePruningConfig(tolerance=1.0, step=0.25, overshoot="keep")
    )
    assert result.score < 89.0
    assert all(row.accepted for row in result.steps)
    assert [row.units_after for row in result.steps] == [3, 96, 3, 96]


def test_the_lowest_units_go_first() -> None:
    network = _network()
    marked = [3, 77, 100]
    with torch.no_grad():
        network.blocks[0].mlp.fc1.weight[marked] *= 1e-3
        network.blocks[0].mlp.fc2.weight[:, marked] *= 1e-3
    config = AdaptivePruningConfig(kinds=("mlp",), step=3 / 128, min_step=0.01, round_to=1, max_rounds=1)
    result = prune(network, lambda _n: 90.0, config)
    assert set(range(128)) - set(result.plan.kept["blocks.0.mlp.channels"]) == set(marked)


def test_order_by_size() -> None:
    config = AdaptivePruningConfig(order="size", max_rounds=1)
    result = prune(_network(), lambda _n: 90.0, config)
    assert [row.kind for row in result.steps] == ["mlp", "mlp", "heads", "heads"]


@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_target_stops_the_search(measure: str) -> None:
    network = _network()
    before = {"macs": count_macs(network, SHAPE), "parameters": count_parameters(network)}
    config = AdaptivePruningConfig(target=0.2, target_of=measure)  # type: ignore[arg-type]
    result = prune(network, lambda _n: 90.0, config, input_shape=SHAPE)
    after = {"macs": count_macs(network, SHAPE), "parameters": count_parameters(network)}
    assert 0.2 <= 1 - after[measure] / before[measure] < 0.3
    assert result.stopped.startswith("target reached")
    assert (result.steps[-1].macs, result.steps[-1].parameters) == (after["macs"], after["parameters"])


def test_a_target_that_cannot_be_met_is_reported() -> None:
    config = AdaptivePruningConfig(target=0.9, max_sparsity=0.5)
    result = prune(_network(), lambda _n: 90.0, config, input_shape=SHAPE)
    assert "every target is locked" in result.stopped
    assert "the target of 90.0% is not met" in result.stopped


def test_slicing_that_tips_an_image_gives_up_the_latest_steps() -> None:
    """The sliced network scores lower than the masked one as soon as the last block's channels are cut."""
    network = _network()

    def evaluate(candidate: nn.Module) -> float:
        return 80.0 if candidate.blocks[1].mlp.fc1.out_features < 128 else 90.0

    result = prune(network, evaluate, AdaptivePruningConfig(tolerance=1.0, max_rounds=1), input_shape=SHAPE)
    assert network.blocks[1].mlp.fc1.out_features == 128
    assert network.blocks[0].mlp.fc1.out_features == 120
    assert result.score == 90.0
    assert [(row.target, row.accepted) for row in result.steps[-2:]] == [
        ("blocks.1.mlp.channels", True),
        ("blocks.1.mlp.channels", False),
    ]
    assert result.steps[-1].macs == count_macs(network, SHAPE)
    assert result.steps[-1].parameters == count_parameters(network)


@pytest.mark.parametrize("calls", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_network_as_it_was(calls: int, error: type[BaseException]) -> None:
    network = _network().train()
    network.blocks[0].eval()
    snapshot, count = _snapshot(network), [0]

    def evaluate(candidate: nn.Module) -> float:
        assert not any(m.training for m in candidate.modules())
        count[0] += 1
        if count[0] == calls:
            raise error("stop")
        return 90.0

    with pytest.raises(error, match="stop"):
        prune(network, evaluate)
    _assert_same(network, snapshot)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 100.5, float("inf")])
@pytest.mark.parametrize("at", [1, 3])
def test_a_score_that_is_no_accuracy_is_refused(bad: float, at: int) -> None:
    network, count = _network(), [0]
    snapshot = _snapshot(network)

    def evaluate(_candidate: nn.Module) -> float:
        count[0] += 1
        return bad if count[0] == at else 90.0

    with pytest.raises(ValueError, match=r"an accuracy in points, 0 to 100") as caught:
        prune(network, evaluate)
    notes = getattr(caught.value, "__notes__", [])
    assert notes == ([] if at == 1 else ["while blocks.0.mlp.channels was tried with 120 of 128 mlp"])
    _assert_same(network, snapshot)


def test_a_progress_that_raises_leaves_the_network_as_it_was() -> None:
    network = _network()
    snapshot = _snapshot(network)

    def progress(step: Step) -> None:
        raise ZeroDivisionError(step.target)

    with pytest.raises(ZeroDivisionError):
        prune(network, lambda _n: 90.0, progress=progress)
    _assert_same(network, snapshot)


def test_recovery_runs_between_rounds_and_steps_are_tried_again() -> None:
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    rounds: list[AppliedPlan] = []

    def recover(candidate: nn.Module, applied: AppliedPlan) -> None:
        slice_optimizer(optimizer, applied)
        candidate.train()
        candidate(torch.ones(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
        rounds.append(applied)

    # nothing is accepted before the second recovery
    result = prune(
        network,
        lambda n: 90.0 if len(rounds) >= 2 or _alive(n) == WIDTHS else 10.0,
        AdaptivePruningConfig(tolerance=1.0, step=0.25, max_rounds=4),
        recover=recover,
    )
    assert [r.accepted for r in result.steps] == [False] * 8 + [True] * 8
    assert len(rounds) == 3
    assert result.stopped == "max_rounds=4 is reached"


def test_rounds_one_by_one_equal_the_whole_and_the_state_is_data() -> None:
    price = dict.fromkeys(WIDTHS, 6.0)
    config = AdaptivePruningConfig(tolerance=2.0, step=0.2)
    whole, single = _network(), _network()
    result = prune(whole, lambda n: _score(n, price), config, input_shape=SHAPE)
    state = SearchSession(single, lambda n: _score(n, price), config, input_shape=SHAPE).state
    plan = PruningPlan.identity()
    while state.stopped is None:
        state = SearchState.from_dict(json.loads(json.dumps(state.to_dict())))
        session = SearchSession(single, lambda n: _score(n, price), config, input_shape=SHAPE, state=state)
        outcome = session.round(retrains=False)
        assert state.rounds == outcome.state.rounds - 1  # the given state is not changed
        state, plan = outcome.state, plan.then(outcome.applied.plan)
    state.elapsed_s, state.scoring = result.state.elapsed_s, result.state.scoring
    assert (plan, state) == (result.plan, result.state)
    with pytest.raises(ValueError, match="search state of version 2 is expected, not 7"):
        SearchState.from_dict({**state.to_dict(), "version": 7})


def test_a_state_of_another_network_is_refused() -> None:
    state = SearchSession(_network(), lambda _n: 90.0, AdaptivePruningConfig(kinds=("mlp",))).state
    with pytest.raises(ValueError, match=r"begun on another network or with other settings.*blocks\.0\.attn\.heads"):
        SearchSession(_network(), lambda _n: 90.0, AdaptivePruningConfig(), state=state).round()


def test_a_fraction_for_a_score_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="does evaluate return a fraction"):
        SearchSession(_network(), lambda _n: 0.97, AdaptivePruningConfig())


def test_kinds_that_match_nothing_are_refused() -> None:
    with pytest.raises(
        ValueError, match="VisionTransformer has no group of kind 'filters', only embed, head_dim, heads, mlp"
    ):
        prune(_network(), lambda _n: 90.0, AdaptivePruningConfig(kinds=("filters",)))


@pytest.mark.parametrize("granularity", ["structured", "weight"])
def test_layers_that_match_nothing_are_refused(granularity: str) -> None:
    with pytest.raises(
        ValueError, match=r"layers: 'stages\.\*' matches nothing that can be pruned; there is blocks\.0"
    ):
        prune(
            _network(),
            lambda _n: 90.0,
            AdaptivePruningConfig(granularity=granularity, layers=("blocks.0.*", "stages.*")),
        )


def test_a_target_in_macs_needs_the_input_shape() -> None:
    with pytest.raises(ValueError, match="needs input_shape"):
        prune(_network(), lambda _n: 90.0, AdaptivePruningConfig(target=0.5))


_BAD: list[tuple[str, object]] = [
    ("tolerance", 0),
    ("tolerance", -1),
    ("tolerance", 100.5),
    ("tolerance", float("nan")),
    ("step", 0),
    ("step", 1.5),
    ("min_step", 0),
    ("min_step", 0.06),
    ("max_sparsity", 0),
    ("max_sparsity", 1),
    ("round_to", 0),
    ("round_to", 2.5),
    ("order", "random"),
    ("overshoot", "maybe"),
    ("kinds", ()),
    ("criterion", "hessian"),
    ("ranking", "both"),
    ("shrink", "never"),
    ("layers", ()),
    ("time_budget_s", 0),
    ("target", 0),
    ("target", 1.0),
    ("target_of", "watts"),
    ("max_rounds", 0),
]


@pytest.mark.parametrize(("name", "value"), _BAD)
def test_a_bad_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*it has to be"):
        AdaptivePruningConfig(**{name: value})  # type: ignore[arg-type]


def test_a_users_criterion() -> None:
    def last_first(_name: str, weight: torch.Tensor, _gradients: object) -> torch.Tensor:
        rows = torch.arange(len(weight), 0, -1.0)
        return rows.view(-1, *[1] * (weight.ndim - 1)).expand_as(weight)

    config = AdaptivePruningConfig(criterion=last_first, step=0.25, max_rounds=1)  # type: ignore[arg-type]
    result = prune(_network(), lambda _n: 90.0, config)
    assert result.plan.kept["blocks.0.attn.heads"] == (0, 1, 2)


def _zeros(network: nn.Module) -> dict[str, float]:
    return {
        name: 1 - float(network.get_parameter(name).count_nonzero()) / network.get_parameter(name).numel()
        for name in prunable_weights(network)
    }


@pytest.mark.parametrize(("granularity", "sparsity"), [("weight", 0.25), ("2:4", 0.25), ("1:4", 0.25), ("block", 0.25)])
def test_weights_are_masked_and_stay(granularity: str, sparsity: float) -> None:
    network = _network()
    names = prunable_weights(network)
    config = AdaptivePruningConfig(granularity=granularity, step=0.25, max_rounds=1)
    result = prune(network, lambda _n: 90.0, config, input_shape=SHAPE)
    assert _zeros(network) == dict.fromkeys(names, sparsity)
    assert history_of(network) == [{"mask": names}]
    assert masked_share(network) == sparsity
    assert result.plan == PruningPlan.identity()
    removed = sum(network.get_parameter(name).numel() for name in names) * sparsity
    assert result.steps[-1].parameters == count_parameters(_network()) - removed
    assert result.steps[-1].macs == count_macs(_network(), SHAPE)  # a dense kernel's
    assert result.steps[-1].size_bytes == result.steps[-1].parameters * 4 + removed / sparsity / 8


def test_n_of_m_ends_at_its_pattern() -> None:
    network = _network()
    result = prune(network, lambda _n: 90.0, AdaptivePruningConfig(granularity="2:4", step=0.25))
    assert set(_zeros(network).values()) == {0.5}
    assert {entry.units for entry in result.state.targets.values()} == {2}
    groups = network.blocks[0].mlp.fc1.weight.detach().reshape(-1, 4)
    assert bool((groups.count_nonzero(dim=1) == 2).all())


@settings(max_examples=15, deadline=None)
@given(
    granularity=st.sampled_from(["weight", "block", "2:4", "structured"]),
    shrink=st.sampled_from(["round", "end"]),
    ranking=st.sampled_from(["local", "global"]),
    price=st.floats(0, 40),
    tolerance=st.floats(0.1, 20),
    seed=st.integers(0, 99),
)
def test_every_way_of_pruning_holds_the_tolerance(
    granularity: str, shrink: str, ranking: str, price: float, tolerance: float, seed: int
) -> None:
    if granularity != "structured":
        shrink = "round"
    if granularity == "2:4":
        ranking = "local"
    network = _network()
    whole = sum(float(p.abs().sum()) for p in network.parameters())

    def evaluate(candidate: nn.Module) -> float:
        return 90.0 - price * (1 - sum(float(p.abs().sum()) for p in candidate.parameters()) / whole)

    config = AdaptivePruningConfig(
        tolerance=tolerance,
        granularity=granularity,
        shrink=shrink,
        ranking=ranking,
        step=0.3,
        max_sparsity=0.6,  # type: ignore[arg-type]
    )
    result = prune(network, evaluate, config)
    assert result.score >= 90.0 - tolerance - 1e-6
    if shrink == "round":
        assert result.score == pytest.approx(evaluate(network))
    assert result.stopped == "every target is locked"
    if granularity == "structured":
        assert not masked_parameters(network)
        fresh = _network()
        apply_plan(fresh, result.plan)
        assert [p.shape for p in fresh.parameters()] == [p.shape for p in network.parameters()]
        assert count_parameters(network) == (result.steps[-1].parameters if result.steps else count_parameters(fresh))


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
@pytest.mark.parametrize("calls", [2, 5, 11, 14])
def test_an_exception_among_masks_leaves_the_network_as_it_was(granularity: str, calls: int) -> None:
    network = _network()
    snapshot, count = _snapshot(network), [0]

    def evaluate(_candidate: nn.Module) -> float:
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return 90.0

    with pytest.raises(KeyboardInterrupt):
        prune(network, evaluate, AdaptivePruningConfig(granularity=granularity, step=0.25))
    _assert_same(network, snapshot)


def test_global_ranking_takes_the_lowest_of_all_layers() -> None:
    network = _network()
    with torch.no_grad():
        network.blocks[0].mlp.fc1.weight[:, :4] *= 1e-4
    config = AdaptivePruningConfig(granularity="weight", ranking="global", step=0.01, min_step=0.01, max_rounds=1)
    result = prune(network, lambda _n: 90.0, config)
    zeros = _zeros(network)
    assert zeros["blocks.0.mlp.fc1.weight"] > 3 * max(v for name, v in zeros.items() if "0.mlp.fc1" not in name)
    total = sum(network.get_parameter(name).numel() for name in zeros)
    gone = sum(share * network.get_parameter(name).numel() for name, share in zeros.items())
    assert gone / total == pytest.approx(0.01, abs=1 / total)
    assert [row.target for row in result.steps] == ["network"]


def _unit_prices(network: nn.Module) -> dict[str, int]:
    """MACs of one unit of each target, counted by removing eight channels or one head."""
    prices = {}
    for target in search_space(AdaptivePruningConfig()).targets(network):
        narrower = copy.deepcopy(network)
        removal = search_space(AdaptivePruningConfig()).removals(narrower, target, None)(target.units - target.granule)
        search_space(AdaptivePruningConfig()).commit(narrower, removal)
        prices[target.name] = (count_macs(network, SHAPE) - count_macs(narrower, SHAPE)) // target.granule
    return prices


@pytest.mark.parametrize("dear", ["attn.heads", "mlp.channels"])
def test_a_ranking_by_loss_pays_for_what_it_saves(dear: str) -> None:
    # A MAC of `dear` costs the loss three times as much as one of the others: the ratio decides, not the score, by
    # which a channel, with fewer MACs than a head, always goes first.
    network = _network()
    prices = _unit_prices(network)
    wanted = {name: price * (3.0 if name.endswith(dear) else 1.0) for name, price in prices.items()}
    groups = {g.name: g for g in search_space(AdaptivePruningConfig()).groups(network)}  # type: ignore[attr-defined]
    owner = {s.tensor: name for name, g in groups.items() for s in g.consumers()}

    def criterion(name: str, weight: Tensor, gradients: object) -> Tensor:
        values = torch.zeros_like(weight)
        if name in owner:
            values += wanted[owner[name]] / (weight.numel() / groups[owner[name]].units)
        return values

    criterion.estimates_loss = True  # type: ignore[attr-defined]
    config = AdaptivePruningConfig(ranking="global", criterion=criterion, step=0.1, max_rounds=1, max_sparsity=0.5)
    result = prune(network, lambda _n: 90.0, config, input_shape=SHAPE)
    assert result.plan.kept
    assert not [name for name in result.plan.kept if name.endswith(dear)]


@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_a_step_of_a_global_ranking_removes_what_it_is_asked_for(round_to: int) -> None:
    # Rounded up to granules one by one, the widths would leave a part of each step behind.
    network = _network()
    space = search_space(AdaptivePruningConfig(ranking="global", round_to=round_to))
    (target,) = space.targets(network)
    members = {member.name: member for member in target.members}
    for asked in (1, 50, 200, 400):
        removal = space.removals(network, target, None)(target.units - asked)
        assert all(members[name].kind == "heads" or len(gone) % round_to == 0 for name, gone in removal.items())
        cost = {name: member.weights / member.initial_units for name, member in members.items()}
        removed = sum(cost[name] * len(gone) for name, gone in removal.items())
        granule = max(cost[name] * member.granule for name, member in members.items())
        wanted = target.weights * asked / 1000
        assert removed > 0
        assert wanted - granule < removed <= max(wanted * (1 + 1e-9), granule)


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("target", [0.1, 0.23])
def test_the_last_step_does_not_go_beyond_the_target(ranking: str, target: float) -> None:
    network = _network()
    whole = count_macs(network, SHAPE)
    finest = max(price * (1 if name.endswith("heads") else 8) for name, price in _unit_prices(network).items())
    config = AdaptivePruningConfig(ranking=ranking, step=0.5, target=target)  # type: ignore[arg-type]
    result = prune(network, lambda _n: 90.0, config, input_shape=SHAPE)
    removed = whole - count_macs(network, SHAPE)
    assert result.stopped.startswith("target reached")
    assert target * whole <= removed < target * whole + (1 if ranking == "local" else len(WIDTHS)) * finest


def test_the_end_of_the_search_slices_what_was_masked() -> None:
    network, at_once = _network(), _network()
    seen = []

    def recover(candidate: nn.Module, applied: AppliedPlan) -> None:
        seen.append((applied.tensors, len(masked_parameters(candidate)), candidate.blocks[0].attn.num_heads))

    config = AdaptivePruningConfig(step=0.25, max_rounds=2, shrink="end")
    result = prune(network, lambda _n: 90.0, config, recover=recover, input_shape=SHAPE)
    assert seen == [((), 4, 4)]
    assert network.blocks[0].attn.num_heads == 2
    assert result.steps[-1].macs == count_macs(network, SHAPE)
    prune(at_once, lambda _n: 90.0, AdaptivePruningConfig(step=0.25, max_rounds=2))
    images = torch.ones(SHAPE)
    torch.testing.assert_close(network.eval()(images), at_once.eval()(images))
    restored = restore_from_history(_network(), history_of(network))
    assert [p.shape for p in restored.parameters()] == [p.shape for p in network.parameters()]


def test_the_least_sensitive_goes_first() -> None:
    price = {name: 10.0 * index for index, name in enumerate(reversed(WIDTHS))}
    result = prune(
        _network(), lambda n: _score(n, price), AdaptivePruningConfig(tolerance=50.0, order="sensitivity", max_rounds=1)
    )
    assert [row.target for row in result.steps] == list(reversed(WIDTHS))
    curve = result.state.sensitivity["blocks.0.mlp.channels"]
    assert curve == [(0.0, 90.0), (0.125, 87.5), (0.25, 85.0), (0.5, 80.0)]


def test_a_time_budget_ends_the_search() -> None:
    network = _network()
    result = prune(network, lambda _n: 90.0, AdaptivePruningConfig(time_budget_s=1e-9))
    assert result.steps == ()
    assert result.stopped == "time_budget_s=1e-09 is used up"
    assert history_of(network) == []


def test_a_network_that_training_left_below_the_tolerance_is_not_tried() -> None:
    network = _network()
    config = AdaptivePruningConfig(tolerance=1.0, step=0.25)
    state = SearchSession(network, lambda _n: 90.0, config).state
    outcome = SearchSession(network, lambda _n: 80.0, config, state=state).round()
    assert (outcome.steps, outcome.state.rounds, outcome.state.stopped) == ((), 1, None)
    assert all(entry.step == 0.25 for entry in outcome.state.targets.values())  # nothing was held against a target


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_gradient_criteria_find_what_does_nothing(criterion: str) -> None:
    network = _network()
    with torch.no_grad():
        network.blocks[0].mlp.fc2.weight[:, :8] = 0  # no gradient reaches the first eight channels, however large
        network.blocks[0].mlp.fc1.weight[:8] = 5
    batches = [(torch.randn(8, 3, 16, 16), torch.randint(0, 3, (8,))) for _ in range(2)]
    config = AdaptivePruningConfig(kinds=("mlp",), criterion=criterion, layers=("blocks.0.*",), max_rounds=1)
    with pytest.raises(ValueError, match="needs gradients"):
        prune(network, lambda _n: 90.0, config)
    result = prune(network, lambda _n: 90.0, config, gradients=lambda n: collect_gradients(n, batches))
    assert result.plan.kept["blocks.0.mlp.channels"] == tuple(range(8, 128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "weight", "target": 0.5}, "^target_of='macs'"),
        ({"granularity": "weight", "shrink": "end"}, "^shrink='end'"),
        ({"granularity": "2:4", "ranking": "global"}, "^ranking='global'"),
        ({"kinds": ("embed",), "shrink": "end"}, "^shrink='end'.*kind embed"),
        ({"kinds": ("qk",), "shrink": "end"}, "^shrink='end'.*kind qk"),
        ({"granularity": "rows"}, "rows"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptivePruningConfig(**options)  # type: ignore[arg-type]


def test_a_narrow_beginning_takes_what_is_cheap_first() -> None:
    """The first group is dear and is met first; a wide tolerance spends all on it."""
    price = dict(zip(WIDTHS, (0.0, 30.0, 0.0, 2.0), strict=True))
    wide = AdaptivePruningConfig(tolerance=4.0, step=0.125, min_step=0.0625, kinds=("mlp",), max_sparsity=0.75)
    narrow = replace(wide, first_tolerance=0.5)
    results = [prune(_network(), lambda n: _score(n, price), config) for config in (wide, narrow)]
    assert [r.stopped for r in results] == ["every target is locked"] * 2
    assert all(r.score >= 86.0 for r in results)
    cheap, dear = "blocks.1.mlp.channels", "blocks.0.mlp.channels"
    widths = [{name: entry.units for name, entry in r.state.targets.items()} for r in results]
    assert widths[1][cheap] < widths[0][cheap]
    first = next(step for step in results[1].steps if step.target == dear and step.accepted)
    assert {s.target for s in results[1].steps[: results[1].steps.index(first)] if s.accepted} == {cheap}
    assert results[1].state.tolerance == 4.0
    for bad in (0, 4.5):
        with pytest.raises(ValueError, match=r"^first_tolerance=.*at most tolerance=4\.0"):
            replace(wide, first_tolerance=bad)

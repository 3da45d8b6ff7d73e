"""Errors of a layer's outputs that are felt together: the weights and the masks of least error under both matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swincompress_pl.pruning.compensation import reader_state
from swincompress_pl.pruning.compensation.compensator import Compensator
from swincompress_pl.pruning.compensation.masks import MaskCompensator
from swincompress_pl.pruning.compensation.moments import Moments
from swincompress_pl.pruning.compensation.rows import Felt, RowSystem, best_weights
from swincompress_pl.pruning.structure.patterns import SingleWeights

OUTPUTS, INPUTS = 6, 10


def _system(seed: int, together: Tensor | None, outputs: int = OUTPUTS, inputs: int = INPUTS) -> RowSystem:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    weight = torch.randn(outputs, inputs, generator=draw).double()
    moments = Moments.empty(inputs, outputs, torch.device("cpu"))
    moments.add(x)
    moments.give(weight, weight.new_zeros(outputs))
    whole = moments.system(intercept=True)
    felt = None if together is None else Felt(together=together, parts=_parts(together, whole.xx, seed))
    system = RowSystem.of(whole, weight, felt=felt)
    assert system is not None
    return system


def _parts(together: Tensor, xx: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """One group of rows, or two of different inputs."""
    if seed % 2:
        return ((together, xx),)
    direction = torch.randn(len(together), generator=torch.Generator().manual_seed(seed)).double()
    direction *= together.diagonal().min().sqrt() / direction.abs().max() / len(together)
    apart = torch.outer(direction, direction)
    return (apart, 3 * xx.diagonal().diag()), (together - apart, xx)


def _felt(seed: int, outputs: int = OUTPUTS) -> Tensor:
    """Like gradients that mostly point one way."""
    draw = torch.Generator().manual_seed(seed)
    g = torch.randn(300, outputs, generator=draw).double() + 3 * torch.randn(300, 1, generator=draw).double()
    found = g.T @ g
    return found / found.diagonal().mean()


def _mask(seed: int, outputs: int = OUTPUTS, inputs: int = INPUTS) -> Tensor:
    return torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed + 1)) >= 0.5


Terms = Sequence[tuple[Tensor, Tensor]]


def _terms(system: RowSystem) -> Terms:
    """How errors are weighed when weights are solved."""
    assert system.felt is not None
    alone = 0.5 * system.felt.together.diagonal().diag()
    return [*system.felt.parts, (alone, system.hessian)]


def _error(system: RowSystem, weight: Tensor, terms: Terms | None = None) -> float:
    d = weight - system.best
    return float(sum((g @ d @ a * d).sum() for g, a in terms or _terms(system)))


def _exact(system: RowSystem, mask: Tensor, terms: Terms | None = None) -> Tensor:
    """Solves all weights that stay in one system."""
    whole = torch.stack([torch.kron(g, a) for g, a in terms or _terms(system)]).sum(0)
    kept = mask.flatten()
    right = (whole @ system.best.flatten())[kept]
    solved = torch.zeros(mask.numel(), dtype=torch.float64)
    solved[kept] = torch.linalg.solve(whole[kept][:, kept], right)
    return solved.reshape(mask.shape)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_weights_come_close_to_the_least_error(seed: int) -> None:
    system, mask = _system(seed, _felt(seed)), _mask(seed)
    begun = system.best * mask
    near, best = best_weights(system, begun, mask), _exact(system, mask)
    assert not near[~mask].any()
    assert _error(system, best) <= _error(system, near) * (1 + 1e-7) + 1e-9
    assert _error(system, near) <= 1.01 * _error(system, best) + 1e-9
    apart = replace(system, felt=None).solve(mask)
    assert _error(system, best) <= _error(system, apart) * (1 + 1e-7) + 1e-9


def test_outputs_that_are_felt_apart_are_solved_apart() -> None:
    mask, apart, eye = _mask(3), _system(3, None), torch.eye(OUTPUTS, dtype=torch.float64)
    together = replace(apart, felt=Felt(together=eye, parts=((eye, apart.hessian),)))
    torch.testing.assert_close(together.approach(together.best, mask), apart.solve(mask), rtol=1e-4, atol=1e-4)


def _keep(saliency: Tensor, part: float) -> Tensor:
    """Half of all weights in the end."""
    kept = torch.zeros(saliency.numel(), dtype=torch.bool)
    kept[saliency.flatten().topk(round(saliency.numel() * (1 - part / 2))).indices] = True
    return kept.reshape(saliency.shape)


def test_masks_of_outputs_that_are_felt_apart_are_those_of_each_for_itself() -> None:
    apart, scale = _system(5, None, inputs=32), torch.ones(OUTPUTS, dtype=torch.float64)
    eye = torch.eye(OUTPUTS, dtype=torch.float64)
    together = replace(apart, felt=Felt(together=eye, parts=((eye, apart.hessian),)))
    same = together.mask(apart.best, scale, _keep) == apart.mask(apart.best, scale, _keep)
    assert float(same.double().mean()) > 0.98  # rounding decides between weights that cost the same


def test_a_mask_that_knows_of_it_costs_less() -> None:
    known = unknown = 0.0
    for seed in range(8):
        system, scale = _system(seed, _felt(seed)), torch.ones(OUTPUTS, dtype=torch.float64)
        assert system.felt is not None
        values, vectors = torch.linalg.eigh(system.felt.together)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        root /= root.diagonal().mean()
        terms = [(root + 0.3 * torch.eye(OUTPUTS, dtype=torch.float64), system.hessian)]
        for each in (system, replace(system, felt=None)):
            mask = each.mask(system.best, scale, _keep)
            assert int(mask.sum()) == mask.numel() // 2
            error = _error(system, _exact(system, mask, terms), terms)
            known, unknown = (known + error, unknown) if each is system else (known, unknown + error)
    assert known < unknown


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4)).eval()


@pytest.mark.parametrize("most", [12, 11])
def test_what_is_felt_together_are_the_products_of_gradients(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_state, "_MOST_OUTPUTS", most)
    network, images = _network(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    compensator = Compensator([images[:40], images[40:]])
    compensator.begin_round(network, None, ["0", "2"])
    hidden, last = compensator.state("0"), compensator.state("2")
    assert hidden is not None
    assert last is not None
    felt = last.felt()
    assert felt is not None
    found = felt.together
    assert float(found.diagonal().mean()) == pytest.approx(1.0)
    if most < 12:
        assert hidden.felt() is None  # each of so many outputs counts for itself
        return
    # All that the hidden layer's gradients can be lies in the rows of the last weight, bent by the GELU.
    of_hidden = hidden.felt()
    assert of_hidden is not None
    whole = of_hidden.together
    assert torch.equal(whole, whole.T)
    assert float(torch.linalg.eigvalsh(whole).min()) > -1e-6
    assert float(whole.fill_diagonal_(0.0).abs().max()) > 0.1
    # Gradients of log-probabilities sum to 0, so that all logits together can move freely.
    torch.testing.assert_close(found.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_gradients_that_do_not_fit_32_bits_weigh_no_outputs_together(size: float) -> None:
    """Such as those behind a saturated softmax; the masks are searched for all the same."""
    network, images = _network(), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    network.append(_Scaled(size))
    compensator = Compensator([images])
    masks = MaskCompensator(compensator, writes=True)
    masks.begin_round(network, ["0.weight", "2.weight"])
    state = compensator.state("2")
    assert state is not None
    assert state.felt() is None
    half = masks.best_mask("2.weight", lambda saliency, part: SingleWeights().keep_mask(saliency, 24), (4, 12))
    assert half is not None
    assert int(half.sum()) == 24


class _Scaled(nn.Module):
    """Its gradients are `size` times as large as they are, what it gives is not."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() + (x - x.detach()) * self.size


class _FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def test_tokens_that_alone_are_read_are_a_group_of_their_own() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), _FirstToken(), nn.Linear(5, 3)).eval()
    images = torch.randn(40, 9, 6, generator=torch.Generator().manual_seed(1))
    images[:, 0] += 2.0  # the first token reads something else
    compensator = Compensator([images])
    compensator.begin_round(network, None, ["0", "2"])
    state = compensator.state("0")
    assert state is not None
    felt = state.felt()
    assert felt is not None
    (far, of_first), (others, of_others) = felt.parts
    torch.testing.assert_close(far, felt.together)
    assert not others.any()
    mean = state.moments.x / state.moments.rows
    assert float(((of_first.diagonal() + 1e-9).sqrt()).min()) > 1.0
    assert float(of_others.diagonal().max()) < float(of_first.diagonal().min())
    others_about = (images[:, 1:].flatten(0, 1).double() - mean).T @ (images[:, 1:].flatten(0, 1).double() - mean)
    torch.testing.assert_close(of_others, others_about / (40 * 8), rtol=1e-6, atol=1e-6)

"""The candidates of PrimeSVT: what each saves, how it scores, and a memory of both that outlives the process."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from swincompress_pl.pruning.adaptive.config import RoundRobinConfig
from swincompress_pl.pruning.criteria import (
    Gradients,
    lowest_units,
    needs_gradients,
    unit_scores,
    weight_scores,
)
from swincompress_pl.pruning.evaluation.ranks import from_rank_zero, gather_results, rank, share_buffers
from swincompress_pl.pruning.evaluation.scorer import Scorer, Verdict
from swincompress_pl.pruning.prime.config import PrimeSVTConfig
from swincompress_pl.pruning.space import (
    Change,
    GlobalGranularity,
    Removal,
    StructuredGranularity,
    Target,
    granularity_for,
)
from swincompress_pl.pruning.structure.cost import count_parameters, count_parameters_without
from swincompress_pl.pruning.structure.weight_masks import masked_parameters

Widths = Mapping[str, int]
"""{target: units that stay}; a target that is not named keeps all."""

_MEMO_VERSION = 1
_LEAST_VARIANCE = 1e-5  # BatchNorm's own epsilon: a channel that was silent does not make a ratio without bounds


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to prune, and how it does.

    phase: "target set", "robustness" or "policy"; label: what was tried, for people. widths: {target: units that stay},
    the narrowed ones. saving: part of all parameters that it removes. score: accuracy in points on the hold-out, an
    estimate with a standard error of `error_points` unless `exact`; images: how many it took. accepted: within the
    accuracy constraint. remembered: the verdict was known already, nothing was run. stands_for: how many candidates of
    the plain algorithm it replaces.
    """

    phase: str
    label: str
    widths: dict[str, int]
    saving: float
    score: float
    accepted: bool
    images: int
    exact: bool
    error_points: float = 0.0
    remembered: bool = False
    stands_for: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return asdict(self)


class Candidates:
    """Makes candidates of `network`, which stays as it is but for the time of a context or a call.

    calibration: batches (images, ...) on which BatchNorm's statistics are made anew, where the config asks for it; it
    is gone through again for each candidate. memo: a file that keeps every verdict as it falls.
    """

    def __init__(
        self,
        network: nn.Module,
        scorer: Scorer,
        config: PrimeSVTConfig,
        *,
        floor: float,
        calibration: Iterable[Any] | None,
        gradients: Callable[[nn.Module], Gradients] | None,
        memo: Path | None,
    ) -> None:
        _check_sources(config, calibration, gradients)
        if config.mode == "paper" and masked_parameters(network):
            raise ValueError(
                f"mode='paper': {type(network).__name__} has masked weights already; begin with a network without masks"
            )
        self.network, self.scorer, self.config, self.floor = network, scorer, config, floor
        settings = config.granularity(network)
        found = granularity_for(settings)
        assert not isinstance(found, GlobalGranularity)  # ranked locally
        self.granularity = found
        self.targets = {target.name: target for target in self.granularity.targets(network)}
        self._calibration = calibration
        self.reestimates = 0
        statistics = gradients(network) if gradients is not None and needs_gradients(config.criterion) else None
        self._scores = self._ranked(settings, statistics)
        self._unpruned_statistics = self._estimated() if config.batchnorm == "reestimate" else {}
        self._parameters = count_parameters(network)
        self._memo = Memo()
        gather_results(lambda: self._open(memo) if rank() == 0 else None)  # should it fail, all ranks hear of it
        self._standing: dict[str, int] | None = None  # the widths that the scorer's round stands at
        self._last: dict[str, int] | None = None  # the widths judged last
        self._baseline_is_latest = True  # what the scorer last scored in full is the unpruned network

    def _ranked(self, settings: RoundRobinConfig, statistics: Gradients | None) -> dict[str, Tensor]:
        """{target: the scores of its units, or of its weights}, of the unpruned network: cuts of any depth nest."""
        if isinstance(self.granularity, StructuredGranularity):
            groups = {group.name: group for group in self.granularity.groups(self.network)}
            found = {
                name: unit_scores(self.network, groups[name], settings.criterion, statistics) for name in self.targets
            }
        else:
            found = {name: weight_scores(self.network, name, settings.criterion, statistics) for name in self.targets}
        return {name: from_rank_zero(scores) for name, scores in found.items()}

    def _open(self, memo: Path | None) -> None:
        if memo is not None:
            self._memo = Memo(memo, self._fingerprint())

    def _fingerprint(self) -> str:
        """Of all that a verdict depends on: weights, hold-out, constraint, and what a width of a target means."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        for scores in self._scores.values():  # they say which units go first, whatever the criterion is called
            digest.update(scores.cpu().numpy().tobytes())
        # not "reestimate": verdicts of memos from when statistics were made wholly anew mean something else
        statistics = "corrected" if self.config.batchnorm == "reestimate" else "keep"
        means = [self.config.mode, statistics, self.config.max_accuracy_drop]
        holdout = getattr(self.scorer, "fingerprint", None)
        units = {name: target.units for name, target in self.targets.items()}
        digest.update(json.dumps([means, units, holdout, self.scorer.images], sort_keys=True).encode())
        return digest.hexdigest()

    def widths(self, rates: Mapping[str, float]) -> dict[str, int]:
        """The widths at these rates, {target: part of its units to remove}, as near as `round_to` allows."""
        widths = {}
        for name, rate in rates.items():
            target = self.targets[name]
            width = _width(target, rate, self.config.max_rate)
            if width < target.units:
                widths[name] = width
        return widths

    def saving(self, widths: Widths) -> float:
        """The part of all parameters that is removed, or zero by a mask."""
        if isinstance(self.granularity, StructuredGranularity):
            groups = {group.name: group for group in self.granularity.groups(self.network)}
            gone = {groups[name]: range(self.targets[name].units - width) for name, width in widths.items()}
            return 1 - count_parameters_without(self.network, gone) / self._parameters
        zeros = 0
        for name, width in widths.items():
            target = self.targets[name]
            zeros += target.weights // target.units * (target.units - width)
        return zeros / self._parameters

    def judge(
        self,
        widths: dict[str, int],
        base: dict[str, int],
        *,
        phase: str,
        label: str,
        resolution_points: float | None = None,
    ) -> Candidate:
        """Whether the network so narrowed meets the accuracy constraint.

        base: narrower nowhere; the candidate is compared with the network so narrowed. resolution_points: for scores
        that are compared with others, the standard error of an accepted candidate's.
        """
        known = from_rank_zero(self._memo.get(widths))
        finest = math.inf if resolution_points is None else resolution_points
        fresh = known is None or (known.accepted and known.error_points > finest)
        if fresh:
            known = self._score(widths, base, resolution_points)
            self._memo.put(widths, known)
        assert known is not None
        return Candidate(
            phase=phase, label=label, widths=widths, saving=self.saving(widths), **asdict(known), remembered=not fresh
        )

    def _score(self, widths: dict[str, int], base: dict[str, int], resolution: float | None) -> Verdict:
        if self._standing != base:
            with self.masked(base):
                self.scorer.begin_round(self.network, unchanged=self._baseline_is_latest and not base)
            self._standing, self._baseline_is_latest = dict(base), not base
        with self.masked(widths):
            verdict = self.scorer.judge(
                self.network, self.floor, self._changed(widths, base), resolution_points=resolution
            )
        self._last = dict(widths)
        return verdict

    def accept(self, widths: dict[str, int], base: dict[str, int]) -> None:
        """Candidates to come have `widths` for their base; what was run for the last one is kept where it was that."""
        if self._standing == base and self._last == widths:
            self.scorer.accept(self._changed(widths, base))
            self._standing = dict(widths)

    def _changed(self, widths: Widths, base: Widths) -> list[str]:
        """The tensors in which two candidates differ; none named is anywhere, as statistics that are made anew do."""
        if self.config.batchnorm == "reestimate":
            return []
        changed = [name for name in widths if widths[name] != base.get(name)]
        return list(dict.fromkeys(tensor for name in changed for tensor in self.targets[name].tensors))

    @contextmanager
    def masked(self, widths: Widths) -> Iterator[None]:
        """The network computes as if so narrowed, with statistics made anew where the config asks for it."""
        with self.granularity.masked(self.network, self._removal(widths)):
            before = batchnorm_state(self.network)
            try:
                if widths:
                    self.reestimate()
                yield
            finally:
                restore_batchnorm(self.network, before)

    def reestimate(self) -> None:
        """Correct BatchNorm's running statistics by what pruning changes on the calibration images, where the config
        asks for it.

        The mean by the difference to the unpruned network's on the same images, the variance by the ratio: what
        sets these few images apart from those of the training cancels, and the unpruned network stays as it is.
        """
        if self.config.batchnorm != "reestimate":
            return
        trained, pruned = batchnorm_state(self.network), self._estimated()
        corrected = dict(trained)
        for name, unpruned in self._unpruned_statistics.items():
            if name.endswith("running_mean"):
                corrected[name] = trained[name] + (pruned[name] - unpruned)
            elif name.endswith("running_var"):
                corrected[name] = trained[name] * (pruned[name] + _LEAST_VARIANCE) / (unpruned + _LEAST_VARIANCE)
        restore_batchnorm(self.network, corrected)

    def _estimated(self) -> dict[str, Tensor]:
        """BatchNorm's statistics on the calibration images; the running ones are left as they are."""
        assert self._calibration is not None
        before, device = batchnorm_state(self.network), next(self.network.parameters()).device
        try:
            update_bn(self._calibration, self.network, device=device)
            share_buffers(self.network)
            self.reestimates += 1
            return batchnorm_state(self.network)
        finally:
            restore_batchnorm(self.network, before)

    def commit(self, widths: Widths) -> Change:
        """Make it last: slice the network, or register masks."""
        self._standing = self._last = None
        self._baseline_is_latest = False
        removal = self._removal(widths)
        with self.granularity.masked(self.network, removal):
            self.reestimate()
        return self.granularity.commit(self.network, removal)

    def _removal(self, widths: Widths) -> Removal:
        if isinstance(self.granularity, StructuredGranularity):
            return {
                name: lowest_units(self._scores[name], self.targets[name].units - width)
                for name, width in widths.items()
            }
        return {name: self.granularity.pattern.keep_mask(self._scores[name], width) for name, width in widths.items()}


class Memo:
    """Verdicts by widths: in memory, and in a file of JSON lines to which each is added as it falls.

    The first line names what the verdicts are about; a file about something else is a ValueError, as is a damaged one.
    A line that was cut off by a kill at the end of the file is dropped.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self._path, self._known = path, dict[str, Verdict]()
        if path is None:
            return
        header = {"version": _MEMO_VERSION, "about": fingerprint}
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
        whole, rest = lines[:-1], lines[-1]
        if not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        self._read(path, whole, header)
        if rest:
            with path.open("r+b") as file:  # cut in place: another kill here loses nothing
                file.truncate(path.stat().st_size - len(rest.encode("utf-8")))

    def _read(self, path: Path, lines: list[str], header: dict[str, Any]) -> None:
        try:
            first, *entries = [json.loads(line) for line in lines]
            self._known = {_key(entry["widths"]): Verdict(**entry["verdict"]) for entry in entries}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"memo={str(path)!r} is damaged ({error}); remove it, or give another path, to begin anew"
            ) from error
        if first != header:
            raise ValueError(
                f"memo={str(path)!r} is about another network, hold-out or constraint; give another path, or remove it"
            )

    def get(self, widths: Widths) -> Verdict | None:
        """What was found for these widths."""
        return self._known.get(_key(widths))

    def put(self, widths: Widths, verdict: Verdict) -> None:
        """Remember `verdict`."""
        self._known[_key(widths)] = verdict
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"widths": dict(widths), "verdict": asdict(verdict)}) + "\n")


def batchnorm_state(network: nn.Module) -> dict[str, Tensor]:
    """{name: a copy} of the running statistics of every BatchNorm."""
    return {name: buffer.clone() for name, buffer in _statistics(network)}


def restore_batchnorm(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the running statistics that `batchnorm_state` gave."""
    with torch.no_grad():
        for name, buffer in _statistics(network):
            buffer.copy_(state[name])


def _statistics(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var", "num_batches_tracked"):
                    yield f"{prefix}.{name}", buffer


def _key(widths: Widths) -> str:
    return json.dumps(widths, sort_keys=True)


def _width(target: Target, rate: float, max_rate: float) -> int:
    """The width nearest to the wanted one: all units, or a multiple of the granule, but not below the least."""
    wanted = target.units * (1 - rate)
    least = min(target.least_units(max_rate), target.units)
    below = _floor_multiple(wanted, target.granule)
    above = min(below + target.granule, target.units)
    nearest = above if above - wanted <= wanted - below else below
    return max(nearest, least)


def _floor_multiple(value: float, granule: int) -> int:
    """The largest multiple of `granule` that is not above `value`."""
    return int((value + 1e-9) // granule) * granule


def _check_sources(
    config: PrimeSVTConfig, calibration: Iterable[Any] | None, gradients: Callable[[nn.Module], Gradients] | None
) -> None:
    if config.batchnorm == "reestimate" and calibration is None:
        raise ValueError("batchnorm='reestimate' needs calibration=: batches of training images, e.g. a list of a few")
    if config.batchnorm == "reestimate" and isinstance(calibration, Iterator):
        raise ValueError("calibration is an iterator, which ends after the first candidate; give a list or a loader")
    if needs_gradients(config.criterion) and gradients is None:
        raise ValueError(
            f"criterion={config.criterion!r} needs gradients: give gradients=lambda network: "
            "collect_gradients(network, batches)"
        )

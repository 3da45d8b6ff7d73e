"""The settings of PrimeSVT: constraints, what may go, and the policy that chooses the rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from swincompress_pl._deprecated import gathered, renamed
from swincompress_pl.arguments import choice, integer, names, number, numbers, optional, require
from swincompress_pl.pruning.compensation.compensator import METHODS, Method
from swincompress_pl.pruning.criteria import Criterion
from swincompress_pl.pruning.evaluation.audit import checked_audit
from swincompress_pl.pruning.space import SpaceConfig, check_criterion, checked_tolerance
from swincompress_pl.registry import adapter_for

WHOLE_UNITS = ("heads", "embed")  # kinds that the default leaves alone: they overlap others, or reach everywhere
_SOLVED = ("ridge", "second_order")  # compensation that makes the removal of residual streams ("embed") worth while


@dataclass(frozen=True, kw_only=True)
class AllocatedPolicy:
    """Takes each block's rate from what the block costs alone at each of the config's `rates`, on all layers.

    Attributes:
        resolution_points: Standard error to which the accuracies of these curves are estimated, in points, above 0.
            Only the order of the steps depends on the curves, so they need not be exact. None for a fifteenth of the
            tolerance, and at least 0.2.
        curves: What a block alone costs. "accuracy" is the accuracy lost on the hold-out. "divergence" is 100 times the
            Kullback-Leibler divergence, in nats per image, from the unpruned network's answers on calibration images.
            It needs no labels and far fewer images, and leaves the hold-out to what is decided together.
        curve_images: Number of calibration images for "divergence", 1 or more.

    Raises:
        ValueError: If a field is outside its range; the message names the field.
    """

    resolution_points: float | None = None
    curves: Literal["accuracy", "divergence"] = "accuracy"
    curve_images: int = 256

    def __post_init__(self) -> None:
        choice("curves", self.curves, ("accuracy", "divergence"))
        object.__setattr__(self, "curve_images", integer("curve_images", self.curve_images, least=1))
        points = optional(number, "resolution_points", self.resolution_points, _positive, "above 0, e.g. 0.2, or None")
        object.__setattr__(self, "resolution_points", points)


@dataclass(frozen=True, kw_only=True)
class PrioritizedPolicy:
    """The paper's policy: a uniform rate for a set of layers (Alg. 1), raised by robustness (Alg. 3 and 4).

    Attributes:
        order: Order in which blocks are raised. "robustness" takes the most robust first, and raises them by more.
            "size" takes the largest first, and raises all by the largest increment.
        target_sets: Parts of the layers that Alg. 1 chooses from, each above 0 and at most 1; a part is made of the
            largest layers.
        theta: Width of a band of robustness, in points saved per point lost, above 0.
        increments: Increments of the rate for the best band, the next, and so on; the last is for all other bands.
            Falling, below 1 and at least 0, the first above 0. A block whose increment is refused gets the next
            smaller one.
        frozen: What happens to blocks whose increment is 0.0. "last" raises them when no other block gains, in bands of
            their own. "never", as in the paper, leaves them at the initial rate. If a block costs nothing, that ends
            the search early, because all others are then in the last band.
        benefit_resolution_points: Standard error, in points, of the accuracies that Alg. 1 averages over the rates of a
            set; above 0.
        robustness_resolution_points: Standard error, in points, of the accuracies by which Alg. 3 compares the blocks;
            above 0.

    Raises:
        ValueError: If a field is outside its range; the message names the field.
    """

    order: Literal["robustness", "size"] = "robustness"
    target_sets: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
    theta: float = 1.0
    increments: tuple[float, ...] = (0.08, 0.04, 0.02, 0.01, 0.0)
    frozen: Literal["last", "never"] = "last"
    benefit_resolution_points: float = 1.0
    robustness_resolution_points: float = 0.2

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        """The fields, each in its type."""
        wanted = "falling, below 1 and at least 0, e.g. (0.08, 0.04, 0.02, 0.01, 0.0)"
        increments = numbers("increments", self.increments, lambda each: 0 <= each < 1, wanted)
        falling = list(increments) == sorted(set(increments), reverse=True) and increments[0] > 0
        require("increments", self.increments, falling, wanted)
        positive = {"theta": 1.0, "benefit_resolution_points": 1.0, "robustness_resolution_points": 0.2}
        return {
            "order": choice("order", self.order, ("robustness", "size")),
            "frozen": choice("frozen", self.frozen, ("last", "never")),
            "target_sets": numbers("target_sets", self.target_sets, _part, "parts, above 0 and at most 1"),
            "increments": increments,
            **{n: number(n, getattr(self, n), _positive, f"above 0, e.g. {usual}") for n, usual in positive.items()},
        }


def _positive(value: float) -> bool:
    return value > 0


def _below_one(value: float) -> bool:
    return 0 <= value < 1


def _part(value: float) -> bool:
    return 0 < value <= 1


Policy = AllocatedPolicy | PrioritizedPolicy
POLICIES: dict[str, type[Policy]] = {"allocated": AllocatedPolicy, "prioritized": PrioritizedPolicy}


def _old_policy(policy: Any, settings: Mapping[str, Any]) -> Any:
    """The policy that the settings of version 0.1 describe, which were given beside its name."""
    settings = {name: value for name, value in settings.items() if value is not None}
    if policy in (None, "allocated"):
        resolution, defaults = settings.pop("robustness_resolution_points", None), PrioritizedPolicy()
        as_fields = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        wrong = [name for name, value in as_fields.items() if value != getattr(defaults, name)]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: not a setting of policy='allocated', but of 'prioritized' (Alg. 1, 3 and 4 of "
                f"the paper); give policy=PrioritizedPolicy({wrong[0]}=...), or leave it out"
            )
        return AllocatedPolicy(resolution_points=resolution)
    return PrioritizedPolicy(**settings)


with_old_policy_settings = gathered(
    "policy",
    _old_policy,
    (
        "order", "target_sets", "theta", "increments", "frozen", "benefit_resolution_points",
        "robustness_resolution_points",
    ),
)  # fmt: skip


@with_old_policy_settings
@renamed(
    max_accuracy_drop="tolerance",
    mode="granularity",
    max_rate="max_sparsity",
    values={"granularity": {"group": "structured", "paper": "filter"}, "batchnorm": {"reestimate": "correct"}},
)
@dataclass(frozen=True, kw_only=True)
class PrimeSVTConfig:
    """What PrimeSVT (arXiv 2606.03428) prunes, under which constraints; `PrimeSVTConfig.paper()` is the paper's search.

    Attributes:
        tolerance: Accuracy that may be lost against the unpruned network, in points, above 0 and at most 100.
        audit: Part of the hold-out that decides nothing until the end, 0 to below 1. A candidate that loses more than
            the tolerance on it is not applied, and the next best one is tried. 0 for none.
        min_memory_saving: Part of all parameters that has to go, from 0 to below `max_sparsity`.
        granularity: "structured" removes units of the network's groups physically. "filter" sets the weakest input
            channels of every filter to zero, chosen for each filter alone (Alg. 2). Shapes stay then, and the saving
            counts zeros.
        policy: How the rates are chosen: "allocated", "prioritized" (the paper), or an `AllocatedPolicy` or
            `PrioritizedPolicy` with other settings.
        blocks: "layer" has one rate per layer; "block" (the paper) has one rate for all layers of a block.
        prefer: What is applied if no candidate meets both constraints. "accuracy" is the largest saving within the
            tolerance, "memory" is the best accuracy of those that save enough.
        rates: Parts of a layer's units that are tried, above 0 and at most `max_sparsity`. The policy "allocated" tries
            them on each block alone, "prioritized" on all layers of a target set.
        min_block_share: A block with less than this part of an average block's parameters stays at the initial rate,
            because raising it saves next to nothing; with the policy "allocated" that rate is 0. From 0 (the paper),
            which raises all, to below 1.
        max_sparsity: Largest rate of a layer, above 0 and below 1.
        round_to: Kept widths, except the number of heads, are multiples of it; of "qk" and "v", those of all heads
            together. 1 or more, and only for "structured".
        kinds: Kinds of groups to prune; None for all that the network has, except "heads" and, unless `compensation` is
            "ridge" or "second_order", "embed". Only for "structured".
        layers: Patterns (fnmatch) of the names to prune; None for all.
        criterion: A name in `pruning.CRITERIA`, or a function (`pruning.Criterion`). "magnitude" is the paper's L2
            norm.
        batchnorm: "keep" leaves the running statistics as they are. "correct" changes them for every candidate by what
            pruning changes on calibration images.
        compensation: What makes up for what goes, in the layers that read it. "none" leaves them as they are, "bias"
            adds what went on average, and "ridge" solves their weights again, from calibration images, and has the
            BatchNorm behind them take up the rest.

    Raises:
        ValueError: If a field is outside its range, or fields contradict each other; the message names the field.
    """

    tolerance: float = 3.0
    audit: float = 0.0
    min_memory_saving: float = 0.25
    granularity: Literal["structured", "filter"] = "structured"
    policy: Policy | Literal["allocated", "prioritized"] = field(default_factory=AllocatedPolicy)
    blocks: Literal["layer", "block"] = "layer"
    prefer: Literal["accuracy", "memory"] = "accuracy"
    rates: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
    min_block_share: float = 0.2
    max_sparsity: float = 0.9
    round_to: int = 8
    kinds: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None
    criterion: str | Criterion = "magnitude"
    batchnorm: Literal["keep", "correct"] = "keep"
    compensation: Method = "none"

    @classmethod
    def paper(cls, **settings: Any) -> PrimeSVTConfig:
        """Makes the settings of the paper's search.

        Args:
            **settings: Fields that are to differ from it.

        Returns:
            The config.

        Raises:
            ValueError: If a field is outside its range, or fields contradict each other.
        """
        paper: dict[str, Any] = {
            "granularity": "filter",
            "policy": PrioritizedPolicy(frozen="never"),
            "blocks": "block",
            "min_block_share": 0.0,
        }
        return cls(**{**paper, **settings})

    def __post_init__(self) -> None:
        if isinstance(self.policy, str):
            choice("policy", self.policy, POLICIES)
            object.__setattr__(self, "policy", POLICIES[self.policy]())
        known = f"one of {', '.join(POLICIES)}, or a policy"
        require("policy", self.policy, isinstance(self.policy, tuple(POLICIES.values())), known)
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        check_criterion(self.criterion)
        self._check_together()

    def _checked(self) -> dict[str, Any]:
        """The fields, each in its type."""
        saving, share, most = self.min_memory_saving, self.min_block_share, self.max_sparsity
        most = number("max_sparsity", most, lambda part: 0 < part < 1, "above 0 and below 1, e.g. 0.9")
        within = f"above 0 and at most max_sparsity={most}"
        return {
            **{name: choice(name, getattr(self, name), choices) for name, choices in _CHOICES.items()},
            "tolerance": checked_tolerance(self.tolerance, example=3.0, stacklevel=7),
            "audit": checked_audit(self.audit),
            "min_memory_saving": number("min_memory_saving", saving, _below_one, "a part, 0 to below 1, e.g. 0.25"),
            "min_block_share": number(
                "min_block_share", share, _below_one, "a part of an average block, 0 to below 1, e.g. 0.2"
            ),
            "max_sparsity": most,
            "round_to": integer("round_to", self.round_to, least=1, wanted="an integer of 1 or more"),
            "rates": numbers("rates", self.rates, lambda rate: 0 < rate <= most, within),
            "kinds": optional(names, "kinds", self.kinds, "None, or one or more kinds, e.g. ('mlp',)"),
            "layers": optional(names, "layers", self.layers, "None, or one or more patterns"),
        }

    def _check_together(self) -> None:
        if self.min_memory_saving >= self.max_sparsity:
            raise ValueError(
                f"min_memory_saving={self.min_memory_saving} contradicts max_sparsity={self.max_sparsity}: not even "
                "all layers at that rate save as much; raise max_sparsity, or ask for less"
            )
        if self.granularity == "filter" and self.kinds is not None:
            raise ValueError(
                f"kinds={self.kinds}: granularity='filter' prunes filters, not groups; choose with layers="
            )

    def resolution_points(self) -> dict[str, float]:
        """Returns the standard error, in points, to which scores are estimated in each phase.

        Phases that only compare scores with the floor are left out.
        """
        if isinstance(self.policy, PrioritizedPolicy):
            return {
                "target set": self.policy.benefit_resolution_points,
                "robustness": self.policy.robustness_resolution_points,
            }
        assert isinstance(self.policy, AllocatedPolicy)
        return {"robustness": self.policy.resolution_points or max(0.2, self.tolerance / 15)}

    def space(self, network: nn.Module) -> SpaceConfig:
        """Makes the settings of the search space.

        Args:
            network: The network to prune.

        Returns:
            What may be removed of it.

        Raises:
            UnsupportedNetworkError: If the network has no adapter, or its adapter does not cover this variant.
        """
        common: dict[str, Any] = {
            "layers": self.layers, "criterion": self.criterion, "max_sparsity": self.max_sparsity,
            "compensation": self.compensation,
        }  # fmt: skip
        if self.granularity == "filter":
            return SpaceConfig(granularity="filter", **common)
        kinds: Sequence[str] | None = self.kinds
        if kinds is None:
            found = dict.fromkeys(group.kind for group in adapter_for(network).groups(network))
            left = {"heads"} if self.compensation in _SOLVED else WHOLE_UNITS
            kinds = [kind for kind in found if kind not in left]
        return SpaceConfig(granularity="structured", kinds=tuple(kinds), round_to=self.round_to, **common)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields in JSON types; a function becomes its name, and a policy its fields with a `name`."""
        plain = _as_lists(asdict(self))
        if callable(self.criterion):
            plain["criterion"] = getattr(self.criterion, "__qualname__", repr(self.criterion))
        (name,) = [name for name, kind in POLICIES.items() if isinstance(self.policy, kind)]
        return {**plain, "policy": {"name": name, **_as_lists(plain["policy"])}}


_CHOICES = {
    "granularity": ("structured", "filter"),
    "prefer": ("accuracy", "memory"),
    "blocks": ("layer", "block"),
    "batchnorm": ("keep", "correct"),
    "compensation": METHODS,
}


def _as_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def current_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings under their present names; those of version 0.1 are translated."""
    plain = dict(stored)
    if "max_accuracy_drop" not in plain:
        return plain
    plain["tolerance"] = plain.pop("max_accuracy_drop")
    plain["max_sparsity"] = plain.pop("max_rate")
    plain["granularity"] = {"group": "structured", "paper": "filter"}[plain.pop("mode")]
    plain["batchnorm"] = {"reestimate": "correct"}.get(plain["batchnorm"], plain["batchnorm"])
    name = plain.pop("policy", "prioritized")  # at first, version 0.1 had no other
    of_policy = {key: plain.pop(key) for key in PrioritizedPolicy.__dataclass_fields__ if key in plain}
    if name == "allocated":
        of_policy = {"resolution_points": of_policy["robustness_resolution_points"]}
    return {**plain, "policy": {"name": name, **of_policy}}

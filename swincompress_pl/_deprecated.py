"""Names of version 0.1 that work for one more version: the tables, and the code that maps old names to new ones.

    MODULES     old module -> new module                       import swincompress_pl.norm
    NAMES       old module -> {old name -> "new module:name"}    from swincompress_pl.pruning import set_mask
    renamed     old arguments of a function or class           PrimeSVT(max_accuracy_drop=3)
    renamed_attributes  old attributes of a class              network.scales.sites

Each use warns with a DeprecationWarning that names the new spelling. `tests/test_deprecated.py` walks the tables.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

PACKAGE = "swincompress_pl"

# Without the package's name in front.
MODULES: dict[str, str] = {
    "norm": "spec",
    "norm.integer": "spec.integer",
    "norm.kind": "spec.kind",
    "norm.kinds": "spec.kinds",
    "norm.lowering": "spec.lowering",
    "norm.operations": "spec.operations",
    "norm.program": "spec.program",
    "norm.reference": "spec.reference",
    "norm.spiking": "spec.spiking",
    "norm.spiking_kinds": "spec.spiking_kinds",
    "pruning.apply": "pruning.structure.apply",
    "pruning.config": "pruning.adaptive.config",
    "pruning.cost": "pruning.structure.cost",
    "pruning.granularity": "pruning.space",
    "pruning.groups": "pruning.structure.groups",
    "pruning.holdout": "pruning.evaluation.holdout",
    "pruning.ledger": "pruning.structure.cost",
    "pruning.masks": "pruning.structure.unit_masks",
    "pruning.optimizers": "pruning.structure.optimizer_state",
    "pruning.patterns": "pruning.structure.patterns",
    "pruning.plan": "pruning.structure.plan",
    "pruning.prefix_cache": "pruning.evaluation.prefix_cache",
    "pruning.prime_allocation": "pruning.prime.allocation",
    "pruning.prime_candidates": "pruning.prime.candidates",
    "pruning.prime_config": "pruning.prime.config",
    "pruning.prime_result": "pruning.prime.result",
    "pruning.prime_search": "pruning.prime.search",
    "pruning.primesvt": "pruning.prime.primesvt",
    "pruning.ranks": "pruning.evaluation.ranks",
    "pruning.regrow": "pruning.structure.regrow",
    "pruning.round_robin": "pruning.adaptive.search",
    "pruning.rounds": "pruning.adaptive.rounds",
    "pruning.scorer": "pruning.evaluation.scorer",
    "pruning.scores": "pruning.criteria",
    "pruning.sequential": "pruning.evaluation.sequential_test",
    "pruning.state": "pruning.adaptive.state",
    "pruning.weight_masks": "pruning.structure.weight_masks",
    "quant.allocation": "quant.mixed_precision",
    "quant.build": "quant.graph.builder",
    "quant.cut": "quant.scale_cut",
    "quant.debug": "quant.diagnosis",
    "quant.inspection": "text_table",
    "quant.neurons": "quant.graph.neurons",
    "quant.nodes": "quant.graph.nodes",
    "quant.site_errors": "quant.diagnosis.errors",
    "quant.spiking_nodes": "quant.graph.spiking_nodes",
    "models.groups": "models",
    "models.groups.coupling": "models.shared.coupling",
    "models.groups.meta_spikeformer": "models.meta_spikeformer.groups",
    "models.groups.parts": "models.shared.parts",
    "models.groups.spiking": "models.spiking.groups",
    "models.groups.spiking_attention": "models.spiking.attention",
    "models.groups.spiking_parts": "models.spiking.parts",
    "models.groups.stream": "models.shared.stream",
    "models.groups.swin": "models.swin.groups",
    "models.groups.vit": "models.vit.groups",
    "models.groups.window_attention": "models.swin.window_attention",
    "models.manifest": "checkpoint.record",
    "models.spiking_builder": "models.spiking.graph_builder",
    "models.spiking_graphs": "models.spiking.graph",
    "callbacks.qat_surroundings": "callbacks.compatibility",
    "callbacks.resume": "callbacks.random_state",
    "callbacks.searched": "callbacks.searched_network",
    "callbacks.surroundings": "callbacks.compatibility",
    "report.bench": "report.comparison.bench",
    "report.drawing": "report.plots.drawing",
    "report.kernels": "report.comparison.kernels",
    "report.peers": "report.comparison.runtimes",
    "report.primesvt_plots": "report.plots.primesvt",
    "report.pruning_plots": "report.plots.pruning",
    "report.quantization_plots": "report.plots.quantization",
    "report.race": "report.comparison.compare",
    "report.run": "report.write",
    "report.worker": "report.comparison.worker",
}

# For names that have left their old module (or the module that MODULES gives for it).
NAMES: dict[str, dict[str, str]] = {
    "callbacks.searched": {"ScalesFollower": "callbacks.searched_network:CoupledScales"},
    "models.groups": {
        "swin_groups": "models.swin.groups:swin_groups",
        "vit_groups": "models.vit.groups:vit_groups",
    },
    "models.manifest": {
        "CompressionMixin": "checkpoint.hooks:CompressionMixin",
        "MANIFEST_VERSION": "checkpoint.record:RECORD_VERSION",
        "network_of": "checkpoint.holder:network_of",
        "put_network": "checkpoint.holder:put_network",
        "rebuild": "models.factory:rebuild",
        "restore_from_checkpoint": "checkpoint.hooks:restore_from_checkpoint",
        "restore_from_history": "checkpoint.restore:restore_from_history",
        "restore_on_load": "checkpoint.hooks:keep_record",
        "save_to_checkpoint": "checkpoint.hooks:save_to_checkpoint",
    },
    "models.meta_spikeformer": {
        name: f"models.meta_spikeformer.network:{name}"
        for name in (
            "MetaSpikeFormer",
            "meta_spikeformer_8_256",
            "meta_spikeformer_8_384",
            "meta_spikeformer_8_512",
        )
    },
    "models.spiking": {"MetaSpikeFormerAdapter": "models.meta_spikeformer.adapter:MetaSpikeFormerAdapter"},
    "models.spiking_graphs": {"meta_spikeformer_graph": "models.meta_spikeformer.graph:meta_spikeformer_graph"},
    "models.swin": {
        "merging_index": "models.swin.graph:merging_index",
        "window_indices": "models.swin.graph:window_indices",
    },
    "pruning": {
        "AppliedPlan": "pruning.structure.apply:AppliedPlan",
        "Attribute": "pruning.structure.groups:Attribute",
        "BlockState": "pruning.prime.result:BlockState",
        "Candidate": "pruning.prime.result:Candidate",
        "Change": "pruning.structure.change:Change",
        "Exchange": "pruning.structure.groups:ClassSwap",
        "Follower": "pruning.adaptive.rounds:CoupledState",
        "FunctionScorer": "pruning.evaluation.scorer:FunctionScorer",
        "Granularity": "pruning.space:SearchSpace",
        "MaskedLayerNorm": "pruning.structure.unit_masks:MaskedLayerNorm",
        "NormSlice": "pruning.structure.groups:NormSlice",
        "Pattern": "pruning.structure.patterns:Pattern",
        "Predict": "pruning.evaluation.holdout:Predict",
        "RoundOutcome": "pruning.adaptive.search:RoundOutcome",
        "RoundRobinConfig": "pruning.adaptive.config:AdaptivePruningConfig",
        "Scorer": "pruning.evaluation.scorer:Scorer",
        "ScoringCost": "pruning.evaluation.scorer:ScoringCost",
        "Slice": "pruning.structure.groups:Slice",
        "SlicedTensor": "pruning.structure.apply:SlicedTensor",
        "StructuredGranularity": "pruning.space:StructuredSpace",
        "Target": "pruning.space:Target",
        "TargetSet": "pruning.prime.result:TargetSet",
        "TargetState": "pruning.adaptive.state:TargetState",
        "Verdict": "pruning.evaluation.scorer:Verdict",
        "WeightGranularity": "pruning.space:WeightSpace",
        "begin_search": "pruning.adaptive.old_functions:begin_search",
        "count_nonzero": "pruning.structure.weight_masks:count_nonzero",
        "enforce_masks": "pruning.structure.weight_masks:enforce_masks",
        "estimates_loss": "pruning.criteria:estimates_loss",
        "evaluation_mode": "evaluation_mode:evaluation_mode",
        "finish_search": "pruning.adaptive.search:finish_search",
        "from_rank_zero": "pruning.evaluation.ranks:from_rank_zero",
        "granularity_for": "pruning.space:search_space",
        "history_of": "history:history_of",
        "mask_plan": "pruning.structure.unit_masks:mask_plan",
        "mask_units": "pruning.structure.unit_masks:mask_units",
        "masked_parameters": "pruning.structure.weight_masks:masked_parameters",
        "masked_share": "pruning.structure.weight_masks:masked_share",
        "masked_shares": "pruning.structure.weight_masks:masked_shares",
        "measure_sensitivity": "pruning.adaptive.search:measure_sensitivity",
        "needs_gradients": "pruning.criteria:needs_gradients",
        "parse_granularity": "pruning.structure.patterns:parse_granularity",
        "prunable_weights": "pruning.space:prunable_weights",
        "register_masks": "pruning.structure.weight_masks:register_masks",
        "regrow_latest_plan": "pruning.structure.regrow:regrow_latest_plan",
        "remove_masks": "pruning.structure.weight_masks:remove_masks",
        "revert": "pruning.structure.change:revert",
        "revert_plan": "pruning.structure.apply:revert_plan",
        "run_round": "pruning.adaptive.old_functions:run_round",
        "saliency": "pruning.criteria:saliency",
        "set_mask": "pruning.structure.weight_masks:set_mask",
        "share_buffers": "pruning.evaluation.ranks:share_buffers",
        "skeleton": "pruning.structure.cost:skeleton",
        "slice_optimizers": "pruning.structure.optimizer_state:slice_optimizers",
        "sum_over_ranks": "pruning.evaluation.ranks:sum_over_ranks",
        "temporary_mask": "pruning.structure.weight_masks:temporary_mask",
        "undo_latest_masks": "pruning.structure.weight_masks:undo_latest_masks",
        "unit_scores": "pruning.criteria:unit_scores",
        "weight_scores": "pruning.criteria:weight_scores",
        "world_size": "pruning.evaluation.ranks:world_size",
    },
    "pruning.apply": {"history_of": "history:history_of"},
    "pruning.config": {"RoundRobinConfig": "pruning.adaptive.config:AdaptivePruningConfig"},
    "pruning.granularity": {
        "Change": "pruning.structure.change:Change",
        "Granularity": "pruning.space:SearchSpace",
        "StructuredGranularity": "pruning.space:StructuredSpace",
        "WeightGranularity": "pruning.space:WeightSpace",
        "gone_units": "pruning.structure.change:gone_units",
        "granularity_for": "pruning.space:search_space",
        "nothing_applied": "pruning.structure.change:nothing_applied",
        "plan_of_masks": "pruning.structure.change:plan_of_masks",
        "revert": "pruning.structure.change:revert",
    },
    "pruning.groups": {"Exchange": "pruning.structure.groups:ClassSwap"},
    "pruning.prime_candidates": {
        "Candidate": "pruning.prime.result:Candidate",
        "Memo": "pruning.prime.evaluation_cache:EvaluationCache",
        "batchnorm_state": "pruning.prime.batchnorm:batchnorm_state",
        "restore_batchnorm": "pruning.prime.batchnorm:restore_batchnorm",
    },
    "pruning.prime_search": {"PrimeProgress": "pruning.prime.trials:PrimeProgress"},
    "pruning.round_robin": {
        "Evaluate": "pruning.evaluation.scorer:Evaluate",
        "as_scorer": "pruning.evaluation.scorer:as_scorer",
        "begin_search": "pruning.adaptive.old_functions:begin_search",
        "run_round": "pruning.adaptive.old_functions:run_round",
    },
    "pruning.rounds": {"Follower": "pruning.adaptive.rounds:CoupledState"},
    "quant": {
        "METHODS": "quant.network:METHODS",
        "ActivationNode": "quant.graph.nodes:ActivationNode",
        "AddConstantNode": "quant.graph.nodes:AddConstantNode",
        "AddNode": "quant.graph.nodes:AddNode",
        "AttentionNode": "quant.graph.nodes:AttentionNode",
        "Effect": "quant.diagnosis:Effect",
        "GatherNode": "quant.graph.nodes:GatherNode",
        "Histogram": "quant.diagnosis:Histogram",
        "LayerNormNode": "quant.graph.nodes:LayerNormNode",
        "LayerSensitivity": "quant.sensitivity:LayerSensitivity",
        "LinearNode": "quant.graph.nodes:LinearNode",
        "MeanNode": "quant.graph.nodes:MeanNode",
        "PixelConvNode": "quant.graph.nodes:PixelConvNode",
        "PrependNode": "quant.graph.nodes:PrependNode",
        "Site": "quant.graph:QuantizerSpec",
        "SiteCost": "quant.diagnosis:QuantizerCost",
        "SiteError": "quant.diagnosis:QuantizationError",
        "find_preprocessing": "quant.preprocessing:find_preprocessing",
        "site_costs": "quant.diagnosis:quantizer_costs",
        "site_errors": "quant.diagnosis:quantization_errors",
    },
    "quant.debug": {
        "SiteCost": "quant.diagnosis:QuantizerCost",
        "site_costs": "quant.diagnosis:quantizer_costs",
        "site_errors": "quant.diagnosis:quantization_errors",
    },
    "quant.graph": {
        "LOGIT_BITS": "quant.graph.quantizer_spec:LOGIT_BITS",
        "RESIDUAL_BITS": "quant.graph.quantizer_spec:RESIDUAL_BITS",
        "Site": "quant.graph:QuantizerSpec",
        "collect_sites": "quant.graph.quantizer_spec:collect_specs",
        "parameter": "quant.graph.graph:parameter",
        "residual_site": "quant.graph.quantizer_spec:residual_spec",
    },
    "quant.inspection": {
        "decibels": "quant.diagnosis.errors:decibels",
        "divergence": "quant.diagnosis.costs:divergence",
        "standing_still": "evaluation_mode:standing_still",
    },
    "quant.scales": {
        "LearnedStep": "quant.quantizers:LearnedStep",
        "SiteScale": "quant.quantizers:ActivationQuantizer",
        "WeightScale": "quant.quantizers:WeightQuantizer",
        "affine_range": "quant.quantizers:affine_range",
        "quantize_weight": "quant.quantizers:quantize_weight",
    },
    "quant.site_errors": {
        "SiteError": "quant.diagnosis:QuantizationError",
        "site_errors": "quant.diagnosis:quantization_errors",
    },
    "quant.spiking_nodes": {"ConvNormNode": "quant.graph.conv_norm:ConvNormNode"},
    "report.content": {
        "Item": "report.content.parts:Item",
        "Section": "report.content.parts:Section",
        "Table": "report.content.parts:Table",
        "count": "report.content.numbers:count",
        "duration": "report.content.numbers:duration",
        "megabytes": "report.content.numbers:megabytes",
    },
    "report.markdown": {
        "count": "report.content.numbers:count",
        "megabytes": "report.content.numbers:megabytes",
    },
    "report.peers": {
        "PEERS": "report.comparison.runtimes:RUNTIMES",
        "parse_peers": "report.comparison.runtimes:parse_runtimes",
    },
    "report.plots": {
        "PLOTS": "report.plots.draw:PLOTS",
        "Plot": "report.plots.draw:Plot",
        "draw_plots": "report.plots.draw:draw_plots",
        "save_plots": "report.plots.draw:save_plots",
    },
    "report.race": {
        "Contestant": "report.comparison.compare:Runner",
        "run": "report.comparison.compare:compare",
    },
}

T = TypeVar("T")


def find_old_name(module: str, name: str) -> Any:
    """What the old `name` of `module` stands for now, with a warning; an AttributeError if it is unknown.

    It is for the `__getattr__` of a package that some names have left, so the caller two frames up is warned. `module`
    lacks the name of this package.
    """
    new = NAMES.get(module, {}).get(name)
    if new is None:
        raise AttributeError(f"module {PACKAGE}.{module} has no attribute {name!r}")
    place, _, current = new.partition(":")
    _warn(f"{PACKAGE}.{module}.{name}", f"{PACKAGE}.{place}.{current}", stacklevel=4)
    return getattr(importlib.import_module(f"{PACKAGE}.{place}"), current)


def renamed(*, values: Mapping[str, Mapping[Any, Any]] | None = None, **arguments: str) -> Callable[[T], T]:
    """A decorator that passes keyword arguments with old names on under their new names, with a warning.

    `arguments` are old name = "new name", and `values` is {new name: {old value: new value}}. A TypeError is raised if
    both names are given. The `__init__` of a class is wrapped in place.
    """

    def decorate(function: Any) -> Any:
        if isinstance(function, type):
            function.__init__ = decorate(function.__init__)  # type: ignore[misc]  # that is the purpose
            return function

        @functools.wraps(function)
        def wrapper(*args: Any, **given: Any) -> Any:
            what = function.__qualname__.removesuffix(".__init__")
            for old, new in arguments.items():
                if old in given:
                    if new in given:
                        raise TypeError(f"{what} got {new} and {old}, its former name; give {new} alone")
                    _warn(f"{what}({old}=...)", f"{new}=", stacklevel=3)
                    given[new] = given.pop(old)
            for name, translated in (values or {}).items():
                value = given.get(name)
                if isinstance(value, str | bool) and value in translated:
                    _warn(f"{what}({name}={value!r})", f"{name}={translated[value]!r}", stacklevel=3)
                    given[name] = translated[value]
            return function(*args, **given)

        wrapper.old_arguments = dict(arguments)  # type: ignore[attr-defined]  # for `current_arguments`
        wrapper.old_values = dict(values or {})  # type: ignore[attr-defined]
        return wrapper

    return decorate


def gathered(
    argument: str, gather: Callable[[Any, Mapping[str, Any]], Any], names: Sequence[str]
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A decorator that moves old keyword arguments `names` into the value of one `argument`, with a warning.

    `gather` maps (the value of `argument` or None, {old name: value}) to the new value. Classes as in `renamed`.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        if isinstance(function, type):
            function.__init__ = decorate(function.__init__)  # type: ignore[misc]  # that is the purpose
            return function

        @functools.wraps(function)
        def wrapper(*args: Any, **given: Any) -> T:
            old = {name: given.pop(name) for name in names if name in given}
            if old:
                what = function.__qualname__.removesuffix(".__init__")
                given[argument] = gather(given.get(argument), old)
                _warn(f"{what}({', '.join(f'{name}=...' for name in old)})", f"{argument}=", stacklevel=3)
            return function(*args, **given)

        wrapper.gathered = (argument, gather, tuple(names))  # type: ignore[attr-defined]  # for `current_arguments`
        return wrapper

    return decorate


def current_arguments(function: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Translates keyword arguments of a config file of version 0.1 to the present names and values, with a warning.

    Arguments that are now gathered in one object become a mapping of its fields.
    """
    found = dict(given)
    for old, new in getattr(function, "old_arguments", {}).items():
        if old in found and new not in found:
            found[new] = found.pop(old)
    for name, translated in getattr(function, "old_values", {}).items():
        if isinstance(found.get(name), str):
            found[name] = translated.get(found[name], found[name])
    gathering: tuple[str, Any, tuple[str, ...]] = getattr(function, "gathered", ("", None, ()))
    argument, gather, names = gathering
    together = {name: found.pop(name) for name in names if name in found}
    if together:
        fields = vars(gather(found.get(argument), together))
        found[argument] = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    if found != given:
        before = ", ".join(name for name in given if name not in found or found[name] != given[name])
        now = ", ".join(name for name in found if name not in given or found[name] != given[name])
        _warn(f"{function.__qualname__.removesuffix('.__init__')}'s {before}", now, stacklevel=3)
    return found


def renamed_attributes(**attributes: str) -> Callable[[T], T]:
    """A class decorator with which attributes can be read, set and called by their old names, with a warning."""

    def old_attribute(old: str, new: str) -> property:
        def get(self: Any) -> Any:
            _warn(f"{type(self).__name__}.{old}", f".{new}", stacklevel=3)
            return getattr(self, new)

        def put(self: Any, value: Any) -> None:
            _warn(f"{type(self).__name__}.{old}", f".{new}", stacklevel=3)
            setattr(self, new, value)

        return property(get, put)

    def decorate(decorated: T) -> T:
        for old, new in attributes.items():
            setattr(decorated, old, old_attribute(old, new))
        return decorated

    return decorate


def _warn(old: str, new: str, *, stacklevel: int) -> None:
    warnings.warn(
        f"{old} is the name of version 0.1 and will be removed in version 0.3; use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


class _OldModule(ModuleType):
    """Stands under an old name for the module that has the names now; writes also go to that module."""

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix(f"{PACKAGE}.")
        if name in NAMES.get(old, {}):
            place, _, current = NAMES[old][name].partition(":")
            return getattr(importlib.import_module(f"{PACKAGE}.{place}"), current)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_new_module(old), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or isinstance(value, _OldModule):
            super().__setattr__(name, value)
        else:
            setattr(_new_module(self.__name__.removeprefix(f"{PACKAGE}.")), name, value)

    def __dir__(self) -> Sequence[str]:
        old = self.__name__.removeprefix(f"{PACKAGE}.")
        return sorted({*vars(_new_module(old)), *NAMES.get(old, {})})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function that had the name of its module, such as `pruning.primesvt`."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def _new_module(old: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{MODULES[old]}")


class _OldModules:
    """Finds and loads the modules of MODULES by their old names.

    It is not a subclass of the classes in `importlib.abc`, whose import takes longer than the rest of this package's.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        old = fullname.removeprefix(f"{PACKAGE}.")
        if old == fullname or old not in MODULES:
            return None
        is_package = any(other.startswith(f"{old}.") for other in MODULES)
        return ModuleSpec(fullname, self, is_package=is_package)  # type: ignore[arg-type]  # a loader all the same

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        _warn(module.__name__, f"{PACKAGE}.{MODULES[old]}", stacklevel=3)
        _new_module(old)


def install() -> None:
    """Makes the old modules importable; a second call changes nothing."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def old_names() -> Iterator[tuple[str, str, str]]:
    """Yields (old module, old name, "new module:name") of all moved names."""
    for module, names in NAMES.items():
        for name, new in names.items():
            yield module, name, new

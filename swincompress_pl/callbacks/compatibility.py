"""Refuses what does not go with a callback that changes the network in the middle of a fit.

The `Limits` of each kind of change say what it does not go with, and why. The errors name the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS, Optimizer

from swincompress_pl.checkpoint.holder import network_of
from swincompress_pl.pruning.evaluation.ranks import agree

# They keep lists of parameters, or one state for all parameters, which follow neither a cut nor a new group. They are
# known by name because not every build of torch has them.
UNFIT_OPTIMIZERS = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer", LBFGS.__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What does not go with a change of the network, mostly as ends of the errors' sentences.

    In them, {callback}, {strategy} and {state} stand for the names of the callback, the strategy and the state's type.

    Attributes:
        shards: Why not under a strategy that holds shards of the parameters.
        processes: What is wrong with weights that come back from spawned processes.
        comm_state: Why not with DDP's `ddp_comm_state`.
        precisions: The trainer's precisions in which it works.
        other_precisions: What is wrong with the others.
        neighbours: Lightning callbacks that do not go with it, and why.
    """

    shards: str
    processes: str
    comm_state: str
    precisions: Collection[str]
    other_precisions: str
    neighbours: Mapping[type[Callback], str] = field(default_factory=dict)


_COPY = (
    "keeps a copy of the model whose sizes and masks do not follow {callback}; take it out of this fit and average in "
    "a later one, after pruning"
)
PRUNING = Limits(
    shards="cannot shrink a model in the middle of a fit under {strategy}, which holds shards of its parameters. Prune "
    "first (Trainer(devices=1) or strategy='ddp'), then fit the pruned checkpoint with your strategy and without this "
    "callback",
    processes="have other shapes than the module here",
    comm_state="cannot shrink a model whose {strategy} has a ddp_comm_state ({state}), which keeps tensors of the old "
    "shapes. Leave it out of this fit",
    precisions=("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"),
    other_precisions="other layers in place of the network's, which belong to no group; prune in 'bf16-mixed' or "
    "'32-true', then fit the pruned checkpoint without this callback",
    neighbours={
        WeightAveraging: _COPY,
        StochasticWeightAveraging: _COPY,
        ModelPruning: "replaces weights by masked ones, which cannot be pruned again; use it or {callback}, not both",
    },
)
QUANTIZATION = Limits(
    shards="cannot exchange the network in the middle of a fit under {strategy}, which holds shards of its parameters. "
    "Train with strategy='ddp' or on one device (Trainer(devices=1)), or quantize after the fit with quant.quantize",
    processes="belong to another network than the module here",
    comm_state="adds parameters to a model whose {strategy} has a ddp_comm_state ({state}), which keeps what belongs "
    "to the old ones. Leave it out",
    precisions=("32-true", "16-mixed", "bf16-mixed"),
    other_precisions="weights of another type: scales and weights are float32 until they are rounded to integers; use "
    "'bf16-mixed', '16-mixed' or '32-true'",
    neighbours={
        StochasticWeightAveraging: "keeps a copy of the model without scales, and its own learning rates; "
        "average with lightning's WeightAveraging (the same average) or EMAWeightAveraging instead",
        ModelPruning: "replaces weights by masked ones, which the quantizers do not see; prune with "
        "AdaptiveIterativePruning(granularity='weight')",
    },
)
# Plugins that put layers of their own into the network; not all of them have a name in `trainer.precision`.
_REPLACING_PLUGINS = ("BitsandbytesPrecision", "TransformerEnginePrecision")


def refuse_strategy(trainer: Trainer, callback_name: str, limits: Limits) -> None:
    """Raises a ValueError for other strategies than one device and DDP, spawned processes and a `ddp_comm_state`."""
    strategy = trainer.strategy
    name = type(strategy).__name__
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(f"{callback_name} {limits.shards.format(strategy=name)}")
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"{callback_name} cannot run under {name}'s spawned or forked processes: the weights that come back when "
            f"they end {limits.processes}. Use strategy='ddp' in a script, or one device"
        )
    if isinstance(strategy, DDPStrategy) and strategy._ddp_comm_state is not None:
        state = type(strategy._ddp_comm_state).__name__
        raise ValueError(f"{callback_name} {limits.comm_state.format(strategy=name, state=state)}")


def refuse_precision(trainer: Trainer, callback_name: str, limits: Limits) -> None:
    """Raises a ValueError for a precision in which the network cannot be trained and changed."""
    plugin = type(trainer.precision_plugin).__name__
    if plugin in _REPLACING_PLUGINS or trainer.precision not in limits.precisions:
        named = f"the precision plugin {plugin}" if plugin in _REPLACING_PLUGINS else f"precision={trainer.precision!r}"
        raise ValueError(f"{callback_name} cannot train with {named}, which has {limits.other_precisions}")


def refuse_compiled_module(module: LightningModule) -> None:
    """Raises a ValueError for a LightningModule that is compiled as a whole, if its network will be quantized."""
    if getattr(module, "_compiler_ctx", None) is not None:
        raise ValueError(
            f"{type(module).__name__} is compiled as a whole, but evaluation after quantization is integer arithmetic "
            "that torch.compile cannot trace. Compile the network alone (module.net = torch.compile(module.net)): its "
            "training stays compiled"
        )


def refuse_synchronized_norms(trainer: Trainer, network: nn.Module, callback_name: str) -> None:
    """Raises a ValueError if Lightning would replace the network's BatchNorms by SyncBatchNorms.

    A quantized network would go on normalizing by each process's batch. BatchNorms of spikingjelly, over
    (T, N, C, H, W), would lose their step mode for good and take the images for channels.
    """
    sync = getattr(trainer.strategy, "_layer_sync", None)
    norms = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    if sync is not None and norms:
        raise ValueError(
            f"{callback_name} beside Trainer(sync_batchnorm=True): {type(sync).__name__} would replace the "
            f"{len(norms)} BatchNorms of {type(network).__name__} ({norms[0]}, ...) by others, which have neither time "
            "steps nor an integer form. Leave it out: each process then normalizes by its own images at all time "
            "steps, and rank 0's statistics are kept. Give the processes larger batches if theirs are too small"
        )


def refuse_neighbours(trainer: Trainer, callback_name: str, limits: Limits) -> None:
    """Raises a ValueError for callbacks that keep a copy of the weights or replace them."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by the trainer
        for kind, reason in limits.neighbours.items():
            if isinstance(other, kind):
                raise ValueError(f"{type(other).__name__} {reason.format(callback=callback_name)}")


def refuse_overlaps(trainer: Trainer, module: LightningModule, callback: Callback, model_attribute: str) -> None:
    """Raises a ValueError for a second callback that compresses the same network under another name, or a part of it.

    Each would change the network without the other one's knowledge.
    """
    network = network_of(module, model_attribute)
    for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by the trainer
        path = getattr(other, "model_attribute", None)
        if other is callback or not hasattr(other, "callback_name") or path is None or path == model_attribute:
            continue
        theirs = network_of(module, path)
        if theirs in set(network.modules()) or network in set(theirs.modules()):
            relation = "the same network as" if theirs is network else "a part of what is at"
            inner, outer = (path, model_attribute) if theirs in set(network.modules()) else (model_attribute, path)
            raise ValueError(
                f"model_attribute={inner!r} is {relation} {outer!r}, and both are to be compressed; give both "
                f"callbacks the same model_attribute, that of the network itself"
            )


def refuse_averaging_before(trainer: Trainer, callback: Callback, callback_name: str) -> None:
    """Raises a ValueError for a WeightAveraging that comes before `callback`, which quantizes."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
    for place, other in enumerate(callbacks):
        if isinstance(other, WeightAveraging) and callback in callbacks[place:]:
            raise ValueError(
                f"{type(other).__name__} stands before {callback_name}, so that on a resume it would take up its "
                f"average before there is a quantized network; put {callback_name} before it in "
                "Trainer(callbacks=[...])"
            )


def refuse_sharing(module: LightningModule, network: nn.Module, tensors: Collection[str], model_attribute: str) -> None:
    """Raises a ValueError if one of the network's parameters `tensors` has a second place, inside it or outside.

    A cut would leave that place with the old shape, and a mask would prune it too.
    """
    places: dict[int, list[str]] = {}
    for path, holder in network.named_modules(remove_duplicate=False):
        for name, parameter in holder._parameters.items():
            places.setdefault(id(parameter), []).append(f"{model_attribute}.{path}.{name}".replace("..", "."))
    inside = {id(m) for m in network.modules()}  # a network that is held twice, e.g. compiled, is no second place
    for path, holder in module.named_modules():
        for name, parameter in holder._parameters.items() if id(holder) not in inside else ():
            if id(parameter) in places:
                places[id(parameter)].append(f"{path}.{name}".lstrip("."))
    for tensor in tensors:
        first, *others = places[id(network.get_parameter(tensor))]
        if others:
            raise ValueError(
                f"{others[0]} is shared with {first}; pruning one would break the other. Give each its own nn.Parameter"
            )


def refuse_optimizers(optimizers: Iterable[Optimizer], network: nn.Module, tensors: Collection[str]) -> None:
    """Raises a ValueError for an optimizer whose state cannot be cut with the network's parameters `tensors`."""
    watched = {id(p): (name, p) for name, p in network.named_parameters() if name in tensors}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if name in UNFIT_OPTIMIZERS:
            raise ValueError(
                f"{name} keeps its own lists of parameters or a joint state, which cannot be cut with the network; use "
                "an element-wise optimizer (AdamW, SGD), or prune before fit"
            )
        for parameter, state in optimizer.state.items():
            path, expected = watched.get(id(parameter), ("", parameter))
            for key, value in state.items() if path else ():
                if not _can_be_cut(value, expected):
                    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(
                        f"{name}: its state {key!r} of {path} ({shape}) does not have the parameter's shape "
                        f"{tuple(expected.shape)} and cannot be cut with it; use an element-wise optimizer (AdamW, "
                        "SGD), or prune before fit"
                    )


def _can_be_cut(value: object, parameter: Tensor) -> bool:
    """The rule of `slice_optimizers`, whose error would come too late: after a round of the search."""
    if isinstance(value, Tensor):
        return value.numel() <= 1 or value.shape == parameter.shape
    return value is None or isinstance(value, int | float | bool | str)


def wrap_anew(trainer: Trainer) -> None:
    """Under DDP, wraps the module again because its parameters are others now; rank 0's weights are broadcast."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        agree()
        # The old wrapper has to go first: its reducer still hooks the parameters that stayed.
        strategy.model = strategy.lightning_module
        strategy._pl_static_graph_delay_done = False  # the new reducer has its first backward pass before it
        strategy.configure_ddp()

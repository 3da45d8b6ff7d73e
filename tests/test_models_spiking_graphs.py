"""The graphs of the spiking networks: the network itself in floats, one answer in integers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import layer, surrogate
from spikingjelly.activation_based import neuron as neurons
from support.spiking_cases import ALL, FAMILIES, SIZE_PX, lively, most_spikes, spikes_of
from torch import Tensor, nn

from swincompress_pl import accel
from swincompress_pl.models import create_model
from swincompress_pl.pruning import Group, PruningPlan, apply_plan
from swincompress_pl.quant import Graph, float_logits, quantize
from swincompress_pl.quant.graph import Node, Passthrough, Run
from swincompress_pl.quant.graph.spiking_nodes import CountNode, NeuronNode
from swincompress_pl.quant.twin import run_operation
from swincompress_pl.registry import UnsupportedNetworkError, adapter_for
from swincompress_pl.spec import run, steps

PREPROCESSING: dict[str, Any] = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "height": SIZE_PX, "width": SIZE_PX}


def graph_of(network: nn.Module, preprocessing: Mapping[str, Any] = PREPROCESSING) -> Graph:
    found: Graph = adapter_for(network).graph(network, preprocessing)
    return found


def pictures(count: int, seed: int = 0) -> Tensor:
    """uint8 (N, H, W, C) of some structure: noise in large squares."""
    torch.manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 8, 8)).float()
    return nn.functional.interpolate(coarse, size=SIZE_PX).permute(0, 2, 3, 1).to(torch.uint8)


def normalized(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std


class Spikes(Passthrough):
    """Keeps what every neuron of a pass gives, as (T, N, channels, places)."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def output(self, node: Node, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(node, NeuronNode):
            self.found.setdefault(node.module, []).append(output.flatten(2, -2).permute(1, 0, 3, 2))
        if isinstance(node, CountNode):
            self.found[node.module] = [node.norm * output.flatten(1, -2).transpose(1, 2)[None]]


@pytest.mark.parametrize("statistics", ["random", "trained"])
@pytest.mark.parametrize("name", ALL)
def test_the_graph_is_the_network_spike_for_spike(name: str, statistics: str) -> None:
    network, images = lively(ALL[name], 3, trained_statistics=statistics == "trained")
    graph, watched = graph_of(network), Spikes()
    with torch.no_grad(), spikes_of(network) as expected:
        logits = network(images)
    with torch.no_grad():
        found = Run(graph, network, watched)(images)
    torch.testing.assert_close(found, logits)
    assert set(watched.found) == set(expected)
    for neuron, parts in watched.found.items():
        spikes = torch.cat(parts, dim=2)
        assert torch.equal(spikes.flatten(), expected[neuron].reshape(spikes.shape).flatten()), neuron
    rates = [float(spikes.mean()) / most_spikes(network, neuron) for neuron, spikes in expected.items()]
    assert sum(0 < rate < 1 for rate in rates) > len(rates) / 2, "the network is dead"


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_spikingjelly(name: str, by_batch: bool) -> None:
    """Through surrogates, BatchNorms and time. BatchNorms in evaluation run on their running statistics; in training
    they normalize by the batch and keep the running statistics, with the same result."""
    network, images = lively(ALL[name], 7, trained_statistics=True)
    for module in network.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(by_batch)
    labels, found, statistics = torch.tensor([1, 2]), [], []
    for through_graph in (False, True):
        copied = copy.deepcopy(network)
        logits = Run(graph_of(copied), copied, Passthrough())(images) if through_graph else copied(images)
        nn.functional.cross_entropy(logits, labels).backward()
        found.append({key: parameter.grad for key, parameter in copied.named_parameters()})
        statistics.append(copied.state_dict())
    moved, largest = 0, max(float(grad.abs().max()) for grad in found[0].values() if grad is not None)
    for key, expected in found[0].items():
        if expected is not None:
            torch.testing.assert_close(
                found[1][key], expected, rtol=1e-4, atol=1e-10 * largest, msg=lambda text, key=key: f"{key}: {text}"
            )
            moved += bool(expected.any())
    assert moved > len(found[0]) / 2
    for key, expected in statistics[0].items():
        if "running_" in key or "num_batches" in key:
            # images that a network repeats over time count T times as many there in the variance's n - 1
            loose = {"rtol": 1e-3, "atol": 1e-12} if "running_var" in key else {}
            torch.testing.assert_close(
                statistics[1][key], expected, msg=lambda text, key=key: f"{key}: {text}", **loose
            )
            if "num_batches" in key:
                assert int(expected) == int(network.state_dict()[key]) + by_batch, key


def quantized(name: str, seed: int, time_steps: int, *, bits: str = "W8A8") -> Any:
    def build() -> nn.Module:
        return FAMILIES[name](T=time_steps)  # type: ignore[call-arg]

    network, _ = lively(build, seed, trained_statistics=False)
    network = network.float()
    return quantize(network, [normalized(pictures(8))], method="max", bits=bits, preprocessing=PREPROCESSING).eval()


@pytest.mark.parametrize("time_steps", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_integers_have_one_answer(tmp_path: Path, name: str, time_steps: int) -> None:
    """Logits of reference, twin and engine at batches of 1 and 3; all spikes of reference, twin and engine."""
    network = quantized(name, 5, time_steps)
    program, file = network.to_program(), tmp_path / "network.safetensors"
    accel.export(network, file)
    assert program.time_steps == time_steps
    for count in (1, 3):
        pixels = pictures(count, seed=count)
        expected = run(program, pixels.numpy())
        assert np.array_equal(network.integer_logits(pixels).numpy(), expected)
        assert np.array_equal(accel.load(file, threads=2).run_integer(pixels.numpy()), expected)
        logits = network(normalized(pixels))
        assert torch.equal(logits, torch.from_numpy(expected).float() * program.logit_scale)
    rates = same_spikes(program, pixels)
    assert sum(0 < rate < 1 for rate in rates) > len(rates) / 2


QUICKLY_ROUNDED = {
    "e-spikeformer": "second_order",
    "maxformer": "second_order",
    "meta-spikeformer": "second_order",
    "sdt": "learned",
}


@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        pytest.param(name, rounding, marks=() if QUICKLY_ROUNDED.get(name) == rounding else pytest.mark.slow)
        for name in ALL
        for rounding in ("second_order", "learned")
    ],
)
def test_rounded_weights_are_on_their_grids(name: str, rounding: str) -> None:
    """Layers with groups, parts of a layer that go different ways and BatchNorms included."""
    network, _ = lively(ALL[name], 5, trained_statistics=False)
    network, pixels = network.float(), pictures(8)
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    search: dict[str, Any] = {"rows": 64, "rounding": rounding, "learning": {"iterations": 2, "batch_images": 4}}
    made = quantize(network, [normalized(pixels)], bits="W4A8", preprocessing=PREPROCESSING, search=search).eval()
    changed, on_grid = 0, []
    for node in made.graph.weighted_nodes:
        scale = made.scales.weight_quantizer(node)
        codes = node.folded_weight(network, None).detach().flatten(1) / scale.step[:, None]
        changed += not torch.equal(network.get_submodule(node.module).weight, before[f"{node.module}.weight"])
        if rounding == "second_order":
            on_grid += [bool(row) for row in (codes - codes.round()).abs().amax(1) < 1e-3]
            assert float(codes.abs().max()) <= scale.q_max + 1e-3
    assert changed == len(made.graph.weighted_nodes)
    if rounding == "second_order":  # a bias that grew may have made a row's step larger afterwards
        assert np.mean(on_grid) > 0.95
    program = made.to_program()
    assert np.array_equal(made.integer_logits(pixels).numpy(), run(program, pixels.numpy()))


def same_spikes(program: Any, pixels: Tensor) -> list[float]:
    """Runs every operation in reference, twin and engine on the same values; the rates of the spikes."""
    from swincompress_pl.accel.core import operation_engine
    from swincompress_pl.spec import check
    from swincompress_pl.spec.reference import tensors_of

    values, known, rates = check(program), {"images": pixels.numpy()}, []
    for op, output in steps(program, pixels.numpy()):
        tensors, inputs = tensors_of(program, op), [known[each] for each in op.inputs]
        types = [values[each] for each in op.inputs]
        engine = operation_engine(op, types, tensors)
        given = engine.run(
            [np.ascontiguousarray(x.reshape(len(pixels), *v.shape)) for x, v in zip(inputs, types, strict=True)]
        )
        assert np.array_equal(given.reshape(output.shape), output), op.name
        moved = {role: torch.from_numpy(np.array(tensor)) for role, tensor in tensors.items()}
        twin = run_operation(op, [torch.from_numpy(np.array(x)) for x in inputs], moved, [v.dtype for v in types])
        assert np.array_equal(twin.numpy().reshape(output.shape), output), op.name
        known[op.output] = output
        if op.kind == "lif":
            rates.append(float(output.mean()))
    return rates


@pytest.mark.parametrize("name", FAMILIES)
def test_integers_spike_as_floats_do(name: str) -> None:
    """With weights of 8 bits most spikes of the first neurons are those of the float network."""
    network = quantized(name, 5, 2)
    pixels, watched = pictures(8, seed=9), Spikes()
    with torch.no_grad():
        Run(network.graph, network.network, watched)(normalized(pixels))
    first = next(iter(watched.found))
    integer = next(out for op, out in steps(network.to_program(), pixels.numpy()) if op.kind == "lif")
    spikes = torch.from_numpy(integer).flatten(2, -2).permute(1, 0, 3, 2)
    agreement = float((spikes == watched.found[first][0]).float().mean())
    assert agreement > 0.99
    assert 0.01 < float(spikes.float().mean()) < 0.99


def test_thresholds_are_whole_numbers_of_the_weights_steps() -> None:
    network = quantized("spikformer", 1, 2, bits="W4A8")
    for node in network.graph.nodes:
        if isinstance(node, NeuronNode) and "attn_lif" not in node.name:
            lif = next(op for op in network.to_program().operations if op.name == node.name)
            layer = next(
                n
                for n in network.graph.weighted_nodes
                if n.neuron == node.module and n.output in _back(network.graph, node)
            )
            step = network.scales.step(layer).double()
            real = 8 / step
            torch.testing.assert_close(real, real.round(), rtol=1e-5, atol=0)
            assert lif.attributes["fraction_bits"] >= 3


def test_channels_that_barely_have_weights_keep_their_thresholds() -> None:
    """One has tiny weights, one tiny weights and a large bias, one none at all."""
    network, _ = lively(FAMILIES["spikformer"], 2, trained_statistics=False)
    fc1: Any = network.blocks[0].mlp.fc1  # type: ignore[index, union-attr]
    with torch.no_grad():
        for channel, (scale, bias) in enumerate([(1e-12, 0.3), (1e-9, 60.0), (0.0, 5.0)]):
            fc1[1].weight[channel], fc1[1].bias[channel] = scale, bias
            fc1[1].running_mean[channel] = 0.0
    images = normalized(pictures(4))
    small = quantize(network.float(), [images], method="max", preprocessing=PREPROCESSING).eval()
    assert_one_answer(small, pictures(2, seed=1))
    spikes = next(
        out for op, out in steps(small.to_program(), pictures(2).numpy()) if op.name == "blocks.0.mlp.neuron1"
    )
    # a current of 0.3 never reaches the threshold of 1, one of 60 always does, one of 5 does from the first step on
    assert [int(spikes[..., channel].min()) for channel in range(3)] == [0, 1, 1]
    assert int(spikes[..., 0].max()) == 0


def test_a_bias_that_outgrew_its_steps_is_refused() -> None:
    network, _ = lively(FAMILIES["spikformer"], 2, trained_statistics=False)
    small = quantize(network.float(), [normalized(pictures(2))], method="max", preprocessing=PREPROCESSING).eval()
    with torch.no_grad():
        small.network.blocks[0].mlp.fc1[1].bias[3] = 1e9
    with pytest.raises(
        ValueError, match=r"blocks.0.mlp.neuron1: channel 3 has a bias of 1e\+09, beyond .* recalibrate"
    ):
        small.to_program()


def _back(graph: Graph, node: Node) -> set[str]:
    """Names of what a node reads, poolings passed over."""
    makers = {each.output: each for each in graph.nodes}
    return {node.inputs[0], *(makers[node.inputs[0]].inputs if node.inputs[0] in makers else ())}


@pytest.mark.parametrize("name", ALL)
def test_a_pruned_network_has_its_graph_and_one_answer(name: str) -> None:
    """Every second unit of a few groups of each kind removed, attentions with q and k narrower than v."""
    network, images = lively(ALL[name], 4, trained_statistics=False)
    groups: list[Group] = adapter_for(network).groups(network)
    chosen = {group.kind: group for group in groups if group.kind != "embed" and group.units > 3}
    chosen |= {f"{group.kind} last": group for group in groups[::3] if group.kind == "mlp" and group.units > 3}
    plan = PruningPlan.removing(
        list(chosen.values()), {group.name: range(0, group.units - 1, 2) for group in chosen.values()}
    )
    before = sum(p.numel() for p in network.parameters())
    apply_plan(network, plan)
    assert sum(p.numel() for p in network.parameters()) < before
    with torch.no_grad():
        torch.testing.assert_close(float_logits(graph_of(network), network, images), network(images))
    small = quantize(network.float(), [normalized(pictures(4))], method="max", preprocessing=PREPROCESSING).eval()
    assert_one_answer(small, pictures(2, seed=1))


def assert_one_answer(network: Any, pixels: Tensor) -> None:
    program = network.to_program()
    expected = run(program, pixels.numpy())
    assert np.array_equal(network.integer_logits(pixels).numpy(), expected)
    assert np.array_equal(accel.Engine(program).run_integer(pixels.numpy()), expected)


@pytest.mark.parametrize("name", ["spikformer", "sdt", "maxformer"])
def test_events_go_in_as_counts(name: str) -> None:
    """(N, T, C, H, W) counts, as spikingjelly's datasets give frames, T other than the network was created with."""
    network, _ = lively(lambda: FAMILIES[name](in_channels=2), 6, trained_statistics=False)  # type: ignore[call-arg]
    network.T = 3
    torch.manual_seed(0)
    events = torch.randint(0, 6, (3, 3, 2, SIZE_PX, SIZE_PX)).double()
    counts = {"mean": [0.0, 0.0], "std": [1 / 255] * 2, "height": SIZE_PX, "width": SIZE_PX, "time_steps": 3}
    graph = graph_of(network, counts)
    with torch.no_grad():
        torch.testing.assert_close(float_logits(graph, network, events), network(events))
    network = quantize(network.float(), [events.float()], method="max", preprocessing=counts).eval()
    pixels = network.pixels(events.float())
    assert pixels.shape == (3, 3, SIZE_PX, SIZE_PX, 2)
    assert torch.equal(pixels.movedim(-1, -3).double(), events)
    assert network.to_program().time_steps == 3
    assert_one_answer(network, pixels)
    with pytest.raises(ValueError, match=r"this network takes \(N, 3, 2, 32, 32\)"):
        network.train()(events[:, :2].float())
    order = r"shape \(3, 2, 2, .*the time steps second. .*pass images.transpose\(0, 1\); if they have 2 time steps"
    for refusing in (network.train(), network.eval(), network.pixels):
        with pytest.raises(ValueError, match=order):
            refusing(events[:2].transpose(0, 1).float())


@pytest.mark.parametrize(
    "other", [neurons.QIFNode(step_mode="m"), neurons.KLIFNode(step_mode="m"), neurons.SlidingPSN(k=2, step_mode="m")]
)
def test_other_neurons_are_refused_by_name(other: nn.Module) -> None:
    network, _ = lively(FAMILIES["spikformer"], 0, trained_statistics=False)
    network.blocks[0].mlp.neuron1 = other  # type: ignore[index, union-attr]
    with pytest.raises(
        UnsupportedNetworkError,
        match=rf"blocks.0.mlp.neuron1 is {type(other).__name__}; neurons with an integer form",
    ):
        quantize(network.float(), [normalized(pictures(2))], method="max", preprocessing=PREPROCESSING)


def test_what_has_no_integer_form_is_refused() -> None:
    network, _ = lively(FAMILIES["sdt"], 0, trained_statistics=False)
    network.patch_embed.final_stage[2].ceil_mode = True  # type: ignore[index, union-attr]
    with pytest.raises(UnsupportedNetworkError, match=r"final_stage.2 is MaxPool2d.* without dilation or ceil_mode"):
        graph_of(network)
    with pytest.raises(UnsupportedNetworkError, match="give preprocessing 'height' and 'width'"):
        graph_of(network, {key: PREPROCESSING[key] for key in ("mean", "std")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_threshold": 0.0}, r"v_threshold=0.0; it has to be above 0 and finite"),
        ({"v_threshold": float("inf")}, r"v_threshold=inf; it has to be above 0 and finite"),
        ({"v_reset": float("nan")}, r"v_reset=nan; it has to be finite, or None"),
        ({"tau": 0.0}, r"tau=0.0; it has to be 1 time step or more"),
        ({"tau": float("nan")}, r"tau=nan; it has to be 1 time step or more"),
        ({"surrogate_function": surrogate.Sigmoid(spiking=False)}, r"Sigmoid\(spiking=False\) gives real numbers"),
    ],
)
def test_neurons_out_of_range_are_refused_with_the_graph(change: dict[str, Any], message: str) -> None:
    network, _ = lively(FAMILIES["sdt"], 0, trained_statistics=False)
    graph_of(network)
    for key, value in change.items():
        setattr(network.blocks[0].mlp.lif1, key, value)  # type: ignore[index, union-attr]
    with pytest.raises(UnsupportedNetworkError, match=r"blocks.0.mlp.lif1.*" + message):
        graph_of(network)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.SyncBatchNorm, "is SyncBatchNorm, whose sums over all processes"),
        (
            lambda channels: nn.BatchNorm2d(channels, affine=False),
            "is BatchNorm2d.* with affine=True and running statistics",
        ),
        (
            lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
            "is BatchNorm2d.* with affine=True and running statistics",
        ),
        (lambda channels: nn.GroupNorm(1, channels), r"is GroupNorm\(.*BatchNorm1d and BatchNorm2d can be folded"),
        (lambda channels: layer.ThresholdDependentBatchNorm2d(1.0, 1.0, channels), "is ThresholdDependentBatchNorm2d"),
    ],
)
def test_norms_that_cannot_be_folded_are_refused_with_the_graph(norm: Callable[[int], nn.Module], message: str) -> None:
    network, _ = lively(FAMILIES["spikformer"], 0, trained_statistics=False)
    block: Any = network.patch_embed.stages[0].conv_bn.block  # type: ignore[index, union-attr]
    block[1] = norm(block[1].num_features)
    with pytest.raises(UnsupportedNetworkError, match=r"patch_embed.stages.0.conv_bn.block.1 " + message):
        graph_of(network)


def test_numbers_that_leave_the_membranes_bounds_are_refused_by_name() -> None:
    images = [normalized(pictures(2))]

    def exported(key: str, value: Any) -> None:
        network, _ = lively(FAMILIES["spikformer"], 0, trained_statistics=False)
        node: Any = network.blocks[0].mlp  # type: ignore[index, union-attr]
        if key == "w":
            node.neuron1 = neurons.ParametricLIFNode(step_mode="m")
            node.neuron1.w.data.fill_(value)
        else:
            setattr(node.neuron1, key, value)
        quantize(network.float(), images, method="max", preprocessing=PREPROCESSING).to_program()

    with pytest.raises(ValueError, match=r"blocks.0.mlp.neuron1: v_reset=-1e\+12 is beyond 2\*\*28 units of .*channel"):
        exported("v_reset", -1e12)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.neuron1: .*bias of .* beyond 134217728 units"):
        exported("v_threshold", 1e-30)
    exported("w", 0.0)
    with pytest.raises(ValueError, match=r"blocks.0.mlp.neuron1"):
        exported("w", float("nan"))


def test_networks_that_cannot_mean_anything_are_refused_by_name() -> None:
    images = [normalized(pictures(2))]
    fresh = create_model(
        "Spikformer", T=2, img_size_h=SIZE_PX, img_size_w=SIZE_PX, embed_dims=32, num_heads=2, depths=1
    )
    with pytest.raises(ValueError, match=r"of 12 neurons never spike .* patch_embed.stages.0.neuron the first"):
        quantize(fresh.eval(), images, method="max", preprocessing=PREPROCESSING)
    with pytest.raises(ValueError, match="Spikformer: T is 0; a network needs 1 time step or more"):
        create_model("Spikformer", T=0, embed_dims=32, num_heads=2, depths=1)
    network, _ = lively(FAMILIES["spikformer"], 0, trained_statistics=False)
    with pytest.raises(ValueError, match="time_steps is 0; events have 1 time step or more"):
        graph_of(network, PREPROCESSING | {"time_steps": 0})
    network.blocks[0].mlp.neuron1.step_mode = "s"  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"blocks.0.mlp.neuron1 is in single-step mode"):
        quantize(network.float(), images, method="max", preprocessing=PREPROCESSING)
    remembering, _ = lively(FAMILIES["spikformer"], 0, trained_statistics=False)
    remembering._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match="keeps its membrane potentials from one call to the next"):
        quantize(remembering.float(), images, method="max", preprocessing=PREPROCESSING)

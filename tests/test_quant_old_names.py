"""What version 0.1 called otherwise in `quant` works: arguments, attributes, state dicts, optimizer states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from swincompress_pl.callbacks import QuantizationAwareTraining
from swincompress_pl.callbacks.qat_scales import read_old_names
from swincompress_pl.models import create_model
from swincompress_pl.quant import (
    GraphBuilder,
    QuantizedNetwork,
    QuantizerSpec,
    SearchOptions,
    diagnose,
    measure_sensitivity,
    quantize,
)
from swincompress_pl.quant.scales import _present_key

PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}

pytestmark = pytest.mark.filterwarnings("ignore:.*is the name of version 0.1:DeprecationWarning")


def network_and_images(count: int = 8) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = create_model(
        "VisionTransformer", num_classes=7, img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2
    )
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return network.eval(), (torch.randint(0, 256, (count, 3, 16, 16)) / 255 - mean) / std


def test_a_state_dict_of_version_0_1_loads() -> None:
    network, images = network_and_images()
    quantized = quantize(network, [images], preprocessing=PREPROCESSING, search={"rows": 64})
    quantized.learn_scales()
    state = quantized.state_dict()
    names = {".activations.": ".sites.", ".equalization": ".balance", ".centering": ".shift", ".adjustment": ".drift"}
    old = {}
    for key, value in state.items():
        for now, before in names.items():
            key = key.replace(now, before)
        old[key] = value + 0 if value.dtype == torch.uint8 else value * 1.5
    assert sum(key not in state for key in old) == sum("activations" in key for key in state) + 1
    fresh = QuantizedNetwork(network, preprocessing=PREPROCESSING, learned_scales=True)
    fresh.load_state_dict(old)
    assert fresh.unsigned == quantized.unsigned
    for value, expected in zip(fresh.state_dict().values(), old.values(), strict=True):
        assert torch.equal(value, expected)


def test_names_of_layers_are_no_names_of_ours() -> None:
    assert _present_key("sites.shift/balance.balance") == "activations.shift/balance.equalization"
    assert _present_key("sites.drift.scale") == "activations.drift.scale"
    assert _present_key("weights.sites.step") == "weights.sites.step"
    assert _present_key("drift") == "adjustment"


def test_search_options() -> None:
    assert SearchOptions(balance=False, shift=False) == SearchOptions(equalize=False, center=False)  # type: ignore[call-arg]
    options: dict[str, Any] = {"balance": False, "rows": 64}
    callback = QuantizationAwareTraining(start_epoch=0, search=options)
    assert callback.search == SearchOptions(equalize=False, rows=64)
    network, images = network_and_images()
    made = quantize(network, [images], preprocessing=PREPROCESSING, search=options)
    assert all(bool((ratios == 1).all()) for ratios in made.scales.equalizations.values())


def test_arguments() -> None:
    network, images = network_and_images(count=4)
    made = quantize(network, [images], preprocessing=PREPROCESSING, method="max", images=2)  # type: ignore[call-arg]
    measure_sensitivity(made, [images], widths=(8,), rows=8, images=2)  # type: ignore[call-arg]
    diagnose(made, images, costs=False, batch=2)  # type: ignore[call-arg]
    spec = QuantizerSpec(name="x", segments=(3,), balanced=True)  # type: ignore[call-arg]
    builder: Any = GraphBuilder(nn.Sequential(nn.Linear(3, 2)))
    assert spec.equalized
    assert builder.linear("0", "x", site=builder.site(spec)) == "0"
    assert builder.nodes[0].site == builder.nodes[0].quantizer == "x"


def test_attributes() -> None:
    network, images = network_and_images(count=2)
    made: Any = quantize(network, [images], preprocessing=PREPROCESSING, method="max")
    scales, graph = made.scales, made.graph
    assert scales.sites is scales.activations
    assert scales.drift is None
    assert graph.sites is graph.quantizers
    assert graph.site_of(graph.nodes[0].output).shiftable is False
    scale = scales.site(graph.sites["blocks.0.norm1"])
    assert scale.balance is scale.equalization
    assert scale.site.balanced
    with pytest.warns(DeprecationWarning, match=r"Scales\.sites is the name .*; use \.activations$"):
        _ = scales.sites


def test_an_optimizer_that_names_the_scales() -> None:
    scales = nn.Parameter(torch.zeros(3))
    states: list[dict[str, Any]] = [SGD([("scales.drift", scales)], lr=0.1).state_dict()]
    states.append(SGD([scales], lr=0.1).state_dict())
    read_old_names(states)
    made = SGD([("scales.adjustment", scales)], lr=0.2)
    made.load_state_dict(states[0])
    assert made.param_groups[0]["param_names"] == ["scales.adjustment"]
    assert made.param_groups[0]["lr"] == 0.1
    assert states[1]["param_groups"][0].get("param_names") is None


def test_progress_is_told() -> None:
    network, images = network_and_images(count=2)
    told: list[tuple[str, int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    made = quantize(network, [images], preprocessing=PREPROCESSING, search={"rows": 8}, progress=tell)
    layers = len(made.graph.weighted_nodes)
    assert told == [("searching scales", done, layers) for done in range(layers + 1)]
    told.clear()
    diagnose(made, images, progress=tell)
    assert told == [(what, n, 1) for what in ("measuring errors", "measuring quantizers") for n in (0, 1)]

"""Networks of counts all the way: pruned, restored, quantized and trained in integers, in both readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from support.spiking_cases import COUNTING, SIZE_PX, lively, most_spikes, spikes_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl import accel
from swincompress_pl.callbacks import PrimeSVT, QuantizationAwareTraining
from swincompress_pl.checkpoint.restore import restore_from_history
from swincompress_pl.history import history_of
from swincompress_pl.models import CompressibleClassifier, create_model
from swincompress_pl.models.factory import rebuild, recreate_model
from swincompress_pl.models.spiking.memory import watching_spikes
from swincompress_pl.models.spiking.multi_spike import MultiSpike
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.quant import QuantizedNetwork, quantize
from swincompress_pl.quant.twin import TorchTwin
from swincompress_pl.registry import adapter_for
from swincompress_pl.spec import Program, binary_steps, check, run, steps

HALF: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "height": SIZE_PX, "width": SIZE_PX}
TINY: dict[str, Any] = {
    "embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1, 1], "num_heads": 2, "mlp_ratio": 2, "strides": [2, 2, 2, 1, 1],
}  # fmt: skip
CLASSES = 3


def pictures(count: int, seed: int = 0) -> Tensor:
    """uint8 (N, H, W, C) of some structure: noise in large squares, brighter by class."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 160, (count, 3, 4, 4), generator=generator).float()
    pixels = nn.functional.interpolate(coarse, size=SIZE_PX) + 45 * labels(count).view(-1, 1, 1, 1)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8)


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def normalized(pixels: Tensor) -> Tensor:
    return (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def loader(count: int = 24) -> DataLoader[Any]:
    return DataLoader(TensorDataset(normalized(pictures(count)), labels(count)), batch_size=8)


def trainer(tmp_path: Path, epochs: int, *callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip


def classifier() -> CompressibleClassifier:
    """Fires from the start: BatchNorms' shifts lift what neurons read."""
    torch.manual_seed(0)
    module = CompressibleClassifier("ESpikeFormer", CLASSES, model_kwargs=TINY)
    for part in module.net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(part.bias, 0.7)
    return module


def assert_one_answer(program: Program, pixels: Tensor) -> None:
    """Reference, twin and engine, in counts and in binary time steps; the reference value by value."""
    images, expected = pixels.numpy(), run(program, pixels.numpy())
    binary = binary_steps(program)
    check(binary)
    for reading in (program, binary):
        assert np.array_equal(TorchTwin(reading, torch.device("cpu"))(pixels).numpy(), expected)
        assert np.array_equal(accel.Engine(reading).run_integer(images), expected)
    found = {op.output: value for op, value in steps(binary, images)}
    for op, value in steps(program, images):
        spikes = found[op.output]
        assert np.array_equal(spikes.sum(1) if "largest" in op.attributes else spikes, value), op.name


@pytest.mark.parametrize("bits", ["W8A8", "W4A8"])
@pytest.mark.parametrize("name", COUNTING)
def test_integers_have_one_answer(name: str, bits: str) -> None:
    network, _ = lively(COUNTING[name], 5, trained_statistics=False)
    most = most_spikes(network, "spike")
    made = quantize(network.float(), [normalized(pictures(8))], method="max", bits=bits, preprocessing=HALF).eval()
    program = made.to_program()
    pixels = pictures(3, seed=3)
    assert_one_answer(program, pixels)
    assert np.array_equal(made.integer_logits(pixels).numpy(), run(program, pixels.numpy()))
    assert (program.time_steps, binary_steps(program).time_steps) == (None, most)
    counting = [op for op in program.operations if "largest" in op.attributes]
    neurons = [name for name, module in network.named_modules() if isinstance(module, MultiSpike)]
    assert len(counting) == len(neurons)
    assert {op.attributes["largest"] for op in counting} == {most}
    assert "lif" not in {op.kind for op in program.operations}
    values = [value for op, value in steps(program, pixels.numpy()) if "largest" in op.attributes]
    assert sum(0 < value.mean() < most for value in values) > 0.9 * len(values)


def test_integers_count_as_floats_do() -> None:
    """With weights of 8 bits most counts of the first neurons are those of the float network."""
    network, _ = lively(COUNTING["e-spikeformer"], 5, trained_statistics=False)
    pixels = pictures(8, seed=9)
    with torch.no_grad(), spikes_of(network) as spikes:
        network(normalized(pixels).double())
    made = quantize(network.float(), [normalized(pixels)], preprocessing=HALF).eval()
    found = {op.name: value for op, value in steps(made.to_program(), pixels.numpy()) if "largest" in op.attributes}
    first = torch.from_numpy(found["ConvBlock1_1.0.Conv.spike1"]).movedim(-1, 1)
    expected = spikes["ConvBlock1_1.0.Conv.spike1"][0]
    assert float((first == expected).float().mean()) > 0.98
    assert 0.1 < float(first.float().mean()) < 3.9


def test_a_silent_network_is_not_quantized() -> None:
    network, _ = lively(COUNTING["e-spikeformer"], 0, trained_statistics=True)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.bias.fill_(-9.0)
    with pytest.raises(ValueError, match=r"of 45 neurons never spike"):
        quantize(network.float(), [normalized(pictures(2))], method="max", preprocessing=HALF)


def test_a_pruned_network_is_restored_from_its_history() -> None:
    network = create_model("ESpikeFormer", num_classes=CLASSES, **TINY)
    groups = adapter_for(network).groups(network)
    removed = {group.name: [0] if group.kind == "heads" else range(group.units // 2) for group in groups}
    for names in (lambda name: "block" in name.lower(), lambda name: "embed" in name):
        chosen = {name: units for name, units in removed.items() if names(name)}
        apply_plan(network, PruningPlan.removing(adapter_for(network).groups(network), chosen))
    assert len(history_of(network)) == 2
    heads = {module.num_heads for module in network.modules() if hasattr(module, "num_heads")}
    assert heads == {1}
    images = normalized(pictures(2))
    again = restore_from_history(recreate_model(network.creation), history_of(network))
    rebuilt = rebuild({"network": network.creation, "history": history_of(network)})
    for other in (again, rebuilt):
        other.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert torch.equal(other.eval()(images), network.eval()(images))
    scales = [module.scale for module in network.modules() if hasattr(module, "scale")]
    assert scales == [2 * 8**-0.5] * 2, "as before pruning"


@pytest.mark.filterwarnings("ignore:PrimeSVT. no candidate keeps both")
@pytest.mark.filterwarnings("ignore:.* neurons never spike on the hold-out")
@pytest.mark.parametrize("granularity", ["structured", "filter"])
def test_a_fit_prunes_and_its_checkpoint_rebuilds_the_network(tmp_path: Path, granularity: str) -> None:
    module = classifier()
    before = sum(int(p.count_nonzero()) for p in module.net.parameters())
    callback = PrimeSVT(
        tolerance=100.0, min_memory_saving=0.05, rates=(0.1, 0.25), max_sparsity=0.6, round_to=1,
        granularity=granularity, start_epoch=1,
    )  # fmt: skip
    run_ = trainer(tmp_path, 2, callback)
    run_.fit(module, loader(), loader())
    assert callback.result is not None
    assert callback.result.met
    assert sum(int(p.count_nonzero()) for p in module.net.parameters()) < before
    neurons = [name for name, part in module.net.named_modules() if isinstance(part, MultiSpike)]
    assert set(callback.result.spike_rates) == set(neurons)
    assert all(0 <= rate <= 1 for rate in callback.result.spike_rates.values())
    assert sum(rate > 0 for rate in callback.result.spike_rates.values()) > len(neurons) / 2
    run_.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    images = normalized(pictures(4))
    with torch.no_grad(), watching_spikes(loaded.net) as rates:
        assert torch.equal(loaded(images), module.eval()(images))
    assert set(rates) == set(neurons)


def test_a_fit_goes_on_in_integers(tmp_path: Path) -> None:
    module = classifier()
    qat = QuantizationAwareTraining(start_epoch=1, method="max", bits="W4A8", preprocessing=HALF)
    run_ = trainer(tmp_path, 3, qat)
    run_.fit(module, loader(), loader())
    made: Any = module.net
    assert isinstance(made, QuantizedNetwork)
    assert all(bool(torch.isfinite(p).all()) for p in made.parameters())
    pixels = pictures(24)
    program = made.eval().to_program()
    logits = run(program, pixels.numpy())
    assert np.array_equal(logits, made.integer_logits(pixels).numpy())
    assert float(run_.callback_metrics["val/top1"]) == pytest.approx((logits.argmax(1) == labels(24).numpy()).mean())
    assert_one_answer(program, pixels[:2])
    file = accel.export(made, tmp_path / "model.safetensors")
    assert np.array_equal(accel.load(file, threads=1).run_integer(pixels.numpy()), logits)
    run_.save_checkpoint(tmp_path / "last.ckpt")
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert np.array_equal(run(loaded.net.to_program(), pixels.numpy()), logits)  # type: ignore[operator]

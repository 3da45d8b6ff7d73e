"""What users hand to `export` and to an engine: found and taken where there is no doubt, else a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from PIL import Image
from support.quant_cases import PREPROCESSING, network_and_images
from torch import nn

from swincompress_pl import accel
from swincompress_pl.quant import QuantizedNetwork, quantize


@pytest.fixture(scope="module")
def quantized() -> QuantizedNetwork:
    network, _, images = network_and_images("vit")
    return quantize(network, [images], method="max", preprocessing=PREPROCESSING).eval()


@pytest.fixture(scope="module")
def pixels() -> Any:
    return network_and_images("vit", count=5)[1].numpy()


@pytest.fixture(scope="module")
def engine(quantized: QuantizedNetwork, tmp_path_factory: pytest.TempPathFactory) -> accel.Engine:
    return accel.load(accel.export(quantized, tmp_path_factory.mktemp("engine") / "vit.safetensors"), threads=1)


# export


class Holder(LightningModule):
    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)


class Plainly:
    """No module at all."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network


HOLDERS: dict[str, Any] = {
    "another attribute": lambda net: Holder(model=net),
    "nested": lambda net: Holder(model=Holder(inner=nn.ModuleDict({"one": net}))),
    "in a list": lambda net: Holder(networks=[net]),
    "in a dictionary": lambda net: Holder(networks={"one": net}),
    "held twice": lambda net: Holder(model=net, alias=net),
    "beside others": lambda net: Holder(head=nn.Linear(2, 2), model=net, teacher=nn.Linear(2, 2)),
    "in an object": lambda net: Plainly(net),
    "net": lambda net: Holder(net=net),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_export_finds_the_one_quantized_network(quantized: QuantizedNetwork, tmp_path: Path, name: str) -> None:
    found = accel.export(HOLDERS[name](quantized), tmp_path / "found.safetensors")
    assert found.read_bytes() == accel.export(quantized, tmp_path / "itself.safetensors").read_bytes()


def test_export_of_several_names_them(quantized: QuantizedNetwork, tmp_path: Path) -> None:
    network, _, images = network_and_images("vit")
    other = quantize(network, [images], method="max", preprocessing=PREPROCESSING)
    with pytest.raises(
        TypeError, match=r"holds 2 quantized networks: model\.first, model\.others\[0\]; export the one"
    ):
        accel.export(Holder(first=quantized, others=[other]), tmp_path / "x.safetensors")


def test_export_of_none_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"not quantized; quantize it .* None of its 2 modules .*: model\.model \(Lin"):
        accel.export(Holder(model=nn.Linear(2, 2), other=nn.ReLU()), tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match="int is not quantized"):
        accel.export(3, tmp_path / "x.safetensors")


def test_load_of_something_else(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "fit.ckpt")
    with pytest.raises(accel.ArtifactError, match=r"fit\.ckpt.*PyTorch checkpoint.*load_from_checkpoint"):
        accel.load(tmp_path / "fit.ckpt")
    with pytest.raises(FileNotFoundError, match="a folder"):
        accel.load(tmp_path)


# images


class Interface:
    """An array of another library, as `__array_interface__` shows it."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = array.__array_interface__
        self._array = array


TAKEN: dict[str, Any] = {
    "torch": torch.from_numpy,
    "torch, strided": lambda x: torch.from_numpy(x).flip(0).flip(0),
    "torch, channels last of (N, C, H, W)": lambda x: torch.from_numpy(x).movedim(-1, 1).contiguous().movedim(1, -1),
    "list of arrays": list,
    "tuple of tensors": lambda x: tuple(torch.from_numpy(x)),
    "list of PIL images": lambda x: [Image.fromarray(image) for image in x],
    "array interface": Interface,
}


@pytest.mark.parametrize("name", TAKEN)
def test_engines_take_what_is_an_array_of_bytes(engine: accel.Engine, pixels: Any, name: str) -> None:
    expected = engine(pixels)
    assert np.array_equal(engine(TAKEN[name](pixels)), expected)
    assert np.array_equal(accel.ReferenceEngine(engine.program)(TAKEN[name](pixels[:1])), expected[:1])
    assert engine.profile(TAKEN[name](pixels), repeats=1).rows


def test_a_tensor_is_not_copied(engine: accel.Engine, pixels: Any) -> None:
    from swincompress_pl.accel.images import as_images

    tensor = torch.from_numpy(pixels)
    assert as_images(engine._taken, tensor).ctypes.data == tensor.data_ptr()


class OnADevice:
    device = "cuda:0"

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (lambda x: None, TypeError, "images are None; pass an array of uint8"),
    "text": (lambda x: "cat.png", TypeError, "images are str"),
    "a device": (lambda x: OnADevice(), TypeError, r"OnADevice on cuda:0.*\.cpu\(\)"),
    "one image": (lambda x: x[0], ValueError, r"one image: pass images\[None\]"),
    "one tensor": (lambda x: torch.from_numpy(x[0]), ValueError, r"one image: pass images\[None\]"),
    "channels first": (lambda x: np.moveaxis(x, -1, 1), ValueError, r"np\.moveaxis\(images, -3, -1\)"),
    "grey": (lambda x: x[..., 0], ValueError, r"no axis of channels: pass np\.repeat"),
    "another size": (lambda x: x[:, :8], ValueError, "expected .N, 16, 16, 3., channels last; resize"),
    "list, other sizes": (lambda x: [x[0], x[0][:8]], ValueError, r"different shapes: images\[0\].*images\[1\]"),
    "list, a float": (lambda x: [x[0], x[0] / 255], TypeError, r"images\[1\] is float64"),
    "an empty list": (lambda x: [], ValueError, r"an empty list; pass an array \(0, 16, 16, 3\)"),
    "int64": (lambda x: x.astype(np.int64), TypeError, r"int64.*images\.astype\(np\.uint8\)"),
    "float pixels": (
        lambda x: torch.from_numpy(x).float(),
        TypeError,
        r"float32 \(torch\.Tensor\).*astype\(np\.uint8\)",
    ),
    "normalized": (lambda x: (x / 255 - 0.5) / 0.2, TypeError, "not normalized: these reach from -2.5 to 2.5"),
    "NaN": (lambda x: np.full(x.shape, np.nan), TypeError, "float64; pass raw uint8 pixels"),
    "objects": (lambda x: np.array([None, "a"], dtype=object), TypeError, "it holds objects"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_engines_say_what_is_wrong(engine: accel.Engine, pixels: Any, name: str) -> None:
    make, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        engine(make(pixels))


@pytest.mark.parametrize(
    ("mode", "size", "remedy"),
    [
        ("RGB", (16, 16), r"pass a list: \[picture\]"),
        ("L", (16, 16), r"pass a list: \[picture\.convert\('RGB'\)\]"),
        ("RGBA", (40, 30), r"pass a list: \[picture\.convert\('RGB'\)\.resize\(\(16, 16\)\)\]"),
    ],
)
def test_a_single_picture_is_named_and_its_remedy_works(
    engine: accel.Engine, mode: str, size: tuple[int, int], remedy: str
) -> None:
    picture = Image.new(mode, size)
    with pytest.raises(ValueError, match=rf"one PIL image of {mode}, .*; {remedy}"):
        engine(picture)
    assert engine([picture.convert("RGB").resize((16, 16))]).shape == (1, engine.num_classes)

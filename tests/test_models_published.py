"""create_model takes networks of hubs, folders and other libraries, and nothing is fetched to build them again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning import Trainer
from support.conversion_cases import PIXELS, VIT, WINDOWS, close, hugging, lively, logits, swin
from support.hub_server import Hub, point_at, serving
from torchvision import models as torchvisions

from swincompress_pl import accel, export, quantize
from swincompress_pl.models import CompressibleClassifier, create_model, preprocessing_for, rebuild
from swincompress_pl.registry import UnsupportedNetworkError

NAMES = ("cat", "dog", "owl")
IMAGES = (PIXELS.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3,
}  # fmt: skip
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub:
        point_at(hub.address, tmp_path / "cache", monkeypatch)
        yield hub


def timm_folder(folder: Path, **changes: Any) -> Any:
    """A network of timm, saved in `folder` as timm saves it for the Hub."""
    network = lively(timm.create_model("vit_tiny_patch16_224", **SMALL))
    described = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "crop_pct": 0.8}
    config = {"label_names": list(NAMES), "pretrained_cfg": described, **changes}
    timm.models.save_for_hf(network, str(folder), model_config=config, model_args=SMALL, safe_serialization=True)
    return network


def hugging_folder(folder: Path, kind: str = "ViTForImageClassification", **options: Any) -> Any:
    """A network of transformers, saved in `folder` with its image processor."""
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    network: Any = lively(hugging(kind, **((WINDOWS if "Swin" in kind else VIT) | labels | options)))
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return network


def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *folders: Path) -> None:
    """From now on there is no hub, no cache, and none of the folders."""
    for folder in folders:
        shutil.rmtree(folder)
    point_at("http://127.0.0.1:1", tmp_path / "empty", monkeypatch)


@pytest.mark.parametrize("kind", ["timm's folder", "timm's hub", "folder of transformers", "hub of transformers"])
def test_weights_names_and_preprocessing_come_along_and_nothing_is_fetched_again(
    kind: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "published"
    original = timm_folder(folder) if "timm" in kind else hugging_folder(folder)
    hub.add("me/small", folder)
    place = str(folder) if "folder" in kind else "me/small"
    name = {"t": {False: "local-dir", True: "hf-hub"}, "f": {False: "hf"}, "h": {True: "hf"}}[kind[0]]["hub" in kind]
    module = CompressibleClassifier(f"{name}:{place}", num_classes=3, model_kwargs={"pretrained": True})
    with torch.no_grad():
        expected = original(IMAGES) if "timm" in kind else logits(original, IMAGES)
        assert close(expected, module.net.eval()(IMAGES))
    assert bool(hub.requests) == ("hub" in kind)
    stored = module.hparams["model"], json.dumps(dict(module.hparams["model_kwargs"]))
    assert stored[0] == ("vit_tiny_patch16_224" if "timm" in kind else "VisionTransformer")
    assert "me/small" not in stored[1]
    assert str(tmp_path) not in stored[1]

    saved(module, tmp_path / "last.ckpt")
    unreachable(monkeypatch, tmp_path, folder)
    hub.requests.clear()
    loaded = CompressibleClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    net: Any = loaded.net.eval()
    assert torch.equal(net(IMAGES), module.net(IMAGES))
    assert net.class_names == NAMES
    fields = preprocessing_for(net)
    assert (fields["mean"], fields["std"], fields["height"]) == ([0.5] * 3, [0.25] * 3, 32)
    assert (fields["resize"], fields["crop_mode"]) == ((40, "center") if "timm" in kind else (32, "squash"))
    quantized = quantize(net, [IMAGES], method="max")
    engine = accel.load(export(quantized, tmp_path / "small.safetensors"), threads=1)
    assert engine.classes == NAMES
    assert accel.Preprocess.of(engine).resize == fields["resize"]
    rebuild(quantized.to_program().origin)
    assert hub.requests == []


def test_other_arguments_adapt_the_weights_as_timm_does(tmp_path: Path) -> None:
    hugging_folder(tmp_path / "vit")
    network: Any = create_model(f"hf:{tmp_path / 'vit'}", pretrained=True, num_classes=5, img_size=48, in_chans=1)
    assert network(torch.zeros(1, 1, 48, 48)).shape == (1, 5)
    assert not hasattr(network, "class_names")
    assert "pretrained_cfg" not in network.creation["kwargs"]  # its mean and std are those of three channels
    same: Any = create_model(f"hf:{tmp_path / 'vit'}", pretrained=True)
    assert torch.equal(network.patch_embed.proj.weight.sum(1), same.patch_embed.proj.weight.sum(1))
    assert torch.equal(network.blocks[0].attn.qkv.weight, same.blocks[0].attn.qkv.weight)
    hugging_folder(tmp_path / "swin", "SwinModel")
    larger: Any = create_model(f"hf:{tmp_path / 'swin'}", pretrained=True, img_size=64)
    assert larger(torch.zeros(1, 3, 64, 64)).shape == (1, 32)
    assert preprocessing_for(larger)["height"] == 64


def test_without_pretrained_the_weights_are_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = hugging_folder(tmp_path / "vit")
    network: Any = create_model(f"hf:{tmp_path / 'vit'}").eval()
    assert not close(logits(original, IMAGES), network(IMAGES))
    assert network.class_names == NAMES
    timm_folder(tmp_path / "timm")
    other: Any = create_model(f"local-dir:{tmp_path / 'timm'}", checkpoint_path=tmp_path / "timm/model.safetensors")
    known: Any = create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert torch.equal(other.head.weight, known.head.weight)


@pytest.mark.parametrize("options", [{"pretrained": True}, {"weights": "IMAGENET1K_V1"}])
def test_torchvision(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def builder(*, weights: Any = None) -> torchvisions.SwinTransformer:
        asked.append(weights)
        return lively(swin(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1] * 4, window_size=[7, 7], num_classes=1000))

    monkeypatch.setattr(torchvisions, "get_model_builder", lambda name: builder)
    network: Any = create_model("torchvision:swin_t", **options)
    assert asked == [torchvisions.Swin_T_Weights.IMAGENET1K_V1]
    assert network.class_names[:2] == ("tench", "goldfish")
    assert preprocessing_for(network)["resize"] == 232
    assert network.creation["name"] == "SwinTransformer"
    again: Any = rebuild({"network": network.creation})
    assert preprocessing_for(again) == preprocessing_for(network)
    asked.clear()
    create_model("torchvision:swin_t", num_classes=4)
    assert asked == [None]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("hub:me/x", ValueError, "hub:me/x: unknown source 'hub'; there are hf-hub:OWNER/NAME"),
        ("hf:", ValueError, "nothing follows 'hf'"),
        ("torchvision:swin_tt", ValueError, "torchvision .* has no such model; these are converted: swin_b"),
        ("torchvision:resnet18", UnsupportedNetworkError, "torchvision:resnet18: .*ResNet: to_timm has no conversion"),
        ("local-dir:/nowhere", FileNotFoundError, "/nowhere is no folder; give one with config.json"),
        ("hf:/nowhere", FileNotFoundError, "/nowhere is no folder"),
        ("hf-hub:a/b/c", ValueError, "'a/b/c' is no repository; give OWNER/NAME"),
        ("hf:a//b", ValueError, "is no repository"),
    ],
)
def test_names_that_lead_nowhere(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        create_model(name, pretrained=True)


def test_repositories_that_are_missing_or_out_of_reach(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = ("hf-hub", "hf") if find_spec("transformers") else ("hf-hub",)
    for source in sources:
        with pytest.raises(ValueError, match=rf"{source}:me/none: config.json cannot be fetched: the Hub has no such"):
            create_model(f"{source}:me/none", pretrained=True)
    hub.repositories["me/empty"] = {}
    with pytest.raises(ValueError, match=r"the repository has no such file"):
        create_model("hf-hub:me/empty")
    timm_folder(tmp_path / "timm")
    (tmp_path / "timm" / "model.safetensors").unlink()
    hub.add("me/bare", tmp_path / "timm")
    with pytest.raises(ValueError, match=r"hf-hub:me/bare: the weights cannot be fetched: the repository has no such"):
        create_model("hf-hub:me/bare", pretrained=True)
    unreachable(monkeypatch, tmp_path)
    for source in sources:
        with pytest.raises(ConnectionError, match=rf"{source}:me/x: config.json cannot be fetched .*go online once"):
            create_model(f"{source}:me/x")


def test_configurations_of_another_library(hub: Hub, tmp_path: Path) -> None:
    timm_folder(tmp_path / "timm")
    hugging_folder(tmp_path / "vit")
    with pytest.raises(
        ValueError, match=r"has no 'model_type'; .*for a network of timm give hf-hub:OWNER/NAME or local"
    ):
        create_model(f"hf:{tmp_path / 'timm'}")
    with pytest.raises(ValueError, match=r"has no 'architecture'; .*for a network of transformers give hf:OWNER/NAME"):
        create_model(f"local-dir:{tmp_path / 'vit'}")
    hub.add("me/vit", tmp_path / "vit")
    with pytest.raises(ValueError, match=r"hf-hub:me/vit: its config.json has no 'architecture'; .*hf:OWNER/NAME"):
        create_model("hf-hub:me/vit")


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_folders_with_something_wrong(tmp_path: Path) -> None:
    timm_folder(tmp_path / "timm")
    config = tmp_path / "timm" / "config.json"
    _edit(config, label_names=["cat", "dog"])
    with pytest.raises(ValueError, match=r"its configuration has 2 label_names for num_classes=3; give one name per"):
        create_model(f"local-dir:{tmp_path / 'timm'}")
    _edit(config, label_names={"10": "b", "2": "a", "11": "c"})
    named: Any = create_model(f"local-dir:{tmp_path / 'timm'}")
    assert named.class_names == ("a", "b", "c")
    _edit(config, architecture="no_such_model")
    with pytest.raises(ValueError, match=r"its architecture 'no_such_model' is no model of timm"):
        create_model(f"local-dir:{tmp_path / 'timm'}")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        create_model(f"local-dir:{tmp_path / 'timm'}")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"timm has no config.json"):
        create_model(f"local-dir:{tmp_path / 'timm'}")
    timm_folder(tmp_path / "timm")
    with pytest.raises(ValueError, match=r"has its own pretrained_cfg"):
        create_model(f"local-dir:{tmp_path / 'timm'}", pretrained_cfg={"num_classes": 3})


def test_networks_of_transformers_with_something_wrong(tmp_path: Path) -> None:
    hugging_folder(tmp_path / "vit")
    config = tmp_path / "vit" / "config.json"
    _edit(config, id2label={"0": "cat", "1": "dog"})
    with pytest.raises(ValueError, match=r"hf:.*vit: .*classifier.bias \(3,\) instead of \(2,\)"):
        create_model(f"hf:{tmp_path / 'vit'}", pretrained=True)
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"hf:.*vit: the weights are damaged .*fetch them again"):
        create_model(f"hf:{tmp_path / 'vit'}", pretrained=True)
    _edit(config, id2label=dict(enumerate(NAMES)), architectures=["BeitForImageClassification"])
    with pytest.raises(UnsupportedNetworkError, match=r"hf:.*BeitForImageClassification: to_timm has no conversion"):
        create_model(f"hf:{tmp_path / 'vit'}", pretrained=True)
    _edit(config, architectures=["NoSuchNetwork"])
    with pytest.raises(ValueError, match=r"architectures=\['NoSuchNetwork'\] and model_type='vit'"):
        create_model(f"hf:{tmp_path / 'vit'}", pretrained=True)
    hugging_folder(tmp_path / "dino", "Dinov2ForImageClassification")
    with pytest.raises(ValueError, match=r"its head reads the class token beside the mean"):
        create_model(f"hf:{tmp_path / 'dino'}", pretrained=True)
    hugging_folder(tmp_path / "model", "ViTModel")
    _edit(tmp_path / "model" / "config.json", architectures=["ViTForImageClassification"])
    with pytest.raises(
        ValueError, match=r"its weights are not those of the ViTForImageClassification.*classifier.bias"
    ):
        create_model(f"hf:{tmp_path / 'model'}", pretrained=True)
    _edit(tmp_path / "model" / "config.json", architectures=["ViTModel"])
    assert create_model(f"hf:{tmp_path / 'model'}", pretrained=True)(IMAGES).shape == (6, 32)  # without the pooler


def test_an_unknown_preprocessing_is_said_to_be_unknown(tmp_path: Path) -> None:
    hugging_folder(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match=r"how its images are prepared is not known"):
        network = create_model(f"hf:{tmp_path / 'vit'}", pretrained=True)
    with pytest.raises(ValueError, match=r"nothing says how the images are normalized"):
        quantize(network, [IMAGES], method="max")


@pytest.mark.parametrize("source", ["hf", "local-dir"])
def test_a_folder_that_may_not_be_read(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    hugging_folder(folder) if source == "hf" else timm_folder(folder)
    refuse(monkeypatch, "read_bytes")
    with pytest.raises(PermissionError, match=rf"{source}:.*locked/config.json cannot be read .*give read access"):
        create_model(f"{source}:{folder}", pretrained=True)
    monkeypatch.undo()
    monkeypatch.setattr("safetensors.safe_open", denied)
    monkeypatch.setattr("safetensors.torch.load_file", denied)
    if source == "hf":
        monkeypatch.setattr("transformers.modeling_utils.safe_open", denied)
    with pytest.raises(PermissionError, match=rf"{source}:.*locked: the weights cannot be read .*give read access"):
        create_model(f"{source}:{folder}", pretrained=True)


def denied(path: Any, *_: Any, **__: Any) -> Any:
    raise PermissionError(13, "Permission denied", str(path))


def refuse(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Lets the system refuse to read, as it does not refuse the superuser."""
    monkeypatch.setattr(Path, method, denied)


def saved(module: CompressibleClassifier, file: Path) -> Path:
    """The checkpoint that a Trainer writes of a module."""
    trainer = Trainer(logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(file)
    return file


def test_a_stored_name_is_never_fetched(tmp_path: Path) -> None:
    timm_folder(tmp_path / "timm")
    module = CompressibleClassifier(f"local-dir:{tmp_path / 'timm'}", num_classes=3)
    content = torch.load(saved(module, tmp_path / "last.ckpt"), weights_only=True)
    content["hyper_parameters"]["model"] = f"local-dir:{tmp_path / 'timm'}"
    torch.save(content, tmp_path / "forged.ckpt")
    with pytest.raises(ValueError, match=r"names a place, and a stored network is never fetched"):
        CompressibleClassifier.load_from_checkpoint(tmp_path / "forged.ckpt")


def test_weights_and_a_file_contradict_each_other(tmp_path: Path) -> None:
    for options in ({"pretrained": True}, {"weights": "IMAGENET1K_V1"}):
        with pytest.raises(ValueError, match=r"are both given; choose one"):
            create_model("torchvision:swin_t", checkpoint_path=tmp_path / "w.pth", **options)
    with pytest.raises(ValueError, match=r"there are no weights 'V3'; choose one of IMAGENET1K_V1"):
        create_model("torchvision:swin_t", weights="V3")


def test_transformers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"hf:me/x: transformers cannot be imported .*pip install transformers"):
        create_model("hf:me/x")

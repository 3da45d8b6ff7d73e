"""What stands in a checkpoint or an artifact makes no request and reads no file when a network is built of it."""

from __future__ import annotations

import json
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from lightning import Trainer

from swincompress_pl import accel
from swincompress_pl.cli import main
from swincompress_pl.models import CompressibleClassifier, create_model, rebuild
from swincompress_pl.models.factory import recreate_model
from swincompress_pl.models.stored_arguments import checked_creation, storable
from swincompress_pl.quant import quantize

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
NAME = "deit_tiny_patch16_224"  # timm has weights of it to fetch


class Requests(list[str]):
    """What was asked of the server at `url`, and of the functions that fetch."""

    url = ""


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    made = Requests()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815  # as http.server calls it

        def log_message(self, *arguments: Any) -> None:
            pass

    def noting(name: str, call: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            made.append(f"{name}{arguments}")
            if name == "urlopen" and made.url in str(getattr(arguments[0], "full_url", arguments[0])):
                return call(*arguments, **options)
            raise OSError("no network in this test")

        return noted

    server = HTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(urllib.request, "urlopen", noting("urlopen", urllib.request.urlopen))
    monkeypatch.setattr("torch.hub.urlopen", urllib.request.urlopen)
    for module in (huggingface_hub, timm.models._hub):
        monkeypatch.setattr(module, "hf_hub_download", noting("hf_hub_download", None))
    yield made
    server.shutdown()
    server.server_close()


def dangerous(url: str, folder: Path) -> dict[str, dict[str, Any]]:
    file = str(folder / "none.pth")
    return {
        "pretrained": {"pretrained": True},
        "one": {"pretrained": 1},
        "URL": {"pretrained": True, "pretrained_cfg": {"url": url, "num_classes": 4}},
        "overlay": {"pretrained": True, "pretrained_cfg_overlay": {"url": url}},
        "file": {"pretrained": True, "pretrained_cfg_overlay": {"file": file}},
        "hub": {"pretrained": True, "pretrained_cfg": {"hf_hub_id": "timm/vit", "hf_hub_filename": "a.bin"}},
        "path": {"checkpoint_path": file},
        "path as URL": {"checkpoint_path": url},
        "cache": {"pretrained": True, "cache_dir": str(folder)},
        "model arguments": {"pretrained": True, "pretrained_model_args": {"img_size": 8}},
    }


CASES = list(dangerous("", Path()))


def test_the_server_counts(requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for source in ({"url": requests.url}, {"hf_hub_id": "timm/vit"}):
        with pytest.raises((OSError, RuntimeError)):  # whatever timm makes of a failed download
            create_model(NAME, pretrained=True, pretrained_cfg_overlay={"url": "", "hf_hub_id": "", **source})
    assert "/weights.pth" in requests
    assert any(each.startswith("hf_hub_download") for each in requests)


@pytest.mark.parametrize("case", CASES)
def test_a_stored_creation_fetches_nothing(requests: Requests, tmp_path: Path, case: str) -> None:
    creation = {"name": NAME, "kwargs": {**VIT, "num_classes": 4, **dangerous(requests.url, tmp_path)[case]}}
    with pytest.warns(UserWarning, match="nothing is fetched"):
        network = recreate_model(creation)
    with pytest.warns(UserWarning, match="nothing is fetched"):
        again = rebuild({"network": creation, "history": []})
    assert not requests
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    kept = network.creation["kwargs"]
    assert kept == again.creation["kwargs"]
    assert {key: kept[key] for key in VIT} == VIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recreate_model(network.creation)  # what is stored now is clean


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_fetches_nothing(requests: Requests, tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    module = CompressibleClassifier(NAME, 4, model_kwargs=VIT)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    stored = dict(dangerous(requests.url, tmp_path)[case])
    saved["hyper_parameters"]["checkpoint_path"] = stored.get("checkpoint_path")
    saved["hyper_parameters"]["model_kwargs"] |= {k: v for k, v in stored.items() if k != "checkpoint_path"}
    torch.save(saved, tmp_path / "c.ckpt")
    with pytest.warns(UserWarning, match="nothing is fetched"):
        back = CompressibleClassifier.load_from_checkpoint(tmp_path / "c.ckpt")
    assert not requests
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in module.state_dict().items())
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        back.load_from_checkpoint(tmp_path / "c.ckpt")


def test_export_load_and_inspect_fetch_nothing(requests: Requests, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create_model("vit", num_classes=4, **VIT)
    network.creation = {"name": NAME, "kwargs": {**VIT, "num_classes": 4, "pretrained": True}}
    pixels = torch.randint(0, 256, (8, 3, 32, 32))
    images = (pixels / 255 - 0.5) / 0.25
    quantized = quantize(network, [images], preprocessing={"mean": [0.5] * 3, "std": [0.25] * 3})
    accel.export(quantized, tmp_path / "a.safetensors")
    engine = accel.load(tmp_path / "a.safetensors")
    engine(pixels[:1].permute(0, 2, 3, 1).to(torch.uint8).numpy())
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    with pytest.warns(UserWarning, match="nothing is fetched"):
        rebuild(quantized.to_program().origin)
    assert not requests


def test_the_command_line_fetches_nothing(requests: Requests, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(CompressibleClassifier(NAME, 10, model_kwargs=VIT))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
    saved["hyper_parameters"]["model_kwargs"] |= {"pretrained": True, "pretrained_cfg_overlay": {"url": requests.url}}
    torch.save(saved, tmp_path / "c.ckpt")
    config = {
        "model": {"class_path": "CompressibleClassifier", "init_args": {"model": "vit", "num_classes": 10}},
        "data": {"class_path": "Digits", "init_args": {"batch_size": 32, "holdout": 60}},
        "trainer": {"accelerator": "cpu", "logger": False, "limit_test_batches": 1, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="nothing is fetched"):
        assert main(["test", "-c", str(tmp_path / "c.yaml"), "--ckpt_path", str(tmp_path / "c.ckpt")]) == 0
    assert not requests


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/vit", "local-dir:/tmp/x", "http://127.0.0.1/vit", "../vit", NAME + ".a/b", 3, None]
)
def test_names_of_places_are_refused(requests: Requests, name: Any) -> None:
    with pytest.raises(ValueError, match="the stored description of the network"):
        recreate_model({"name": name, "kwargs": {}})
    assert not requests


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights_url", "x"),
        ("hub_id", "x"),
        ("model_file", 1),
        ("pretrained_filter_fn", "x"),
        ("state_dict", {}),
        ("a b", 1),
        (3, 1),
        ("norm_layer", "http://127.0.0.1/x"),
        ("act_layer", "timm/vit"),
        ("global_pool", "..\\x"),
        ("pretrained_cfg", "hf-hub:timm/vit"),
        ("pretrained_cfg_overlay", {"mean": ["file:///x"]}),
        ("depths", [[["a/b"]]]),
        ("depths", {"url": 3}),
        ("depths", json.loads("[" * 50 + "]" * 50)),
        ("embed_dim", float("nan")),
        ("norm_layer", torch.nn.LayerNorm),
    ],
)
def test_only_data_may_stand_there(key: Any, value: Any) -> None:
    for check in (
        lambda kwargs: storable("vit", kwargs),
        lambda kwargs: checked_creation({"name": "vit", "kwargs": kwargs}),
    ):
        with pytest.raises(ValueError, match=r"vit: .*" + str(key)):
            check({key: value})


@pytest.mark.parametrize("creation", [None, [], {}, {"name": "vit"}, {"name": "vit", "kwargs": [1]}])
def test_descriptions_that_are_none(creation: Any) -> None:
    with pytest.raises(ValueError, match="the stored description of the network"):
        recreate_model(creation)


def test_arguments_that_shape_the_network_stay() -> None:
    kwargs = {
        "drop_path_rate": 0.1, "class_token": False, "global_pool": "avg", "norm_layer": "layernorm", "depths": [2, 2],
        "weight_init": "jax_nlhb", "out_indices": [0, 1], "act_layer": "gelu_tanh", "window_size": None,
        "pretrained_cfg": "fb_in1k", "pretrained_cfg_overlay": {"num_classes": 5, "input_size": [3, 32, 32]},
    }  # fmt: skip
    assert storable("vit", kwargs) == kwargs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked_creation({"name": "vit", "kwargs": {**kwargs, "pretrained": False}}) == ("vit", kwargs)


def test_initial_weights_are_not_stored(tmp_path: Path) -> None:
    torch.save(create_model(NAME, num_classes=1000, **VIT).state_dict(), tmp_path / "w.pth")
    sources = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}, "cache_dir": str(tmp_path)}
    network = create_model(NAME, pretrained=True, num_classes=4, **VIT, **sources)
    assert network.creation == {"name": NAME, "kwargs": {"num_classes": 4, **VIT}}

"""Networks in folders and on the Hub: what is saved is what is loaded, here and elsewhere, and cards are valid."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from support.hub_server import Hub, point_at, serving
from torch import nn

import swincompress_pl
from swincompress_pl import accel, hub, quantize
from swincompress_pl.hub import contents
from swincompress_pl.models import CompressibleClassifier, create_model
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.report import Accuracy, Latency, RunRecord, Size

NAMES = ("cat", "dog", "owl")
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
IMAGES = (torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1)) / 255 - 0.5) / 0.25
INPUT = {"mean": [0.5] * 3, "std": [0.25] * 3, "height": 16, "width": 16, "resize": 18, "interpolation": "bilinear"}


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    return create_model("vit", **(SMALL | options)).eval()


def quantized() -> Any:
    return quantize(network(), [IMAGES], method="max", preprocessing=INPUT, classes=NAMES).eval()


def record() -> RunRecord:
    found = RunRecord(name="run", data="Pets, val", environment={"cpu": "A CPU", "cores": 2, "system": "Linux"})
    size = Size(nonzero_bytes=1, indexed_bytes=1, index="1 dense", file_bytes=123456)
    found.add_stage("float", parameters=1000, accuracy=Accuracy(correct=90, images=100))
    found.add_stage(
        "engine",
        size=size,
        accuracy=Accuracy(correct=87, images=100),
        latency_ms={"engine": Latency(samples_ms=(1.5,))},
    )
    found.add_check("engine == reference", True)
    return found


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as server:
        point_at(server.address, tmp_path / "cache", monkeypatch)
        yield server


def test_a_quantized_network_is_loaded_with_all_that_it_had(tmp_path: Path) -> None:
    saved = quantized()
    folder = hub.save_pretrained(saved, tmp_path / "vit", report=record(), license="mit")
    assert sorted(file.name for file in folder.iterdir()) == sorted([*contents.FILES, "config.json"])
    loaded: Any = hub.from_pretrained(folder)
    assert not loaded.training
    assert torch.equal(loaded(IMAGES), saved(IMAGES))
    assert (loaded.classes, loaded.preprocessing) == (NAMES, saved.preprocessing)
    engine = accel.load(folder / "artifact.safetensors", threads=1)
    pixels = saved.pixels(IMAGES)
    assert engine.classes == NAMES
    assert accel.Preprocess.of(engine).resize == 18
    assert np.array_equal(engine.run_integer(pixels.numpy()), saved.integer_logits(pixels).numpy())
    config = json.loads((folder / "config.json").read_text())
    assert (config["label_names"], config["num_classes"]) == (list(NAMES), 3)
    assert config["preprocessing"]["resize"] == 18
    assert RunRecord.load(folder).data == "Pets, val"
    again = hub.save_pretrained(loaded, tmp_path / "again", report=folder, license="mit", name="vit")
    for name in contents.FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_pruned_float_network_is_loaded_with_what_was_done_to_it(tmp_path: Path) -> None:
    saved = network()
    apply_plan(saved, PruningPlan(kept={"blocks.0.mlp.channels": range(40)}))
    folder = hub.save_pretrained(saved, tmp_path / "vit", preprocessing=INPUT, class_names=NAMES)
    assert not (folder / "artifact.safetensors").exists()
    loaded: Any = hub.from_pretrained(str(folder))
    assert torch.equal(loaded(IMAGES), saved(IMAGES))
    assert loaded.compression_history == saved.compression_history
    program = quantize(loaded, [IMAGES], method="max").to_program()
    assert (program.classes, program.input.preprocessing["resize"]) == (NAMES, 18)


@pytest.mark.parametrize("report", [None, record()], ids=["no report", "report"])
@pytest.mark.parametrize("license", [None, "apache-2.0"])
def test_cards_are_valid(license: str | None, report: RunRecord | None, tmp_path: Path, remote: Hub) -> None:
    folder = hub.save_pretrained(
        quantized(), tmp_path / "my_vit", license=license, report=report, base_model="timm/vit_tiny_patch16_224"
    )
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == (license or "other", "swincompress_pl")
    assert card.data.tags == ["swincompress_pl", "vision-transformer", "quantization"]
    assert card.data.base_model == "timm/vit_tiny_patch16_224"
    text = card.text
    assert "# my_vit" in text
    assert ("Not chosen yet" in text) == (license is None)
    assert re.search(r"^\| resize +\| +18 \|$", text, flags=re.MULTILINE)
    if report is None:
        assert "Not measured." in text
        return
    assert "87.00 % [79.02, 92.24], n = 100" in text
    assert "123.5 kB" in text
    assert "Measured on Pets, val. Times are medians with quartiles, on A CPU, 2 cores, Linux." in text
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_type, result.metric_value) == ("Pets, val", "pets-val", 87.0)
    assert card.data.model_name == "my_vit"


def test_names_in_a_card_cannot_become_html(tmp_path: Path) -> None:
    folder = hub.save_pretrained(network(), tmp_path / "vit", name="<script>", class_names=["<b>", "[x](y)", "`"])
    text = (folder / "README.md").read_text().split("---")[2]
    assert "\\<script>" in text
    assert " <b>" not in text
    assert " [x](y)" not in text


def test_a_network_that_is_saved_again_replaces_the_first(tmp_path: Path) -> None:
    folder = hub.save_pretrained(quantized(), tmp_path / "vit", report=record())
    (folder / "mine.txt").write_text("stays")
    hub.save_pretrained(network(), folder)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "mine.txt",
        "network.safetensors",
    ]
    assert type(hub.from_pretrained(folder)).__name__ == "VisionTransformer"
    (folder / "README.md").write_text("my own words")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"README.md was edited, and stays"):
            hub.save_pretrained(quantized(), folder)
        assert (folder / "README.md").read_text() == "my own words"


def test_a_save_that_is_interrupted_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: Hub
) -> None:
    folder = hub.save_pretrained(quantized(), tmp_path / "vit")
    other = network()
    with torch.no_grad():
        other.head.bias.add_(1)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("swincompress_pl.hub.folder._write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        hub.save_pretrained(other, folder)
    monkeypatch.undo()
    point_at(remote.address, tmp_path / "cache", monkeypatch)
    with pytest.warns(UserWarning, match=r"network.safetensors is another file than config.json lists"):
        loaded: Any = hub.from_pretrained(folder)
    assert torch.equal(loaded.head.bias, other.head.bias)
    with pytest.raises(
        ValueError, match=r"network.safetensors, artifact.safetensors and config.json are of different saves"
    ):
        hub.push_to_hub(folder, "me/vit")
    assert remote.repositories == {}


def test_published_and_loaded_elsewhere(remote: Hub, tmp_path: Path) -> None:
    saved = quantized()
    folder = hub.save_pretrained(saved, tmp_path / "vit", report=record(), license="mit")
    address = hub.push_to_hub(folder, "me/vit", token="hf_x")
    assert address.startswith(f"{remote.address}/me/vit/commit/")
    assert remote.repositories["me/vit"].keys() == {*contents.FILES, "config.json"}
    shutil.rmtree(folder)
    loaded: Any = hub.from_pretrained("me/vit", cache_dir=tmp_path / "cache")
    assert torch.equal(loaded(IMAGES), saved(IMAGES))
    fetched = [request.rpartition("/")[2] for request in remote.requests if request.startswith("GET me/vit/resolve")]
    assert sorted(fetched) == ["config.json", "network.safetensors"]
    found = hub.download("me/vit", cache_dir=tmp_path / "cache")
    assert accel.load(found / "artifact.safetensors", threads=1).classes == NAMES
    hub.push_to_hub(hub.save_pretrained(network(), tmp_path / "vit"), "me/vit", token="hf_x")
    assert remote.repositories["me/vit"].keys() == {"config.json", "network.safetensors", "README.md"}


def test_an_artifact_is_fetched_without_torch(remote: Hub, tmp_path: Path) -> None:
    remote.add("me/vit", hub.save_pretrained(quantized(), tmp_path / "vit"))
    code = """
import sys
sys.modules["torch"] = sys.modules["lightning"] = None  # importing them fails
from swincompress_pl import accel, hub
engine = accel.load(hub.download("me/vit", cache_dir=sys.argv[1]) / "artifact.safetensors", threads=1)
print(engine.classes)
"""
    environment = {**os.environ, "HF_ENDPOINT": remote.address}
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, ran.stdout.strip()) == (0, str(NAMES)), ran.stderr


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing says how to build this network again; make it with"):
        hub.save_pretrained(nn.Linear(2, 2), tmp_path / "x")
    module = CompressibleClassifier(
        "vit", num_classes=3, model_kwargs={k: v for k, v in SMALL.items() if "cl" not in k}
    )
    with pytest.raises(TypeError, match=r"give the network itself, such as module.net"):
        hub.save_pretrained(module, tmp_path / "x")
    changed = network()
    changed.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match="its arguments would build another network"):
        hub.save_pretrained(changed, tmp_path / "x")
    with pytest.raises(ValueError, match="class_names has 2 names for 3 classes; give one per class"):
        hub.save_pretrained(network(), tmp_path / "x", class_names=["a", "b"])
    with pytest.raises(ValueError, match=r"preprocessing\['mean'\] is .*the network was quantized with"):
        hub.save_pretrained(quantized(), tmp_path / "x", preprocessing=INPUT | {"mean": [0.1] * 3})
    with pytest.raises(FileNotFoundError, match="no record of a run there"):
        hub.save_pretrained(network(), tmp_path / "x", report=tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="it is a file, and a network is saved in a folder"):
        hub.save_pretrained(network(), tmp_path / "file")


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder; give one, or OWNER/NAME"):
        hub.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no config.json of swincompress_pl in it"):
        hub.from_pretrained(tmp_path)
    folder = hub.save_pretrained(network(), tmp_path / "vit")
    config, whole = folder / "config.json", (folder / "network.safetensors").read_bytes()
    (folder / "network.safetensors").write_bytes(whole[:-100])
    with (
        pytest.warns(UserWarning, match="another file than"),
        pytest.raises(ValueError, match=r"network.safetensors: damaged .*fetch it again"),
    ):
        hub.from_pretrained(folder)
    (folder / "network.safetensors").write_bytes(whole)
    original = config.read_text()
    for text, message in (
        ("{", "not JSON"),
        ('{"architecture": "vit"}', "not of swincompress_pl; models.create_model takes networks of timm"),
        (original.replace('"format": 1', '"format": 9'), "format 9, this version reads 1; update swincompress_pl"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            hub.from_pretrained(folder)
    config.write_text(original)

    def denied(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("safetensors.safe_open", denied)
    with pytest.raises(PermissionError, match=r"network.safetensors: cannot be read .*give read access"):
        hub.from_pretrained(folder)
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(PermissionError, match=r"config.json: cannot be read .*give read access"):
        hub.from_pretrained(folder)


def test_repositories_out_of_reach(remote: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.save_pretrained(network(), tmp_path / "vit")
    with pytest.raises(
        ValueError, match=r"me/none: cannot be fetched .*the Hub has no such repository, or it is private"
    ):
        hub.from_pretrained("me/none")
    with pytest.raises(ValueError, match="repository is 'none'; give OWNER/NAME"):
        hub.push_to_hub(folder, "none")
    remote.refusing = 403
    with pytest.raises(PermissionError, match=r"me/vit: cannot be published .*the token has no right .*HTTP 403"):
        hub.push_to_hub(folder, "me/vit", token="hf_x")
    point_at("http://127.0.0.1:1", tmp_path / "empty", monkeypatch)
    with pytest.raises(ConnectionError, match=r"me/vit: cannot be fetched from the Hugging Face Hub"):
        hub.from_pretrained("me/vit")
    with pytest.raises(ConnectionError, match=r"me/vit: cannot be published"):
        hub.push_to_hub(folder, "me/vit", token="hf_x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        hub.from_pretrained("me/vit")


def test_the_room_shows_its_four_names() -> None:
    assert dir(hub) == sorted(hub.__all__) == ["download", "from_pretrained", "push_to_hub", "save_pretrained"]
    assert swincompress_pl.hub is hub
    with pytest.raises(AttributeError, match="has no attribute 'pull'"):
        _ = hub.pull

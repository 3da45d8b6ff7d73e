"""What was changed on a network after it was made and has no key: it comes back, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callback_cases import greedy, make_trainer, vit
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swincompress_pl import accel
from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.checkpoint.record import CHECKPOINT_KEY
from swincompress_pl.models import CompressibleClassifier, create_model, rebuild
from swincompress_pl.models.changes import changes_since_creation
from swincompress_pl.pruning import PruningPlan, apply_plan
from swincompress_pl.quant import quantize
from swincompress_pl.registry import adapter_for
from swincompress_pl.structure import describe, differences, set_attributes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
KWARGS = {"vit": VIT, "swin": SWIN}
Change = Callable[[Any], object]


def images() -> Tensor:
    pixels = torch.randint(0, 256, (16, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    return (pixels / 255 - 0.5) / 0.25


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(images(), torch.arange(16) % 3), 8)


def set_eps(network: Any) -> None:
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2


def with_prefix(network: Any) -> None:
    network.global_pool, network.pool_include_prefix = "avg", True


def fewer_heads(network: Any) -> None:
    network.blocks[0].attn.num_heads, network.blocks[0].attn.head_dim = 2, 16


def relu(network: Any) -> None:
    network.blocks[1].mlp.act = nn.ReLU()


RESTORED: dict[str, tuple[str, Change]] = {
    "reset_classifier": ("vit", lambda net: net.reset_classifier(3, global_pool="avg")),
    "global_pool": ("vit", lambda net: setattr(net, "global_pool", "avg")),
    "pool_include_prefix": ("vit", with_prefix),
    "eps": ("vit", set_eps),
    "scale": ("vit", lambda net: setattr(net.blocks[0].attn, "scale", 0.5)),
    "num_heads, pruned afterwards": ("vit", fewer_heads),
    "shift_size": ("swin", lambda net: setattr(net.layers[0].blocks[1], "shift_size", (0, 0))),
    "eps of a Swin": ("swin", set_eps),
}
REFUSED: dict[str, tuple[str, Change, str]] = {
    "activation": ("vit", relu, "blocks.1.mlp.act is ReLU and was GELU"),
    "no activation": ("vit", lambda n: setattr(n.blocks[0].mlp, "act", nn.Identity()), "act is Identity and was GELU"),
    "classes": ("vit", lambda net: net.reset_classifier(5), r"head.weight is \[5, 32\] and was \[3, 32\]"),
    "head": ("vit", lambda n: setattr(n, "head", nn.Sequential(nn.Linear(32, 3))), "head.weight is not there"),
    "block": ("vit", lambda net: setattr(net, "blocks", net.blocks[:1]), r"blocks.1.norm1.weight is not there"),
    "pooling": ("swin", lambda net: net.reset_classifier(3, "max"), "head.global_pool.pool is FastAdaptiveMaxPool"),
}


def classifier(model: str = "vit", kind: type[CompressibleClassifier] = CompressibleClassifier) -> Any:
    torch.manual_seed(0)
    return kind(model, 3, model_kwargs=KWARGS[model])


def fit(module: Any, path: Path, *callbacks: Any) -> Path:
    keep = ModelCheckpoint(path.parent, path.stem)
    make_trainer(path.parent, 1, *callbacks, keep).fit(module, loader(), loader())
    return path


def same_answers(one: Any, other: Any) -> bool:
    with torch.no_grad():
        return torch.equal(one.eval()(images()), other.eval()(images()))


def stored(module: Any) -> dict[str, Any]:
    """What a checkpoint of `module` holds."""
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(getattr(module, "hparams", {}))}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def loaded(module: Any, checkpoint: dict[str, Any]) -> Any:
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module


@pytest.mark.parametrize("name", RESTORED)
def test_a_changed_attribute_comes_back(name: str) -> None:
    model, change = RESTORED[name]
    module = classifier(model)
    change(module.net)
    changes_since_creation(module.net)  # as the start of a fit does
    groups = adapter_for(module.net).groups(module.net)
    group = next(group for group in groups if group.name.endswith("heads"))
    apply_plan(module.net, PruningPlan.removing(groups, {group.name: [0]}))
    restored = loaded(classifier(model), stored(module))
    assert same_answers(restored, module)
    assert same_answers(loaded(classifier(model), stored(restored)), module)


def test_a_changed_attribute_comes_back_after_a_fit(tmp_path: Path) -> None:
    module = classifier()
    fewer_heads(module.net)
    path = fit(module, tmp_path / "x.ckpt", greedy(round_to=1))
    assert same_answers(CompressibleClassifier.load_from_checkpoint(path, weights_only=True), module)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_attribute_brings_back_is_refused_before_the_fit_and_when_saving(tmp_path: Path, name: str) -> None:
    model, change, message = REFUSED[name]
    module = classifier(model)
    trainer = make_trainer(tmp_path, 1, greedy())
    change(module.net)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader(), loader())
    with pytest.raises(ValueError, match=f"{message}.*model_kwargs"):
        module.on_save_checkpoint({"state_dict": module.state_dict()})


def test_another_state_of_the_attribute_is_refused_when_a_fit_is_resumed(tmp_path: Path) -> None:
    path = fit(classifier(), tmp_path / "x.ckpt")
    changed = classifier()
    changed.net.global_pool = "avg"
    with pytest.raises(ValueError, match="global_pool is 'token' there and 'avg' here"):
        make_trainer(tmp_path, 2).fit(changed, loader(), loader(), ckpt_path=path)


class Changing(CompressibleClassifier):
    """Makes its changes in its own constructor, so that loading makes them too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        relu(self.net)
        set_eps(self.net)
        self.net.head = nn.Sequential(nn.Dropout(), nn.Linear(32, 3))


def test_a_subclass_may_change_its_network_itself() -> None:
    module = classifier(kind=Changing)
    assert same_answers(loaded(classifier(kind=Changing), stored(module)), module)
    with pytest.raises(ValueError, match=r"eps is 0\.01 there and 1e-06 here"):
        classifier().on_load_checkpoint(stored(module))


class Mine(CompressionMixin, LightningModule):
    """A user's own module, which builds its network itself."""

    change: Change = staticmethod(lambda network: None)
    build: Callable[[], nn.Module] = staticmethod(vit)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = type(self).build()
        type(self).change(self.net)

    def forward(self, batch: Tensor) -> Tensor:
        answer: Tensor = self.net(batch)
        return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.reset_classifier(3, global_pool="avg"), "global_pool is 'avg' there and 'token' here"),
        (set_eps, "blocks.0.norm1.eps is 0.01 there and 1e-06 here, and 4 more"),
        (relu, "blocks.1.mlp.act is 'ReLU' there and 'GELU' here"),
        (
            lambda net: setattr(net, "blocks", nn.Sequential(*net.blocks, nn.ReLU())),
            "blocks.2 is 'ReLU' there",
        ),
    ],
)
def test_a_network_of_one_s_own_is_compared_when_it_is_loaded(change: Change, message: str) -> None:
    module = Mine()
    change(module.net)
    checkpoint = stored(module)
    with pytest.raises(ValueError, match=message):
        Mine().on_load_checkpoint(checkpoint)
    other = Mine()
    change(other.net)
    other.on_load_checkpoint(checkpoint)
    del checkpoint[CHECKPOINT_KEY]["structure"]  # as files of version 0.1 are
    Mine().on_load_checkpoint(checkpoint)


def test_what_changes_no_answer_in_evaluation_may_differ() -> None:
    more = {**VIT, "drop_path_rate": 0.3, "proj_drop_rate": 0.1, "weight_init": "moco"}
    other = CompressibleClassifier("vit", 3, model_kwargs=more)
    other.net.set_grad_checkpointing(True)
    assert same_answers(loaded(classifier(), stored(other)), other)
    loaded(other, stored(classifier()))


class Counting(VisionTransformer):
    """A subclass of a user's, which counts its calls and says how it pools."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls, self.largest, self.pooling = 0, 0.0, "soft"

    def forward(self, images: Tensor) -> Tensor:
        self.calls, self.largest = self.calls + 1, float(images.max())
        answer: Tensor = super().forward(images)
        return answer


def test_counters_of_one_s_own_class_are_not_compared_and_its_words_are() -> None:
    one, other = (Counting(**VIT) for _ in range(2))
    one(images())
    assert list(differences(describe(one), describe(other))) == []
    one.pooling, one.num_prefix_tokens = "hard", 0
    found = [str(difference) for difference in differences(describe(one), describe(other))]
    assert found == ["num_prefix_tokens is 0 there and 1 here", "pooling is 'hard' there and 'soft' here"]


@pytest.mark.parametrize("model", ["vit", "swin"])
def test_compiling_and_running_change_no_description(model: str) -> None:
    network = create_model(model, num_classes=3, **KWARGS[model])
    before = describe(network)
    network(images())
    network.half().eval()
    network = torch.compile(network, backend="eager")
    assert describe(network) == before == json.loads(json.dumps(before))


def test_an_artifact_s_origin_has_the_changes_or_no_network(tmp_path: Path) -> None:
    preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3}
    network = create_model("vit", num_classes=3, **VIT)
    network.reset_classifier(3, global_pool="avg")
    quantized = quantize(network, [images()], method="max", preprocessing=preprocessing)
    accel.export(quantized, tmp_path / "x.safetensors")
    origin = accel.load(tmp_path / "x.safetensors", threads=1).program.origin
    rebuilt = rebuild(origin)
    rebuilt.load_state_dict(network.state_dict())
    assert same_answers(rebuilt, network)
    assert changes_since_creation(rebuilt) == {"": {"global_pool": "avg"}}
    network = create_model("vit", num_classes=3, **VIT)
    network.head = nn.Sequential(nn.Dropout(), nn.Linear(32, 3))
    quantized = quantize(network, [images()], method="max", preprocessing=preprocessing)
    with pytest.raises(ValueError, match="does not say how its network was created"):
        rebuild(quantized.to_program().origin)


@pytest.mark.parametrize(
    "attributes",
    [{"": {"forward": "x"}}, {"": {"global_pool": 3}}, {"nowhere": {"eps": 1.0}}, {"": {"T": 2}}, {"": 3}, [1]],
)
def test_stored_attributes_that_the_network_does_not_have_are_refused(attributes: Any) -> None:
    with pytest.raises(ValueError, match="damaged"):
        set_attributes(vit(), attributes)


def test_weights_that_torch_computes_are_those_of_their_names() -> None:
    network = create_model("VisionTransformer", num_classes=3, **VIT)
    torch.nn.utils.prune.l1_unstructured(network.blocks[0].mlp.fc1, "weight", amount=0.5)
    torch.nn.utils.parametrizations.weight_norm(network.blocks[1].mlp.fc1)
    assert changes_since_creation(network) == {}
    torch.nn.utils.prune.l1_unstructured(network.blocks[1].mlp.fc2, "weight", amount=0.5)
    network.blocks[1].mlp.fc2.weight_mask = network.blocks[1].mlp.fc2.weight_mask[:, :8]
    del network.blocks[1].mlp.fc2.weight
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc2.weight is not there"):
        changes_since_creation(network)

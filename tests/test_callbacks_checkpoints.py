"""Every way in which the checkpoint of a pruned network is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from support.callback_cases import Plain, Restorable, assert_same_state, greedy, loader, make_trainer, vit
from torch import Tensor, nn

from swincompress_pl.callbacks import AdaptiveIterativePruning
from swincompress_pl.checkpoint.hooks import CompressionMixin
from swincompress_pl.models import CompressibleClassifier
from swincompress_pl.pruning.structure.weight_masks import masked_parameters

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def _classifier() -> CompressibleClassifier:
    torch.manual_seed(0)
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return CompressibleClassifier("vit_tiny_patch16_224", 3, kwargs)


class Mine(CompressionMixin, LightningModule):
    """A user's own module with the mixin and another attribute."""

    model_attribute = "backbone"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = vit()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/top1", (self.backbone(batch[0]).argmax(-1) == batch[1]).float().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/top1", (self.backbone(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("granularity", ["structured", "weight", "2:4"])
@pytest.mark.parametrize(("make", "attribute"), [(_classifier, "net"), (Mine, "backbone"), (Restorable, "net")])
def test_every_way_to_load(tmp_path: Path, make: Any, attribute: str, granularity: str) -> None:
    """weights_only, load_from_checkpoint, test in a fresh trainer without the callback, from more to less pruned."""
    module = make()
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callback = greedy(granularity=granularity, model_attribute=attribute, step=0.25)
    make_trainer(tmp_path, 2, callback, save).fit(module, loader(), loader())
    states = [torch.load(tmp_path / f"epoch={n}.ckpt", weights_only=True)["state_dict"] for n in (0, 1)]
    masks = [key for key in states[1] if key.endswith("weight_mask")]
    assert bool(masks) == (granularity != "structured")
    for n, state in enumerate(states):
        path = tmp_path / f"epoch={n}.ckpt"
        restored = type(module).load_from_checkpoint(path)
        assert_same_state(dict(restored.state_dict()), dict(state))
        network = getattr(restored, attribute)
        assert len(masked_parameters(network)) == len(masks)
        (expected,) = make_trainer(tmp_path, 1).test(restored, loader(), verbose=False)
        fresh = make()
        (found,) = make_trainer(tmp_path, 1).test(fresh, loader(), ckpt_path=path, verbose=False)
        assert found == expected
        assert_same_state(dict(fresh.state_dict()), dict(state))
    # the fitted module is the most pruned: go back to the first and on again
    for n in (0, 1, 0):
        make_trainer(tmp_path, 1).test(module, loader(), ckpt_path=tmp_path / f"epoch={n}.ckpt", verbose=False)
        assert_same_state(dict(module.state_dict()), dict(states[n]))


def test_masks_go_on_after_a_search_that_is_over(tmp_path: Path) -> None:
    """Fine-tuning what was pruned: the masks hold, also in a fit that searches no more."""
    module = Restorable()
    save = ModelCheckpoint(tmp_path, "last")
    first = greedy(granularity="weight", max_rounds=1)
    make_trainer(tmp_path, 2, first, save).fit(module, loader(), loader())
    resumed, callback = Restorable(), greedy(granularity="weight", max_rounds=1)
    make_trainer(tmp_path, 4, callback).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.search_state is not None
    assert callback.search_state.rounds == 1
    masks = masked_parameters(module.net)
    for name, (parameter, mask) in masked_parameters(resumed.net).items():
        assert torch.equal(mask, masks[name][1])
        assert not bool(parameter.detach()[~mask].any())
        assert not torch.equal(parameter, masks[name][0])


def test_masks_hold_in_a_fit_without_the_callback(tmp_path: Path) -> None:
    """Else the zeros would train away and nobody would say so."""
    save = ModelCheckpoint(tmp_path, "masked")
    make_trainer(tmp_path, 1, greedy(granularity="weight", step=0.25), save).fit(Restorable(), loader(), loader())
    module = Restorable.load_from_checkpoint(tmp_path / "masked.ckpt")
    make_trainer(tmp_path, 1).fit(module, loader(), loader())
    masked = masked_parameters(module.net)
    assert masked
    for parameter, mask in masked.values():
        assert not bool(parameter[~mask].any())
        assert bool((~mask).any())


def test_a_subclass_goes_on_with_the_search(tmp_path: Path) -> None:
    class Special(AdaptiveIterativePruning):
        pass

    save = ModelCheckpoint(tmp_path, "first")
    make_trainer(tmp_path, 1, greedy(), save).fit(Plain(), loader(), loader())
    special = Special(tolerance=100.0, step=0.25, max_sparsity=0.75)
    make_trainer(tmp_path, 2, special).fit(Plain(), loader(), loader(), ckpt_path=tmp_path / "first.ckpt")
    assert special.search_state is not None
    assert special.search_state.rounds == 2

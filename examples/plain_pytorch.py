"""Compress a network in a plain PyTorch loop: prune single weights, fine-tune, quantize, fine-tune, save, reload.

$ python examples/plain_pytorch.py
float: 97.50% of 360 test images
pruned, 114,250 -> 51,987: 95.56% of 360 test images
fine-tuned: 96.94% of 360 test images
int8, fine-tuned: 97.22% of 360 test images
reloaded, in the engine: 97.22%
"""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from swincompress_pl import accel, load_network, save_network
from swincompress_pl.data import Digits
from swincompress_pl.models import create_model
from swincompress_pl.pruning import AdaptivePruningConfig, HoldOut, keep_masks, prune
from swincompress_pl.quant import quantize


def new_network() -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return create_model("VisionTransformer", num_classes=10, global_pool="avg", **size)


def train(network: nn.Module, batches: DataLoader, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    keep_masks(optimizer, network)  # pruned weights stay 0; before anything is pruned it does nothing
    network.train()
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)  # another order each epoch; a Trainer calls this itself
        for images, labels in batches:
            cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    network.eval()


@torch.no_grad()
def top1(network: nn.Module, batches: DataLoader) -> str:
    right = torch.cat([network(images).argmax(1) == labels for images, labels in batches])
    return f"{right.float().mean():.2%} of {len(right)} test images"


def main() -> None:
    quick = "--quick" in sys.argv  # one epoch each, to see that it runs
    torch.manual_seed(0)
    data = Digits(augmentation=None)  # any loaders of (images, labels) do
    batches, test = data.train_dataloader(), data.test_dataloader()
    network = new_network()
    train(network, batches, epochs=1 if quick else 60, lr=1e-3)
    print("float:", top1(network, test))

    search = AdaptivePruningConfig(tolerance=2.0, granularity="weight", step=0.2, min_step=0.1, max_rounds=4)
    found = prune(network, HoldOut.from_batches(data.holdout_dataloader()), search)
    print(f"pruned, {found.state.baseline_parameters:,} -> {found.steps[-1].parameters:,}:", top1(network, test))
    train(network, batches, epochs=1 if quick else 10, lr=3e-4)
    print("fine-tuned:", top1(network, test))

    quantized = quantize(network, batches, preprocessing=data.preprocessing.to_dict(), classes=data.class_names)
    train(quantized, batches, epochs=1 if quick else 5, lr=1e-4)
    print("int8, fine-tuned:", top1(quantized, test))

    save_network(quantized, "plain_pytorch.ckpt")
    again = load_network(new_network(), "plain_pytorch.ckpt")  # in another process, say
    engine = accel.load(accel.export(again, "plain_pytorch.safetensors"))
    right = [engine(pixels).argmax(1) == labels for pixels, labels in data.uint8_batches("test")]
    print(f"reloaded, in the engine: {sum(map(sum, right)) / sum(map(len, right)):.2%}")


if __name__ == "__main__":
    main()

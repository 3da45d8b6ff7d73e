"""What layers read and give in a pass over images, and how much the network's answers feel it.

An error e of what a layer gives moves the answers by (g e)^2 / 2 nats on average, where g is a random gradient whose
second moment is the Fisher information (Martens & Grosse, 2015). So an error where g is small costs little: in most
tokens of a last block, or where a neuron is saturated.

g is that of sum_c v_c logit_c with v = sqrt(p) z - p (sqrt(p) z), p the answers and z signs by chance. It has the same
second moment as the gradient of the log-probability of a class drawn from p. That is next to nothing for most confident
images and large for a few, which takes more images to average out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swincompress_pl.evaluation_mode import gradients
from swincompress_pl.pruning.compensation.moments import CalibrationError
from swincompress_pl.pruning.compensation.readers import Predict

Take = Callable[[nn.Module, Tensor, Tensor | None, int], None]
"""(layer, what it read, the gradient of what it gave, or None if the answers have none there, number of images)"""

_IMAGES_AT_ONCE = 8  # with gradients, which keep what all layers gave


def run_watched(
    network: nn.Module, images: Tensor, watched: Mapping[str, Take], predict: Predict, draw: torch.Generator | None
) -> None:
    """Runs images (N, ...), and calls `watched[name]` for every call of the layer of that name.

    Args:
        network: The network, in eval mode.
        images: The images.
        watched: {path: function}.
        predict: Runs the network on images.
        draw: Draws the signs; None for no gradients.
    """
    if draw is None or not images.is_floating_point():
        with torch.no_grad(), _calls(network, watched, len(images)):
            predict(network, images)
        return
    for few in images.split(_IMAGES_AT_ONCE):
        with (
            gradients(network.parameters(), wanted=False),
            torch.enable_grad(),
            _calls(network, watched, len(few)) as calls,
        ):
            pixels = few.detach().clone().requires_grad_()
            pulled = _pulled(predict(network, pixels), draw)
            calls.running = False
            if pulled is not None:
                torch.autograd.grad(pulled, pixels, allow_unused=True)


def _pulled(answers: object, draw: torch.Generator) -> Tensor | None:
    """A sum whose gradients are, in the mean square, those of `divergence.distance`; None for answers without any."""
    if not isinstance(answers, Tensor) or not answers.requires_grad or not bool(answers.isfinite().all()):
        return None
    if answers.ndim == 2 and answers.shape[1] > 1:
        parts = answers.detach().double().softmax(1)
        signs = torch.randint(2, answers.shape, generator=draw).to(parts) * 2 - 1
        pull = parts.sqrt() * signs
        return (answers.double() * (pull - parts * pull.sum(1, keepdim=True))).sum()
    return (answers * torch.randn(answers.shape, generator=draw).to(answers)).sum()


@dataclass(eq=False)
class _Calls:
    """The calls of layers that wait for their gradients.

    Attributes:
        images: How many images run.
        waiting: What to tell of each call.
        running: Whether layers are called for the first time.
    """

    images: int
    waiting: dict[int, tuple[Take, nn.Module, Tensor, int]]
    running: bool = True

    def called(self, take: Take, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        if not self.running:
            return  # a part with checkpoints is run again for its gradients
        if not output.requires_grad:
            take(layer, x, None, self.images)
            return
        number = len(self.waiting) + 1
        self.waiting[number] = take, layer, x, x._version
        output.register_hook(lambda gradient: self.arrived(number, gradient))

    def arrived(self, number: int, gradient: Tensor | None) -> None:
        take, layer, x, version = self.waiting.pop(number)
        if x._version != version:
            raise CalibrationError(
                f"calibration: something changes what a {type(layer).__name__} reads in place, after it was read; "
                "let it make a new tensor (no inplace=True)"
            )
        take(layer, x, gradient, self.images)


@contextmanager
def _calls(network: nn.Module, watched: Mapping[str, Take], images: int) -> Iterator[_Calls]:
    calls = _Calls(images, {})
    handles = []
    for name, take in watched.items():

        def called(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor, take: Take = take) -> None:
            calls.called(take, layer, given[0].detach(), output)

        handles.append(network.get_submodule(name).register_forward_hook(called))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    for take, layer, x, _ in calls.waiting.values():
        take(layer, x, None, images)

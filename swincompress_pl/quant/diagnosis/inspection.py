"""What looking into a network needs: it stands still meanwhile, and its figures are printed as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def standing_still(network: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters for a while; after it every module and parameter is as it was."""
    modes = {module: module.training for module in network.modules()}
    frozen = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for module in modes:
        module.training = False
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter in frozen:
            parameter.requires_grad_(True)


def divergence(float_logits: Tensor, logits: Tensor) -> Tensor:
    """(N,) KL divergence of every image's classes from the float ones, in nats, at least 0."""
    expected, found = float_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).clamp(min=0)


def decibels(signal: float, noise: float) -> float | None:
    """10 log10 of signal to noise power; None where there is no noise, or no signal."""
    return 10 * float(torch.tensor(signal / noise, dtype=torch.float64).log10()) if signal > 0 and noise > 0 else None


def show(value: float | None, form: str) -> str:
    """A figure in a table; "-" for None."""
    return "-" if value is None else format(value, form)


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns for a terminal, also valid Markdown; the first column is text, the others are figures."""
    body = [list(header), *map(list, rows)]
    widths = [max(3, *(len(row[column]) for row in body)) for column in range(len(header))]
    rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [body[0], rule, *body[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )

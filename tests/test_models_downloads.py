"""Weights that are fetched are announced first, and a failure is one line with the remedy; no test needs a network."""

from __future__ import annotations

import itertools
import socket
from typing import Any

import pytest
import timm

from swincompress_pl.models import create_model

NAME = "vit_tiny_patch16_224"
WEIGHTS = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k of the Hugging Face Hub"


class ConnectError(Exception):
    """As httpx has it: no OSError."""


def failing(*errors: Exception) -> Any:
    """A builder that fails by the last error, which the ones before caused."""

    def build(*_: Any, **__: Any) -> Any:
        for cause, error in itertools.pairwise(errors):
            error.__cause__ = cause
        raise errors[-1]

    return build


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged for the user."""
    lines: list[str] = []
    monkeypatch.setattr("swincompress_pl.models.downloads.rank_zero_info", lines.append)
    return lines


@pytest.mark.parametrize(
    "errors",
    [
        (socket.gaierror(-2, "Name or service not known"),),
        (
            socket.gaierror(-2, "Name or service not known"),
            ConnectError("x"),
            FileNotFoundError("check your connection"),
        ),
    ],
)
def test_a_failure_names_weights_reason_and_remedy(
    monkeypatch: pytest.MonkeyPatch, told: list[str], errors: tuple[Exception, ...]
) -> None:
    monkeypatch.setattr(timm, "create_model", failing(*errors))
    with pytest.raises(ConnectionError) as caught:
        create_model(NAME, pretrained=True)
    message = str(caught.value)
    assert message.startswith(
        f"{NAME}: the weights {WEIGHTS} cannot be fetched ([Errno -2] Name or service not known); "
    )
    assert "give checkpoint_path" in message
    assert len(told) == 1
    assert told[0].startswith(f"{NAME}: taking the weights {WEIGHTS}, from its cache or the network; to use a file ")


def test_an_error_of_another_library_for_transfers(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    monkeypatch.setattr(ConnectError, "__module__", "httpx")
    monkeypatch.setattr(timm, "create_model", failing(ConnectError("no route")))
    with pytest.raises(ConnectionError, match=r"cannot be fetched \(no route\)"):
        create_model(NAME, pretrained=True)


def test_another_error_passes(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    monkeypatch.setattr(timm, "create_model", failing(RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match=r"^size mismatch$"):
        create_model(NAME, pretrained=True)


@pytest.mark.parametrize("options", [{}, {"pretrained": True, "pretrained_cfg_overlay": {"file": "mine.pth"}}])
def test_nothing_is_announced_where_nothing_is_fetched(
    monkeypatch: pytest.MonkeyPatch, told: list[str], options: dict[str, Any]
) -> None:
    monkeypatch.setattr(timm, "create_model", failing(RuntimeError("not built here")))
    with pytest.raises(RuntimeError, match="not built here"):
        create_model(NAME, **options)
    assert told == []


def test_an_address_is_named(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    monkeypatch.setattr(timm, "create_model", failing(OSError("refused")))
    overlay = {"hf_hub_id": None, "url": "https://example.org/w.pth"}
    with pytest.raises(
        ConnectionError, match=r"the weights at https://example.org/w.pth cannot be fetched \(refused\)"
    ):
        create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)

"""What there is to measure: one job is one network quantized in one way, and one file of results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NETWORKS = ("swin_cifar10", "deit_tiny")
BITS = ("W8A8", "W6A6", "W4A8", "W4A4")
# name -> method and search options of `quant.quantize`; frozen before any test image was looked at. "crops": so many
# random crops of every calibration image are calibrated on beside it, as training would see them. "spare": with the
# images of ImageNet-mini's `train` that are neither calibrated on nor reported (72), too.
WAYS: dict[str, dict[str, Any]] = {
    "affine": {"method": "affine"},
    "max": {"method": "max"},
    "percentile": {"method": "max", "percentile": 99.99},
    "searched": {"method": "searched"},
    "searched, no balance": {"method": "searched", "search": {"equalize": False}},
    "searched, bias corrected": {"method": "searched", "search": {"bias_correction": True}},
    "searched, second order": {"method": "searched", "search": {"rounding": "second_order"}},
    "searched, no shift": {"method": "searched", "search": {"center": False}},
    "searched, learned": {
        "method": "searched",
        "search": {"rounding": "learned", "learning": {"iterations": 300}},
        "crops": 2,
    },
    "searched, learned at length": {
        "method": "searched",
        "search": {"rounding": "learned", "learning": {"iterations": 1000, "batch_images": 32}},
        "crops": 7,
        "spare": True,
    },
    "searched, learned for the loss": {
        "method": "searched",
        "search": {"rounding": "learned", "learning": {"iterations": 1000, "batch_images": 32, "sensitive": True}},
        "crops": 7,
        "spare": True,
    },
}
FORMS = ("packed", "plain", "lzma")  # of a file; packed: plain, but without sparse weights
_TABLE = ("affine", "max", "searched", "searched, second order")
_SWITCHES = (
    "percentile", "searched, no balance", "searched, no shift", "searched, bias corrected", "searched, learned",
)  # fmt: skip
_AT_LENGTH = ("searched, learned at length", "searched, learned for the loss")


@dataclass(frozen=True, kw_only=True)
class Job:
    """network: of NETWORKS, whole or pruned; way: of WAYS, None for the float network; bits: of BITS. tuned: fine-tuned
    for some epochs by `tuning.py`, quantized from the first on, or in floats where way is None."""

    network: str
    pruned: bool = False
    way: str | None = None
    bits: str | None = None
    tuned: bool = False

    @property
    def name(self) -> str:
        """Unique, and the name of the results' file."""
        what = "float" if self.way is None else f"{self.bits}-{self.way.replace(', ', '-').replace(' ', '_')}"
        return f"{self.network}-{'pruned' if self.pruned else 'whole'}-{what}{'-tuned' if self.tuned else ''}"

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return asdict(self)


def all_jobs() -> list[Job]:
    """Every job: the float networks, which all are paired with, and then what takes longest first."""
    everywhere = [(network, pruned) for network in NETWORKS for pruned in (True, False)]
    jobs = [Job(network=network, pruned=pruned) for network, pruned in everywhere]
    jobs += [Job(network="deit_tiny", way=way, bits="W4A8") for way in _AT_LENGTH]
    jobs += [Job(network=network, pruned=pruned, tuned=True) for network, pruned in everywhere]
    jobs += [
        Job(network=network, pruned=pruned, way="searched", bits=bits, tuned=True)
        for bits in BITS
        for network, pruned in everywhere
    ]
    # A few hundred images move few weights to another code: where steps are coarse, the start decides.
    jobs += [
        Job(network="deit_tiny", pruned=pruned, way="searched, second order", bits=bits, tuned=True)
        for bits in ("W4A8", "W4A4")
        for pruned in (False, True)
    ]
    jobs += [
        Job(network=network, pruned=pruned, way=way, bits=bits)
        for network, pruned in everywhere
        for bits in BITS
        for way in _TABLE
    ]
    jobs += [
        Job(network=network, way=way, bits=bits)
        for network in NETWORKS
        for bits in ("W8A8", "W4A8", "W6A6")
        for way in _SWITCHES
    ]
    return jobs

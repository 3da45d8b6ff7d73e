"""The packages that training and compression need, and what to say where they are missing.

To run artifacts, numpy and safetensors are enough: `pip install --no-deps swincompress_pl numpy safetensors`.
"""

from __future__ import annotations

# {module: the distribution that has it}, of pyproject.toml
DISTRIBUTIONS = {
    "PIL": "pillow",
    "platformdirs": "platformdirs",
    "jsonargparse": "jsonargparse",
    "lightning": "lightning",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "spikingjelly": "spikingjelly",
    "timm": "timm",
    "torch": "torch",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
}


def missing_package(error: BaseException) -> str | None:
    """What to say of an import that failed because one of the packages is missing; None for any other error."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if module not in DISTRIBUTIONS:
        return None
    return (
        f"{DISTRIBUTIONS[module]} is not installed, and only what runs artifacts does without it; "
        "`pip install swincompress_pl` installs everything"
    )

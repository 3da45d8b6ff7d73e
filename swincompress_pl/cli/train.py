"""`swincompress fit`, `validate` and `test`: Lightning's own command line over our models, data and callbacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from swincompress_pl.callbacks.termination import TERMINATED
from swincompress_pl.cli import PROGRAM
from swincompress_pl.cli.common import epilog
from swincompress_pl.cli.parsing import HelpFormatter, OneLineParser, read_configs
from swincompress_pl.cli.paths import import_from, path_arguments
from swincompress_pl.models.stored_arguments import restoring
from swincompress_pl.report.fit_report import CompressionReport

_DEFAULT_MODEL = "swincompress_pl.models.CompressibleClassifier"
_REPORT_HELP = "whether fit writes a report beside the checkpoints; CompressionReport among the callbacks says how"
_EXAMPLES = {
    "fit": (
        "swincompress fit -c configs/digits_swin.yaml",
        "swincompress fit -c configs/deit_tiny_imagenet.yaml --data.root imagenet --model.checkpoint_path deit.pth",
        "swincompress fit -c configs/digits_swin.yaml --ckpt_path runs/digits/last.ckpt",
    ),
    "validate": ("swincompress validate -c configs/digits_swin.yaml --ckpt_path runs/digits/best.ckpt",),
    "test": ("swincompress test -c configs/digits_swin.yaml --ckpt_path runs/digits/best.ckpt",),
}


class CompressionCLI(LightningCLI):
    """Lightning's command line for any LightningModule, by default CompressibleClassifier, and any datamodule."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns three of Lightning's four sub-commands: a compressed classifier has no predict step."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in _EXAMPLES}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Makes CompressibleClassifier the default, and adds the option for the report.

        Args:
            parser: The parser of a sub-command.
        """
        parser.set_defaults({"model": {"class_path": _DEFAULT_MODEL}})
        parser.add_argument("--report", type=bool, default=True, help=_REPORT_HELP)

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        """Makes a trainer; that of `fit` writes a report, unless the config has a CompressionReport of its own.

        Args:
            **settings: Settings that replace those of the config.

        Returns:
            The trainer.
        """
        trainer = super().instantiate_trainer(**settings)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer
        wanted = self.subcommand == "fit" and self._get(self.config, "report")
        if wanted and not any(isinstance(each, CompressionReport) for each in callbacks):
            callbacks.insert(0, CompressionReport())
        return trainer

    def before_instantiate_classes(self) -> None:
        """Makes paths of weights and data absolute, so that the config that Lightning stores is good anywhere."""
        config: Any = self.config[self.config.subcommand] if self.config.get("subcommand") else self.config
        for part in (config.get("model"), config.get("data")):
            arguments: Any = part.get("init_args") if part else None
            for name in path_arguments(part.class_path) if arguments else ():
                value = arguments.get(name)
                if isinstance(value, str | Path) and "://" not in str(value):
                    arguments[name] = os.path.abspath(Path(value).expanduser())

    def instantiate_classes(self) -> None:
        """Makes model, data and trainer; with a checkpoint, Lightning takes the model's arguments from it."""
        checkpoint = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        with restoring() if checkpoint and Path(checkpoint).is_file() else nullcontext():
            super().instantiate_classes()

    def after_fit(self) -> None:
        """Says where the checkpoints are and what comes next."""
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if checkpoint:
            rank_zero_info(f"best checkpoint: {checkpoint}\nnext: {PROGRAM} export {checkpoint} -o model.safetensors")


CLI = TypeVar("CLI", bound=CompressionCLI)


def main(name: str, arguments: Sequence[str]) -> int:
    """Runs Lightning's command line; returns 0, or 143 if SIGTERM ended it."""
    # Lightning reads sys.argv, and starts the other processes of a DDP run with it.
    sys.argv[1:] = [name, *arguments]
    options: dict[str, Any] = {each: {"epilog": epilog(*examples)} for each, examples in _EXAMPLES.items()}
    try:
        command_line(CompressionCLI, parser_kwargs={"prog": PROGRAM, "formatter_class": HelpFormatter, **options})
    except SIGTERMException:
        print(f"{PROGRAM}: {name}: ended by SIGTERM", file=sys.stderr)
        return TERMINATED
    return 0


def command_line(kind: type[CLI], **options: Any) -> CLI:
    """Runs Lightning's command line for our models, data and callbacks.

    Args:
        kind: The class of the command line.
        **options: Arguments of LightningCLI.

    Returns:
        The command line, with the objects that it has made.
    """
    import_from(Path.cwd())
    read_configs(_DEFAULT_MODEL)
    return kind(
        LightningModule,
        LightningDataModule,
        parser_class=OneLineParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        **options,
    )

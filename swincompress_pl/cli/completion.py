"""`swincompress completion`: a script for the shell that completes commands, options and files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from swincompress_pl.cli import COMMANDS, PROGRAM
from swincompress_pl.cli.common import parser
from swincompress_pl.cli.options import OPTIONS, trainer_arguments

# The script is plain bash: pressing Tab starts no Python. zsh runs it by its own bashcompinit.
_BASH = """\
_{program}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} options= place
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{commands} --help --version --debug" -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
        [[ -n $BASH_VERSION ]] && compopt -o filenames 2> /dev/null  # a folder ends with a slash
    fi
}}
complete -o bashdefault -F _{program} {program}
"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def main(name: str, arguments: Sequence[str]) -> int:
    """Prints the script of a shell; returns 0."""
    command = parser(
        name,
        "Prints a script that completes commands, options and files in bash or zsh.",
        "swincompress completion bash >> ~/.bash_completion",
        "swincompress completion zsh >> ~/.zshrc",
    )
    command.add_argument("shell", choices=("bash", "zsh"), help="the shell that will read the script")
    sys.stdout.write(script(command.parse_args(list(arguments)).shell))
    return 0


def script(shell: str) -> str:
    """The script for a shell, "bash" or "zsh"."""
    cases = "\n".join(f'        {name}) options="{" ".join(_options(name))}" ;;' for name in COMMANDS)
    text = _BASH.format(program=PROGRAM, commands=" ".join(COMMANDS), cases=cases)
    return _ZSH + text if shell == "zsh" else text


def _options(command: str) -> list[str]:
    trainer = [f"--trainer.{each}" for each in sorted(trainer_arguments())] if "--trainer" in OPTIONS[command] else []
    return [*OPTIONS[command], *trainer]

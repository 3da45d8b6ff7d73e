"""Markdown that reads the same on GitHub and on the documentation's site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from swincompress_pl.report.markdown import table

__all__ = ["command", "commit", "cpu", "details", "document", "picture", "places", "shifted", "short_cpu", "table"]


def document(parts: Iterable[str]) -> str:
    """A page of paragraphs, tables and headings."""
    return "\n\n".join(parts) + "\n"


def picture(name: str, alt: str) -> str:
    """A plot in the reader's color scheme. The fragments are those that both GitHub and the theme act on."""
    return f"![{alt}]({name}-light.svg#gh-light-mode-only)\n![{alt}]({name}-dark.svg#gh-dark-mode-only)"


def details(title: str, parts: Iterable[str]) -> str:
    """Parts that are folded away under a title."""
    body = "\n\n".join(parts)
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{body}\n\n</details>'


def shifted(parts: Iterable[str]) -> list[str]:
    """The parts with every heading one level deeper."""
    return [f"#{part}" if part.startswith("#") else part for part in parts]


def command(lines: str, needs: str) -> str:
    """A block of commands that is not run in the tests; needs: why."""
    return f"<!-- not run: needs {needs} -->\n```\n{lines}\n```"


def places(entries: Iterable[Mapping[str, Any]]) -> str:
    """Where results with `where` and `commit` were measured: "NVIDIA H200 (commit a), ..."."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        name = entry["where"].replace("(R)", "").replace(" Processor", "").split(" (")[0].split(",")[0]
        found.setdefault(name, set()).add(entry["commit"])
    return " and ".join(
        f"{name} (commit{'s' if len(commits) > 1 else ''} {', '.join(sorted(commits))})"
        for name, commits in sorted(found.items())
    )


def commit(environment: Mapping[str, Any]) -> str:
    """The commit in short; "not known" where the sources were no checkout."""
    return str(environment["commit"])[:7] if environment["commit"] else "not known"


def cpu(environment: Mapping[str, Any]) -> str:
    """The CPU with what decides the kernels: "AMD EPYC (Zen 4, AVX-512 VNNI, no AMX)"."""
    name, flags = environment["cpu"].replace("(R)", "").replace(" Processor", ""), environment["cpu_flags"]
    if "avx512_vnni" not in flags:
        return f"{name} (no AVX-512 VNNI)"
    amx = "AMX" if "amx_int8" in flags else "no AMX"
    # Virtual machines hide the generation. The Xeons without AMX here are Sapphire Rapids whose host masks it.
    kind = {("AMD EPYC", "no AMX"): "Zen 4, ", ("Intel Xeon", "no AMX"): "Sapphire Rapids, "}.get((name, amx), "")
    return f"{name} ({kind}AVX-512 VNNI, {amx})"


def short_cpu(environment: Mapping[str, Any]) -> str:
    """The CPU without its instructions: "AMD EPYC (Zen 4)"."""
    name, _, rest = cpu(environment).partition(" (")
    kind = rest.split(",")[0]
    return name if "AVX" in kind else f"{name} ({kind})"

"""CITATION.cff: a YAML file with the keys of the Citation File Format 1.2.0, and the papers that the docs name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from swincompress_pl import __version__

ROOT = Path(__file__).resolve().parent.parent
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
METHODS = (ROOT / "docs/explanation/methods.md").read_text("utf-8")

# https://github.com/citation-file-format/citation-file-format/blob/1.2.0/schema-guide.md
KEYS = {
    "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords",
    "license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "title", "type", "url", "version",
}  # fmt: skip
REFERENCE_KEYS = {"authors", "doi", "identifiers", "notes", "title", "type", "url", "year"}
PERSON_KEYS = {"affiliation", "alias", "email", "family-names", "given-names", "name-particle", "name-suffix", "orcid"}
REFERENCES = pytest.mark.parametrize("reference", CITATION["references"], ids=lambda each: each["title"])


def test_the_keys_are_those_of_the_format() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert {"authors", "message", "title"} <= set(CITATION) <= KEYS
    assert CITATION["type"] == "software"
    assert CITATION["version"] == __version__.partition("+")[0]


@REFERENCES
def test_the_keys_of_a_reference(reference: dict[str, Any]) -> None:
    assert {"authors", "title", "type"} <= set(reference) <= REFERENCE_KEYS
    assert reference["type"] == "article"
    for author in reference["authors"]:
        assert set(author) <= PERSON_KEYS or set(author) == {"name"}  # a person, or an entity
    for identifier in reference.get("identifiers", []):
        assert set(identifier) == {"type", "value"}
        assert identifier["type"] in ("doi", "url", "swh", "other")


@REFERENCES
def test_the_papers_are_those_of_the_methods_page(reference: dict[str, Any]) -> None:
    assert reference["title"] in METHODS
    number = reference.get("doi") or reference["identifiers"][0]["value"].replace(":", " ")
    assert f"({'DOI ' if 'doi' in reference else ''}{number})" in METHODS
    assert all(author["family-names"] in METHODS for author in reference["authors"] if "family-names" in author)


def test_both_papers_are_there() -> None:
    assert len(CITATION["references"]) == 2

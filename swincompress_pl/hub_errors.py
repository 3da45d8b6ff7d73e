"""What errors of huggingface_hub mean. It is not imported: the errors are known by the names of their classes."""

from __future__ import annotations

from collections.abc import Iterator

_MEANINGS = {
    "GatedRepoError": "the repository asks for an agreement to its terms; agree on its page, and `hf auth login`",
    "RepositoryNotFoundError": "the Hub has no such repository, or it is private; check the name, or `hf auth login`",
    "RevisionNotFoundError": "the repository has no such revision; check its name",
    "EntryNotFoundError": "the repository has no such file; check that it holds a network of this library",
    "RemoteEntryNotFoundError": "the repository has no such file; check that it holds a network of this library",
}


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, the innermost last."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def meaning(error: BaseException) -> str | None:
    """What the Hub does not have, and what to do; None if the error says nothing of the kind."""
    return next((_MEANINGS[type(link).__name__] for link in chain(error) if type(link).__name__ in _MEANINGS), None)

"""Pages and the events of a prefix cache, before they are encoded for the wire."""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import msgspec

__all__ = [
    "DEFAULT_NAMESPACE",
    "FULL_ATTENTION",
    "CacheEvent",
    "Cleared",
    "Group",
    "Medium",
    "Namespace",
    "Page",
    "Removed",
    "Stored",
    "pages_of",
]

Page: TypeAlias = Hashable
Medium = Literal["GPU", "CPU_PINNED"]


class Namespace(msgspec.Struct, frozen=True):
    """Requests share pages only within one of these."""

    cache_salt: str | None = None
    lora_name: str | None = None


DEFAULT_NAMESPACE = Namespace()


class Group(msgspec.Struct, frozen=True):
    """Layers of a vLLM model that share blocks; `window` in tokens if they see only so many."""

    number: int
    kind: str
    window: int | None = None


FULL_ATTENTION = Group(0, "full_attention")


class Stored(msgspec.Struct, frozen=True):
    """A chain of pages was stored in `medium`; each is the child of the one before it.

    `hashes` are signed. `parent` is the hash of the page before the chain, None at the root.
    `group` is set where a model has several.
    """

    hashes: list[int]
    parent: int | None
    pages: list[Page]
    medium: Medium
    namespace: Namespace
    group: Group | None = None


class Removed(msgspec.Struct, frozen=True):
    """Pages have left `medium`; each page comes after the pages that continue it."""

    hashes: list[int]
    medium: Medium
    group: Group | None = None


class Cleared(msgspec.Struct, frozen=True):
    """The cache is empty in every medium."""


CacheEvent = Stored | Removed | Cleared


def pages_of(
    tokens: Sequence[int], page_size: int, *, bigram: bool = False
) -> list[tuple[object, ...]]:
    """The whole pages of a prompt; the rest at its end is not cached.

    Page sizes count tokens or, with `bigram`, pairs of neighbours: an engine that speculates
    (EAGLE) keeps those, so that a page needs the token after it as well.
    """
    units = [*pairwise(tokens)] if bigram else tokens
    ends = range(page_size, len(units) + 1, page_size)
    return [tuple(units[end - page_size : end]) for end in ends]

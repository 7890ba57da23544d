"""Tokens of words that were encoded before.

Two generations stand for "least recently used": what is found in the old one moves to the young
one, and when that is full it becomes the old one. That costs one look-up and no bookkeeping.
"""

from collections.abc import Sequence
from typing import Final

__all__ = ["WordCache"]

# Of a word, its few tokens and its slot in a dict. Measured.
_ENTRY_BYTES: Final = 240
# Longer ones are not words, and hardly come again.
_WORD_MAX_CHARS: Final = 48
_GENERATIONS: Final = 2


class WordCache:
    """Holds about `max_bytes` of words; 0 holds none. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_words = max_bytes // _ENTRY_BYTES // _GENERATIONS
        self._young: dict[str, bytes] = {}
        self._old: dict[str, bytes] = {}

    @property
    def size_bytes(self) -> int:
        """Memory taken, by an average word."""
        return (len(self._young) + len(self._old)) * _ENTRY_BYTES

    def get(self, words: Sequence[str]) -> list[bytes | None]:
        """The tokens of each word, uint32, None where they are not known."""
        found = list(map(self._young.get, words))
        if None in found and self._old:
            place = -1
            for _ in range(found.count(None)):
                place = found.index(None, place + 1)
                word = words[place]
                if (again := self._old.get(word)) is not None:
                    found[place] = again
                    self.put(word, again)
        return found

    def put(self, word: str, tokens: bytes) -> None:
        if len(word) > _WORD_MAX_CHARS:
            return
        if len(self._young) >= self._max_words:
            self._old = self._young
            self._young = {}
        if self._max_words:
            self._young[word] = tokens

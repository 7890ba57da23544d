"""Caches of the tokens of text pieces and of words that were encoded before.

Earlier turns, system prompts and tool lists come again with each request, and new text is made of
old words. Tokens are kept as the bytes of a uint32 array. Pieces are long and few, so each use is
recorded and the least recently used one is dropped first. Words are short and many, so their
cache has two generations instead: a word that is found in the old one moves to the young one, and
when the young one is full it becomes the old one.
"""

import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

__all__ = ["SegmentCache", "WordCache"]

# An entry's part of the ordered table: its slots at the usual filling, and a link. Measured.
_PIECE_ENTRY_BYTES: Final = 160
_SHARES: Final = 8
# A word, its few tokens and its slot in a dict. Measured.
_WORD_ENTRY_BYTES: Final = 240
# A longer text between two blanks is hardly a word, and hardly comes again.
_WORD_MAX_CHARS: Final = 48
_GENERATIONS: Final = 2


class SegmentCache:
    """Keeps the tokens of pieces in up to `max_bytes`, keys and bookkeeping included.

    One request should add no more than `share_bytes`, so that a single long text does not push
    out the pieces of all other requests. Not thread-safe.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, bytes] = OrderedDict()
        self.share_bytes = max_bytes // _SHARES
        self.bytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, piece: str) -> bytes | None:
        """The tokens of a piece, which counts as a use of it; None if they are not kept."""
        tokens = self._entries.get(piece)
        if tokens is not None:
            self._entries.move_to_end(piece)
        return tokens

    def put(self, piece: str, tokens: bytes) -> int:
        """Keep the tokens of a piece; returns the bytes this takes up, 0 if it is not kept."""
        size = sys.getsizeof(piece) + sys.getsizeof(tokens) + _PIECE_ENTRY_BYTES
        if size > self.share_bytes or piece in self._entries:
            return 0
        self._entries[piece] = tokens
        self.bytes += size
        while self.bytes > self._max_bytes:
            old, dropped = self._entries.popitem(last=False)
            self.bytes -= sys.getsizeof(old) + sys.getsizeof(dropped) + _PIECE_ENTRY_BYTES
            self.evictions += 1
        return size


class WordCache:
    """Keeps about `max_bytes` of words, and no words with 0. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_words = max_bytes // _WORD_ENTRY_BYTES // _GENERATIONS
        self._young: dict[str, bytes] = {}
        self._old: dict[str, bytes] = {}

    @property
    def size_bytes(self) -> int:
        """Memory taken, estimated from the number of words."""
        return (len(self._young) + len(self._old)) * _WORD_ENTRY_BYTES

    def get(self, words: Sequence[str]) -> list[bytes | None]:
        """The tokens of each word, uint32; None where they are not known."""
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

"""Tokens of text pieces that were encoded before.

Earlier turns, system prompts and tool lists come again with every request. A piece's tokens are
kept as the bytes of an uint32 array. The bound is on the memory that all of it takes up, keys
and bookkeeping included, and the piece that was not used for the longest time goes first. What
one request adds is bounded as well (`share_bytes`), so that a single long text does not push out
everybody else's.
"""

import sys
from collections import OrderedDict
from typing import Final

__all__ = ["SegmentCache"]

# Of the ordered table: its slots at their usual filling, and a link for each entry. Measured.
_ENTRY_BYTES: Final = 160
_SHARES: Final = 8


class SegmentCache:
    """Least recently used pieces go first once `max_bytes` are exceeded. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, bytes] = OrderedDict()
        self.share_bytes = max_bytes // _SHARES
        self.bytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, piece: str) -> bytes | None:
        """The tokens of a piece, which thereby is the last to go; None if it is not here."""
        tokens = self._entries.get(piece)
        if tokens is not None:
            self._entries.move_to_end(piece)
        return tokens

    def put(self, piece: str, tokens: bytes) -> int:
        """Keep the tokens of a piece, and drop others for it; returns the bytes it takes up."""
        size = sys.getsizeof(piece) + sys.getsizeof(tokens) + _ENTRY_BYTES
        if size > self.share_bytes or piece in self._entries:
            return 0
        self._entries[piece] = tokens
        self.bytes += size
        while self.bytes > self._max_bytes:
            old, dropped = self._entries.popitem(last=False)
            self.bytes -= sys.getsizeof(old) + sys.getsizeof(dropped) + _ENTRY_BYTES
            self.evictions += 1
        return size

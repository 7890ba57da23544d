"""Keeps live batches that wait until a replay has brought the batches before them, within bounds.

Separate from the sequence, since the bounds are shared by all ranks.
"""

from msgspec import Struct

__all__ = ["ReorderBuffer", "ReorderLimits"]


class ReorderLimits(Struct):
    """How much may wait: for one rank, and `total_bytes` for all ranks that share this object.

    `waiting_bytes` is the present sum of all ranks.
    """

    rank_batches: int = 4096
    rank_bytes: int = 16 << 20
    total_bytes: int = 256 << 20
    waiting_bytes: int = 0


class ReorderBuffer:
    """The waiting batches of one rank, in order; `dropped` counts those that had no room."""

    def __init__(self, limits: ReorderLimits) -> None:
        self.dropped = 0
        self._limits = limits
        self._batches: list[tuple[int, bytes]] = []
        self._bytes = 0

    def add(self, seq: int, payload: bytes) -> bool:
        """Keep a batch; False if those before it, and perhaps the batch itself, were dropped."""
        limits = self._limits
        size = len(payload)
        room = (
            len(self._batches) < limits.rank_batches
            and self._bytes + size <= limits.rank_bytes
            and limits.waiting_bytes + size <= limits.total_bytes
        )
        if not room:
            self.drop()
        if size > limits.rank_bytes or limits.waiting_bytes + size > limits.total_bytes:
            self.dropped += 1
            return False
        self._batches.append((seq, payload))
        self._bytes += size
        limits.waiting_bytes += size
        return room

    def drop(self) -> None:
        self.dropped += len(self.take())

    def take(self) -> list[tuple[int, bytes]]:
        """Take all batches out."""
        batches, self._batches = self._batches, []
        self._limits.waiting_bytes -= self._bytes
        self._bytes = 0
        return batches

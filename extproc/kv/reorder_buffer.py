"""Live batches that wait for a replay to bring what comes before them, within bounds."""

from msgspec import Struct

__all__ = ["ReorderBuffer", "ReorderLimits"]


class ReorderLimits(Struct):
    """How much may wait for a replay to end: for one rank, and in bytes for all that share this.

    `waiting_bytes` is the sum now.
    """

    rank_batches: int = 4096
    rank_bytes: int = 16 << 20
    total_bytes: int = 256 << 20
    waiting_bytes: int = 0


class ReorderBuffer:
    """Those of one rank, in order; `dropped` counts what was let go."""

    def __init__(self, limits: ReorderLimits) -> None:
        self.dropped = 0
        self._limits = limits
        self._batches: list[tuple[int, bytes]] = []
        self._bytes = 0

    def add(self, seq: int, payload: bytes) -> bool:
        """Keep a batch; False when those before it, and perhaps itself, had to go."""
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
        """All of them; nothing is held afterwards."""
        batches, self._batches = self._batches, []
        self._limits.waiting_bytes -= self._bytes
        self._bytes = 0
        return batches

"""The seam between a rank's sockets and what becomes of its events."""

from collections.abc import Iterator
from typing import Protocol

__all__ = ["EventSink"]


class EventSink(Protocol):
    """What becomes of one rank's events. What these raise is counted, not passed on."""

    def apply(self, payload: bytes) -> Iterator[None] | None:
        """The next batch, as it was published.

        If it is taken in step by step, with rests between, the steps; nothing else is called
        before the last of them. Raises, in a step too, when the batch can not be used: then it
        is given once more, or what was applied until now is cleared.
        """
        ...

    def clear(self, reason: str) -> None:
        """What was applied until now no longer holds."""
        ...

    def set_trusted(self, trusted: bool, reason: str) -> None:
        """Trusted: what was applied holds, if not all ("partial"), and is kept up to date."""
        ...

    def on_load(self, payload: bytes) -> None:
        """The engine's newest word on its load; older ones are left out."""
        ...

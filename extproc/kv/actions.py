"""The actions that a rank's sequence decides on, for the rank's stream to carry out.

Separate from both, so that the sequence needs no streams and a stream reads like a table.
"""

from typing import NamedTuple, TypeAlias

__all__ = ["Action", "Apply", "CancelReplay", "Clear", "RequestReplay", "Trust"]


class Apply(NamedTuple):
    """Apply the next batch; between two clears no batch comes twice."""

    payload: bytes


class Clear(NamedTuple):
    """Forget all that was applied until now: it is void."""

    reason: str


class RequestReplay(NamedTuple):
    """Ask for the buffered batches from `start` on, instead of any earlier request."""

    start: int


class CancelReplay(NamedTuple):
    """Ignore the rest of the answer to the last request."""


class Trust(NamedTuple):
    """Set whether the pages held can be relied on; comes with each change of either field."""

    trusted: bool
    reason: str


Action: TypeAlias = Apply | Clear | RequestReplay | CancelReplay | Trust

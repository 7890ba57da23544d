"""What is to be done about a rank's events, as decided by its sequence."""

from typing import NamedTuple, TypeAlias

__all__ = ["Action", "Apply", "CancelReplay", "Clear", "RequestReplay", "Trust"]


class Apply(NamedTuple):
    """The next batch, never given twice between two clears."""

    payload: bytes


class Clear(NamedTuple):
    """What was applied until now is void."""

    reason: str


class RequestReplay(NamedTuple):
    """Ask for the buffered batches from `start` on; an earlier request is void."""

    start: int


class CancelReplay(NamedTuple):
    """The answer to the last request is of no use any more."""


class Trust(NamedTuple):
    """Whether what is held can be relied on; told on each change of either field."""

    trusted: bool
    reason: str


Action: TypeAlias = Apply | Clear | RequestReplay | CancelReplay | Trust

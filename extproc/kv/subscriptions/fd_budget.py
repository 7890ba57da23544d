"""Computes how many ranks a process can follow with the file descriptors it may open.

A process without free descriptors cannot accept requests either, so ranks get only a share.
"""

import contextlib
import resource
from typing import Final

from msgspec import Struct

__all__ = ["FdBudget", "raise_descriptor_limit"]

# The sockets for events and load take two each, one of them for the connection; the monitor two.
_PER_RANK: Final = 6
_PER_REPLAY: Final = 4
_REPLAYS_MAX: Final = 256
# Reserved for everything else in the process: requests, workers, files.
_RESERVED_MAX: Final = 2048
_UNLIMITED: Final = 1 << 20


class FdBudget(Struct, frozen=True):
    """How many ranks may have sockets, and how many of them a replay at a time."""

    ranks: int
    replays: int

    @classmethod
    def within(cls, limit: int) -> "FdBudget":
        """The budget of a process that may open `limit` files."""
        replays = max(1, min(_REPLAYS_MAX, limit // 32))
        left = limit - min(_RESERVED_MAX, limit // 2) - replays * _PER_REPLAY
        return cls(max(1, left // _PER_RANK), replays)


def raise_descriptor_limit() -> int:
    """Raise the process's limit of open files to what the system allows; gives the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Some systems allow less than their hard limit.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft

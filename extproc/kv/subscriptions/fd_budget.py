"""How many ranks a process can follow before it runs out of file descriptors.

A process that has none left can not accept requests either, so ranks take only their share.
"""

import contextlib
import resource
from typing import Final

from msgspec import Struct

__all__ = ["FdBudget", "raise_descriptor_limit"]

# Events and load: two each, one of them the connection. The monitor: two.
_PER_RANK: Final = 6
_PER_REPLAY: Final = 4
_REPLAYS_MAX: Final = 256
# For everything else in the process: requests, workers, files.
_RESERVED_MAX: Final = 2048
_UNLIMITED: Final = 1 << 20


class FdBudget(Struct, frozen=True):
    """How many ranks may have sockets, and how many of them a replay at the same time."""

    ranks: int
    replays: int

    @classmethod
    def within(cls, limit: int) -> "FdBudget":
        """The share of a process that may open so many files."""
        replays = max(1, min(_REPLAYS_MAX, limit // 32))
        left = limit - min(_RESERVED_MAX, limit // 2) - replays * _PER_REPLAY
        return cls(max(1, left // _PER_RANK), replays)


def raise_descriptor_limit() -> int:
    """Let the process open as many files as the system allows it to; gives how many it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Some systems allow less than they say.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft

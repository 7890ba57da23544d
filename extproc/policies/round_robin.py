"""Each worker in turn.

A counter modulo the number of candidates would jump when one joins, leaves or is left out
for a moment. Remembering who came last and taking the next in the stable order does not.
"""

from bisect import bisect_right
from collections.abc import Sequence

from extproc.policies.base import CandidateT, Choice, Query

__all__ = ["RoundRobin"]


class RoundRobin:
    """Reason: `next`."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last_order = -1

    def choose(self, candidates: Sequence[CandidateT], query: Query) -> Choice[CandidateT]:
        index = bisect_right(candidates, self._last_order, key=lambda candidate: candidate.order)
        chosen = candidates[index if index < len(candidates) else 0]
        self._last_order = chosen.order
        return Choice(chosen, "next")

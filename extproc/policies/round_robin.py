"""Chooses each worker in turn.

A counter modulo the number of candidates would jump when a worker joins, leaves or is left out for
a moment. This policy remembers the last worker and takes the next one in the stable order.
"""

from bisect import bisect_right
from collections.abc import Sequence

from extproc.policies.base import Candidate, CandidateT, Choice

__all__ = ["RoundRobin"]


class RoundRobin:
    """Reason: `next`."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last_order = -1
        self._last_index = -1

    def choose(self, candidates: Sequence[CandidateT]) -> Choice[CandidateT]:
        index = self._last_index
        if index < len(candidates) and candidates[index].order == self._last_order:
            index += 1  # the same candidates as last time, nearly always
        else:
            index = bisect_right(candidates, self._last_order, key=_order)
        if index >= len(candidates):
            index = 0
        chosen = candidates[index]
        self._last_order, self._last_index = chosen.order, index
        return Choice(chosen, "next")


def _order(candidate: Candidate) -> int:
    return candidate.order

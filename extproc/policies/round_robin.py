"""Chooses each worker in turn, except workers that have far more requests than the others.

A counter modulo the number of candidates would jump when a worker joins, leaves or is left out for
a moment. This policy remembers the last worker and takes the next one in the stable order.

Requests pile up on a worker that hangs or is slow: with a fixed number of clients, soon all of them
wait there. So such a worker loses its turn until the others have as many.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from extproc.policies.base import Candidate, CandidateT, Choice

__all__ = ["RoundRobin"]

# Chance alone makes the numbers of healthy workers differ by less than this.
_CROWDED_AT_MEAN_TIMES: Final = 1.5
_CROWDED_AT_MEAN_PLUS: Final = 6


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
        if chosen.in_flight > _CROWDED_AT_MEAN_PLUS:
            index = _next_not_crowded(candidates, index)
            chosen = candidates[index]
        self._last_order, self._last_index = chosen.order, index
        return Choice(chosen, "next")


def _next_not_crowded(candidates: Sequence[Candidate], index: int) -> int:
    """The first index from this one on, around the end, of a worker that is not crowded."""
    mean = sum(candidate.in_flight for candidate in candidates) / len(candidates)
    most = _CROWDED_AT_MEAN_TIMES * mean + _CROWDED_AT_MEAN_PLUS
    # The least loaded one is never above the mean.
    while candidates[index].in_flight > most:
        index = (index + 1) % len(candidates)
    return index


def _order(candidate: Candidate) -> int:
    return candidate.order

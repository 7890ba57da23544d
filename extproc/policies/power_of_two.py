"""Chooses the less loaded of two random workers.

This is nearly as even as comparing all workers, and several routers that see the same loads do not
all choose the same one.
"""

from collections.abc import Sequence
from random import Random

from extproc.policies.base import CandidateT, Choice

__all__ = ["PowerOfTwo"]


class PowerOfTwo:
    """Reasons: `less_loaded`, `equal_load` (the first drawn wins), `only_one`."""

    name = "power_of_two"

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, candidates: Sequence[CandidateT]) -> Choice[CandidateT]:
        if len(candidates) == 1:
            return Choice(candidates[0], "only_one")
        first, second = self._random.sample(candidates, 2)
        if first.in_flight == second.in_flight:
            return Choice(first, "equal_load")
        return Choice(first if first.in_flight < second.in_flight else second, "less_loaded")

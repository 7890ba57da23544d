"""Chooses the worker with the fewest requests in flight: exact if one router serves the pool."""

from collections.abc import Sequence
from random import Random

from extproc.policies.base import CandidateT, Choice, least_loaded

__all__ = ["LeastLoad"]


class LeastLoad:
    """Reason: `least_load`; a random one of several with the fewest."""

    name = "least_load"

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, candidates: Sequence[CandidateT]) -> Choice[CandidateT]:
        return Choice(least_loaded(candidates, self._random), "least_load")

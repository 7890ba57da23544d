"""Chooses a random worker.

It keeps no state, and many routers that share a pool do not all choose the same worker.
"""

from collections.abc import Sequence
from random import Random

from extproc.policies.base import CandidateT, Choice

__all__ = ["RandomPolicy"]


class RandomPolicy:
    """Reason: `random`."""

    name = "random"

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, candidates: Sequence[CandidateT]) -> Choice[CandidateT]:
        return Choice(self._random.choice(candidates), "random")

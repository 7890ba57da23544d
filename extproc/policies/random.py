"""Any worker, uniformly: no state, and no herd where many routers share one pool."""

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

"""Which decode worker takes over from a prefill worker: a neighbour, unless it is busy.

On one host the KV cache need not cross the network. A neighbour is taken while it has at most
twice the load of the median worker, rounded up, and one request where all are idle: a hot
neighbour in an idle pool is none.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import Final, Protocol, TypeVar

from extproc.policies.base import Choice

__all__ = ["DecodeAffinity", "DecodeCandidate"]

_TOLERANCE: Final = 2.0
_TOLERANCE_MIN: Final = 1


class DecodeCandidate(Protocol):
    """A decode worker that may be tried."""

    @property
    def host(self) -> str:
        """As in its URL."""
        ...

    @property
    def requests(self) -> int:
        """Requests that wait or run there."""
        ...

    @property
    def kv_usage(self) -> float:
        """How full its KV cache is, 0 to 1; 0 where it does not say."""
        ...


CandidateT = TypeVar("CandidateT", bound=DecodeCandidate)


class DecodeAffinity:
    """Reasons: `same_host`; `peer_busy`, there was one, and others have less to do; `no_peer`."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, candidates: Sequence[CandidateT], prefill_host: str) -> Choice[CandidateT]:
        """Pick one of at least one candidate."""
        loads = sorted([candidate.requests for candidate in candidates])
        tolerance = max(_TOLERANCE_MIN, math.ceil(_TOLERANCE * loads[len(loads) // 2]))
        peers = [candidate for candidate in candidates if candidate.host == prefill_host]
        near = [peer for peer in peers if peer.requests <= tolerance]
        if near:
            return Choice(self._least(near), "same_host")
        return Choice(self._least(candidates), "peer_busy" if peers else "no_peer")

    def order(self, candidates: Sequence[CandidateT], prefill_host: str) -> list[CandidateT]:
        """All of them: the chosen one, then the others, less loaded first, random among equals."""
        chosen, _ = self.choose(candidates, prefill_host)
        others = [candidate for candidate in candidates if candidate is not chosen]
        self._random.shuffle(others)
        return [chosen, *sorted(others, key=_load)]

    def _least(self, candidates: Sequence[CandidateT]) -> CandidateT:
        lowest = min([_load(candidate) for candidate in candidates])
        equals = [candidate for candidate in candidates if _load(candidate) == lowest]
        return equals[0] if len(equals) == 1 else self._random.choice(equals)


def _load(candidate: DecodeCandidate) -> tuple[int, float]:
    return candidate.requests, candidate.kv_usage

"""Chooses the decode worker for a prefill worker: one on the same host, unless it is busy.

On one host the KV cache need not cross the network. A decode worker on the host is chosen while it
has at most twice the load of the median worker, rounded up, and at most one request if the others
are idle.
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
    """A decode worker that may be chosen."""

    @property
    def host(self) -> str:
        """The host, as in the worker's URL."""
        ...

    @property
    def requests(self) -> int:
        """Requests that wait or run there."""
        ...

    @property
    def kv_usage(self) -> float:
        """How full its KV cache is, from 0 to 1; 0 if the worker does not report it."""
        ...


CandidateT = TypeVar("CandidateT", bound=DecodeCandidate)


class DecodeAffinity:
    """Reasons: `same_host`; `no_peer`, no candidate is on the host; `peer_busy`, all of those are.

    With `no_peer` and `peer_busy` the least loaded candidate is chosen.
    """

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, candidates: Sequence[CandidateT], prefill_host: str) -> Choice[CandidateT]:
        """Choose one of the candidates, of which there is at least one."""
        loads = sorted([candidate.requests for candidate in candidates])
        tolerance = max(_TOLERANCE_MIN, math.ceil(_TOLERANCE * loads[len(loads) // 2]))
        peers = [candidate for candidate in candidates if candidate.host == prefill_host]
        near = [peer for peer in peers if peer.requests <= tolerance]
        if near:
            return Choice(self._least(near), "same_host")
        return Choice(self._least(candidates), "peer_busy" if peers else "no_peer")

    def order(self, candidates: Sequence[CandidateT], prefill_host: str) -> list[CandidateT]:
        """All candidates: the chosen one, then the others by load, random among equals."""
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

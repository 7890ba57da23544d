"""What a policy sees and what it answers.

A policy is given candidates that may be chosen (right model, usable, breaker allows) and
never sees sockets, clocks or the registry, so each is tested with plain values.
"""

from collections.abc import Sequence
from random import Random
from typing import Generic, NamedTuple, Protocol, TypeVar

from msgspec import Struct

__all__ = ["Candidate", "CandidateT", "Choice", "Policy", "Query", "least_loaded"]


class Candidate(Protocol):
    """A worker a request could go to."""

    @property
    def order(self) -> int:
        """Rank in the stable order of candidates; unique, never reused."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests decided for this worker that have not ended."""
        ...


CandidateT = TypeVar("CandidateT", bound=Candidate)


class Query(Struct, frozen=True):
    """What a policy may know of the request."""

    model: str


class Choice(NamedTuple, Generic[CandidateT]):
    """The chosen candidate, and why, as a short word of a closed set per policy."""

    candidate: CandidateT
    reason: str


class Policy(Protocol):
    """One instance per model; may keep state between calls, all from one event loop."""

    name: str

    def choose(self, candidates: Sequence[CandidateT], query: Query) -> Choice[CandidateT]:
        """Pick one of at least one candidate, given in ascending `order`."""
        ...


def least_loaded(candidates: Sequence[CandidateT], random: Random) -> CandidateT:
    """A candidate with the fewest requests in flight, random among equals.

    Without the draw an idle fleet would send everything to its first worker.
    """
    lowest = min(candidate.in_flight for candidate in candidates)
    equals = [candidate for candidate in candidates if candidate.in_flight == lowest]
    return equals[0] if len(equals) == 1 else random.choice(equals)

"""What a policy sees and what it answers.

A policy is given candidates that may be chosen (right model, usable, breaker allows) and
never sees sockets, clocks or the registry, so each is tested with plain values.
"""

from collections.abc import Sequence
from random import Random
from typing import Generic, NamedTuple, Protocol, TypeVar

from msgspec import Struct

__all__ = [
    "Candidate",
    "CandidateT",
    "Choice",
    "KvCandidate",
    "KvCandidateT",
    "KvPolicy",
    "KvQuery",
    "Policy",
    "RankPressure",
    "TierWeights",
    "least_loaded",
]


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


ChosenT = TypeVar("ChosenT")


class Choice(NamedTuple, Generic[ChosenT]):
    """The chosen candidate, and why, as a short word of a closed set per policy."""

    candidate: ChosenT
    reason: str


class Policy(Protocol):
    """One instance per model; may keep state between calls, all from one event loop."""

    name: str

    def choose(self, candidates: Sequence[CandidateT]) -> Choice[CandidateT]:
        """Pick one of at least one candidate, given in ascending `order`."""
        ...


# -- policies that look at KV caches


class RankPressure(Protocol):
    """What a rank has to do; `now` in monotonic seconds."""

    @property
    def prefill_tokens_per_second(self) -> float: ...

    def requests(self, now: float) -> int:
        """Requests that wait or run there."""
        ...

    def running(self, now: float) -> int:
        """Those of them that decode."""
        ...

    def prefill_tokens_ahead(self, now: float) -> float:
        """Tokens to prefill before a request that comes now."""
        ...

    def slot_wait_seconds(self, prompt_tokens: int, now: float) -> float:
        """How long a request would wait until others end and leave it their place; mostly 0."""
        ...


class KvCandidate(Protocol):
    """A data-parallel rank of a worker, and what it holds of the prompt.

    Tokens are those that spare prefill: the engine computes the last token of every prompt,
    and with it the rest of its page. What is held on several tiers counts on the best.
    """

    @property
    def order(self) -> int:
        """Rank in the stable order of candidates; unique, never reused."""
        ...

    @property
    def load(self) -> RankPressure: ...

    @property
    def has_events(self) -> bool:
        """Whether it is known what it holds; if not, all that follows is 0."""
        ...

    @property
    def prompt_pages(self) -> int:
        """Whole pages of the prompt, in its own page size."""
        ...

    @property
    def held_pages(self) -> int:
        """Of these, how many it has on any tier, from the first on without a gap."""
        ...

    @property
    def device_tokens(self) -> int: ...

    @property
    def host_tokens(self) -> int:
        """Tokens that follow, in the host's memory."""
        ...

    @property
    def disk_tokens(self) -> int:
        """Tokens that follow, further down."""
        ...

    @property
    def predicted_pages(self) -> int:
        """Pages it is going to have from the first on, since they were just sent there."""
        ...

    @property
    def predicted_tokens(self) -> int: ...


KvCandidateT = TypeVar("KvCandidateT", bound=KvCandidate)


class KvQuery(Struct, frozen=True):
    """What a policy knows of the request.

    `prompt_tokens` is the exact number of tokens, 0 if it is not known. `expected_tokens` is then
    a guess, 0 if there is no guess either.
    """

    now: float
    prompt_tokens: int = 0
    expected_tokens: int = 0


class KvPolicy(Protocol):
    """As Policy, for ranks."""

    name: str

    def choose(self, candidates: Sequence[KvCandidateT], query: KvQuery) -> Choice[KvCandidateT]:
        """Pick one of at least one candidate, given in ascending `order`."""
        ...


class TierWeights(NamedTuple):
    """What a held token is worth by where it lies, 1 = its whole prefill.

    Bringing a page up is a copy: from pinned host memory at some hundred thousand tokens a
    second, from a disk or over the network at some ten thousand, where prefill does ten
    thousand, or fifty for a small model.
    """

    device: float = 1.0
    host: float = 0.8
    disk: float = 0.5

    def tokens(self, candidate: KvCandidate) -> float:
        """The tokens of prefill that the candidate's holdings spare."""
        worth = candidate.device_tokens * self.device
        if candidate.host_tokens or candidate.disk_tokens:
            worth += candidate.host_tokens * self.host + candidate.disk_tokens * self.disk
        return worth


def least_loaded(candidates: Sequence[CandidateT], random: Random) -> CandidateT:
    """A candidate with the fewest requests in flight, random among equals.

    Without the draw an idle fleet would send everything to its first worker.
    """
    lowest = min(candidate.in_flight for candidate in candidates)
    equals = [candidate for candidate in candidates if candidate.in_flight == lowest]
    return equals[0] if len(equals) == 1 else random.choice(equals)

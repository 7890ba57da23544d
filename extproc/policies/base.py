"""What a policy is shown and what it returns.

A policy gets only candidates that may be chosen: they serve the model, are usable, and their
breaker allows it. It sees no sockets, clocks or registries, so tests give it plain values.
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
    """A worker that may be chosen."""

    @property
    def order(self) -> int:
        """Position in the stable order of candidates; unique, never reused."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests sent to this worker that have not ended."""
        ...


CandidateT = TypeVar("CandidateT", bound=Candidate)


ChosenT = TypeVar("ChosenT")


class Choice(NamedTuple, Generic[ChosenT]):
    """The chosen candidate, and the reason: one word of a closed set per policy."""

    candidate: ChosenT
    reason: str


class Policy(Protocol):
    """Chooses a worker. One instance per model; calls come from one event loop."""

    name: str

    def choose(self, candidates: Sequence[CandidateT]) -> Choice[CandidateT]:
        """Choose one of the candidates: at least one, in ascending `order`."""
        ...


# -- policies that look at KV caches


class RankPressure(Protocol):
    """The load of a rank; `now` in monotonic seconds."""

    @property
    def prefill_tokens_per_second(self) -> float: ...

    def requests(self, now: float) -> int:
        """Requests that wait or run."""
        ...

    def running(self, now: float) -> int:
        """Requests that decode."""
        ...

    def prefill_tokens_ahead(self, now: float) -> float:
        """Tokens that the rank prefills before a request that is sent now."""
        ...

    def slot_wait_seconds(self, prompt_tokens: int, now: float) -> float:
        """How long a request would wait for a free slot in the running batch; mostly 0."""
        ...


class KvCandidate(Protocol):
    """A data-parallel rank of a worker, and what it holds of the prompt.

    Tokens count as held if they spare prefill: the engine computes the last token of every
    prompt, and with it the rest of its page. Pages on several tiers count on the best one.
    """

    @property
    def order(self) -> int:
        """Position in the stable order of candidates; unique, never reused."""
        ...

    @property
    def load(self) -> RankPressure: ...

    @property
    def has_events(self) -> bool:
        """Whether the rank's pages are known and trusted; if not, all numbers below are 0."""
        ...

    @property
    def prompt_pages(self) -> int:
        """Whole pages of the prompt, in the rank's page size."""
        ...

    @property
    def held_pages(self) -> int:
        """Pages of the prompt that it holds on any tier, from the first on without a gap."""
        ...

    @property
    def device_tokens(self) -> int: ...

    @property
    def host_tokens(self) -> int:
        """Held tokens after those on the device, in host memory."""
        ...

    @property
    def disk_tokens(self) -> int:
        """Held tokens after those, on a disk or further away."""
        ...

    @property
    def predicted_pages(self) -> int:
        """Pages it will hold soon, from the first on: such a prompt was just sent there."""
        ...

    @property
    def predicted_tokens(self) -> int: ...


KvCandidateT = TypeVar("KvCandidateT", bound=KvCandidate)


class KvQuery(Struct, frozen=True):
    """What a policy knows of the request.

    `prompt_tokens` is the exact number of tokens, or 0 if it is not known. `expected_tokens` is an
    estimate for that case, or 0 without one.
    """

    now: float
    prompt_tokens: int = 0
    expected_tokens: int = 0


class KvPolicy(Protocol):
    """Chooses a rank by what it holds; otherwise as Policy."""

    name: str

    def choose(self, candidates: Sequence[KvCandidateT], query: KvQuery) -> Choice[KvCandidateT]:
        """Choose one of the candidates: at least one, in ascending `order`."""
        ...


class TierWeights(NamedTuple):
    """What a held token is worth on each tier; 1 is the cost of its prefill.

    Fetching a page is a copy: about 100 000 tokens a second from pinned host memory, and 10 000
    from a disk or over the network. Prefill computes 10 000 a second, a small model 50 000.
    """

    device: float = 1.0
    host: float = 0.8
    disk: float = 0.5

    def tokens(self, candidate: KvCandidate) -> float:
        """The prefill tokens that the candidate's pages spare."""
        worth = candidate.device_tokens * self.device
        if candidate.host_tokens or candidate.disk_tokens:
            worth += candidate.host_tokens * self.host + candidate.disk_tokens * self.disk
        return worth


def least_loaded(candidates: Sequence[CandidateT], random: Random) -> CandidateT:
    """A candidate with the fewest requests in flight; a random one if there are several.

    Otherwise an idle fleet would send everything to its first worker.
    """
    lowest = min(candidate.in_flight for candidate in candidates)
    equals = [candidate for candidate in candidates if candidate.in_flight == lowest]
    return equals[0] if len(equals) == 1 else random.choice(equals)

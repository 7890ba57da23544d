"""Computes the demo's figures for each policy, from data of clients and prefill workers."""

from collections import defaultdict
from statistics import quantiles

from msgspec import Struct

__all__ = ["Outcome", "Tally", "percentile"]


class Outcome(Struct, frozen=True, kw_only=True):
    """One request that has ended.

    `worker` names the worker that computed the prompt, if known. `ttft_seconds` is the time from
    sending to the first byte of the body. The tokens are those of that worker, 0 if it did not
    answer.
    """

    worker: str
    good: bool
    ttft_seconds: float
    prompt_tokens: int
    cached_tokens: int


def percentile(values: list[float], percent: int) -> float:
    """The percentile of at least one value, interpolated between its neighbours."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


class Tally:
    """The outcomes of one policy so far; `workers` is the number that can compute its prompts."""

    def __init__(self, policy: str, workers: int) -> None:
        self.policy = policy
        self.good = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._workers = workers
        self._ttft_seconds: list[float] = []
        self._prefilled: defaultdict[str, int] = defaultdict(int)

    def add(self, outcome: Outcome) -> None:
        """Count a request; a failed one counts only as failed."""
        if not outcome.good:
            self.failed += 1
            return
        self.good += 1
        self.prompt_tokens += outcome.prompt_tokens
        self.cached_tokens += outcome.cached_tokens
        self._ttft_seconds.append(outcome.ttft_seconds)
        self._prefilled[outcome.worker] += outcome.prompt_tokens - outcome.cached_tokens

    @property
    def hit_rate(self) -> float | None:
        """The share of prompt tokens that were cached; None before the first request."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that prefill computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def spread(self) -> float | None:
        """Tokens prefilled by the busiest worker over the mean of all; 1 is even."""
        if not self.prefilled_tokens:
            return None
        return max(self._prefilled.values()) * self._workers / self.prefilled_tokens

    def ttft_seconds(self, percent: int) -> float | None:
        """The percentile of the time to the first token; None before the first request."""
        return percentile(self._ttft_seconds, percent) if self._ttft_seconds else None

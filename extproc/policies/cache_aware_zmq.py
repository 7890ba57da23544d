"""sgl-router's `cache_aware_zmq`: the rank that holds most of the prompt, unless loads are unequal.

The order of steps, the thresholds and their strictness are those of sgl-router. Its faults are
mended: the overlap is taken per candidate, so that a rank that may not be chosen does not hide the
others; a partial page at the end of the prompt does not count; tiers do; ties are drawn; and a
prefix that is being prefilled somewhere is taken into account.
"""

from collections.abc import Sequence
from random import Random
from typing import Final

from extproc.policies.base import Choice, KvCandidateT, KvQuery, TierWeights

__all__ = ["CacheAwareZmq"]

# A rank that will hold the prompt soon is preferred while it has at most this many requests more
# than the least loaded rank.
_PREDICTED_MAX_MORE_REQUESTS: Final = 4


class CacheAwareZmq:
    """Chooses the least loaded rank, except for the reasons `hit` and `predicted`.

    Reasons, in the order of the steps:
    `imbalance`: the loads differ by more than `balance_abs_threshold` requests, and the highest
    is above `balance_rel_threshold` times the lowest, rounded down.
    `no_tokens`: the prompt's tokens are not known. `no_events`: no candidate's pages are known.
    `short_prompt`: the prompt has no whole page.
    `hit`: the rank holds most, which is more than `cache_threshold` of the prompt's whole pages;
    of several such ranks, it is the least loaded.
    `predicted`: no rank holds that much, but the same prefix was just sent to this rank, which is
    not busy.
    `below_threshold`: no rank holds or will hold that much.
    """

    name = "cache_aware_zmq"

    def __init__(
        self,
        random: Random,
        *,
        cache_threshold: float = 0.5,
        balance_abs_threshold: int = 32,
        balance_rel_threshold: float = 1.1,
        weights: TierWeights | None = None,
    ) -> None:
        self._random = random
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs_threshold
        self._balance_rel = balance_rel_threshold
        self._weights = weights or TierWeights()

    def choose(self, candidates: Sequence[KvCandidateT], query: KvQuery) -> Choice[KvCandidateT]:
        now = query.now
        loads = [candidate.load.requests(now) for candidate in candidates]
        lowest, highest = min(loads), max(loads)
        if highest - lowest > self._balance_abs and highest > int(lowest * self._balance_rel):
            reason = "imbalance"
        elif not query.prompt_tokens:
            reason = "no_tokens"
        else:
            chosen = self._deepest(candidates, loads)
            if chosen is not None:
                return Choice(chosen, "hit")
            chosen = self._predicted(candidates, loads, lowest)
            if chosen is not None:
                return Choice(chosen, "predicted")
            reason = _reason_for_none(candidates)
        lightest = [one for one, load in zip(candidates, loads, strict=True) if load == lowest]
        return Choice(self._draw(lightest), reason)

    def _deepest(self, candidates: Sequence[KvCandidateT], loads: list[int]) -> KvCandidateT | None:
        """The least loaded of the ranks that hold most, if that is above the threshold."""
        best: list[KvCandidateT] = []
        most, least = 0.0, 0
        threshold, worth_of = self._cache_threshold, self._weights.tokens
        for candidate, load in zip(candidates, loads, strict=True):
            pages = candidate.held_pages
            if not pages or pages / candidate.prompt_pages <= threshold:
                continue
            worth = worth_of(candidate)
            if not best or worth > most or (worth == most and load < least):
                best, most, least = [candidate], worth, load
            elif worth == most and load == least:
                best.append(candidate)
        return self._draw(best) if best else None

    def _predicted(
        self, candidates: Sequence[KvCandidateT], loads: list[int], lowest: int
    ) -> KvCandidateT | None:
        best: list[KvCandidateT] = []
        most, least = 0, 0
        for candidate, load in zip(candidates, loads, strict=True):
            pages = candidate.predicted_pages
            if not pages or pages / candidate.prompt_pages <= self._cache_threshold:
                continue
            if load > lowest + _PREDICTED_MAX_MORE_REQUESTS:
                continue
            tokens = candidate.predicted_tokens
            if not best or tokens > most or (tokens == most and load < least):
                best, most, least = [candidate], tokens, load
            elif tokens == most and load == least:
                best.append(candidate)
        return self._draw(best) if best else None

    def _draw(self, equals: list[KvCandidateT]) -> KvCandidateT:
        return equals[0] if len(equals) == 1 else self._random.choice(equals)


def _reason_for_none(candidates: Sequence[KvCandidateT]) -> str:
    """The reason why no candidate is preferred for its pages."""
    has_events = False
    for candidate in candidates:
        if candidate.has_events:
            has_events = True
            if candidate.prompt_pages:
                return "below_threshold"
    return "short_prompt" if has_events else "no_events"

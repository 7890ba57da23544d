"""The policy of sgl-router: whoever holds most of the prompt, unless the fleet is out of balance.

Order of steps, thresholds and strictness are sgl-router's (its `cache_aware_zmq`). What differs
are its faults: depths are taken per candidate, so that holders that may not be chosen do not
hide the others; the partial page at a prompt's end does not count; tiers do; ties are drawn;
and a prefix that is just being prefilled somewhere is taken into account.
"""

from collections.abc import Sequence
from random import Random
from typing import Final

from extproc.policies.base import Choice, KvCandidateT, KvQuery, TierWeights

__all__ = ["CacheAwareZmq"]

# A predicted holder is preferred while it has no more requests than this above the fewest.
_PREDICTED_MAX_MORE_REQUESTS: Final = 4


class CacheAwareZmq:
    """Reasons, in the order of the steps; all but `hit` and `predicted` mean least requests:

    `imbalance`: the loads are more than `balance_abs_threshold` requests apart, and the highest
    is above `balance_rel_threshold` times the lowest, rounded down.
    `no_tokens`: the prompt's tokens are not known. `no_events`: no candidate's holdings are.
    `short_prompt`: it has no whole page.
    `hit`: the least loaded of those that hold most, which is more than `cache_threshold` of the
    prompt's whole pages.
    `predicted`: nobody holds that much, but it was just sent to this one, which is not busy.
    `below_threshold`: neither.
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
        """The least loaded of those with the most, if that is enough."""
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
    """Why nobody is preferred for what it holds."""
    has_events = False
    for candidate in candidates:
        if candidate.has_events:
            has_events = True
            if candidate.prompt_pages:
                return "below_threshold"
    return "short_prompt" if has_events else "no_events"

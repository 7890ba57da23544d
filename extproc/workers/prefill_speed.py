"""Learns how fast a rank prefills prompts, from its responses or from its engine's counters.

It is separate from the load of a rank because a model has such a speed, too: the one that its
new ranks begin with.
"""

from typing import Final

__all__ = ["SPEED_DEFAULT_TOKENS_PER_SECOND", "EngineCounters", "PrefillSpeed"]

SPEED_DEFAULT_TOKENS_PER_SECOND: Final = 8000.0
_SPEED_MIN_TOKENS_PER_SECOND: Final = 50.0
_SPEED_MAX_TOKENS_PER_SECOND: Final = 2_000_000.0
# The time of smaller prompts is mostly overhead.
_SPEED_SAMPLE_MIN_TOKENS: Final = 256
_SPEED_SAMPLE_MAX_TOKENS: Final = 1 << 40
# A sample counts as at most so many times slower or faster than expected.
_SPEED_SAMPLE_MAX_SLOWER: Final = 4.0
_SPEED_SAMPLE_MAX_FASTER: Final = 8.0
# How much busy time is remembered, and the weight of the speed that a rank starts with.
_SPEED_WINDOW_SECONDS: Final = 30.0
_SPEED_PRIOR_SECONDS: Final = 0.25

# As long after the engine's own counters, our less precise measurements are not used.
_ENGINE_SPEED_FRESH_SECONDS: Final = 60.0
_ENGINE_SPEED_MIN_TOKENS: Final = 256


class PrefillSpeed:
    """The speed of prefills: tokens divided by busy time, where old samples fade.

    Both are summed, since an average of speeds would be wrong for batches: an engine answers
    all prompts of a batch at once, so only the sum of their tokens has a meaningful time.
    Until it has samples, a rank has the speed of its model (`prior`).
    """

    __slots__ = ("_known", "_prior", "_seconds", "_tokens", "default_tokens_per_second")

    def __init__(
        self,
        prior: "PrefillSpeed | None" = None,
        *,
        default_tokens_per_second: float = SPEED_DEFAULT_TOKENS_PER_SECOND,
    ) -> None:
        self._prior = prior
        # Assumed while nothing is known.
        self.default_tokens_per_second = default_tokens_per_second
        self._tokens = 0.0
        self._seconds = 0.0
        self._known: float | None = None

    @property
    def tokens_per_second(self) -> float:
        known = self._known
        if known is not None:
            return known
        if self._prior is not None:
            return self._prior.tokens_per_second
        return self.default_tokens_per_second

    def observe(self, tokens: int, seconds: float) -> bool:
        """Learn from a prefill; returns False if the sample is too small or implausible."""
        if not (_SPEED_SAMPLE_MIN_TOKENS <= tokens <= _SPEED_SAMPLE_MAX_TOKENS and seconds > 0):
            return False
        speed = self.tokens_per_second
        if not self._seconds:
            self._seconds = _SPEED_PRIOR_SECONDS
            self._tokens = _SPEED_PRIOR_SECONDS * speed
        expected = tokens / speed
        self._seconds += min(
            max(seconds, expected / _SPEED_SAMPLE_MAX_FASTER), expected * _SPEED_SAMPLE_MAX_SLOWER
        )
        self._tokens += tokens
        if self._seconds > _SPEED_WINDOW_SECONDS:
            self._tokens *= _SPEED_WINDOW_SECONDS / self._seconds
            self._seconds = _SPEED_WINDOW_SECONDS
        self._known = min(
            max(self._tokens / self._seconds, _SPEED_MIN_TOKENS_PER_SECOND),
            _SPEED_MAX_TOKENS_PER_SECOND,
        )
        if self._prior is not None:
            self._prior.observe(tokens, seconds)
        return True


class EngineCounters:
    """Learns the speed of one rank from what its engine has prefilled in what busy time."""

    __slots__ = ("_before", "_learnt_at", "_speed")

    def __init__(self, speed: PrefillSpeed) -> None:
        self._speed = speed
        self._before: tuple[int, int] | None = None
        self._learnt_at = float("-inf")

    def are_fresh(self, now: float) -> bool:
        """The speed was learnt from the engine lately, so our own measurements are not needed."""
        return now - self._learnt_at <= _ENGINE_SPEED_FRESH_SECONDS

    def read(self, tokens: int | None, busy_us: int | None, now: float) -> None:
        """Learn from the counters of a report: tokens and microseconds since the engine's start."""
        if tokens is None or busy_us is None:
            return
        before, counters = self._before, (tokens, busy_us)
        if before is None:
            self._before = counters
            return
        more_tokens, more_us = tokens - before[0], busy_us - before[1]
        if more_tokens < 0 or more_us < 0:  # the engine was restarted
            self._before = counters
        elif more_tokens >= _ENGINE_SPEED_MIN_TOKENS and more_us > 0:
            self._before = counters
            if self._speed.observe(more_tokens, more_us / 1e6):
                self._learnt_at = now

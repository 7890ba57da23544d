"""Computes how long work takes. It has no clock, so that worker and benchmarks share it.

A rank prefills one prompt after the other, at a fixed speed, and only tokens that its cache
lacks. Decoding runs beside that, every request at its own steady pace. Real engines slow down a
little as the batch grows, and need time to bring pages back from the host. Both are left out
to keep the arithmetic of tests simple.
"""

import msgspec

__all__ = ["TimeModel", "reusable_tokens"]


def reusable_tokens(held_tokens: int, prompt_tokens: int, page_size: int) -> int:
    """The cached tokens of a prompt that need no prefill.

    The last token of a prompt is always computed, since the first output token comes from
    it. Only whole pages are reused, so a prompt that is held in full loses its last page.
    """
    return min(held_tokens, max(0, prompt_tokens - 1) // page_size * page_size)


class TimeModel(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of one rank; times are seconds on the caller's clock."""

    prefill_tokens_per_second: float
    seconds_per_token: float

    def prefill_starts_at(self, arrived_at: float, free_at: float) -> float:
        """When a request's prefill starts on a rank whose last prefill ends at `free_at`."""
        return max(arrived_at, free_at)

    def first_token_at(self, prefill_starts_at: float, uncached_tokens: int) -> float:
        """When prefill ends and the headers of a streamed answer are sent."""
        return prefill_starts_at + self.prefill_seconds(uncached_tokens)

    def prefill_seconds(self, uncached_tokens: int) -> float:
        return uncached_tokens / self.prefill_tokens_per_second

    def token_at(self, first_token_at: float, position: int, pace: float | None = None) -> float:
        """When the output token at `position` is due; `pace` replaces `seconds_per_token`."""
        return first_token_at + position * (self.seconds_per_token if pace is None else pace)

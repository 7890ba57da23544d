"""How long work takes, apart from any clock, so that worker and simulated-time bench agree.

A rank prefills one prompt after the other, at a fixed speed and only what its cache lacks.
Decoding runs beside that, every request at its own steady pace. Real engines slow a little
as the batch grows, and take a moment to bring pages back from the host; that is left out, so
that the arithmetic of a test stays easy.
"""

import msgspec

__all__ = ["TimeModel", "reusable_tokens"]


def reusable_tokens(held_tokens: int, prompt_tokens: int, page_size: int) -> int:
    """How much of what the cache holds of a prompt spares prefill.

    The last token of a prompt is always computed, since the first output token comes from
    it, and what is reused are whole pages: a prompt held in full loses its last page.
    """
    return min(held_tokens, max(0, prompt_tokens - 1) // page_size * page_size)


class TimeModel(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of one rank; moments are seconds on whatever clock the caller has."""

    prefill_tokens_per_second: float
    seconds_per_token: float

    def prefill_starts_at(self, arrived_at: float, free_at: float) -> float:
        """When a request's turn comes on a rank whose last prefill ends at `free_at`."""
        return max(arrived_at, free_at)

    def first_token_at(self, prefill_starts_at: float, uncached_tokens: int) -> float:
        """When prefill ends: the moment a streamed answer's headers leave."""
        return prefill_starts_at + self.prefill_seconds(uncached_tokens)

    def prefill_seconds(self, uncached_tokens: int) -> float:
        return uncached_tokens / self.prefill_tokens_per_second

    def token_at(self, first_token_at: float, position: int, pace: float | None = None) -> float:
        """When the output token at `position` is due; `pace` replaces `seconds_per_token`."""
        return first_token_at + position * (self.seconds_per_token if pace is None else pace)

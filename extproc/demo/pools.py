"""What serves a policy's model: plain workers, or some that prefill and others that decode.

Slow enough that waiting for prefill decides the time to the first token, and a cache that does
not hold everything everybody says: as with real engines, on another scale.
"""

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

__all__ = ["PAIR_WORKERS_MIN", "Part", "Pool", "divided_pool", "plain_pool"]

PAIR_WORKERS_MIN: Final = 2

_OPTIONS: Final = {
    "--prefill-tokens-per-second": "3000",
    "--decode-milliseconds-per-token": "15",
    "--max-total-num-tokens": "16000",
    "--page-size": "16",
    "--kv-events-port": "0",
}
# Half of the workers compute all prompts. As fast as plain ones they would never catch up.
_PREFILL_OPTIONS: Final = _OPTIONS | {
    "--disaggregation-mode": "prefill",
    "--disaggregation-bootstrap-port": "0",
    "--prefill-tokens-per-second": "6000",
}
# Room for all that runs, so that nobody waits for a decode worker.
_DECODE_OPTIONS: Final = _OPTIONS | {
    "--disaggregation-mode": "decode",
    "--max-total-num-tokens": "64000",
    "--max-running-requests": "256",
}


class Part(Struct, frozen=True):
    """So many workers with the same options of the simulator; `name` is "" for plain ones."""

    name: str
    workers: int
    options: Mapping[str, str]


class Pool(Struct, frozen=True):
    """The workers of one model.

    The first part computes the prompts. `label` says, before the word "workers", how many there
    are.
    """

    label: str
    parts: tuple[Part, ...]

    @property
    def apart(self) -> bool:
        """Whether one worker prefills and another decodes."""
        return len(self.parts) > 1

    @property
    def prefilling(self) -> int:
        """How many workers a prompt can be computed by."""
        return self.parts[0].workers


def plain_pool(workers: int) -> Pool:
    """Workers that prefill and decode."""
    return Pool(str(workers), (Part("", workers, _OPTIONS),))


def divided_pool(workers: int) -> Pool:
    """Half of at least two workers for prefill, and the odd one; the others decode."""
    decode = workers // 2
    prefill = workers - decode
    return Pool(
        f"{prefill} prefill and {decode} decode",
        (
            Part("prefill", prefill, _PREFILL_OPTIONS),
            Part("decode", decode, _DECODE_OPTIONS),
        ),
    )

"""The workers of a policy's model: plain ones, or prefill and decode workers.

They are so slow that queues for prefill decide the time to the first token, and their caches
are too small for all conversations: as with real engines, on another scale.
"""

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from extproc.simulator.settings import EngineName

__all__ = ["PAIR_WORKERS_MIN", "Part", "Pool", "divided_pool", "plain_pool"]

PAIR_WORKERS_MIN: Final = 2

_OPTIONS: Final = {
    "--prefill-tokens-per-second": "3000",
    "--decode-milliseconds-per-token": "15",
    "--max-total-num-tokens": "16000",
    "--page-size": "16",
    "--kv-events-port": "0",
}
# Half of the workers compute all prompts, so they must be faster than plain ones.
_FAST_PREFILL: Final = {"--prefill-tokens-per-second": "6000"}
# Enough room for all running requests, so that no request waits for a decode worker.
_ROOMY: Final = {"--max-total-num-tokens": "64000", "--max-running-requests": "256"}
_SGLANG_PREFILL: Final = {
    "--disaggregation-mode": "prefill",
    "--disaggregation-bootstrap-port": "0",
}
_SGLANG_DECODE: Final = {"--disaggregation-mode": "decode"}
# Each request says which of them prefills, so they have no roles.
_VLLM_PAIR: Final = {"--pd-protocol": "nixl"}


class Part(Struct, frozen=True):
    """Workers with the same simulator options; `name` is "" for plain ones."""

    name: str
    workers: int
    options: Mapping[str, str]


class Pool(Struct, frozen=True):
    """The workers of one model.

    The first part computes the prompts. `label` is the number of workers as text, to stand
    before the word "workers".
    """

    label: str
    parts: tuple[Part, ...]

    @property
    def apart(self) -> bool:
        """True if one worker prefills and another decodes."""
        return len(self.parts) > 1

    @property
    def prefilling(self) -> int:
        """The number of workers that can compute a prompt."""
        return self.parts[0].workers


def plain_pool(workers: int, engine: EngineName = "sglang") -> Pool:
    """Workers that prefill and decode."""
    return Pool(str(workers), (Part("", workers, _OPTIONS | {"--engine": engine}),))


def divided_pool(workers: int, engine: EngineName = "sglang") -> Pool:
    """Half of at least two workers prefill, rounded up; the others decode."""
    decode = workers // 2
    prefill = workers - decode
    common = _OPTIONS | {"--engine": engine}
    first, second = (
        (_VLLM_PAIR, _VLLM_PAIR) if engine == "vllm" else (_SGLANG_PREFILL, _SGLANG_DECODE)
    )
    return Pool(
        f"{prefill} prefill and {decode} decode",
        (
            Part("prefill", prefill, common | _FAST_PREFILL | first),
            Part("decode", decode, common | _ROOMY | second),
        ),
    )

"""Prefill and decode workers in pairs, and the two legs of a request."""

import asyncio
from typing import Any

from extproc.simulator.settings import SimulatorSettings

from .clients import Launch, SimulatedWorker

COMPLETIONS = "/v1/completions"
GENERATE = "/generate"
SOON_SECONDS = 0.2  # patience of workers whose time-outs a test waits for


def sided(mode: str, **fields: Any) -> SimulatorSettings:
    """A disaggregated worker that computes in no time; prefill listens at a free port."""
    defaults: dict[str, Any] = {
        "disaggregation_mode": mode,
        "disaggregation_bootstrap_port": 0,
        "prefill_tokens_per_second": 1e9,
        "decode_milliseconds_per_token": 0,
    }
    return SimulatorSettings(**(defaults | fields))


class Pair:
    """A prefill and a decode worker."""

    def __init__(self, prefill: SimulatedWorker, decode: SimulatedWorker) -> None:
        self.prefill = prefill
        self.decode = decode

    def body(self, room: Any = 7, **fields: Any) -> dict[str, Any]:
        """The body that both legs of one request are sent."""
        defaults = {
            "text": "x" * 130,
            "sampling_params": {"max_new_tokens": 3},
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.prefill.simulator.bootstrap_port,
            "bootstrap_room": room,
        }
        return defaults | fields

    async def both(self, body: Any, path: str = GENERATE) -> list[tuple[int, Any]]:
        """The answers of both legs, sent at once: each a status and a body."""
        workers = (self.prefill, self.decode)
        return [*await asyncio.gather(*(worker.post(path, body) for worker in workers))]

    async def is_empty(self) -> None:
        """Wait until nothing of either leg is left."""
        for worker in (self.prefill, self.decode):
            await worker.until(rooms=0, running=0, waiting=0)


async def pair(
    launch: Launch, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None
) -> Pair:
    return Pair(
        await launch(sided("prefill", **(prefill or {}))),
        await launch(sided("decode", **(decode or {}))),
    )


def pd(stats: Any) -> tuple[int, int, int]:
    """(transferred, timed out, aborted)."""
    counts = stats["pd"]
    assert set(counts) == {"transferred", "timed_out", "aborted"}
    return counts["transferred"], counts["timed_out"], counts["aborted"]

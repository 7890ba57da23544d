"""Deadlines of many streams, kept by one task.

A timer per request would cost more than the decision, so one task looks at all streams that
have a deadline, twenty times a second.
"""

import asyncio
import time
from itertools import islice
from typing import Final, Protocol

__all__ = ["Deadlines", "TimesOut"]

_LOOK_SECONDS: Final = 0.05
_LOOKED_AT_MAX: Final = 32


class TimesOut(Protocol):
    """Something with a deadline."""

    @property
    def waits_for_client(self) -> bool:
        """True while only the client can do the next step."""

    def timed_out(self) -> None:
        """The deadline has passed."""


class Deadlines(dict[TimesOut, float]):
    """When the deadline of a stream is due, in seconds of time.monotonic; one for each at most.

    It is a dict because requests ask it several times each: a method call would cost more.
    """

    def start(self, stream: TimesOut, seconds: float) -> float:
        """Start a deadline, in place of the stream's last one; returns the time now."""
        now = time.monotonic()
        self[stream] = now + seconds
        return now

    def end(self, stream: TimesOut) -> None:
        """The stream is in time, or over; idempotent."""
        self.pop(stream, None)

    def end_waiting(self, due_before: float) -> None:
        """Time out one that waits for its client and is due before this, among the oldest few."""
        for stream, due in islice(self.items(), _LOOKED_AT_MAX):
            if stream.waits_for_client and due < due_before:
                self.end(stream)
                stream.timed_out()
                return

    async def run(self) -> None:
        """Call `timed_out` of streams that are late, once each; runs until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            for stream in [stream for stream, due in self.items() if due <= now]:
                self.end(stream)
                stream.timed_out()

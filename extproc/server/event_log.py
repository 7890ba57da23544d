"""Writes the log lines of streams, each kind in bounded number.

Clients cause these lines. Without a bound, a client that is refused as fast as it can send would
fill the disk, and logging would cost more than refusing.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

import structlog

from extproc.routing.lease import Lease
from extproc.routing.pd.pair import Pair
from extproc.server.steps import LogEvent

__all__ = ["EventLog", "log_decision"]

_log = structlog.get_logger()

_PERIOD_SECONDS: Final = 10.0
# Lines of one kind in a period; the others are counted.
_LINES_MAX: Final = 20

# The event and the error code.
_Kind = tuple[str, object]


class EventLog:
    """Bounds the lines of each event and error code, of which there are few."""

    def __init__(self) -> None:
        self._lines: dict[_Kind, int] = {}
        self._period: asyncio.TimerHandle | None = None

    def write(self, events: Iterable[LogEvent]) -> None:
        """Log the events, or count those that are too many; needs a running event loop."""
        if self._period is None:
            self._period = asyncio.get_running_loop().call_later(_PERIOD_SECONDS, self.flush)
        for level, event, fields in events:
            kind = (event, fields.get("code"))
            lines = self._lines[kind] = self._lines.get(kind, 0) + 1
            if lines <= _LINES_MAX:
                getattr(_log, level)(event, **fields)

    def flush(self) -> None:
        """End the period: say how many lines were left out."""
        if self._period is not None:
            self._period.cancel()
            self._period = None
        lines, self._lines = self._lines, {}
        for (event, code), count in lines.items():
            if count > _LINES_MAX:
                _log.warning("log_lines_left_out", of=event, code=code, count=count - _LINES_MAX)


def log_decision(request_id: str, lease: Lease | Pair, attempt: int) -> None:
    """Log where a request goes; at debug level, so without a bound."""
    decision = lease.decision
    _log.debug(
        "routed",
        request_id=request_id,
        model=decision.model,
        adapter=decision.adapter,
        policy=decision.policy,
        reason=decision.reason,
        worker=decision.worker_url,
        cached_tokens=decision.cached_tokens,
        total_tokens=decision.total_tokens,
        predicted_tokens=decision.predicted_tokens,
        attempt=attempt,
    )

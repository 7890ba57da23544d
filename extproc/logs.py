"""Logging: key-value events, as text or JSON, at the configured level.

It is set up once, before anything logs, so that format and level apply from the first line. A
thread writes the lines: the reader of stderr may stop reading, and clients can cause many lines,
but neither may delay the event loop.
"""

import atexit
import contextlib
import logging
import queue
import sys
import threading
from typing import TextIO, cast

import structlog

from extproc.config.schema import ObservabilityConfig

__all__ = ["configure_logging", "set_log_level"]

_BACKLOG_LINES = 10_000
_CLOSE_SECONDS = 2.0
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _BackgroundStream:
    """A text stream with a bounded backlog; lines beyond it are dropped and counted."""

    def __init__(self, target: TextIO) -> None:
        self._target = target
        self._lines: queue.Queue[str | None] = queue.Queue(_BACKLOG_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, text: str) -> int:
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """The thread flushes when it has caught up."""

    def close(self) -> None:
        """Write the rest of the backlog, within a time limit."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                text += f"event='log_lines_dropped' count={dropped}\n"
            # Requests are served even if stderr is closed.
            with contextlib.suppress(OSError, ValueError):
                self._target.write(text)
                if self._lines.empty():
                    self._target.flush()


def configure_logging(config: ObservabilityConfig) -> None:
    """Send all events, of this service and of libraries, to stderr."""
    stream = _BackgroundStream(sys.stderr)
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if config.log_format == "json"
        else [
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(
                key_order=["timestamp", "level", "event"], drop_missing=True
            ),
        ]
    )
    structlog.configure(
        processors=[*shared, *renderers],
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, stream)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(cast(TextIO, stream))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_log_level(config)


def set_log_level(config: ObservabilityConfig) -> None:
    """Log at the configured level from now on."""
    level = _LEVELS[config.log_level]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    # The debug output of libraries (asyncio, grpc) can contain request data: only warnings pass.
    logging.getLogger().setLevel(max(level, logging.WARNING))

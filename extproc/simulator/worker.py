"""The state of one simulated worker: what a process of the engine holds, and its restarts."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from extproc.simulator.engine import Engine
from extproc.simulator.faults import FaultBoard
from extproc.simulator.journal import Journal
from extproc.simulator.kv_publisher import KvPorts, KvPublisher
from extproc.simulator.settings import DisaggregationMode, SimulatorSettings
from extproc.simulator.tokens import Tokenizer

__all__ = ["Worker"]


class Worker:
    """The state of one simulated worker, shared by every handler."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.settings = settings
        self.tokenizer = Tokenizer(settings.tokenizer_path)
        self.faults = FaultBoard()
        self.journal = Journal()
        self._handlers: set[asyncio.Task[object]] = set()
        self._start: asyncio.Task[None] | None = None
        self._kv_ports: KvPorts | None = None  # those of the first start, for all that follow
        self._renew()

    def _renew(self) -> None:
        settings = self.settings
        self.publisher = None if settings.kv_events_port is None else KvPublisher(settings)
        self.engine = Engine(settings, output_ids=self.tokenizer.output, observer=self.publisher)
        self.mode: DisaggregationMode = settings.disaggregation_mode
        self.started_at = time.monotonic()
        self.startup_time = time.time()
        self._is_up = False

    async def start(self) -> None:
        """Begin to publish, if it is to; raises OSError when a port can not be used."""
        if self.publisher is not None:
            await self.publisher.start(self.engine.load, self._kv_ports)
            self._kv_ports = self.publisher.ports
            self.engine.announce()
        self._is_up = True

    def stop(self) -> None:
        if self._start is not None:
            self._start.cancel()
        if self.publisher is not None:
            self.publisher.stop()

    async def restart(self) -> None:
        """Die and come back at the same ports with nothing remembered but the journal.

        Clients of requests that run, health checks among them, see their connections break.
        Raises OSError when somebody else has taken a port of the KV sockets.
        """
        own = asyncio.current_task()
        while others := self._handlers - {own}:
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        self.stop()
        self._renew()
        # Whoever asked for it may leave before it is done.
        self._start = asyncio.create_task(self.start())
        await asyncio.shield(self._start)

    @property
    def is_starting(self) -> bool:
        age = time.monotonic() - self.started_at
        return not self._is_up or age < self.settings.startup_delay_seconds

    @contextmanager
    def handling(self) -> Iterator[None]:
        """The present task handles a request here, which `break_off` would have to end."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("requests are handled in tasks")
        self._handlers.add(task)
        try:
            yield
        finally:
            self._handlers.discard(task)

    def break_off(self) -> None:
        """End all running requests at once, as a worker does that is killed."""
        for task in self._handlers:
            task.cancel()

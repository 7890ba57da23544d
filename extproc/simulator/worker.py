"""The state of one simulated worker, which stands for one engine process, and its restarts."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from extproc.simulator.adapters import Adapters
from extproc.simulator.bodies import readers
from extproc.simulator.engine import Engine
from extproc.simulator.faults import FaultBoard
from extproc.simulator.journal import Journal
from extproc.simulator.kv_publisher import KvPorts, KvPublisher
from extproc.simulator.legs import KvExchange
from extproc.simulator.nixl_pd import NixlPd
from extproc.simulator.settings import DisaggregationMode, SimulatorSettings
from extproc.simulator.sglang_pd import SglangPd
from extproc.simulator.tokens import Tokenizer
from extproc.simulator.vllm_bodies import vllm_readers
from extproc.simulator.vllm_tokens import VllmTokenizer

__all__ = ["Worker"]


class Worker:
    """The state of one simulated worker, shared by every handler."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self.settings = settings
        self.use_tokenizer(settings.tokenizer_path)
        self.readers = vllm_readers if settings.is_vllm else readers
        self.faults = FaultBoard()
        self.journal = Journal()
        self._handlers: set[asyncio.Task[object]] = set()
        self._reviving = asyncio.Lock()
        self._revivals: set[asyncio.Task[None]] = set()
        self._kv_ports: KvPorts | None = None  # of the first start; restarts use them again
        self._pd_port: int | None = None  # of the first start, too
        self._renew()

    def use_tokenizer(self, path: str | None) -> None:
        """From now on, encode and render with these files."""
        settings = self.settings
        self.tokenizer: Tokenizer = (
            VllmTokenizer(path, settings.context_length, settings.content_format)
            if settings.is_vllm
            else Tokenizer(path)
        )

    def _renew(self) -> None:
        settings = self.settings
        self.publisher = None if settings.kv_events_port is None else KvPublisher(settings)
        self.engine = Engine(settings, output_ids=self.tokenizer.output, observer=self.publisher)
        self.mode: DisaggregationMode = settings.disaggregation_mode
        self.pd = self._new_pd()
        self.started_at = time.monotonic()
        self.startup_time = time.time()
        # Adapters that were loaded at run time are gone after a restart.
        self.adapters = Adapters(settings.model, settings.lora)
        self._is_up = False

    def _new_pd(self) -> KvExchange:
        settings, port = self.settings, self._pd_port
        if settings.pd_protocol == "nixl":
            return NixlPd(settings, settings.nixl_side_channel_port if port is None else port)
        return SglangPd(settings, settings.disaggregation_bootstrap_port if port is None else port)

    async def start(self) -> None:
        """Begin to publish KV events and to serve KV, where configured.

        Raises OSError when a port cannot be used, and then leaves nothing running.
        """
        try:
            await self._listen()
        except BaseException:
            await self._close()
            raise
        self._is_up = True

    async def _listen(self) -> None:
        await self.pd.start()
        self._pd_port = self.pd.port
        if self.publisher is not None:
            await self.publisher.start(self.engine.load, self._kv_ports)
            self._kv_ports = self.publisher.ports
            self.engine.announce()

    async def stop(self) -> None:
        if self._revivals:
            await asyncio.wait(self._revivals)
        await self._close()

    async def _close(self) -> None:
        if self.publisher is not None:
            self.publisher.stop()
        await self.pd.stop()

    async def switch_role(self, mode: DisaggregationMode) -> None:
        """Switch to the other role; raises OSError when the port for it is taken."""
        await self.pd.switch(mode)
        self.mode = mode
        self._pd_port = self.pd.port

    @property
    def bootstrap_port(self) -> int:
        """The real port once it has listened, else the setting."""
        if self.settings.pd_protocol == "sglang":
            return self.pd.port
        return self.settings.disaggregation_bootstrap_port

    @property
    def side_channel_port(self) -> int | None:
        return self.pd.port if self.settings.pd_protocol == "nixl" else None

    async def restart(self) -> None:
        """Restart at the same ports; only the journal is kept.

        The connections of running requests, health checks included, break. Raises OSError
        when another process has taken a port of the worker.
        """
        # The client of the restart may disconnect before it is done.
        revival = asyncio.create_task(self._revive(asyncio.current_task()))
        self._revivals.add(revival)
        revival.add_done_callback(self._revivals.discard)
        await asyncio.shield(revival)

    async def _revive(self, asker: asyncio.Task[object] | None) -> None:
        async with self._reviving:
            self._is_up = False
            while others := self._handlers - {asker}:
                for task in others:
                    task.cancel()
                await asyncio.wait(others)
            await self._close()
            self._renew()
            await self.start()

    @property
    def is_starting(self) -> bool:
        age = time.monotonic() - self.started_at
        return not self._is_up or age < self.settings.startup_delay_seconds

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Register the present task as a request that `break_off` must end."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("requests are handled in tasks")
        self._handlers.add(task)
        try:
            yield
        finally:
            self._handlers.discard(task)

    def break_off(self) -> None:
        """End all running requests at once, like a killed worker."""
        for task in self._handlers:
            task.cancel()

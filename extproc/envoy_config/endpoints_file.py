"""Keeps the file up to date from which Envoy reads the workers' endpoints.

A worker is chosen only when Envoy knows its address. Envoy does not say what it knows, so that is
what was last written, after a moment in which Envoy reads it. Separate from the text of the file,
since it writes and waits.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import structlog

from extproc.clock import Clock, wait_for_first
from extproc.config.schema import Config
from extproc.envoy_config.clusters import worker_urls
from extproc.envoy_config.endpoints import Endpoint, endpoints_text, read_endpoints
from extproc.worker_url import format_endpoint
from extproc.workers.observer import WorkerObserver
from extproc.workers.registry import WorkerRegistry

__all__ = ["EndpointsFile", "configured_endpoints"]

_log = structlog.get_logger()

# Envoy is notified of the new file at once, and then updates its threads.
_NOTICE_SECONDS: Final = 0.5
# Several workers that change together make one file. A request that was just decided for a
# worker that has left reaches Envoy before the file does.
_GATHER_SECONDS: Final = 0.2
_RETRY_SECONDS: Final = 2.0
# Without the file Envoy cannot be restarted.
_LOOK_SECONDS: Final = 5.0
_MODE: Final = 0o644


class EndpointsFile(WorkerObserver):
    """The file at `path`, with the endpoints of Envoy's cluster of workers.

    `known_changed` is called when other workers may be chosen than before.
    """

    def __init__(
        self,
        path: Path,
        cluster: str,
        registry: WorkerRegistry,
        clock: Clock,
        *,
        all_named: Callable[[], bool],
        known_changed: Callable[[], None],
    ) -> None:
        """`all_named` is true once discovery has named all workers of the start."""
        self._path = path
        self._cluster = cluster
        self._registry = registry
        self._clock = clock
        self._all_named = all_named
        self._known_changed = known_changed
        self._workers_changed = asyncio.Event()
        # What the file holds, and from when on Envoy knows it.
        self._known_at: dict[Endpoint, float] = {}
        self._known: frozenset[str] = frozenset()
        self._written = False
        registry.limit_to(self._known)

    def workers_changed(self) -> None:
        self._workers_changed.set()

    async def run(self, configured: Iterable[Endpoint]) -> None:
        """Keep the file up to date, for ever.

        Envoy has read a file that exists, so it is taken over. Without a file Envoy cannot start,
        so one with the `configured` endpoints is written at once.
        """
        now = self._clock.monotonic()
        found = await asyncio.to_thread(self._read)
        if found is not None:
            self._known_at = dict.fromkeys(found, now)
            self._written = bool(found)
        else:
            await self._write(frozenset(configured))
        while True:
            written = await self._write(self._wanted())
            await self._change(self._mark_known() if written else _RETRY_SECONDS)
            self._written = self._written and await asyncio.to_thread(self._path.exists)

    def _wanted(self) -> frozenset[Endpoint]:
        """All workers with an address; until all are named, also those of the file so far."""
        wanted = {
            Endpoint(worker.address, worker.url)
            for worker in self._registry
            if worker.address is not None
        }
        if not self._all_named():
            wanted |= self._known_at.keys()
        return frozenset(wanted)

    async def _write(self, wanted: frozenset[Endpoint]) -> bool:
        """Write the file if its content changes; returns False if that failed."""
        if self._written and wanted == self._known_at.keys():
            return True
        # Not known from now on, not from when the file is there.
        self._known_at = {one: at for one, at in self._known_at.items() if one in wanted}
        self._mark_known()
        try:
            await asyncio.to_thread(self._replace, endpoints_text(self._cluster, wanted))
        except OSError as error:
            _log.error("endpoints_not_written", file=str(self._path), error=error.strerror)
            return False
        self._written = True
        known_at = self._clock.monotonic() + _NOTICE_SECONDS
        self._known_at = {one: self._known_at.get(one, known_at) for one in wanted}
        _log.info("endpoints_written", file=str(self._path), workers=len(wanted))
        return True

    def _mark_known(self) -> float:
        """Let the workers be chosen that Envoy knows by now.

        Returns the seconds until it knows another one, or until the file is looked at again.
        """
        now = self._clock.monotonic()
        known = frozenset(one.address for one, at in self._known_at.items() if at <= now)
        if known != self._known:
            self._known = known
            self._registry.limit_to(known)
            self._known_changed()
        later = [at - now for at in self._known_at.values() if at > now]
        return min([*later, _LOOK_SECONDS])

    async def _change(self, seconds: float) -> None:
        """Return when workers have changed, or after this time."""
        await wait_for_first(self._workers_changed.wait(), self._clock.sleep(seconds))
        if self._workers_changed.is_set():
            await self._clock.sleep(_GATHER_SECONDS)
            self._workers_changed.clear()

    def _read(self) -> frozenset[Endpoint] | None:
        """What the file holds, None if it does not exist."""
        try:
            return read_endpoints(self._path.read_bytes())
        except OSError:
            return None

    def _replace(self, text: bytes) -> None:
        """Envoy watches the file for being replaced; so it never reads half of one."""
        beside = self._path.with_name(f".{self._path.name}.new")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _MODE)
        with open(descriptor, "wb") as file:
            file.write(text)
        os.replace(beside, self._path)


def configured_endpoints(config: Config) -> list[Endpoint]:
    """The configured workers whose addresses need no resolution."""
    return [
        Endpoint(format_endpoint(url.host, url.port), str(url))
        for url in worker_urls(config)
        if url.is_ip
    ]

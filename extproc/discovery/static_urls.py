"""Discovery from a list in the configuration, which may be replaced by another one."""

import asyncio
from collections.abc import AsyncIterator

from extproc.config.schema import DnsConfig, StaticUrlsConfig
from extproc.config.worker_urls import normalised
from extproc.worker_url import WorkerUrl, parse_worker_url
from extproc.workers.source import Added, Listed, Removed, WorkerEvent
from extproc.workers.worker import Role, WorkerSpec, configured_spec

__all__ = ["StaticUrls", "listed_urls"]


class StaticUrls:
    """A WorkerSource; the configuration has checked the URLs."""

    def __init__(self, config: StaticUrlsConfig) -> None:
        self._specs = _specs(config)
        self._events: asyncio.Queue[WorkerEvent] = asyncio.Queue()
        for spec in self._specs.values():
            self._events.put_nowait(Added(spec))
        self._events.put_nowait(Listed())

    def replace(self, config: StaticUrlsConfig) -> None:
        """Take over another list: `events` has what differs."""
        before, self._specs = self._specs, _specs(config)
        for worker_id in before:
            if worker_id not in self._specs:
                self._events.put_nowait(Removed(worker_id))
        for spec in self._specs.values():
            known = before.get(spec.id)
            if known is not None and known != spec:
                # A configured role says what the engine was started as: it is another one now.
                self._events.put_nowait(Removed(spec.id))
            if known != spec:
                self._events.put_nowait(Added(spec))

    async def events(self) -> AsyncIterator[WorkerEvent]:
        # A source never ends; an end would look like a failure.
        while True:
            yield await self._events.get()


def _specs(config: StaticUrlsConfig) -> dict[str, WorkerSpec]:
    """The workers by id, which is the URL in its normal form."""
    return {str(url): configured_spec(url, role) for url, role in listed_urls(config)}


def listed_urls(config: StaticUrlsConfig | DnsConfig) -> list[tuple[WorkerUrl, Role | None]]:
    """The URLs of a list, each with its role if the configuration names one."""
    roles: dict[str, Role] = {}
    roles |= dict.fromkeys(normalised(config.prefill_urls), "prefill")
    roles |= dict.fromkeys(normalised(config.decode_urls), "decode")
    urls = [parse_worker_url(text) for text in config.urls]
    return [(url, roles.get(str(url))) for url in urls]

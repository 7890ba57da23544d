"""Discovery from a list in the configuration: workers never join later or leave."""

import asyncio
from collections.abc import AsyncIterator

from extproc.config.schema import StaticUrlsConfig
from extproc.worker_url import parse_worker_url
from extproc.workers.source import Added, Listed, WorkerEvent
from extproc.workers.worker import Role, WorkerSpec

__all__ = ["StaticUrls"]


class StaticUrls:
    """A WorkerSource; the configuration has checked the URLs."""

    def __init__(self, config: StaticUrlsConfig) -> None:
        self._urls = [parse_worker_url(url) for url in config.urls]
        self._roles: dict[str, Role] = {}
        for url in config.prefill_urls:
            self._roles[str(parse_worker_url(url))] = "prefill"
        for url in config.decode_urls:
            self._roles[str(parse_worker_url(url))] = "decode"

    async def events(self) -> AsyncIterator[WorkerEvent]:
        for url in self._urls:
            role = self._roles.get(str(url))
            yield Added(
                WorkerSpec(
                    id=str(url),
                    url=url,
                    role=role or "plain",
                    role_is_configured=role is not None,
                )
            )
        yield Listed()
        # A source never ends; an end would look like a failure.
        await asyncio.Event().wait()

"""Workers from a list in the configuration: all there at the start, none ever leaves."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from extproc.worker_url import parse_worker_url
from extproc.workers.source import Added, Listed, WorkerEvent
from extproc.workers.worker import WorkerSpec

__all__ = ["StaticUrls"]


class StaticUrls:
    """WorkerSource over URLs that the configuration has checked."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = [parse_worker_url(url) for url in urls]

    async def events(self) -> AsyncIterator[WorkerEvent]:
        for url in self._urls:
            yield Added(WorkerSpec(id=str(url), url=url))
        yield Listed()
        # Nothing more will come; ending would look like a broken source.
        await asyncio.Event().wait()

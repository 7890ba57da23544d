"""Workers that an operator adds while the service runs, beside those of discovery.

They are for installations without a cluster, and for a quick trial. They belong to this process
alone: another replica does not know them, and they are gone after a restart. The worker of
discovery counts more: where both name the same URL, that of discovery stays.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

import msgspec
import structlog

from extproc.errors import ServiceError
from extproc.worker_url import WorkerUrl
from extproc.workers.source import Added, Removed, Vanished, WorkerEvent, WorkerSource
from extproc.workers.worker import Role, WorkerSpec, configured_spec

__all__ = ["RuntimeWorkerError", "RuntimeWorkers"]

_log = structlog.get_logger()

_ID_PREFIX: Final = "runtime/"
# A backend can have thousands of events at once; requests go on in between.
_EVENTS_A_TURN: Final = 8


class RuntimeWorkerError(ServiceError):
    """A worker cannot be added or removed; the text is for the operator.

    `is_known` is false only for a worker that is neither an added one nor one of discovery.
    """

    def __init__(self, text: str, *, is_known: bool = True) -> None:
        super().__init__(text)
        self.is_known = is_known


class RuntimeWorkers:
    """A WorkerSource: the events of a backend, and those of the added workers."""

    def __init__(self, source: WorkerSource, *, limit: int) -> None:
        """At most `limit` workers can be added; it may be changed later."""
        self.limit = limit
        self._source = source
        self._added: dict[WorkerUrl, WorkerSpec] = {}
        # The URLs that discovery names, by id.
        self._discovered: dict[str, WorkerUrl] = {}
        self._events: asyncio.Queue[WorkerEvent | None] = asyncio.Queue()

    def __len__(self) -> int:
        return len(self._added)

    @staticmethod
    def is_added(worker_id: str) -> bool:
        """True for the id of a worker that was added here."""
        return worker_id.startswith(_ID_PREFIX)

    def add(self, url: WorkerUrl, role: Role | None, model: str | None) -> None:
        """Add a worker; without a role and a model, the engine says them.

        Raises RuntimeWorkerError if the URL is known already, or if there are too many.
        """
        if url in self._added:
            raise RuntimeWorkerError("this worker was added before; remove it first to change it")
        if url in self._discovered.values():
            raise RuntimeWorkerError("discovery names this worker, so it need not be added")
        if len(self._added) >= self.limit:
            raise RuntimeWorkerError(
                f"{len(self._added)} workers were added; discovery.runtime_workers_max does not "
                "allow more"
            )
        spec = self._added[url] = msgspec.structs.replace(
            configured_spec(url, role),
            id=f"{_ID_PREFIX}{url}",
            model_ids=() if model is None else (model,),
        )
        self._events.put_nowait(Added(spec))

    def remove(self, url: WorkerUrl) -> None:
        """Remove a worker that was added; raises RuntimeWorkerError for any other one."""
        spec = self._added.pop(url, None)
        if spec is not None:
            self._events.put_nowait(Removed(spec.id))
        elif url in self._discovered.values():
            raise RuntimeWorkerError("discovery names this worker; remove it there")
        else:
            raise RuntimeWorkerError("there is no such worker", is_known=False)

    async def events(self) -> AsyncGenerator[WorkerEvent, None]:
        follow = asyncio.create_task(self._follow())
        try:
            while (event := await self._events.get()) is not None:
                yield event
            await follow  # a source never ends, so it has failed
        finally:
            follow.cancel()
            await asyncio.gather(follow, return_exceptions=True)

    async def _follow(self) -> None:
        """Pass the events of the backend on."""
        passed = 0
        try:
            async for event in self._source.events():
                self._note(event)
                self._events.put_nowait(event)
                passed += 1
                if passed % _EVENTS_A_TURN == 0:
                    await asyncio.sleep(0)
        finally:
            self._events.put_nowait(None)

    def _note(self, event: WorkerEvent) -> None:
        match event:
            case Added(spec):
                self._discovered[spec.id] = spec.url
                if (added := self._added.pop(spec.url, None)) is not None:
                    _log.info("runtime_worker_replaced", worker=str(spec.url))
                    self._events.put_nowait(Removed(added.id))
            case Removed(worker_id):
                self._discovered.pop(worker_id, None)
            case Vanished(spec):
                self._discovered.pop(spec.id, None)

"""How a worker processes a request: as a whole, or as one of two legs.

A whole request is computed and answered by one worker. A disaggregated one is prefilled by
one worker and decoded by another; `sglang_pd` and `nixl_pd` transfer the KV between them.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from extproc.simulator.bodies import InferenceRequest
from extproc.simulator.errors import ApiError
from extproc.simulator.generation import Job
from extproc.simulator.split import Output

__all__ = ["KvExchange", "Leg", "RemotePrefill", "TransferError", "Transfers", "Wait"]


class TransferError(Exception):
    """The KV cannot be fetched, and waiting would not help."""


class Wait:
    """One request that waits in its rooms; `done` counts rooms whose KV was transferred."""

    def __init__(self, rooms: int) -> None:
        self.rooms = rooms
        self.done = 0


class Transfers:
    """Counts a worker's open rooms, and closed ones by outcome."""

    def __init__(self, timeout_seconds: float) -> None:
        self.rooms = 0
        self.transferred = 0
        self.timed_out = 0
        self.aborted = 0
        self._timeout_seconds = timeout_seconds

    @contextmanager
    def waiting(self, rooms: int) -> Iterator[Wait]:
        """Count this number of rooms as open until the context ends, then by outcome.

        A room that is left without an error and without its KV belonged to an aborted request.
        """
        wait = Wait(rooms)
        self.rooms += rooms
        try:
            yield wait
        except TimeoutError as error:
            self.timed_out += rooms - wait.done
            raise ApiError(
                500, f"KV transfer failed: no partner came in {self._timeout_seconds:g} seconds"
            ) from error
        except TransferError as error:
            raise ApiError(500, f"KV transfer failed: {error}") from error
        except asyncio.CancelledError:
            self.aborted += rooms - wait.done
            raise
        else:
            self.aborted += rooms - wait.done
        finally:
            self.rooms -= rooms
            self.transferred += wait.done

    def patience(self) -> asyncio.Timeout:
        return asyncio.timeout(self._timeout_seconds)


class Leg:
    """A whole request: the worker prefills and decodes it."""

    def jobs(self, job: Job) -> list[Job]:
        """The jobs for the engine; more than one for a batch on several ranks."""
        return [job]

    async def prefill(self, generation: Output) -> None:
        """Return when the first token may be sent, or the request is aborted.

        Raises ApiError if neither can happen.
        """
        await generation.prefill()

    def finish(self, generation: Output) -> dict[str, Any]:
        """The further fields of the answer; called after the last token."""
        return {}


class RemotePrefill(Leg):
    """The leg that decodes a prompt that another worker has prefilled."""

    def __init__(self, transfers: Transfers, rooms: int) -> None:
        self._transfers = transfers
        self._rooms = rooms

    def jobs(self, job: Job) -> list[Job]:
        return [msgspec.structs.replace(job, transferred=True)]

    async def prefill(self, generation: Output) -> None:
        with self._transfers.waiting(self._rooms) as wait:
            async with self._transfers.patience():
                await generation.unless_aborted(self._fetch(wait))
        if not generation.is_aborted:
            generation.kv_arrived()
            await generation.prefill()

    async def _fetch(self, wait: Wait) -> None:
        """Fetch the KV; raises TransferError when that fails."""
        raise NotImplementedError


class KvExchange(Protocol):
    """Transfers KV between this worker and others."""

    transfers: Transfers

    @property
    def port(self) -> int:
        """The port at which others fetch KV: the real one once it listens, else the setting."""

    @property
    def held_requests(self) -> int:
        """Number of answered requests whose blocks wait to be fetched."""

    async def start(self) -> None:
        """Raises OSError when a port cannot be bound."""

    async def stop(self) -> None: ...

    async def switch(self, mode: str) -> None:
        """Take that role; on failure raises OSError and keeps the old one."""

    def leg(self, asked: InferenceRequest) -> Leg:
        """The leg that this worker runs; raises ApiError 400 for contradictory fields."""

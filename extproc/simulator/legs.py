"""What becomes of a request on its way through a worker, as one of two legs or as a whole.

Whole, it is computed and answered here. Disaggregated, one worker computes its prompt and
another its output; how the KV gets from one to the other is told where the protocols are.
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
    """KV that is not to be had, and waiting would not help."""


class Wait:
    """One request that waits in its rooms; `done` of them have their KV transferred."""

    def __init__(self, rooms: int) -> None:
        self.rooms = rooms
        self.done = 0


class Transfers:
    """How many rooms are open on a worker, and how those before them ended."""

    def __init__(self, timeout_seconds: float) -> None:
        self.rooms = 0
        self.transferred = 0
        self.timed_out = 0
        self.aborted = 0
        self._timeout_seconds = timeout_seconds

    @contextmanager
    def waiting(self, rooms: int) -> Iterator[Wait]:
        """Count what becomes of so many rooms, which are open in this context.

        A room that is left without an error and without its KV belongs to an aborted request.
        """
        wait = Wait(rooms)
        self.rooms += rooms
        try:
            yield wait
        except TimeoutError as error:
            self.timed_out += rooms - wait.done
            raise ApiError(
                500, f"KV transfer failed: nobody came in {self._timeout_seconds:g} seconds"
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
    """A whole request: what a worker of its own makes of each."""

    def jobs(self, job: Job) -> list[Job]:
        """What the engine is to do; more than one for a batch on several ranks."""
        return [job]

    async def prefill(self, generation: Output) -> None:
        """Return when the first token may leave, or the request is aborted.

        Raises ApiError when it never will.
        """
        await generation.prefill()

    def finish(self, generation: Output) -> dict[str, Any]:
        """What the answer has besides; called when the last token is out."""
        return {}


class RemotePrefill(Leg):
    """The leg that decodes what another worker has computed."""

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
        """Get the KV; raises TransferError when there is none."""
        raise NotImplementedError


class KvExchange(Protocol):
    """How a worker hands KV to others and takes it from them."""

    transfers: Transfers

    @property
    def port(self) -> int:
        """Where others fetch KV: the real port once it has listened, else the setting."""

    @property
    def held_requests(self) -> int:
        """Requests that are answered and whose blocks wait to be fetched."""

    async def start(self) -> None:
        """Raises OSError when a port can not be had."""

    async def stop(self) -> None: ...

    async def switch(self, mode: str) -> None:
        """Take that role from now on; raises OSError and stays in the old one."""

    def leg(self, asked: InferenceRequest) -> Leg:
        """Raises ApiError 400 for fields that make no sense."""

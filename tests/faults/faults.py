"""The faults of a storm. Each is a context manager: the fault begins, lasts, and ends."""

import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from tests.faults.fleet import Fleet, Worker
from tests.faults.impostors import silent, swallowing, with_wrong_length

__all__ = ["FLEET_FAULTS", "GATEWAY_FAULTS", "KV_FAULTS", "NAME_FAULTS", "WORKER_FAULTS"]

WorkerFault = Callable[[Worker], AbstractAsyncContextManager[None]]
FleetFault = Callable[[Fleet], AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def _killed(worker: Worker) -> AsyncIterator[None]:
    await worker.stop(signal.SIGKILL)
    try:
        yield
    finally:
        await worker.start()


@contextlib.asynccontextmanager
async def _stopped(worker: Worker) -> AsyncIterator[None]:
    """Accepts connections and answers nothing: the system accepts for it."""
    worker.send(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.send(signal.SIGCONT)


@contextlib.asynccontextmanager
async def _half_open(worker: Worker) -> AsyncIterator[None]:
    async with _killed(worker), silent(worker.port):
        yield


@contextlib.asynccontextmanager
async def _wrong_length(worker: Worker) -> AsyncIterator[None]:
    async with _killed(worker), with_wrong_length(worker.port):
        yield


@contextlib.asynccontextmanager
async def _swallowed_syns(worker: Worker) -> AsyncIterator[None]:
    async with _killed(worker):
        with swallowing(worker.port):
            yield


def _simulated(**faults: Any) -> WorkerFault:
    """A fault of the simulator; it stays alive."""

    @contextlib.asynccontextmanager
    async def fault(worker: Worker) -> AsyncIterator[None]:
        await worker.set_faults(**faults)
        try:
            yield
        finally:
            await worker.set_faults()

    return fault


@contextlib.asynccontextmanager
async def _service_killed(fleet: Fleet) -> AsyncIterator[None]:
    await fleet.stack.service.stop(signal.SIGKILL)
    try:
        yield
    finally:
        await fleet.stack.start_service()


@contextlib.asynccontextmanager
async def _service_restarted(fleet: Fleet) -> AsyncIterator[None]:
    await fleet.stack.service.stop()
    await fleet.stack.start_service()
    yield


@contextlib.asynccontextmanager
async def _service_stopped(fleet: Fleet) -> AsyncIterator[None]:
    fleet.stack.service.send(signal.SIGSTOP)
    try:
        yield
    finally:
        fleet.stack.service.send(signal.SIGCONT)


@contextlib.asynccontextmanager
async def _gateway_restarted(fleet: Fleet) -> AsyncIterator[None]:
    envoy = fleet.stack.envoy
    await envoy.stop(signal.SIGKILL)
    await envoy.start()
    await envoy.wait_ready(fleet.stack.envoy_sees_service)
    yield


def _moved(address: str | None) -> FleetFault:
    """The first worker's name gets another address or loses it, and then gets the old one again."""

    @contextlib.asynccontextmanager
    async def fault(fleet: Fleet) -> AsyncIterator[None]:
        assert fleet.names is not None
        fleet.names.move(0, address)
        try:
            yield
        finally:
            fleet.names.move(0, "127.0.0.1")

    return fault


WORKER_FAULTS: Final[Mapping[str, WorkerFault]] = {
    "kill": _killed,
    "hang": _stopped,
    "slow": _simulated(slow_token=0.2),
    "errors": _simulated(status=500),
    "full": _simulated(retry_after=1),
    "reset": _simulated(die_before_headers=True, reset=True),
    "cut": _simulated(die_after_tokens=2, reset=True),
    "half-open": _half_open,
    "swallowed-syns": _swallowed_syns,
    "wrong-length": _wrong_length,
}
# Only for workers that publish KV events.
KV_FAULTS: Final[Mapping[str, WorkerFault]] = {
    "kv-garbage": _simulated(kv_garbage_frames=2000),
    "kv-flood": _simulated(kv_unknown_removals=100_000),
    "kv-gap": _simulated(kv_drop_batches=5),
}
FLEET_FAULTS: Final[Mapping[str, FleetFault]] = {
    "service-kill": _service_killed,
    "service-restart": _service_restarted,
    "service-stop": _service_stopped,
}
# Only for workers with host names.
NAME_FAULTS: Final[Mapping[str, FleetFault]] = {
    "name-moves": _moved("127.0.0.9"),
    "name-goes": _moved(None),
}
# Clients lose their connections in these.
GATEWAY_FAULTS: Final[Mapping[str, FleetFault]] = {"gateway-restart": _gateway_restarted}

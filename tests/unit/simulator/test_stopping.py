"""A worker that stops closes every connection, also those that it is just accepting."""

import asyncio
import contextlib
import socket

import pytest

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings

CONNECTIONS = 20


@pytest.mark.parametrize("turns", range(6))
async def test_a_stop_closes_connections_that_are_being_accepted(turns: int) -> None:
    """`turns` of the event loop pass between the connections and the stop."""
    worker = await start(SimulatorSettings(port=0))
    # Connected by the kernel alone: the event loop does not run meanwhile.
    clients = [
        socket.create_connection(("127.0.0.1", worker.port), timeout=10.0)
        for _ in range(CONNECTIONS)
    ]
    for _ in range(turns):
        await asyncio.sleep(0)
    await worker.stop()
    for client in clients:
        # A connection that was never accepted is reset.
        with client, contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""

"""Binds ZMQ sockets on the ports of a worker's ranks."""

import errno
import random

import zmq

__all__ = ["bind_ranks"]

_ATTEMPTS = 50
# Below the ephemeral ports: on a busy machine few of those are free side by side.
_QUIET_PORTS = range(10_000, 30_000)
_HIGH_WATER_MARK_MESSAGES = 100_000  # as in the engine; room for ten whole replays


def bind_ranks(
    context: "zmq.Context[zmq.Socket[bytes]]", kind: int, host: str, base: int, ranks: int
) -> tuple[list["zmq.Socket[bytes]"], int]:
    """One bound socket for every rank, rank r at `base` + r, and that base.

    `base` 0 picks consecutive free ports. Unsent messages do not delay a close.
    Raises zmq.ZMQError when a port is taken.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        sockets: list[zmq.Socket[bytes]] = []
        try:
            port = base
            if not base and attempt > 1:
                port = random.choice(_QUIET_PORTS)  # noqa: S311 (a port, not a secret)
            for rank in range(ranks):
                sockets.append(_socket(context, kind))
                port = _bind(sockets[-1], host, port + (rank > 0) if port else 0)
        except zmq.ZMQError as error:
            for socket in sockets:
                socket.close()
            if base or attempt == _ATTEMPTS or error.errno not in (errno.EADDRINUSE, errno.EINVAL):
                raise
        else:
            return sockets, port - ranks + 1
    raise AssertionError("unreachable: the last attempt raises or returns")


def _socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.linger = 0
    socket.set_hwm(_HIGH_WATER_MARK_MESSAGES)
    return socket


def _bind(socket: "zmq.Socket[bytes]", host: str, port: int) -> int:
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    socket.bind(f"tcp://{host}:{port or '*'}")
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return int(endpoint.rpartition(":")[2])

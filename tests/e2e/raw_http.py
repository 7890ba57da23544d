"""Sends one request over HTTP/1.0, HTTP/1.1 or HTTP/2, and reads the answer while it still sends.

Envoy answers a body over the limit before it has read all of it. The usual clients go on sending
and then report a broken connection in place of the answer.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import h2.config
import h2.connection
import h2.events

from tests.e2e.conftest import Running

__all__ = ["Answer", "completion", "port_of", "post"]

_SECONDS = 60
_READ_BYTES = 64 * 1024


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def port_of(running: Running) -> int:
    """The port of Envoy."""
    return int(running.stack.config["envoy"]["port"])


def completion(size: int) -> bytes:
    """A body of exactly this size."""
    head, tail = b'{"model":"m","max_tokens":1,"prompt":"', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


async def post(
    port: int,
    path: str,
    body: bytes,
    *,
    version: str = "HTTP/1.1",
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """POST `body` to 127.0.0.1; `version` is the protocol. HTTP/1.0 sends no host of its own.

    Raises ConnectionResetError if there is no answer, TimeoutError if it takes too long.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(_SECONDS):
            exchange = _http2 if version == "HTTP/2" else _http1
            return await exchange(reader, writer, path, body, version, dict(headers or {}))
    finally:
        writer.close()


async def _http1(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    path: str,
    body: bytes,
    version: str,
    headers: dict[str, str],
) -> Answer:
    if version == "HTTP/1.1":
        headers = {"host": "api", "connection": "close", **headers}
    lines = [f"POST {path} {version}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"content-length: {len(body)}", "", ""]

    async def send() -> None:
        writer.write("\r\n".join(lines).encode() + body)
        await writer.drain()

    sending = asyncio.create_task(send())
    raw = b""
    try:
        while piece := await reader.read(_READ_BYTES):
            raw += piece
    except ConnectionResetError:
        pass  # the answer came before
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    if not raw:
        raise ConnectionResetError("closed without an answer")
    head, _, content = raw.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    pairs = (line.partition(": ") for line in rest)
    got = {name.lower(): value for name, _, value in pairs}
    if got.get("transfer-encoding") == "chunked":
        content = _joined_chunks(content)
    return Answer(int(first.split()[1]), got, content)


def _joined_chunks(content: bytes) -> bytes:
    joined = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        joined += content[: int(size, 16)]
        content = content[int(size, 16) + 2 :]
    return joined


async def _http2(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    path: str,
    body: bytes,
    version: str,
    headers: dict[str, str],
) -> Answer:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    head = {":method": "POST", ":path": path, ":scheme": "http", ":authority": "api", **headers}
    connection.send_headers(1, list(head.items()))
    left = memoryview(body)
    got: dict[str, str] = {}
    content = b""
    while True:
        while left and (room := connection.local_flow_control_window(1)) > 0:
            size = min(room, connection.max_outbound_frame_size, len(left))
            connection.send_data(1, bytes(left[:size]), end_stream=size == len(left))
            left = left[size:]
        writer.write(connection.data_to_send())
        if not (received := await reader.read(_READ_BYTES)):
            raise ConnectionResetError("closed without an answer")
        for event in connection.receive_data(received):
            match event:
                case h2.events.ResponseReceived():
                    got = {str(name): str(value) for name, value in event.headers}
                case h2.events.DataReceived():
                    content += event.data
                    connection.acknowledge_received_data(event.flow_controlled_length, 1)
                case h2.events.StreamEnded():
                    return Answer(int(got[":status"]), got, content)
                case h2.events.StreamReset() | h2.events.ConnectionTerminated():
                    raise ConnectionResetError(str(event))

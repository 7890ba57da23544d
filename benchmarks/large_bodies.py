"""Sends many large bodies at once to the rendered Envoy, and shows what becomes of it.

    python -m benchmarks.large_bodies [--kind KIND] [--requests 200] [--mebibytes 31]

Envoy holds a body until the service has decided, so clients decide how much memory it needs. The
bodies are sent in three ways: announced by `content-length`, so that the service can refuse them
before they come; in chunks; and over HTTP/2 without a length. Small requests are sent all the
time, as those of other clients.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Final

import h2.config
import h2.connection
import h2.events
from msgspec import Struct

from benchmarks.procs import rss_bytes
from benchmarks.rig import run_until_signal
from benchmarks.simulated import MODEL, raise_file_limit, running_stack
from extproc.testing.stack import Stack, StackError

__all__ = ["main"]

_MEBIBYTE: Final = 1024 * 1024
_PATH: Final = "/v1/completions"
_HEAD: Final = b'{"model":"%s","max_tokens":1,"prompt":"hello","padding":"' % MODEL.encode()
_TAIL: Final = b'"}'
_PIECE: Final = b"x" * (256 * 1024)
_FRAME_BYTES: Final = 16 * 1024
_GIVEN_UP_SECONDS: Final = 120.0
_SMALL_EVERY_SECONDS: Final = 0.1
_SIMULATOR: Final = {
    "--prefill-tokens-per-second": "1000000000",
    "--decode-milliseconds-per-token": "1",
    "--max-running-requests": "1000",
}


class _Result(Struct, frozen=True):
    """How a request ended: a status, or `cut off`, or `no answer`."""

    end: str
    seconds: float


def _pieces(size: int) -> Iterator[bytes]:
    """A body of this size that costs the worker little."""
    yield _HEAD
    left = size - len(_HEAD) - len(_TAIL)
    while left > 0:
        yield _PIECE[:left]
        left -= len(_PIECE)
    yield _TAIL


class _Connection:
    """One request on a connection of its own, which reads the answer while it still sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def _send(self, first: bytes, parts: Iterator[bytes]) -> None:
        self._writer.write(first)
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()

    @contextlib.asynccontextmanager
    async def _sending(self, first: bytes, parts: Iterator[bytes]) -> AsyncIterator[None]:
        sending = asyncio.create_task(self._send(first, parts))
        try:
            yield
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def http1(self, how: str, parts: Iterator[bytes]) -> str:
        head = f"POST {_PATH} HTTP/1.1\r\nhost: api\r\n{how}\r\n\r\n".encode()
        async with self._sending(head, parts):
            answer = await self._reader.readuntil(b"\r\n\r\n")
        return answer.split(b" ", 2)[1].decode()

    async def announced(self, size: int) -> str:
        return await self.http1(f"content-length: {size}", _pieces(size))

    async def chunked(self, size: int) -> str:
        chunks = (b"%x\r\n%b\r\n" % (len(piece), piece) for piece in _pieces(size))
        return await self.http1("transfer-encoding: chunked", _then(chunks, b"0\r\n\r\n"))

    async def http2(self, size: int) -> str:
        """Frames are written by hand, since the windows are larger than the body."""
        protocol = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        protocol.initiate_connection()
        head = {":method": "POST", ":path": _PATH, ":scheme": "http", ":authority": "api"}
        protocol.send_headers(1, list(head.items()))
        self._writer.write(protocol.data_to_send())
        while not any(
            isinstance(event, h2.events.RemoteSettingsChanged)
            for event in protocol.receive_data(await self._read())
        ):
            pass
        async with self._sending(protocol.data_to_send(), _frames(size)):
            while True:
                for event in protocol.receive_data(await self._read()):
                    match event:
                        case h2.events.ResponseReceived():
                            got = {str(name): str(value) for name, value in event.headers}
                            return got[":status"]
                        case h2.events.StreamReset() | h2.events.ConnectionTerminated():
                            raise ConnectionResetError

    async def _read(self) -> bytes:
        if not (received := await self._reader.read(65536)):
            raise ConnectionResetError
        return received


def _then(parts: Iterator[bytes], last: bytes) -> Iterator[bytes]:
    yield from parts
    yield last


def _frames(size: int) -> Iterator[bytes]:
    """The body in DATA frames of stream 1, RFC 9113, section 6.1."""
    for piece in _pieces(size):
        frames = bytearray()
        for start in range(0, len(piece), _FRAME_BYTES):
            part = piece[start : start + _FRAME_BYTES]
            frames += len(part).to_bytes(3, "big") + b"\0\0\0\0\0\1" + part
        yield bytes(frames)
    yield b"\0\0\0\0\1\0\0\0\1"


_KINDS: Final[dict[str, Callable[[_Connection, int], Awaitable[str]]]] = {
    "announced": _Connection.announced,
    "chunked": _Connection.chunked,
    "HTTP/2": _Connection.http2,
}


async def _request(port: int, kind: str, size: int) -> _Result:
    started = monotonic()
    writer = None
    try:
        async with asyncio.timeout(_GIVEN_UP_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            end = await _KINDS[kind](_Connection(reader, writer), size)
    except TimeoutError:
        end = "no answer"
    except (OSError, EOFError):
        end = "cut off"
    finally:
        if writer is not None:
            writer.close()
    return _Result(end, monotonic() - started)


class _Watch:
    """Reads Envoy's memory from a thread, and sends small requests, until `stop` is called."""

    def __init__(self, stack: Stack) -> None:
        self._pid = stack.envoy.pid
        self._port = int(stack.config["envoy"]["port"])
        self._stopped = asyncio.Event()
        self.peak_bytes = 0
        self.small: list[_Result] = []
        self._tasks = [asyncio.create_task(self._memory()), asyncio.create_task(self._small())]

    async def _memory(self) -> None:
        while not self._stopped.is_set():
            self.peak_bytes = max(self.peak_bytes, rss_bytes(self._pid))
            await asyncio.sleep(0.02)

    async def _small(self) -> None:
        while not self._stopped.is_set():
            self.small.append(await _request(self._port, "announced", 200))
            await asyncio.sleep(_SMALL_EVERY_SECONDS)

    async def stop(self) -> None:
        self._stopped.set()
        await asyncio.gather(*self._tasks)


def _ends(results: Sequence[_Result]) -> str:
    counts = Counter(result.end for result in results)
    return ", ".join(f"{end}: {count}" for end, count in sorted(counts.items()))


async def _measure(stack: Stack, kind: str, requests: int, size: int) -> None:
    port = int(stack.config["envoy"]["port"])
    watch = _Watch(stack)
    results = await asyncio.gather(*(_request(port, kind, size) for _ in range(requests)))
    await watch.stop()
    after = await _request(port, "announced", 200)
    lives = "lives" if stack.envoy.returncode is None else "is dead"
    print(
        f"{kind:9}  {watch.peak_bytes / _MEBIBYTE:8.0f} MiB  "
        f"{max(one.seconds for one in results):6.1f} s  {_ends(results)}\n"
        f"           small requests: {_ends(watch.small)}, slowest "
        f"{max(one.seconds for one in watch.small):.1f} s; then Envoy {lives}: {after.end} in "
        f"{after.seconds * 1000:.0f} ms"
    )


async def _main(kinds: Sequence[str], requests: int, size: int, max_heap_mb: int) -> int:
    raise_file_limit(4 * requests + 1000)
    print(f"{requests} bodies of {size / _MEBIBYTE:g} MiB at once")
    print("bodies     peak of Envoy   slowest  answers")
    try:
        for kind in kinds:
            with tempfile.TemporaryDirectory(prefix="extproc-benchmark-") as folder:
                envoy = {"max_heap_mb": max_heap_mb or None}
                async with running_stack(Path(folder), 1, _SIMULATOR, envoy) as stack:
                    await _measure(stack, kind, requests, size)
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all was measured, 1 if something did not start, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", choices=list(_KINDS), help="only bodies that are sent so")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--mebibytes", type=float, default=31)
    parser.add_argument("--max-heap-mb", type=int, default=2048, help="0 for no limit")
    options = parser.parse_args(arguments)
    kinds = [options.kind] if options.kind else list(_KINDS)
    size = int(options.mebibytes * _MEBIBYTE)
    work = _main(kinds, options.requests, size, options.max_heap_mb)
    return asyncio.run(run_until_signal(work))


if __name__ == "__main__":
    sys.exit(main())

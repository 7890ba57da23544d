"""Measures the memory of an open stream.

    python -m benchmarks.open_streams [--streams 1000] [--body-bytes 1200]

A generation lasts minutes, and so does its ext_proc stream, so many streams are open at one
time. The streams are opened twice: memory that the second round does not add was given back in
between, whatever the resident size says.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import aiohttp

from benchmarks.rig import run_until_signal
from benchmarks.simulated import MODEL, Held, raise_file_limit, running_stack, settle
from benchmarks.wrk import chat_body
from extproc.testing.stack import Stack, StackError

__all__ = ["main"]

_ROUNDS: Final = 2
_WARM_UP_STREAMS: Final = 64
_OPENING_AT_ONCE: Final = 64
# The second token is far away: the stream stays open during the measurement.
_SIMULATOR: Final = {
    "--decode-milliseconds-per-token": "600000",
    "--prefill-tokens-per-second": "1000000000",
    "--max-running-requests": "1000000",
}


@contextlib.asynccontextmanager
async def _open_streams(url: str, count: int, body: bytes) -> AsyncIterator[None]:
    """Open this many streamed requests and receive the response headers of each."""
    gate = asyncio.Semaphore(_OPENING_AT_ONCE)
    headers = {"content-type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)

    async def open_one(session: aiohttp.ClientSession) -> aiohttp.ClientResponse:
        async with gate:
            response = await session.post(url, data=body, headers=headers)
            response.raise_for_status()
            return response

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        responses = await asyncio.gather(*(open_one(session) for _ in range(count)))
        try:
            yield
        finally:
            for response in responses:
                response.close()


async def _measure(stack: Stack, count: int, body_bytes: int) -> list[tuple[str, Held]]:
    url = f"{stack.url}/v1/chat/completions"
    request = chat_body(MODEL, body_bytes).replace('"max_tokens": 64', '"stream": true', 1)
    body = request.encode()
    async with _open_streams(url, _WARM_UP_STREAMS, body):
        await settle(stack, _WARM_UP_STREAMS)
    readings = [("no stream open", await settle(stack))]
    for turn in range(1, _ROUNDS + 1):
        async with _open_streams(url, count, body):
            readings.append((f"{count} open, round {turn}", await settle(stack, count)))
        readings.append((f"all closed, round {turn}", await settle(stack)))
    return readings


def _report(readings: Sequence[tuple[str, Held]], count: int) -> str:
    base = readings[0][1].rss_bytes
    lines = [f"{'':<24}{'RSS MB':>9}{'more MB':>9}{'KB/stream':>11}{'tickets':>9}{'files':>7}"]
    for name, now in readings:
        more = now.rss_bytes - base
        per_stream = f"{more / count / 1024:.1f}" if now.streams else "-"
        lines.append(
            f"{name:<24}{now.rss_bytes / 1e6:>9.1f}{more / 1e6:>9.1f}{per_stream:>11}"
            f"{now.tickets:>9}{now.open_files:>7}"
        )
    return "\n".join(lines)


async def _main(count: int, body_bytes: int) -> int:
    # Per stream, client and Envoy hold two sockets together, the simulator one.
    raise_file_limit(4 * count + 1000)
    try:
        with tempfile.TemporaryDirectory(prefix="extproc-benchmark-") as folder:
            async with running_stack(Path(folder), 1, _SIMULATOR) as stack:
                readings = await _measure(stack, count, body_bytes)
    except (StackError, aiohttp.ClientError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(_report(readings, count))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all is well, 1 if streams did not open or close, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--body-bytes", type=int, default=1200)
    options = parser.parse_args(arguments)
    return asyncio.run(run_until_signal(_main(options.streams, options.body_bytes)))


if __name__ == "__main__":
    sys.exit(main())

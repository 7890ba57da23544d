"""Checks what the service keeps after many requests that end in every possible way.

    python -m benchmarks.leaks [--requests 10000]

A ticket that is never released makes a worker look busy for ever, and lost streams or files
cause a crash days later. Refused, aborted and streamed requests end in different code, so all
kinds are mixed.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random
from typing import Final

import aiohttp

from benchmarks.rig import run_until_signal
from benchmarks.simulated import MODEL, Held, running_stack, settle
from extproc.testing.stack import StackError

__all__ = ["grown", "main"]

_WORKERS: Final = 3
_AT_ONCE: Final = 32
_WARM_UP_REQUESTS: Final = 500
_ABORT_SECONDS: Final = 0.05
_SEED: Final = 1
_SIMULATOR: Final = {
    "--decode-milliseconds-per-token": "1",
    "--prefill-tokens-per-second": "1000000000",
    "--max-running-requests": "1000",
}
_CHAT: Final = "/v1/chat/completions"
# More tokens than the simulator makes before the client aborts.
_LONG: Final = 4000


def _body(**fields: object) -> bytes:
    request = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    return json.dumps({**request, "max_tokens": 4, **fields}).encode()


class _Client:
    """Sends one request of a kind and returns how it ended."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    def _post(
        self, body: bytes, path: str = _CHAT
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        headers = {"content-type": "application/json"}
        return self._session.post(self._url + path, data=body, headers=headers)

    async def _read(self, body: bytes, path: str = _CHAT) -> str:
        async with self._post(body, path) as response:
            await response.read()
            return str(response.status)

    async def plain(self) -> str:
        return await self._read(_body())

    async def streamed(self) -> str:
        return await self._read(_body(stream=True))

    async def unknown_path(self) -> str:
        return await self._read(_body(), "/v1/unknown")

    async def unknown_model(self) -> str:
        return await self._read(_body(model="unknown"))

    async def bad_json(self) -> str:
        return await self._read(b'{"model": ')

    async def aborted_in_stream(self) -> str:
        """Abort after the first bytes."""
        async with self._post(_body(stream=True, max_tokens=_LONG)) as response:
            await response.content.readany()
            response.close()
        return "aborted"

    async def aborted_before_headers(self) -> str:
        """Abort while the worker still computes the answer."""
        try:
            async with asyncio.timeout(_ABORT_SECONDS):
                return await self._read(_body(max_tokens=_LONG))
        except TimeoutError:
            return "aborted"


# Kind, share of all requests, required ending.
_Kind = tuple[Callable[[_Client], Awaitable[str]], int, str]
_MIX: Final[tuple[_Kind, ...]] = (
    (_Client.plain, 50, "200"),
    (_Client.streamed, 20, "200"),
    (_Client.aborted_in_stream, 10, "aborted"),
    (_Client.aborted_before_headers, 5, "aborted"),
    (_Client.unknown_path, 5, "404"),
    (_Client.unknown_model, 5, "404"),
    (_Client.bad_json, 5, "400"),
)


async def _send(url: str, count: int, random: Random) -> Counter[tuple[str, str, bool]]:
    """Number of requests by kind, ending, and whether the ending was the required one."""
    kinds = random.choices(_MIX, weights=[share for _, share, _ in _MIX], k=count)
    ends: Counter[tuple[str, str, bool]] = Counter()
    rest: Iterator[_Kind] = iter(kinds)

    async def work(client: _Client) -> None:
        for send, _, expected in rest:
            try:
                end = await send(client)
            except aiohttp.ClientError as error:
                end = type(error).__name__
            ends[send.__name__, end, end == expected] += 1

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        client = _Client(session, url)
        await asyncio.gather(*(work(client) for _ in range(_AT_ONCE)))
    return ends


def grown(before: Held, after: Held) -> list[str]:
    """The growth of each resource, by name; memory is shown but not judged."""
    names = ["tickets"] if after.tickets else []
    if after.streams:
        names.append("streams")
    if after.open_files > before.open_files:
        names.append("open files")
    if after.tasks is not None and before.tasks is not None and after.tasks > before.tasks:
        names.append("tasks")
    return names


def _report(
    ends: Counter[tuple[str, str, bool]], before: Held, after: Held, left: Sequence[str]
) -> str:
    lines = [f"{'requests':<28}{'ended':<24}{'count':>7}"]
    for (kind, end, expected), count in sorted(ends.items()):
        note = "" if expected else "  UNEXPECTED"
        lines.append(f"{kind:<28}{end:<24}{count:>7}{note}")
    lines += ["", f"{'':<12}{'tickets':>9}{'streams':>9}{'files':>7}{'tasks':>7}{'RSS MB':>9}"]
    for name, now in (("before", before), ("after", after)):
        tasks = "-" if now.tasks is None else str(now.tasks)
        lines.append(
            f"{name:<12}{now.tickets:>9}{now.streams:>9}{now.open_files:>7}{tasks:>7}"
            f"{now.rss_bytes / 1e6:>9.1f}"
        )
    lines += ["", f"Left behind: {', '.join(left)}" if left else "Nothing left behind."]
    return "\n".join(lines)


async def _main(count: int) -> int:
    random = Random(_SEED)
    try:
        with tempfile.TemporaryDirectory(prefix="extproc-benchmark-") as folder:
            async with running_stack(Path(folder), _WORKERS, _SIMULATOR) as stack:
                await _send(stack.url, _WARM_UP_REQUESTS, random)
                before = await settle(stack)
                ends = await _send(stack.url, count, random)
                after = await settle(stack)
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    left = grown(before, after)
    print(_report(ends, before, after, left))
    return 1 if left or any(not expected for _, _, expected in ends) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all is well, 1 after a leak or an unexpected ending."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args(arguments)
    return asyncio.run(run_until_signal(_main(options.requests)))


if __name__ == "__main__":
    sys.exit(main())

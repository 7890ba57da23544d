"""An engine's cache and publisher in a process of its own, which a test can kill.

    python -m tests.kv_survival.engine '{"port": 0, "replay_port": 0}'

Reads commands from standard input, a JSON object a line, and answers each with a line. The
cache grows and shrinks at random, always closed under prefixes; ids of pages are drawn anew
in every process, as after a restart with another seed.
"""

import json
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, Final

import msgspec
import zmq

from tests.kv_survival.prompts import (
    GROUPS,
    PAGE,
    PROMPT_PAGES,
    PROMPTS,
    SHARED_PAGES,
    page_tokens,
)

_END: Final = b"\xff" * 8
_encode: Final = msgspec.msgpack.encode
_Event = dict[str, Any]


class Cache:
    """The pages held of each prompt, and their ids."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.ids: dict[tuple[int, int], int] = {}

    def change(self) -> list[_Event]:
        prompt = self._random.randrange(PROMPTS)
        depth = self.depth(prompt)
        fate = self._random.random()
        if fate < 0.02:
            return self._evict_group(prompt % GROUPS)
        if fate < 0.45 and depth > SHARED_PAGES:
            return self._shrink(prompt, self._random.randint(SHARED_PAGES, depth - 1), depth)
        return self._grow(prompt, depth, min(PROMPT_PAGES, depth + self._random.randint(1, 8)))

    def depth(self, prompt: int) -> int:
        depth = 0
        while depth < PROMPT_PAGES and _key(prompt, depth) in self.ids:
            depth += 1
        return depth

    def _grow(self, prompt: int, start: int, end: int) -> list[_Event]:
        if start == end:
            return []
        parent = self.ids[_key(prompt, start - 1)] if start else None
        for number in range(start, end):
            self.ids[_key(prompt, number)] = self._random.randrange(-(1 << 63), 1 << 63)
        return [
            {
                "type": "BlockStored",
                "block_hashes": [self.ids[_key(prompt, n)] for n in range(start, end)],
                "parent_block_hash": parent,
                "token_ids": [t for n in range(start, end) for t in page_tokens(prompt, n)],
                "block_size": PAGE,
                "medium": "GPU",
            }
        ]

    def _evict_group(self, group: int) -> list[_Event]:
        """Remove all pages of a group's prompts from the leaves on, shared ones included."""
        prompts = range(group, PROMPTS, GROUPS)
        own = [self._shrink(prompt, SHARED_PAGES, self.depth(prompt)) for prompt in prompts]
        shared = self._shrink(group, 0, min(self.depth(group), SHARED_PAGES))
        return [*(event for events in own for event in events), *shared]

    def _shrink(self, prompt: int, start: int, end: int) -> list[_Event]:
        if start >= end:
            return []
        gone = [self.ids.pop(_key(prompt, n)) for n in range(end - 1, start - 1, -1)]
        return [{"type": "BlockRemoved", "block_hashes": gone, "medium": "GPU"}]


def _key(prompt: int, number: int) -> tuple[int, int]:
    return (prompt % GROUPS if number < SHARED_PAGES else GROUPS + prompt, number)


class Engine:
    """Publishes what its cache does; each method without an underscore is a command.

    `replay` is how requests for a replay are treated: "answer", "silent", "trickle" (a batch
    each 50 ms, without end) or "elsewhere" (as another topic).
    """

    def __init__(
        self,
        port: int = 0,
        replay_port: int = 0,
        buffered: int = 10_000,
        replay: str = "answer",
        queue: int = 100_000,
    ) -> None:
        self._random = Random(os.urandom(8))
        self._cache = Cache(self._random)
        self._replay = replay
        self._seq = 0
        self._subscribed = 0
        self._requests = 0
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffered)
        self._trickling: bytes | None = None
        self._interval = 0.0
        self._flooding = False
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = context.socket(zmq.XPUB)
        self._pub.setsockopt(zmq.XPUB_VERBOSER, 1)
        self._pub.setsockopt(zmq.SNDHWM, queue)
        self._pub.bind(f"tcp://127.0.0.1:{port or '*'}")
        self._router = context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.SNDHWM, 100_000)
        self._router.bind(f"tcp://127.0.0.1:{replay_port or '*'}")

    # -- commands

    def ports(self) -> list[int]:
        return [_port(self._pub), _port(self._router)]

    def publish(self, batches: int = 1, lost: bool = False, buffered: bool = True) -> None:
        """Publish batches; `lost` ones are not sent, and kept in the buffer only if `buffered`."""
        for _ in range(batches):
            events = [event for _ in range(3) for event in self._cache.change()]
            self._send_batch(_encode([time.time(), events, 0]), lost, buffered)

    def tell(self, events: list[Any]) -> None:
        """Publish a batch of any events, true or false."""
        self._send_batch(_encode([time.time(), events, 0]), lost=False, buffered=True)

    def known(self) -> int:
        """The id of a page that no other page follows, for false events."""
        prompt = self._random.randrange(PROMPTS)
        return self._cache.ids.get(_key(prompt, self._cache.depth(prompt) - 1), 0)

    def payload(self, size: int, buffered: bool) -> None:
        """Publish random bytes as the next batch; the buffer has them, or a valid batch."""
        noise = self._random.randbytes(size)
        events = self._cache.change()
        seq = self._seq.to_bytes(8, "big")
        self._buffer.append((seq, noise if buffered else _encode([time.time(), events, 0])))
        self._seq += 1
        self._send([b"", seq, noise])

    def frames(self, sizes: list[int]) -> None:
        """Send a message of frames of random bytes; size 0 is an empty frame."""
        self._send([self._random.randbytes(size) for size in sizes])

    def traffic(self, per_second: float) -> None:
        self._interval = 1 / per_second if per_second else 0.0

    def flood(self, on: bool) -> None:
        self._flooding = on

    def replays(self, how: str) -> None:
        self._replay = how

    def truth(self) -> dict[str, Any]:
        return {
            "seq": self._seq,
            "pages": [self._cache.depth(prompt) for prompt in range(PROMPTS)],
            "held": len(self._cache.ids),
            "subscribed": self._subscribed,
            "requests": self._requests,
        }

    # -- publishing and answering

    def serve(self) -> None:
        commands = _Lines()
        next_at = time.monotonic()
        while True:
            wait = 0.0 if self._flooding else 0.005
            for command, arguments in commands.read(wait):
                method: Callable[..., Any] = getattr(self, command)
                sys.stdout.write(json.dumps(method(**arguments)) + "\n")
                sys.stdout.flush()
            self._serve_sockets()
            if self._flooding:
                self.publish(20)
            now = time.monotonic()
            while self._interval and next_at <= now:
                self.publish()
                next_at += self._interval
            next_at = max(next_at, now) if not self._interval else next_at

    def _serve_sockets(self) -> None:
        while self._pub.poll(0):
            self._subscribed += 1 if self._pub.recv()[:1] == b"\x01" else -1
        while self._router.poll(0):
            client, _, start = self._router.recv_multipart()
            self._requests += 1
            if self._replay == "trickle":
                self._trickling = client
            elif self._replay != "silent":
                self._answer(client, start)
        if self._trickling is not None:
            seq = self._random.randrange(1 << 20).to_bytes(8, "big")
            self._router.send_multipart([self._trickling, b"", b"other", seq, b""])
            time.sleep(0.02)

    def _answer(self, client: bytes, start: bytes) -> None:
        topic = b"other" if self._replay == "elsewhere" else b""
        for seq, payload in self._buffer:
            if seq >= start:
                self._router.send_multipart([client, b"", topic, seq, payload])
        self._router.send_multipart([client, b"", b"", _END, b""])

    def _send_batch(self, payload: bytes, lost: bool, buffered: bool) -> None:
        seq = self._seq.to_bytes(8, "big")
        self._seq += 1
        if buffered:
            self._buffer.append((seq, payload))
        if not lost:
            self._send([b"", seq, payload])

    def _send(self, frames: list[bytes]) -> None:
        self._pub.send_multipart(frames, zmq.NOBLOCK)


class _Lines:
    """Read commands from standard input, without waiting for a complete line."""

    def __init__(self) -> None:
        self._rest = b""

    def read(self, wait_seconds: float) -> list[tuple[str, dict[str, Any]]]:
        if not select.select([sys.stdin], [], [], wait_seconds)[0]:
            return []
        read = os.read(sys.stdin.fileno(), 1 << 16)
        if not read:
            sys.exit()  # the test is over
        *lines, self._rest = (self._rest + read).split(b"\n")
        return [tuple(json.loads(line)) for line in lines]


def _port(socket: "zmq.Socket[bytes]") -> int:
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


if __name__ == "__main__":
    Engine(**json.loads(sys.argv[1])).serve()

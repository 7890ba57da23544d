"""Measures a flood of KV events: the rate of the service, and the delay of requests.

    python -m benchmarks.kv_flood [--rounds 5] [--seconds 3]

First, decoding and index together, without sockets: the best round of each shape. Then a
publisher in another process sends a third of the required rate through a real socket. At the
same time, work as long as a routing decision is due 200 times a second on the event loop; its
delay is measured from that due time. Quiet and flooded phases alternate.
"""

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Final

import msgspec
import numpy as np
import uvloop
import zmq

from extproc.clock import SystemClock
from extproc.kv.event_applier import EventApplier
from extproc.kv.index import PrefixIndex
from extproc.kv.indexer import KvIndexer, RankSource
from extproc.kv.prefix_hash import PrefixHasher, TokenIds
from extproc.kv.rank_pages import RankPages
from extproc.kv.subscriptions.subscription import EventEndpoint, SubscriberSettings

_VOCABULARY: Final = 150_000
_PROMPT_TOKENS: Final = 8192
_PROBES_PER_SECOND: Final = 200
# Name, pages of an event, tokens of a page, events of a batch, required pages a second.
_SHAPES: Final = (
    ("16 pages of 64 an event", 16, 64, 8, 300_000),
    ("1 page of 16 an event", 1, 16, 8, 100_000),
)
_encode: Final = msgspec.msgpack.encode


def payloads(
    random: np.random.Generator, count: int, pages: int, page_size: int, events: int
) -> Iterator[bytes]:
    """Batches of page chains that all begin at the root."""
    for number in range(count):
        ids = random.integers(-(2**63), 2**63, (events, pages)).tolist()
        tokens = random.integers(0, _VOCABULARY, (events, pages * page_size)).tolist()
        yield _encode(
            [
                float(number),
                [
                    {
                        "type": "BlockStored",
                        "block_hashes": ids[event],
                        "parent_block_hash": None,
                        "token_ids": tokens[event],
                        "block_size": page_size,
                        "medium": "GPU",
                    }
                    for event in range(events)
                ],
                0,
            ]
        )


# -- without sockets


def apply_rate(batches: list[bytes], pages: int, page_size: int) -> float:
    """Pages a second, decoding included."""
    index = PrefixIndex(PrefixHasher(), 10_000_000)
    rank_pages = index.add("w", page_size)
    applier = EventApplier(index, rank_pages, index.hasher.seed, lambda load: None, lambda: None)
    started = time.perf_counter()
    for payload in batches:
        for _ in applier.apply(payload):
            pass
    seconds = time.perf_counter() - started
    if rank_pages.page_count != pages:
        raise RuntimeError(f"{rank_pages.page_count} pages arrived instead of {pages}")
    return pages / seconds


def without_sockets(random: np.random.Generator, rounds: int) -> None:
    print(f"{'decode and apply':28} {'pages/s':>10} {'required':>9}")
    for name, pages, page_size, events, required in _SHAPES:
        count = 60_000 // (pages * events)
        batches = list(payloads(random, count, pages, page_size, events))
        best = max(apply_rate(batches, count * pages * events, page_size) for _ in range(rounds))
        print(f"{name:28} {best:10,.0f} {required:9,}")


# -- with sockets


def publish(pipe: Connection, shape: int, seconds: float) -> None:
    """The other process: sends one phase of evenly spread batches for each message of the pipe."""
    _, pages, page_size, events, required = _SHAPES[shape]
    rate = required / 3 / (pages * events)
    count = int(rate * seconds)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
    socket.setsockopt(zmq.SNDHWM, 100_000)
    pipe.send(socket.bind_to_random_port("tcp://127.0.0.1"))
    seq = 0
    random = np.random.default_rng()
    batches = list(payloads(random, count, pages, page_size, events))
    pipe.send(count)
    while pipe.recv():
        started = time.monotonic()
        for number, payload in enumerate(batches):
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
            socket.send_multipart([b"", seq.to_bytes(8, "big"), payload])
            seq += 1
        pipe.send(seq)
        batches = list(payloads(random, count, pages, page_size, events))
        pipe.send(count)


async def probe(
    index: PrefixIndex, ranks: list[RankPages], prompts: list[TokenIds], seconds: float
) -> list[float]:
    """Delays in milliseconds, from the due time of the work to its end."""
    delays: list[float] = []
    loop = asyncio.get_running_loop()
    count = int(seconds * _PROBES_PER_SECOND)
    done = loop.create_future()

    async def work(due: float, number: int) -> None:
        index.match(prompts[number % len(prompts)], ranks)
        await asyncio.sleep(0)
        delays.append((time.perf_counter() - due) * 1000)
        if len(delays) == count:
            done.set_result(None)

    tasks = set()
    loop_start = loop.time() + 0.05
    start = time.perf_counter() + 0.05

    def begin(number: int) -> None:
        task = loop.create_task(work(start + number / _PROBES_PER_SECOND, number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in range(count):
        loop.call_at(loop_start + number / _PROBES_PER_SECOND, begin, number)
    await done
    return delays


async def flooded(shape: int, rounds: int, seconds: float) -> None:
    name, _, page_size, _, _ = _SHAPES[shape]
    pipe, other = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    publisher = context.Process(target=publish, args=(other, shape, seconds), daemon=True)
    publisher.start()
    port = await asyncio.to_thread(pipe.recv)
    indexer = KvIndexer(SystemClock(), max_pages=100_000_000, settings=SubscriberSettings())
    running = asyncio.create_task(indexer.run())
    random = np.random.default_rng(1)
    prompts = [random.integers(0, _VOCABULARY, _PROMPT_TOKENS).astype(np.uint64) for _ in range(16)]
    quiet_ranks = [indexer.index.add(str(number), page_size) for number in range(16)]
    for rank_pages in quiet_ranks:
        for prompt in prompts:
            ids = random.integers(0, 2**63, _PROMPT_TOKENS // page_size).tolist()
            indexer.index.store(rank_pages, ids, None, prompt, page_size)
    endpoint = EventEndpoint("127.0.0.1", port)
    source = RankSource(worker="flooded", dp_rank=0, endpoint=endpoint, page_size=page_size)
    flooded_rank = indexer.follow(source, lambda load: None, lambda: None)
    growths = []
    for _ in range(rounds):
        await asyncio.to_thread(pipe.recv)
        quiet = await probe(indexer.index, quiet_ranks, prompts, seconds)
        pipe.send(True)
        before, started = flooded_rank.page_count, time.monotonic()
        loaded = await probe(indexer.index, quiet_ranks, prompts, seconds)
        arrived = (flooded_rank.page_count - before) / (time.monotonic() - started)
        await asyncio.to_thread(pipe.recv)
        p99s = [float(np.percentile(delays, 99)) for delays in (quiet, loaded)]
        growths.append(p99s[1] - p99s[0])
        medians = [float(np.median(delays)) for delays in (quiet, loaded)]
        print(
            f"{name:28} {arrived:10,.0f} {medians[0]:8.2f} {medians[1]:8.2f}"
            f" {p99s[0]:8.2f} {p99s[1]:8.2f} {growths[-1]:8.2f}"
        )
    print(f"{name:28} {'best growth of p99':>45} {min(growths):8.2f} ms")
    await asyncio.to_thread(pipe.recv)
    pipe.send(False)
    running.cancel()
    await indexer.close()
    await asyncio.to_thread(publisher.join)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    without_sockets(np.random.default_rng(1), options.rounds)
    print()
    print(
        f"{'through a socket':28} {'pages/s':>10} {'p50':>8} {'flooded':>8}"
        f" {'p99':>8} {'flooded':>8} {'growth':>8}  (ms)"
    )
    for shape in range(len(_SHAPES)):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(flooded(shape, options.rounds, options.seconds))


if __name__ == "__main__":
    main()

"""Measures decoding of an engine's KV events, up to arrays of tokens.

    python -m benchmarks.kv_wire [--rounds 40]

Shapes alternate within a round, so that other load affects them alike. "integers only" is
msgspec making only lists of the same token ids: the minimum for any decoder that makes Python
integers.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any, Final

import msgspec

from extproc.kv.wire import decode_events

_EVENTS: Final = 8
_VOCABULARY: Final = 150_000
_REPEATS: Final = 20
_encode: Final = msgspec.msgpack.encode


def stored(random: Random, pages: int, page_size: int, *, bigram: bool = False) -> dict[str, Any]:
    """An event in SGLang's format; token ids have all widths up to five bytes."""
    ids = [random.randrange(_VOCABULARY) for _ in range(pages * page_size + bigram)]
    return {
        "type": "BlockStored",
        "block_hashes": [random.randrange(-(1 << 63), 1 << 63) for _ in range(pages)],
        "parent_block_hash": random.randrange(1 << 63),
        "token_ids": list(pairwise(ids)) if bigram else ids,
        "block_size": page_size,
        "lora_id": None,
        "medium": "GPU",
    }


def batch(events: list[Any]) -> bytes:
    return _encode([1.5, events, 0])


def shapes(random: Random) -> dict[str, tuple[int, Callable[[], object]]]:
    """The measured calls: name, pages of one call, call."""
    found: dict[str, tuple[int, Callable[[], object]]] = {}
    for pages, page_size in ((1, 16), (1, 64), (16, 64), (64, 64)):
        events = [stored(random, pages, page_size) for _ in range(_EVENTS)]
        arrays = [list(event.values()) for event in events]
        size = f"{pages} x {page_size}"
        count = pages * _EVENTS
        found[f"{size}, maps"] = count, partial(decode_events, batch(events))
        found[f"{size}, arrays"] = count, partial(decode_events, batch(arrays))
        mixed = [*events[:-1], {"type": "Unknown"}, arrays[-1]]
        found[f"{size}, both and unknown"] = count, partial(decode_events, batch(mixed))
        ids = msgspec.msgpack.Decoder(list[list[int]])
        payload = _encode([event["token_ids"] for event in events])
        found[f"{size}, integers only"] = count, partial(ids.decode, payload)
    pairs = batch([stored(random, 16, 64, bigram=True) for _ in range(_EVENTS)])
    found["16 x 64, maps, pairs"] = 16 * _EVENTS, partial(decode_events, pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    measured = shapes(Random(1))
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(options.rounds):
        for name, (_, work) in measured.items():
            started = time.perf_counter()
            for _ in range(_REPEATS):
                work()
            times[name].append((time.perf_counter() - started) / _REPEATS)
    print(
        f"{'pages x tokens of an event':32} {'us/event':>9} {'us/page':>8} {'pages/s':>10}  median"
    )
    for name, (pages, _) in measured.items():
        best, median = min(times[name]), sorted(times[name])[len(times[name]) // 2]
        print(
            f"{name:32} {best / _EVENTS * 1e6:9.2f} {best / pages * 1e6:8.2f}"
            f" {pages / best:10,.0f} {pages / median:10,.0f}"
        )


if __name__ == "__main__":
    main()

"""Measures the prefix index: hashing, matching, events and memory.

    python -m benchmarks.kv_index [--pages 1000000]

Times are the best of several rounds, in one process, without the decoding of events.
"""

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher, TokenIds
from extproc.kv.rank_pages import RankPages

_ROUNDS: Final = 9
_VOCABULARY: Final = 150_000
_PAGE: Final = 64
_SWEPT_PAGES: Final = 128


def _tokens(random: np.random.Generator, count: int) -> TokenIds:
    return random.integers(0, _VOCABULARY, count).astype(np.uint64)


def _ids(random: np.random.Generator, count: int) -> list[int]:
    ids: list[int] = random.integers(0, 2**64 - 1, count, dtype=np.uint64).tolist()
    return ids


def _microseconds(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Best and median time of one call."""
    times = []
    for _ in range(_ROUNDS):
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    times.sort()
    return times[0] * 1e6, times[len(times) // 2] * 1e6


def _show(name: str, value: str) -> None:
    print(f"{name:58} {value}")


def requests(random: np.random.Generator) -> None:
    """The cost of one request."""
    hasher = PrefixHasher()
    long = _tokens(random, 32_768)
    for page in (1, 16, 64):
        best, median = _microseconds(partial(hasher.page_sums, 0, 0, long, page), 20)
        _show(f"hash 32768 tokens, page {page}", f"{best:7.1f} us best {median:7.1f} median")
    chain = _tokens(random, 2500 * _PAGE)
    everybody = (1 << 64) - 1
    # A shared system prompt with conversations of a few ranks, and the extremes around it.
    depths = {
        "all of it": [2500] * 64,
        "300 pages, 8 of them more": [300] * 56 + random.integers(300, 2501, 8).tolist(),
        "random depths": random.integers(1, 2501, 64).tolist(),
    }
    for spread, pages_of_each in depths.items():
        index = PrefixIndex(hasher, 10_000_000)
        for n, pages in enumerate(pages_of_each):
            rank_pages = index.add(str(n), _PAGE)
            index.store(rank_pages, _ids(random, pages), None, chain[: pages * _PAGE], _PAGE)
        prefixes = index.prefixes(chain, _PAGE)
        best, median = _microseconds(partial(_match, index, prefixes, everybody), 50)
        _show(f"match 2500 pages, 64 ranks: {spread}", f"{best:7.1f} us best {median:7.1f} median")
    for name, special in (
        ("host and disk below", "lower"),
        ("out of order", "holed"),
        ("both", "lower and holed"),
    ):
        index = PrefixIndex(hasher, 10_000_000)
        for n, pages in enumerate(random.integers(300, 2501, 64).tolist()):
            rank_pages = index.add(str(n), _PAGE)
            ids = _ids(random, pages)
            index.store(rank_pages, ids, None, chain[: pages * _PAGE], _PAGE)
            if "lower" in special:
                _demote(index, rank_pages, ids, chain[: pages * _PAGE], pages // 2, 1)
                _demote(index, rank_pages, ids, chain[: pages * _PAGE], pages * 3 // 4, 2)
            if "holed" in special:
                index.remove(rank_pages, ids[pages - 100 : pages - 99])
        prefixes = index.prefixes(chain, _PAGE)
        best, median = _microseconds(partial(_match, index, prefixes, everybody), 20)
        _show(
            f"match 300 to 2500 pages, 64 ranks: {name}",
            f"{best:7.1f} us best {median:7.1f} median",
        )
    index = PrefixIndex(hasher, 10_000_000)
    ranks = [index.add(str(n), 1) for n in range(8)]
    short = _tokens(random, 4096)
    for rank_pages in ranks:
        index.store(rank_pages, _ids(random, 4096), None, short, 1)
    best, median = _microseconds(partial(index.match, short, ranks), 20)
    _show(
        "hash and match 4096 tokens, page 1, 8 ranks", f"{best:7.1f} us best {median:7.1f} median"
    )


def _demote(
    index: PrefixIndex,
    rank_pages: RankPages,
    ids: list[int],
    tokens: TokenIds,
    first: int,
    tier: int,
) -> None:
    """Move the pages from `first` on down to `tier`."""
    index.store(rank_pages, ids[first:], ids[first - 1], tokens[first * _PAGE :], _PAGE, tier)
    index.remove(rank_pages, ids[:first:-1], tier - 1)
    index.remove(rank_pages, ids[first : first + 1], tier - 1)


def _match(index: PrefixIndex, prefixes: TokenIds, mask: int) -> None:
    index.match_prefixes(prefixes, mask, {})


def events(random: np.random.Generator) -> None:
    """The cost of applying decoded events."""
    for pages, page, label in ((16, 64, "chains of 16 pages of 64"), (1, 16, "single pages of 16")):
        count = 4000 if pages > 1 else 40_000
        tokens = _tokens(random, count * pages * page)
        names = _ids(random, count * pages)
        best = 0.0
        for _ in range(3):
            index = PrefixIndex(PrefixHasher(), 10_000_000)
            rank_pages = index.add("w", page)
            started = time.perf_counter()
            for first in range(0, count * pages, pages):
                index.store(
                    rank_pages,
                    names[first : first + pages],
                    None,
                    tokens[first * page : (first + pages) * page],
                    page,
                )
            best = max(best, count * pages / (time.perf_counter() - started))
        _show(f"store {label}", f"{best:9.0f} pages/s")


def memory(random: np.random.Generator, pages: int) -> None:
    """Resident bytes per page, from the process's memory before and after."""
    index = PrefixIndex(PrefixHasher(), 2 * pages)
    rank_pages = index.add("w", 16)
    gc.collect()
    before = _resident_bytes()
    slowest = 0.0
    for _ in range(pages // 16):
        ids, tokens = _ids(random, 16), _tokens(random, 256)
        started = time.perf_counter()
        index.store(rank_pages, ids, None, tokens, 16)
        slowest = max(slowest, time.perf_counter() - started)
    gc.collect()
    _show("store them, longest event of 16", f"{slowest * 1e6:7.1f} us")
    _show(f"memory at {pages} pages", f"{(_resident_bytes() - before) / pages:7.1f} bytes/page")
    started = time.perf_counter()
    index.drop(rank_pages)
    _show("drop them", f"{(time.perf_counter() - started) * 1e6:7.1f} us")
    slowest = 0.0
    more = True
    began = time.perf_counter()
    while more:
        started = time.perf_counter()
        more = index.scrub(_SWEPT_PAGES)
        slowest = max(slowest, time.perf_counter() - started)
    rate = pages / (time.perf_counter() - began)
    _show(f"sweep them out, longest slice of {_SWEPT_PAGES}", f"{slowest * 1e6:7.1f} us")
    _show("sweep them out", f"{rate:9.0f} pages/s")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pages", type=int, default=1_000_000, help="for the memory figure")
    options = parser.parse_args()
    random = np.random.default_rng(1)
    memory(random, options.pages)
    requests(random)
    events(random)


if __name__ == "__main__":
    main()

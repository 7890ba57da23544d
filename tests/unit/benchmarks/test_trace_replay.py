"""Traces in simulated time: what is printed, and figures of small traces by hand.

`small-trace.jsonl` is made up, by `small_trace` below; to write it anew:

    python -m tests.unit.benchmarks.test_trace_replay > tests/fixtures/small-trace.jsonl
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import pytest

from benchmarks.trace_fleet import (
    BLOCK_TOKENS,
    FleetSettings,
    TraceRequest,
    apply_events,
    pages_of,
    tokens_of,
)
from benchmarks.trace_fleet import replay as replay_trace
from benchmarks.trace_replay import load_trace, main
from extproc.kv.events import LoadStat
from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher
from extproc.simulator.cache_events import CacheEvent, Cleared, Removed
from extproc.simulator.radix_cache import RadixCache
from extproc.simulator.time_model import TimeModel

ROOT: Final = Path(__file__).parents[3]
SMALL: Final = ROOT / "tests" / "fixtures" / "small-trace.jsonl"
KEYS: Final = [
    "policy",
    "workers",
    "cached_ratio",
    "bound_ratio",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "imbalance",
]
POLICIES: Final = (
    "round_robin",
    "random",
    "power_of_two",
    "least_load",
    "cache_aware_zmq",
    "min_ttft",
)
KV_POLICIES: Final = ("cache_aware_zmq", "min_ttft")
ENDLESS: Final = "1000000000"
GOOD: Final = '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}'


def small_trace() -> str:
    """60 conversations of 1 to 5 turns behind 3 system prompts, begun within a minute."""
    random, ids = Random(11), count()

    def more(blocks: int) -> list[int]:
        return [next(ids) for _ in range(blocks)]

    systems = [more(blocks) for blocks in (2, 4, 6)]
    lines = []
    for _ in range(60):
        timestamp = random.randrange(60_000)
        blocks = list(systems[random.randrange(3)])
        for _ in range(random.randrange(1, 6)):
            blocks += more(random.randrange(1, 5))
            tail = random.randrange(BLOCK_TOKENS)
            line = {
                "timestamp": timestamp,
                "input_length": len(blocks) * BLOCK_TOKENS + tail,
                "output_length": random.randrange(20, 200),
                "hash_ids": blocks + more(1 if tail else 0),
            }
            lines.append((timestamp, line))
            timestamp += random.randrange(3000, 11_000)
    lines.sort(key=lambda timed: timed[0])
    return "".join(f"{json.dumps(line)}\n" for _, line in lines)


Replay = Callable[..., list[dict[str, Any]]]


@pytest.fixture(name="replay")
def make_replay(capsys: pytest.CaptureFixture[str]) -> Replay:
    """Runs the command with --json; gives its rows."""

    def replay(*arguments: str, trace: Path = SMALL) -> list[dict[str, Any]]:
        main([str(trace), "--json", *arguments])
        printed = capsys.readouterr()
        assert printed.err == ""
        assert printed.out.count("\n") == 1
        document = json.loads(printed.out)
        assert list(document) == ["results"]
        rows: list[dict[str, Any]] = document["results"]
        return rows

    return replay


def write_trace(folder: Path, *lines: tuple[float, int, int, Sequence[int]]) -> Path:
    """A trace of (milliseconds, input tokens, output tokens, blocks)."""
    path = folder / "trace.jsonl"
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    texts = [json.dumps(dict(zip(names, line, strict=True))) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_the_small_trace_matches_its_recipe() -> None:
    text = SMALL.read_text()
    assert text == small_trace()
    assert len(text) < 60_000


# -- what is printed


def test_json_has_one_row_for_each_policy_and_number_of_workers(
    replay: Replay,
) -> None:
    rows = replay("--workers", "1", "3")
    assert [(row["workers"], row["policy"]) for row in rows] == [
        (workers, policy) for workers in (1, 3) for policy in POLICIES
    ]
    for row in rows:
        assert list(row) == KEYS
        assert 0 < row["cached_ratio"] < 1
        assert 0 < row["bound_ratio"] < 1
        assert 0 < row["ttft_p50_s"] <= row["ttft_p95_s"] <= row["ttft_p99_s"]
        assert row["ttft_mean_s"] > 0
        assert 1 <= row["imbalance"] <= row["workers"]


def test_the_command_prints_json_alone_to_stdout() -> None:
    command = [sys.executable, "-m", "benchmarks.trace_replay", str(SMALL), "--json"]
    command += ["--workers", "2", "--policy", "round_robin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)["results"]
    assert (row["policy"], row["workers"]) == ("round_robin", 2)
    assert done.stderr == ""


def test_without_json_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(SMALL), "--workers", "2", "--policy", "min_ttft", "random"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["policy", "workers", "cached"]
    assert [line.split()[:2] for line in lines] == [["min_ttft", "2"], ["random", "2"]]
    assert {len(line.split()) for line in [head, *lines]} == {10}


def test_figures_depend_on_the_seed(replay: Replay) -> None:
    arguments = ("--workers", "4", "--policy", "random", "power_of_two", *KV_POLICIES)
    rows = replay(*arguments, "--seed", "3")
    assert replay(*arguments, "--seed", "3") == rows
    others = replay(*arguments, "--seed", "4")
    assert others[0] != rows[0]
    assert [row["bound_ratio"] for row in others] == [row["bound_ratio"] for row in rows]


# -- figures


def test_one_worker_with_unlimited_cache_reaches_the_upper_bound(replay: Replay) -> None:
    rows = replay("--workers", "1", "--capacity-tokens", ENDLESS)
    assert len(rows) == len(POLICIES)
    for row in rows:
        assert row["cached_ratio"] == row["bound_ratio"]
        assert row["imbalance"] == 1


@pytest.mark.parametrize("load_stat", [False, True])
def test_no_policy_exceeds_the_upper_bound(replay: Replay, load_stat: bool) -> None:
    more = ["--load-stat"] if load_stat else []
    rows = replay("--workers", "2", "8", "--capacity-tokens", ENDLESS, *more)
    assert {row["policy"] for row in rows} == set(POLICIES)
    assert len({row["bound_ratio"] for row in rows}) == 1
    for row in rows:
        assert 0 < row["cached_ratio"] <= row["bound_ratio"]


def test_cache_aware_policies_find_more_cached_tokens(replay: Replay) -> None:
    cached = {row["policy"]: row["cached_ratio"] for row in replay("--workers", "4")}
    blind = max(cached[policy] for policy in POLICIES if policy not in KV_POLICIES)
    assert all(cached[policy] > blind for policy in KV_POLICIES)


def test_a_small_cache_holds_less(replay: Replay) -> None:
    (large,) = replay("--workers", "2", "--policy", "min_ttft")
    (small,) = replay("--workers", "2", "--policy", "min_ttft", "--capacity-tokens", "20000")
    assert small["cached_ratio"] < large["cached_ratio"]
    assert small["bound_ratio"] < large["bound_ratio"]


def test_load_reports_improve_the_result(replay: Replay) -> None:
    # So little room, and decoding so slow, that only reports show which worker is full.
    arguments = ["--workers", "3", "--capacity-tokens", "30000", "--decode-ms", "50"]
    arguments += ["--policy", *KV_POLICIES]
    without, having = replay(*arguments), replay(*arguments, "--load-stat")
    assert [list(row) for row in having] == [KEYS, KEYS]
    assert having != without


def test_times_and_tokens_by_hand(replay: Replay, tmp_path: Path) -> None:
    # 1024 tokens a second. The first takes 1.0 s. The second comes at 0.5 s, begins at 1.0 s,
    # finds 2 pages, of which the last is computed again, and ends at 1.5 s: 1.0 s of waiting.
    # The third, alone at 10 s, finds 2 of 3 and lacks 100 tokens: 0.098 s.
    trace = write_trace(
        tmp_path, (0, 1024, 5, (1, 2)), (500, 1024, 5, (1, 2)), (10_000, 1124, 5, (1, 2, 3))
    )
    rows = replay("--workers", "1", "--prefill-tps", "1024", trace=trace)
    last = 100 / 1024
    for row in rows:
        assert row["cached_ratio"] == row["bound_ratio"] == (512 + 1024) / (1024 + 1024 + 1124)
        assert row["ttft_mean_s"] == pytest.approx((1.0 + 1.0 + last) / 3)
        assert row["ttft_p50_s"] == pytest.approx(1.0)


def test_workers_share_the_work(replay: Replay, tmp_path: Path) -> None:
    # In turn: 512 and 1536 tokens on the first, 512 on the second: 2048 of 2560, of a mean of 1280.
    trace = write_trace(tmp_path, (0, 512, 1, (1,)), (0, 512, 1, (2,)), (0, 1536, 1, (3, 4, 5)))
    (row,) = replay("--workers", "2", "--policy", "round_robin", trace=trace)
    assert row["imbalance"] == pytest.approx(2048 / 1280)
    assert row["cached_ratio"] == 0


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_events_lead_a_later_turn_to_its_worker(
    replay: Replay, tmp_path: Path, policy: str
) -> None:
    # Three conversations of 8 blocks begun together, and a second turn each, long after: its
    # 8 blocks of 9 are held by one of 8 workers.
    first = [(0.0, 4096, 1, range(10 * one, 10 * one + 8)) for one in range(3)]
    second = [(60_000.0, 4608, 1, range(10 * one, 10 * one + 9)) for one in range(3)]
    trace = write_trace(tmp_path, *((*line[:3], list(line[3])) for line in first + second))
    (row,) = replay("--workers", "8", "--policy", policy, trace=trace)
    assert row["cached_ratio"] == row["bound_ratio"] == 4096 / (4096 + 4608)


def test_pages_smaller_than_blocks_find_no_less(replay: Replay) -> None:
    arguments = ("--workers", "1", "--policy", "min_ttft", "--capacity-tokens", ENDLESS)
    (large,), (small,) = replay(*arguments), replay(*arguments, "--page", "64")
    assert small["cached_ratio"] == small["bound_ratio"] >= large["cached_ratio"]


# -- events and reports of a worker


class Listener:
    """A router with one worker; it records events and their times, to the millisecond."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.loads: list[tuple[float, LoadStat]] = []
        self.starts: list[float] = []
        self.ends: list[float] = []

    def route(self, request: TraceRequest, now: float) -> tuple[int, "Listener"]:
        return 0, self

    def cache_changed(self, worker: int, events: Sequence[CacheEvent]) -> None:
        self.events += [type(event).__name__ for event in events]

    def load_changed(self, worker: int, stat: LoadStat, now: float) -> None:
        self.loads.append((round(now, 3), stat))

    def started(self, now: float) -> None:
        self.starts.append(round(now, 3))

    def release(self, now: float) -> None:
        self.ends.append(round(now, 3))


@pytest.mark.parametrize("load_stat", [False, True])
def test_events_and_reports_arrive_late(load_stat: bool) -> None:
    settings = FleetSettings(
        workers=1,
        capacity_tokens=8192,
        page_tokens=512,
        times=TimeModel(prefill_tokens_per_second=1024.0, seconds_per_token=0.1),
        event_delay_seconds=0.05,
        load_stat=load_stat,
    )
    trace = [
        # Prefilled at 1.0, and 2 tokens after the first: over at 1.2.
        TraceRequest(arrived_at=0.0, input_tokens=1024, output_tokens=3, blocks=(1, 2)),
        # Begun at 1.0 and 512 tokens short of the whole: prefilled and over at 1.5.
        TraceRequest(arrived_at=0.5, input_tokens=1024, output_tokens=1, blocks=(1, 2)),
        # 5.5
        TraceRequest(arrived_at=5.0, input_tokens=512, output_tokens=1, blocks=(3,)),
    ]
    listener = Listener()
    run = replay_trace(trace, settings, listener)
    assert listener.starts == [1.0, 1.5, 5.5]
    assert listener.ends == [1.2, 1.5, 5.5]
    assert listener.events == ["Cleared", "Stored", "Stored"]
    assert run.ttft_seconds == pytest.approx([1.0, 1.0, 0.5])
    assert (run.input_tokens, run.cached_tokens, run.prefill_tokens) == (2560, 512, [2048])
    told = [
        (
            at,
            stat.num_running_reqs,
            stat.num_waiting_reqs,
            stat.num_waiting_uncached_tokens,
            stat.num_tokens,
            stat.total_prefill_uncached_tokens,
            stat.total_prefill_busy_us,
        )
        for at, stat in listener.loads
    ]
    assert all(stat.max_total_num_tokens == 8192 for _, stat in listener.loads)
    # When it comes, running, waiting, tokens to prefill of these, in use, prefilled, and in µs.
    expected = [
        (0.05, 0, 0, 0, 0, 0, 0),
        (0.05, 1, 0, 0, 1024, 0, 0),
        (0.55, 1, 1, 1024, 1024, 0, 0),
        (1.05, 2, 0, 0, 2048, 1024, 1_000_000),
        (1.25, 1, 0, 0, 1024, 1024, 1_000_000),
        (1.55, 1, 0, 0, 1024, 1536, 1_500_000),
        (1.55, 0, 0, 0, 0, 1536, 1_500_000),
        # A second after the last word.
        *((at, 0, 0, 0, 0, 1536, 1_500_000) for at in (2.55, 3.55, 4.55)),
        (5.05, 1, 0, 0, 512, 1536, 1_500_000),
        (5.55, 1, 0, 0, 512, 2048, 2_000_000),
        (5.55, 0, 0, 0, 0, 2048, 2_000_000),
    ]
    assert told == (expected if load_stat else [])


# -- traces


def test_timestamps_are_milliseconds_and_requests_in_their_order(tmp_path: Path) -> None:
    trace = write_trace(tmp_path, (2500, 513, 7, (4, 5)), (1000.5, 512, 0, (4,)))
    assert load_trace(trace) == [
        TraceRequest(arrived_at=1.0005, input_tokens=512, output_tokens=0, blocks=(4,)),
        TraceRequest(arrived_at=2.5, input_tokens=513, output_tokens=7, blocks=(4, 5)),
    ]


def test_a_trace_may_start_at_any_timestamp(replay: Replay, tmp_path: Path) -> None:
    def figures(start_ms: int) -> list[float]:
        lines = [(start_ms + 700 * n, 1024, 50, (n % 2, 2 + n)) for n in range(20)]
        trace = write_trace(tmp_path, *lines)
        (row,) = replay("--workers", "2", "--load-stat", "--policy", "min_ttft", trace=trace)
        return [row[key] for key in KEYS[1:]]

    # Seconds of such a size are 2e-7 apart.
    assert figures(1_750_000_000_000) == pytest.approx(figures(0), rel=1e-3)


def test_blank_lines_and_further_fields_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n" + GOOD.replace("}", ', "type": "text"}\n\n'))
    assert len(load_trace(path)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "not json",
        "[]",
        "5",
        "{}",
        GOOD.replace('"timestamp": 0, ', ""),
        GOOD.replace("0,", "NaN,", 1),
        GOOD.replace("0,", "-1,", 1),
        GOOD.replace("0,", '"0",', 1),
        GOOD.replace("600", "null"),
        GOOD.replace("600", '"600"'),
        GOOD.replace("600", "0"),
        GOOD.replace("600", "1025"),  # beyond 2 blocks of 512
        GOOD.replace(": 1,", ": -1,"),
        GOOD.replace(": 1,", ": null,"),
        GOOD.replace("[1, 2]", "null"),
        GOOD.replace("[1, 2]", '"12"'),
        GOOD.replace("[1, 2]", '["1", "2"]'),
        GOOD.replace("[1, 2]", "[1, -2]"),
        GOOD.replace("[1, 2]", "[1, 99999999999999999999]"),
        GOOD.replace("[1, 2]", "[]"),
    ],
)
def test_a_broken_line_is_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line != GOOD
    path = tmp_path / "broken.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert_refused([str(path)], f"{path}:3: ", capsys)


def test_a_line_that_is_not_text_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    assert_refused([str(path)], f"{path}:2: ", capsys)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_trace_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    assert_refused([str(path)], f"{path}: no requests", capsys)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere.jsonl"
    assert_refused([str(path)], str(path), capsys)


@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "0"),
        ("--workers", "x"),
        ("--capacity-tokens", "0"),
        ("--policy", "best"),
        ("--page", "0"),
        ("--page", "100"),
        ("--prefill-tps", "0"),
        ("--decode-ms", "-1"),
        ("--event-delay-ms", "-1"),
    ],
)
def test_invalid_options_are_refused(
    options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused([str(SMALL), *options], "error: ", capsys)


def assert_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--json"])
    assert left.value.code not in (0, None)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "Traceback" not in printed.err


# -- blocks, pages and tokens


def test_a_block_is_512_tokens_of_its_number() -> None:
    request = TraceRequest(arrived_at=0.0, input_tokens=1000, output_tokens=1, blocks=(7, 9))
    assert tokens_of(request).tolist() == [7] * 512 + [9] * 488
    assert list(pages_of(request, 512)) == [7]
    # 7 whole halves of a quarter: pages of 128 are 28 to 31 of block 7, and 36 to 38 of block 9.
    assert list(pages_of(request, 128)) == [28, 29, 30, 31, 36, 37, 38]


@pytest.mark.parametrize("page", [512, 128])
def test_the_index_learns_what_a_worker_holds(page: int) -> None:
    index = PrefixIndex(PrefixHasher(secret=1), 1000)
    rank_pages = index.add("w", page)
    cache = RadixCache(capacity_tokens=4096, page_size=page)
    one = TraceRequest(arrived_at=0.0, input_tokens=1500, output_tokens=1, blocks=(1, 2, 3))
    other = TraceRequest(arrived_at=0.0, input_tokens=1024, output_tokens=1, blocks=(1, 4))
    for now, request in enumerate((one, other)):
        pages = pages_of(request, page)
        cache.release(cache.acquire(pages, now), now, pages)
        apply_events(index, rank_pages, cache.take_events())

    def held(request: TraceRequest) -> int:
        found = index.match(tokens_of(request), [rank_pages])
        return found[rank_pages].pages if found else 0

    assert held(one) == 1500 // page
    assert held(other) == 1024 // page
    # What was not sent: the blocks 1 and 3.
    stranger = TraceRequest(arrived_at=0.0, input_tokens=1024, output_tokens=1, blocks=(1, 3))
    assert held(stranger) == 512 // page
    last = hash_of_last_page(pages_of(other, page))
    apply_events(index, rank_pages, [Removed(hashes=[last], medium="GPU")])
    assert held(other) == 1024 // page - 1
    apply_events(index, rank_pages, [Cleared()])
    assert held(one) == 0


def hash_of_last_page(pages: Sequence[int]) -> int:
    """As a cache names it that holds nothing else."""
    cache = RadixCache(capacity_tokens=4096, page_size=1)
    cache.take_events()
    cache.release(cache.acquire(pages, 0), 0, pages)
    (stored,) = cache.take_events()
    assert not isinstance(stored, Cleared)
    return stored.hashes[-1]


def test_token_ids_are_64_bit() -> None:
    request = TraceRequest(arrived_at=0.0, input_tokens=2, output_tokens=1, blocks=(1 << 47,))
    assert tokens_of(request).dtype == np.uint64


if __name__ == "__main__":
    sys.stdout.write(small_trace())

"""Replays a trace of real traffic under every policy, in simulated time.

    python -m benchmarks.trace_replay TRACE.jsonl [--workers 4 8 16] [--policy min_ttft ...]

A line of the trace is {"timestamp": ms, "input_length", "output_length", "hash_ids"}, where an id
stands for 512 tokens of the prompt and all before them. The policies are the service's own,
with its index, load books and predictions; engines are the simulator's caches and speeds. Time
is simulated: figures depend on the trace and the seed, not on the machine.

`cached` is the share of prompt tokens that needed no prefill, `bound` that of one LRU cache as
large as all workers' caches together, and `ever` that of one without a limit. TTFT is from
arrival to the end of prefill. `imbalance` is the prefilled tokens of the busiest worker divided
by the mean.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta, Struct

from benchmarks.trace_fleet import (
    BLOCK_TOKENS,
    FleetSettings,
    Run,
    Ticket,
    TraceRequest,
    apply_events,
    pages_of,
    replay,
    tokens_of,
)
from extproc.engines.engine import DEFAULT_ENGINE
from extproc.kv.events import LoadStat
from extproc.kv.index import PrefixIndex
from extproc.kv.prefix_hash import PrefixHasher
from extproc.policies.base import KvPolicy, Policy
from extproc.policies.cache_aware_zmq import CacheAwareZmq
from extproc.policies.least_load import LeastLoad
from extproc.policies.min_ttft import MinTtft
from extproc.policies.power_of_two import PowerOfTwo
from extproc.policies.random import RandomPolicy
from extproc.policies.round_robin import RoundRobin
from extproc.routing.placement import EngineTokens, Placement, PromptTokens
from extproc.routing.rank import Rank
from extproc.simulator.cache_events import CacheEvent, Cleared
from extproc.simulator.radix_cache import RadixCache
from extproc.simulator.time_model import TimeModel, reusable_tokens
from extproc.worker_url import parse_worker_url
from extproc.workers.circuit_breaker import CircuitBreaker
from extproc.workers.rank_load import RankLoad
from extproc.workers.worker import Worker, WorkerSpec

_MODEL: Final = "trace"
_PAGES_MAX: Final = 1 << 40
# Block numbers become token ids, and pages of one token.
_BLOCK_MAX: Final = (1 << 48) - 1


class PlainRouter:
    """A policy that knows only its own requests in flight."""

    def __init__(self, policy: Policy, workers: int) -> None:
        self._policy = policy
        self._workers = [_worker(number) for number in range(workers)]

    def route(self, request: TraceRequest, now: float) -> tuple[int, Ticket]:
        chosen = self._policy.choose(self._workers).candidate
        chosen.in_flight += 1
        return chosen.order, _PlainTicket(chosen)

    def cache_changed(self, worker: int, events: Sequence[CacheEvent]) -> None:
        pass

    def load_changed(self, worker: int, stat: LoadStat, now: float) -> None:
        pass


class _PlainTicket:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def started(self, now: float) -> None:
        pass

    def release(self, now: float) -> None:
        self._worker.in_flight -= 1


class KvRouter:
    """A policy with tokens, events and load, as the service runs it."""

    def __init__(self, policy: KvPolicy, settings: FleetSettings, seed: int) -> None:
        self._index = PrefixIndex(PrefixHasher(secret=seed), _PAGES_MAX)
        self._placement = Placement(policy, self._index)
        self._ranks = [
            Rank(
                _worker(number),
                0,
                order=number,
                load=RankLoad(self._placement.model_speed),
                pages=self._index.add(str(number), settings.page_tokens),
            )
            for number in range(settings.workers)
        ]
        for rank in self._ranks:
            assert rank.pages is not None
            rank.pages.trusted = True

    def route(self, request: TraceRequest, now: float) -> tuple[int, Ticket]:
        prompt = PromptTokens({DEFAULT_ENGINE: EngineTokens(tokens_of(request), 0)})
        placed = self._placement.place(self._ranks, prompt, now)
        return placed.rank.order, placed.book(now)

    def cache_changed(self, worker: int, events: Sequence[CacheEvent]) -> None:
        pages = self._ranks[worker].pages
        assert pages is not None
        apply_events(self._index, pages, events)
        if any(isinstance(event, Cleared) for event in events):
            while self._index.scrub(_PAGES_MAX):
                pass

    def load_changed(self, worker: int, stat: LoadStat, now: float) -> None:
        self._ranks[worker].load.report(stat, now)


def _worker(number: int) -> Worker:
    url = parse_worker_url(f"http://10.0.0.{number + 1}:30000")
    spec = WorkerSpec(id=str(url), url=url)
    return Worker(spec, order=number, breaker=CircuitBreaker(3, 30.0), address=None)


def one_cache(trace: Sequence[TraceRequest], capacity_tokens: int, page_tokens: int) -> float:
    """The cached share of one LRU cache that serves all requests in turn."""
    cache = RadixCache(capacity_tokens=capacity_tokens, page_size=page_tokens, record_events=False)
    cached = total = 0
    for now, request in enumerate(trace):
        pages = pages_of(request, page_tokens)
        lease = cache.acquire(pages, now)
        cached += reusable_tokens(lease.cached.tokens, request.input_tokens, page_tokens)
        total += request.input_tokens
        cache.release(lease, now, pages)
    return cached / total


def figures(policy: str, workers: int, bound: float, run: Run) -> dict[str, Any]:
    """One row of the results."""
    ttft = np.array(run.ttft_seconds)
    p50, p95, p99 = np.percentile(ttft, (50, 95, 99))
    busiest = max(run.prefill_tokens)
    return {
        "policy": policy,
        "workers": workers,
        "cached_ratio": run.cached_tokens / run.input_tokens,
        "bound_ratio": bound,
        "ttft_mean_s": float(ttft.mean()),
        "ttft_p50_s": float(p50),
        "ttft_p95_s": float(p95),
        "ttft_p99_s": float(p99),
        "imbalance": busiest * workers / sum(run.prefill_tokens),
    }


def observer_of(policy: str, settings: FleetSettings, seed: int) -> KvRouter | PlainRouter:
    random = Random(seed)
    match policy:
        case "min_ttft":
            return KvRouter(MinTtft(random), settings, seed)
        case "cache_aware_zmq":
            return KvRouter(CacheAwareZmq(random), settings, seed)
        case "least_load":
            return PlainRouter(LeastLoad(random), settings.workers)
        case "power_of_two":
            return PlainRouter(PowerOfTwo(random), settings.workers)
        case "random":
            return PlainRouter(RandomPolicy(random), settings.workers)
        case "round_robin":
            return PlainRouter(RoundRobin(), settings.workers)
    raise ValueError(f"no such policy: {policy}")


_POLICIES: Final = (
    *("round_robin", "random", "power_of_two", "least_load"),
    *("cache_aware_zmq", "min_ttft"),
)
_HEAD: Final = (
    f"{'policy':16} {'workers':>7} {'cached':>7} {'bound':>7} {'ever':>7}"
    f" {'mean':>8} {'p50':>8} {'p95':>8} {'p99':>8} {'imbalance':>9}"
)


def _line(row: dict[str, Any], ever: float) -> str:
    return (
        f"{row['policy']:16} {row['workers']:7} {row['cached_ratio']:7.3f}"
        f" {row['bound_ratio']:7.3f}"
        f" {ever:7.3f} {row['ttft_mean_s']:8.3f} {row['ttft_p50_s']:8.3f} {row['ttft_p95_s']:8.3f}"
        f" {row['ttft_p99_s']:8.3f} {row['imbalance']:9.2f}"
    )


class _Line(Struct, frozen=True):
    """A line of the trace file; `timestamp` in milliseconds."""

    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=0)]
    hash_ids: tuple[Annotated[int, Meta(ge=0, le=_BLOCK_MAX)], ...]


def load_trace(path: Path) -> list[TraceRequest]:
    """Requests in the order of arrival; raises ValueError, which names the wrong line."""
    decoder = msgspec.json.Decoder(_Line)
    requests = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if len(line.hash_ids) * BLOCK_TOKENS < line.input_length:
            raise ValueError(f"{path}:{number}: hash_ids do not cover input_length")
        request = TraceRequest(
            arrived_at=line.timestamp / 1000,
            input_tokens=line.input_length,
            output_tokens=line.output_length,
            blocks=line.hash_ids,
        )
        requests.append(request)
    if not requests:
        raise ValueError(f"{path}: no requests")
    return sorted(requests, key=lambda request: request.arrived_at)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("trace", type=Path, metavar="TRACE.jsonl")
    parser.add_argument("--workers", type=_positive, nargs="+", default=[8])
    parser.add_argument("--capacity-tokens", type=_positive, default=3_000_000, help="of each")
    parser.add_argument("--prefill-tps", type=float, default=8000.0, help="tokens a second")
    parser.add_argument("--decode-ms", type=float, default=20.0, help="a token")
    parser.add_argument("--page", type=int, default=BLOCK_TOKENS, help="tokens, a divisor of 512")
    parser.add_argument("--event-delay-ms", type=float, default=50.0)
    parser.add_argument("--load-stat", action="store_true", help="engines report their load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", nargs="+", choices=_POLICIES, default=_POLICIES)
    parser.add_argument("--json", action="store_true", help="nothing but JSON to stdout")
    options = parser.parse_args(arguments)
    if options.page < 1 or BLOCK_TOKENS % options.page:
        parser.error(f"--page must divide {BLOCK_TOKENS}")
    if options.prefill_tps <= 0 or options.decode_ms < 0 or options.event_delay_ms < 0:
        parser.error("speeds are positive, times not negative")
    try:
        options.requests = load_trace(options.trace)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    trace: list[TraceRequest] = options.requests
    total = sum(request.input_tokens for request in trace)
    ever = one_cache(trace, total + options.page, options.page)
    rows = []
    if not options.json:
        print(_HEAD)
    for workers in options.workers:
        settings = FleetSettings(
            workers=workers,
            capacity_tokens=options.capacity_tokens,
            page_tokens=options.page,
            times=TimeModel(
                prefill_tokens_per_second=options.prefill_tps,
                seconds_per_token=options.decode_ms / 1000,
            ),
            event_delay_seconds=options.event_delay_ms / 1000,
            load_stat=options.load_stat,
        )
        bound = one_cache(trace, options.capacity_tokens * workers, options.page)
        for policy in options.policy:
            run = replay(trace, settings, observer_of(policy, settings, options.seed))
            rows.append(figures(policy, workers, bound, run))
            if not options.json:
                print(_line(rows[-1], ever), flush=True)
    if options.json:
        json.dump({"results": rows}, sys.stdout)
        print()


if __name__ == "__main__":
    main()

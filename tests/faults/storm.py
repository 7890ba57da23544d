"""One storm: faults come and go under traffic, and then everything must be as before."""

import asyncio
import statistics
from collections.abc import Iterator, Sequence
from random import Random
from typing import Final

from msgspec import Struct

from benchmarks.procs import rss_bytes
from extproc.testing.stack import StackError, wait_until
from tests.faults.faults import (
    FLEET_FAULTS,
    GATEWAY_FAULTS,
    KV_FAULTS,
    NAME_FAULTS,
    WORKER_FAULTS,
)
from tests.faults.fleet import Fleet, Worker
from tests.faults.traffic import Outcome, Traffic

__all__ = ["Storm", "StormOptions", "fault_names"]

_WARM_UP_REQUESTS: Final = 100
_WARM_UP_CLIENTS: Final = 10
_RECOVERY_SECONDS: Final = 90.0
# Sockets to workers and clients that are still closing, and connections that are kept.
_SPARE_FILES: Final = 24
_SAMPLE_SECONDS: Final = 1.0
_SAMPLES_MIN: Final = 20


class StormOptions(Struct, frozen=True, kw_only=True):
    """`requests` or `seconds` end the storm. A fault begins `every_seconds` and lasts as long.

    `plain_errors_max` is the largest share of failed requests among those that are not streamed;
    `growth_max` bounds the growth of the service's memory after the first third.
    """

    seed: int = 1
    faults: tuple[str, ...] = ()
    seconds: float | None = None
    requests: int | None = None
    concurrency: int = 50
    every_seconds: float = 2.0
    deadline_seconds: float = 30.0
    plain_errors_max: float | None = None
    growth_max: float | None = None


def fault_names(*, kv_events: bool, named: bool) -> tuple[str, ...]:
    """All faults that fit a fleet."""
    kv = KV_FAULTS if kv_events else {}
    names = NAME_FAULTS if named else {}
    return (*WORKER_FAULTS, *kv, *FLEET_FAULTS, *names, *GATEWAY_FAULTS)


class Storm:
    """Runs once; `problems` is empty if the fleet has passed."""

    def __init__(self, fleet: Fleet, options: StormOptions) -> None:
        self._fleet = fleet
        self._options = options
        random = Random(options.seed)
        self._victims = Random(random.random())
        self._deck = _shuffled(Random(random.random()), options.faults)
        self.traffic = Traffic(
            fleet.http,
            fleet.stack.url,
            Random(random.random()),
            concurrency=options.concurrency,
            requests=options.requests,
            deadline_seconds=options.deadline_seconds,
        )
        self.problems: list[str] = []
        # Seconds since the start, name and victim of each fault.
        self.log: list[str] = []
        self._memory: list[int] = []

    async def run(self) -> None:
        await self._warm_up()
        files = await self._open_files()
        traffic = asyncio.create_task(self.traffic.run())
        watch = asyncio.create_task(self._watch_memory())
        try:
            await self._blow(traffic)
            self.traffic.stop()
            await traffic
        finally:
            for task in (traffic, watch):
                task.cancel()
            await asyncio.gather(traffic, watch, return_exceptions=True)
        self._check_answers()
        for check in (self._check_rest(files), self._check_recovery(), self._check_rest(files)):
            try:
                await check
            except StackError as error:
                self.problems.append(str(error))
        self._check_memory()

    async def _warm_up(self) -> None:
        warm_up = Traffic(
            self._fleet.http,
            self._fleet.stack.url,
            Random(0),
            concurrency=_WARM_UP_CLIENTS,
            requests=_WARM_UP_REQUESTS,
            deadline_seconds=self._options.deadline_seconds,
        )
        await warm_up.run()
        if warm_up.count(Outcome.OK) < warm_up.sent:
            self.problems.append(f"before the storm: {dict(warm_up.outcomes)} {warm_up.odd[:1]}")

    # -- the storm

    async def _blow(self, traffic: asyncio.Task[None]) -> None:
        """Begin a fault at each interval, until the traffic or the time has ended."""
        options, loop = self._options, asyncio.get_running_loop()
        started = loop.time()
        async with asyncio.TaskGroup() as faults:
            number = 0
            while not traffic.done():
                passed = loop.time() - started
                if options.seconds is not None and passed >= options.seconds:
                    return
                if options.faults:
                    faults.create_task(self._fault(passed))
                number += 1
                until = started + number * options.every_seconds - loop.time()
                await asyncio.wait([traffic], timeout=max(0.0, until))

    async def _fault(self, passed: float) -> None:
        name = next(self._deck)
        fleet_faults = {**FLEET_FAULTS, **NAME_FAULTS, **GATEWAY_FAULTS}
        if name in fleet_faults:
            async with self._fleet.busy:
                self.log.append(f"{passed:6.1f} s  {name}")
                async with fleet_faults[name](self._fleet):
                    await asyncio.sleep(self._options.every_seconds)
            return
        worker = self._victim()
        async with worker.busy:
            self.log.append(f"{passed:6.1f} s  {name:<15} worker {worker.port}")
            async with {**WORKER_FAULTS, **KV_FAULTS}[name](worker):
                await asyncio.sleep(self._options.every_seconds)

    def _victim(self) -> Worker:
        workers = self._fleet.workers
        first = self._victims.randrange(len(workers))
        turned = [*workers[first:], *workers[:first]]
        return next((worker for worker in turned if not worker.busy.locked()), turned[0])

    # -- what must hold afterwards

    def _check_answers(self) -> None:
        traffic = self.traffic
        allowed = any(name in GATEWAY_FAULTS for name in self._options.faults)
        wrong = [Outcome.HUNG, Outcome.ODD, *([] if allowed else [Outcome.REFUSED])]
        for outcome in wrong:
            if count := traffic.count(outcome):
                self.problems.append(f"{count} requests: {outcome.value} {traffic.odd[:3]}")
        if not traffic.count(Outcome.OK):
            self.problems.append("no request was answered well")
        most = self._options.plain_errors_max
        if most is not None and traffic.plain_error_share > most:
            self.problems.append(f"{traffic.plain_error_share:.2%} of the plain requests failed")

    async def _check_rest(self, files: int) -> None:
        """Nothing is left of the requests: tickets, streams, legs, rooms, descriptors."""
        left: dict[str, float] = {}

        async def at_rest() -> bool:
            left.clear()
            left.update(await self._left(files))
            return not left

        try:
            await wait_until(at_rest, "nothing is left", _RECOVERY_SECONDS)
        except StackError as error:
            raise StackError(f"{error}: {left}") from None

    async def _left(self, files: int) -> dict[str, float]:
        metrics = await self._fleet.stack.metrics()
        held = {
            "tickets": metrics["extproc_tickets_open"],
            "streams": metrics["extproc_streams_open"],
            "requests": metrics["extproc_requests_open"],
            "buffered": metrics["extproc_buffered_bytes"],
            "in flight": await self._fleet.stack.in_flight(),
            "files": max(0.0, metrics["process_open_fds"] - files - _SPARE_FILES),
            "on workers": sum([await worker.busy_with() for worker in self._fleet.workers]),
        }
        return {name: count for name, count in held.items() if count}

    async def _check_recovery(self) -> None:
        """Every worker is used again, and every request is answered."""

        async def recovered() -> bool:
            outcomes = [await self._probe() for _ in range(2 * len(self._fleet.workers))]
            states = [worker["breaker"] for worker in await self._fleet.stack.workers()]
            return set(outcomes) == {Outcome.OK} and states == ["closed"] * len(self._fleet.workers)

        await wait_until(recovered, "all workers are used again", _RECOVERY_SECONDS)

    async def _probe(self) -> Outcome:
        probe = Traffic(
            self._fleet.http,
            self._fleet.stack.url,
            self._victims,
            concurrency=1,
            requests=1,
            deadline_seconds=self._options.deadline_seconds,
        )
        return await probe.send()

    async def _open_files(self) -> int:
        return int((await self._fleet.stack.metrics())["process_open_fds"])

    async def _watch_memory(self) -> None:
        while True:
            try:
                self._memory.append(rss_bytes(self._fleet.stack.service.pid))
            except (OSError, ValueError, StackError):
                self._memory.append(0)  # the service is being restarted
            await asyncio.sleep(_SAMPLE_SECONDS)

    @property
    def growth(self) -> float | None:
        """The growth of the service's memory from the second third of the storm to its end.

        None for a storm that is too short or that restarts the service.
        """
        samples = self._memory
        if len(samples) < _SAMPLES_MIN or any(
            name in FLEET_FAULTS for name in self._options.faults
        ):
            return None
        third, tenth = len(samples) // 3, len(samples) // 10
        early = statistics.median(samples[third : third + tenth])
        return statistics.median(samples[-tenth:]) / early - 1

    def _check_memory(self) -> None:
        most = self._options.growth_max
        if most is not None and (self.growth is None or self.growth > most):
            self.problems.append(f"the service's memory has grown by {self.growth}")


def _shuffled(random: Random, names: Sequence[str]) -> Iterator[str]:
    """Each name once in a random order, again and again."""
    while True:
        yield from random.sample(names, len(names))

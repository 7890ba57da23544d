"""Names as a source of workers, with scripted answers and a fake clock."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from extproc.discovery.dns_names import DnsNames, LookupTimes, NamedWorkers
from extproc.discovery.name_lookup import Addresses, LookupFailedError
from extproc.metrics.service import Metrics
from extproc.worker_url import parse_worker_url
from extproc.workers.source import Added, DrainingChanged, Listed, Removed, WorkerEvent
from extproc.workers.source_health import SourceHealth
from tests.fakes import FakeClock, settle

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


class FakeLookup:
    """Answers with what the test has set for a name."""

    def __init__(self) -> None:
        self.ttl: float | None = 5.0
        self.answers: dict[str, Sequence[str] | Exception] = {}
        self.asked: list[str] = []

    async def find(self, name: str) -> Addresses:
        self.asked.append(name)
        answer = self.answers.get(name, LookupFailedError("timeout", "no answer"))
        if isinstance(answer, Exception):
            raise answer
        return Addresses(tuple(answer), self.ttl)


class Setup:
    def __init__(self, *names: NamedWorkers, leave_seconds: float = 10.0) -> None:
        self.lookup = FakeLookup()
        self.clock = FakeClock()
        self.prometheus = CollectorRegistry()
        self.health = SourceHealth()
        self.source = DnsNames(
            names,
            self.lookup,
            LookupTimes(ttl_min_seconds=1, ttl_max_seconds=30, leave_seconds=leave_seconds),
            clock=self.clock,
            metrics=Metrics(self.prometheus).discovery,
            health=self.health,
        )
        self._seen: list[WorkerEvent] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def collect() -> None:
            async for event in self.source.events():
                self._seen.append(event)

        task = asyncio.create_task(collect())
        try:
            await settle()
            yield
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await settle()

    async def after(
        self, seconds: float, **answers: Sequence[str] | Exception
    ) -> list[WorkerEvent]:
        """The events since the last call, after these answers and so many seconds."""
        self.lookup.answers |= answers
        await self.clock.advance(seconds)
        seen, self._seen[:] = list(self._seen), []
        return seen

    def sample(self, name: str, **labels: str) -> float | None:
        return self.prometheus.get_sample_value(name, {"objects": "names"} | labels)

    @property
    def up(self) -> float | None:
        return self.sample("extproc_discovery_up")


def name(host: str, **fields: Any) -> NamedWorkers:
    return NamedWorkers(parse_worker_url(f"http://{host}:8000"), **fields)


def worker(host: str) -> str:
    return f"http://{host}:8000"


def ids(events: list[WorkerEvent]) -> list[str]:
    return [event.spec.id for event in events if isinstance(event, Added)]


async def test_every_address_is_a_worker_at_the_port_of_its_name() -> None:
    setup = Setup(name("w"))
    setup.lookup.answers = {"w": [A, "2001:db8::1"]}
    async with setup.running():
        first, second, listed = await setup.after(0)
        assert isinstance(first, Added)
        assert isinstance(second, Added)
        assert (first.spec.id, first.spec.role) == (worker(A), "plain")
        assert not first.spec.role_is_configured
        assert str(second.spec.url) == "http://[2001:db8::1]:8000"
        assert listed == Listed()
        assert setup.up == 1


async def test_names_give_their_workers_a_role() -> None:
    setup = Setup(name("p", role="prefill"), name("d", role="decode"), name("w"))
    setup.lookup.answers = {"p": [A], "d": [B], "w": [C]}
    async with setup.running():
        events = await setup.after(0)
    specs = [event.spec for event in events if isinstance(event, Added)]
    assert [(one.role, one.role_is_configured) for one in specs] == [
        ("prefill", True),
        ("decode", True),
        ("plain", False),
    ]


async def test_a_name_is_looked_up_again_when_its_records_expire_within_bounds() -> None:
    setup = Setup(name("w"))
    setup.lookup.answers = {"w": [A]}
    async with setup.running():
        for ttl, seconds in ((5.0, 5), (0.0, 1), (3600.0, 30), (None, 30)):
            setup.lookup.ttl = ttl
            before = len(setup.lookup.asked)
            # The wait that runs was made with the time to live before.
            await setup.after(30)
            setup.lookup.asked.clear()
            setup.clock.slept.clear()
            await setup.after(seconds)
            assert setup.lookup.asked, (ttl, before)
            assert set(setup.clock.slept) == {seconds}


async def test_a_missing_worker_drains_and_leaves_later_or_comes_back() -> None:
    setup = Setup(name("w"))
    setup.lookup.answers = {"w": [A, B]}
    async with setup.running():
        await setup.after(0)
        assert await setup.after(5, w=[A]) == [DrainingChanged(worker(B), True)]
        assert await setup.after(5, w=[A, B]) == [DrainingChanged(worker(B), False)]
        assert await setup.after(5, w=[B, C]) == [
            DrainingChanged(worker(A), True),
            Added(name("w").at(C)),
        ]
        assert await setup.after(9) == []
        assert await setup.after(1) == [Removed(worker(A))]
        assert ids(await setup.after(5, w=[A])) == [worker(A)]


async def test_a_worker_of_two_names_stays_while_one_of_them_has_it() -> None:
    setup = Setup(name("v"), name("w"))
    setup.lookup.answers = {"v": [A], "w": [A]}
    async with setup.running():
        assert ids(await setup.after(0)) == [worker(A)]
        assert await setup.after(5, v=[B]) == [Added(name("w").at(B))]
        assert await setup.after(5, w=[B]) == [DrainingChanged(worker(A), True)]


async def test_without_a_good_answer_the_known_workers_stay() -> None:
    setup = Setup(name("w"))
    setup.lookup.answers = {"w": [A, B]}
    async with setup.running():
        await setup.after(0)
        for reason in ("timeout", "server_error", "refused", "name_not_found", "no_addresses"):
            with capture_logs() as logs:
                assert await setup.after(30, w=LookupFailedError(reason, "x")) == []
            assert setup.up == 0
            (shown,) = setup.health.show(setup.clock.monotonic())
            assert (shown["objects"], shown["reason"]) == ("names", reason)
            assert (setup.sample("extproc_discovery_errors_total", reason=reason) or 0) >= 2
            (warning,) = logs
            assert (warning["event"], warning["reason"]) == ("discovery_failing", reason)
            assert (warning["name"], bool(warning["fix"])) == ("w", True)
        with capture_logs() as logs:
            assert await setup.after(30, w=[A, B]) == []
        assert [line["event"] for line in logs] == ["discovery_recovered"]
        assert setup.up == 1
        assert not setup.health.is_stale
    assert setup.health.show(setup.clock.monotonic()) == []


async def test_an_unexpected_error_is_a_failure_like_any_other() -> None:
    setup = Setup(name("w"))
    setup.lookup.answers = {"w": RuntimeError("odd")}
    async with setup.running():
        assert await setup.after(0) == []
        assert setup.sample("extproc_discovery_errors_total", reason="invalid") == 1
        assert ids(await setup.after(5, w=[A])) == [worker(A)]


async def test_the_start_waits_for_an_answer_about_every_name() -> None:
    setup = Setup(name("v"), name("w"))
    setup.lookup.answers = {"v": [A]}
    async with setup.running():
        assert ids(await setup.after(0)) == [worker(A)]
        assert await setup.after(30) == []
        assert setup.up == 0
        # That there is no such name is an answer, too.
        assert await setup.after(5, w=LookupFailedError("name_not_found", "x")) == [Listed()]
        assert setup.up == 0
        assert ids(await setup.after(5, w=[B])) == [worker(B)]
        assert setup.up == 1


async def test_failed_lookups_are_repeated_soon_but_not_at_once() -> None:
    setup = Setup(name("w"))
    async with setup.running():
        await setup.after(30)
        assert setup.clock.slept[:5] == [1, 2, 4, 5, 5]


async def test_a_lasting_failure_is_warned_of_once_a_minute() -> None:
    setup = Setup(name("w"))
    async with setup.running():
        with capture_logs() as logs:
            await setup.after(170)
        assert [line["event"] for line in logs] == ["discovery_failing"] * 2


async def test_a_huge_answer_is_limited() -> None:
    setup = Setup(name("w"))
    many = [f"10.1.{high}.{low}" for high in range(5) for low in range(250)]
    setup.lookup.answers = {"w": many}
    with capture_logs() as logs:
        async with setup.running():
            assert len(ids(await setup.after(0))) == 1000
            assert await setup.after(20) == []
    assert [line["event"] for line in logs] == ["too_many_addresses"]
    assert setup.sample("extproc_discovery_errors_total", reason="too_many_addresses") == 5


_HOSTS = st.sets(st.sampled_from([A, B, C, "10.0.0.4"]), max_size=4)
_STEPS = st.lists(
    st.tuples(st.sampled_from(["v", "w"]), _HOSTS, st.sampled_from([0.0, 1.0, 5.0, 12.0])),
    max_size=12,
)


@given(steps=_STEPS)
@settings(max_examples=60, deadline=None)
async def test_events_agree_with_the_last_good_answers(
    steps: list[tuple[str, set[str], float]],
) -> None:
    """An empty answer stands for a failed lookup."""
    setup = Setup(name("v"), name("w"))
    good: dict[str, set[str]] = {"v": set(), "w": set()}
    known: set[str] = set()
    draining: set[str] = set()
    async with setup.running():
        for host, hosts, seconds in [*steps, ("v", set[str](), 60.0)]:
            answer = sorted(hosts) or LookupFailedError("no_addresses", "x")
            setup.lookup.answers[host] = answer
            for event in await setup.after(5) + await setup.after(seconds):
                match event:
                    case Added(spec):
                        assert spec.id not in known
                        known.add(spec.id)
                    case Removed(gone):
                        known.remove(gone)
                        draining.discard(gone)
                    case DrainingChanged(changed, now):
                        assert changed in known
                        (draining.add if now else draining.discard)(changed)
            good[host] = hosts or good[host]
            expected = {worker(one) for one in good["v"] | good["w"]}
            assert known - draining == expected
        # Those that are missing are gone in time.
        assert not draining

"""Workers that are added while the service runs, beside those of a backend."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.worker_url import parse_worker_url
from extproc.workers.runtime_workers import RuntimeWorkerError, RuntimeWorkers
from extproc.workers.source import Added, Listed, Removed, Vanished, WorkerEvent
from tests.builders import make_spec
from tests.fakes import FakeWorkerSource, settle

A, B, C = (f"http://10.0.0.{n}:8000" for n in (1, 2, 3))


class Setup:
    def __init__(self, limit: int = 10) -> None:
        self.source = FakeWorkerSource()
        self.runtime = RuntimeWorkers(self.source, limit=limit)
        self._seen: list[WorkerEvent] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def collect() -> None:
            async for event in self.runtime.events():
                self._seen.append(event)

        task = asyncio.create_task(collect())
        try:
            yield
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await settle()

    async def events(self, *pushed: WorkerEvent) -> list[WorkerEvent]:
        self.source.push(*pushed)
        await settle()
        seen, self._seen[:] = list(self._seen), []
        return seen

    def add(self, url: str) -> None:
        self.runtime.add(parse_worker_url(url), None, None)

    def remove(self, url: str) -> None:
        self.runtime.remove(parse_worker_url(url))


async def test_both_kinds_of_workers_are_reported_in_order() -> None:
    setup = Setup()
    setup.add(B)
    async with setup.running():
        first, second, listed = await setup.events(Added(make_spec(A)), Listed())
        assert isinstance(first, Added)
        assert (str(first.spec.url), first.spec.role_is_configured) == (B, False)
        assert setup.runtime.is_added(first.spec.id)
        assert (second, listed) == (Added(make_spec(A)), Listed())
        assert not setup.runtime.is_added(make_spec(A).id)
        setup.remove(B)
        assert await setup.events() == [Removed(first.spec.id)]
        assert len(setup.runtime) == 0


async def test_a_role_and_a_model_can_be_given() -> None:
    setup = Setup()
    async with setup.running():
        setup.runtime.add(parse_worker_url(A), "prefill", "m")
        (event,) = await setup.events()
        assert isinstance(event, Added)
        spec = event.spec
        assert (spec.role, spec.role_is_configured, spec.model_ids) == ("prefill", True, ("m",))


async def test_a_worker_is_known_only_once() -> None:
    setup = Setup()
    async with setup.running():
        await setup.events(Added(make_spec(A, id="pod:8000")))
        with pytest.raises(RuntimeWorkerError, match="discovery names this worker"):
            setup.add(A)
        setup.add(B)
        with pytest.raises(RuntimeWorkerError, match="added before"):
            setup.add(B)
        await setup.events(Removed("pod:8000"))
        setup.add(A)
        assert len(setup.runtime) == 2


async def test_a_worker_that_vanished_can_be_added() -> None:
    setup = Setup()
    async with setup.running():
        await setup.events(Added(make_spec(A)), Vanished(make_spec(A)))
        setup.add(A)


async def test_only_added_workers_can_be_removed() -> None:
    setup = Setup()
    async with setup.running():
        await setup.events(Added(make_spec(A)))
        with pytest.raises(RuntimeWorkerError, match="remove it there") as caught:
            setup.remove(A)
        assert caught.value.is_known
        with pytest.raises(RuntimeWorkerError, match="no such worker") as caught:
            setup.remove(B)
        assert not caught.value.is_known


async def test_a_worker_that_discovery_names_later_is_that_of_discovery() -> None:
    setup = Setup()
    async with setup.running():
        setup.add(A)
        (added,) = await setup.events()
        assert isinstance(added, Added)
        assert await setup.events(Added(make_spec(A))) == [
            Removed(added.spec.id),
            Added(make_spec(A)),
        ]
        assert len(setup.runtime) == 0


async def test_the_number_is_limited_and_the_limit_can_change() -> None:
    setup = Setup(limit=1)
    setup.add(A)
    with pytest.raises(RuntimeWorkerError, match=r"discovery\.runtime_workers_max"):
        setup.add(B)
    setup.runtime.limit = 2
    setup.add(B)
    setup.runtime.limit = 0
    with pytest.raises(RuntimeWorkerError):
        setup.add(C)
    setup.remove(A)


async def test_an_error_of_the_backend_ends_the_events() -> None:
    class Failing:
        async def events(self) -> AsyncIterator[WorkerEvent]:
            yield Listed()
            raise RuntimeError("broken")

    runtime = RuntimeWorkers(Failing(), limit=1)
    events = runtime.events()
    assert await anext(events) == Listed()
    with pytest.raises(RuntimeError, match="broken"):
        await anext(events)


_ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "found", "lost"]), st.sampled_from([A, B, C])),
    max_size=20,
)


@given(actions=_ACTIONS)
@settings(max_examples=60, deadline=None)
async def test_a_url_is_never_reported_twice(actions: list[tuple[str, str]]) -> None:
    setup = Setup(limit=2)
    discovered: set[str] = set()
    known: dict[str, str] = {}
    async with setup.running():
        for action, url in actions:
            pushed: list[WorkerEvent] = []
            try:
                if action == "add":
                    setup.add(url)
                elif action == "remove":
                    setup.remove(url)
                elif (action == "found") != (url in discovered):
                    spec = make_spec(url)
                    pushed = [Added(spec) if action == "found" else Removed(spec.id)]
                    (discovered.add if action == "found" else discovered.remove)(url)
            except RuntimeWorkerError:
                pass
            for event in await setup.events(*pushed):
                if isinstance(event, Added):
                    assert str(event.spec.url) not in known.values()
                    known[event.spec.id] = str(event.spec.url)
                elif isinstance(event, Removed):
                    del known[event.id]
            added = {one for one in known if setup.runtime.is_added(one)}
            assert len(added) == len(setup.runtime)
            assert len(added) <= 2
            assert discovered <= set(known.values())

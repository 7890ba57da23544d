"""Workers that discovery names no longer, without a sign that they leave, are held for a while."""

import pytest
from structlog.testing import capture_logs

from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.source import Added, DrainingChanged, Removed, Vanished
from tests.builders import make_spec
from tests.fakes import FakeEngineClient, settle

from .manager_setup import A, B, C, Gate, ManagerSetup, running

HOLD_SECONDS = 30.0
PREFILL = {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 8998}


def holding() -> ManagerSetup:
    setup = ManagerSetup(hold_seconds=HOLD_SECONDS)
    for url in (A, B, C):
        setup.client.tell(url, "m")
    return setup


def ended(setup: ManagerSetup, outcome: str) -> float:
    return setup.metric("extproc_vanished_workers_total", outcome=outcome)


async def test_a_vanished_worker_stays_in_use_for_its_time() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        await setup.deliver(Vanished(make_spec(A)))
        assert setup.worker(A).vanished
        assert not setup.worker(B).vanished
        await setup.clock.advance(HOLD_SECONDS - 2.0)
        assert sorted(setup.pool()) == [A, B]
        await setup.clock.advance(3.0)
        assert setup.pool() == [B]
        assert setup.registry.get(A) is None
        assert ended(setup, "expired") == 1


async def test_a_vanished_worker_that_is_named_again_was_never_away() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        await setup.deliver(Vanished(make_spec(A)))
        await setup.clock.advance(10.0)
        changes = setup.changes
        await setup.deliver(Added(make_spec(A)))
        assert setup.worker(A) is worker
        assert not worker.vanished
        assert setup.changes == changes
        await setup.clock.advance(2 * HOLD_SECONDS)
        assert setup.pool() == [A]
        assert ended(setup, "found") == 1


async def test_a_vanished_worker_that_does_not_answer_leaves_at_once() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        setup.client.script(A, "/server_info", EngineAnswer(503, b""))
        await setup.deliver(Vanished(make_spec(A)), Vanished(make_spec(B)))
        assert setup.pool() == [B]
        assert ended(setup, "silent") == 1


async def test_a_vanished_worker_that_ends_later_leaves_within_its_turn() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A)))
        await setup.deliver(Vanished(make_spec(A)))
        await setup.clock.advance(5.0)
        assert setup.pool() == [A]
        setup.client.script(A, "/server_info", EngineAnswer(503, b""))
        await setup.clock.advance(6.0)
        assert setup.registry.get(A) is None
        # If it is named again, it joins as a new one.
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        assert setup.pool() == [A]


async def test_a_held_worker_is_not_asked_all_the_time() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A)))
        await setup.deliver(Vanished(make_spec(A)))
        asked = len(setup.client.asked(A))
        await setup.clock.advance(20.0)
        assert 3 <= len(setup.client.asked(A)) - asked <= 5


async def test_a_sign_that_comes_later_ends_the_hold() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A)))
        await setup.deliver(Vanished(make_spec(A)))
        await setup.deliver(Removed(A))
        assert setup.registry.get(A) is None
        assert ended(setup, "left") == 1


async def test_another_worker_at_the_address_ends_the_hold() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A, id="old")))
        await setup.deliver(Vanished(make_spec(A, id="old")))
        await setup.deliver(Added(make_spec(A, id="new")))
        assert [worker.id for worker in setup.registry] == ["new"]
        assert ended(setup, "left") == 1


async def test_a_held_worker_that_is_named_in_another_role_changes_it() -> None:
    async with running(holding()) as setup:
        setup.client.script(A, "/server_info", EngineAnswer(404, b""))
        setup.client.script(A, "/v1/models", EngineAnswer(200, b'{"data": [{"id": "m"}]}'))
        await setup.deliver(Added(make_spec(A, role="prefill", bootstrap_port=1)))
        worker = setup.worker(A)
        await setup.deliver(Vanished(make_spec(A, role="prefill", bootstrap_port=1)))
        await setup.deliver(Added(make_spec(A, role="decode", bootstrap_port=1)))
        assert setup.worker(A) is worker
        assert worker.role == "decode"


async def test_a_held_worker_that_is_named_at_another_address_is_another_one() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A, id="pod")))
        await setup.deliver(Vanished(make_spec(A, id="pod")))
        await setup.deliver(Added(make_spec(B, id="pod")))
        assert setup.pool() == [B]


async def test_a_held_worker_can_drain_when_it_is_named_again() -> None:
    async with running(holding()) as setup:
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        await setup.deliver(Vanished(make_spec(A)), Added(make_spec(A)), DrainingChanged(A, True))
        assert setup.worker(A) is worker
        assert setup.pool() == []


async def test_a_worker_that_vanishes_before_it_has_joined_is_held_then() -> None:
    async with running(holding()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", gate)
        await setup.deliver(Added(make_spec(A)), Vanished(make_spec(A)))
        gate.open()
        await settle()
        assert setup.pool() == [A]
        assert setup.worker(A).vanished
        await setup.clock.advance(HOLD_SECONDS + 1.0)
        assert setup.registry.get(A) is None


async def test_a_refused_worker_is_forgotten_after_its_time() -> None:
    async with running(holding()) as setup:
        setup.client.tell(C, "m", **PREFILL)
        await setup.deliver(*(Added(make_spec(url)) for url in (A, B, C)))
        assert [spec.id for spec in setup.manager.refused()] == [C]
        await setup.deliver(Vanished(make_spec(C)))
        assert [spec.id for spec in setup.manager.refused()] == [C]
        await setup.clock.advance(HOLD_SECONDS + 1.0)
        assert setup.manager.refused() == []


async def test_without_a_time_a_vanished_worker_leaves_at_once() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        await setup.deliver(Vanished(make_spec(A)))
        assert setup.registry.get(A) is None


async def test_many_that_vanish_are_one_line_of_the_log() -> None:
    setup = holding()
    urls = [f"http://10.1.0.{n}:8000" for n in range(50)]
    for url in urls:
        setup.client.tell(url, "m")
    async with running(setup):
        await setup.deliver(*(Added(make_spec(url)) for url in urls))
        with capture_logs() as logs:
            await setup.deliver(*(Vanished(make_spec(url)) for url in urls))
            await setup.clock.advance(2.0)
            await setup.deliver(*(Added(make_spec(url)) for url in urls))
            await setup.clock.advance(2.0)
    told = [(line["event"], line["workers"], line.get("outcome")) for line in logs]
    assert told == [("workers_vanished", 50, None), ("vanished_workers_ended", 50, "found")]


@pytest.mark.parametrize("outcome", ["found", "expired"])
async def test_a_role_switch_of_the_engine_is_seen_while_it_is_held(outcome: str) -> None:
    async with running(holding()) as setup:
        setup.client.tell(A, "m", **PREFILL)
        await setup.deliver(Added(make_spec(A)))
        await setup.deliver(Vanished(make_spec(A)))
        setup.client.tell(A, "m", disaggregation_mode="decode")
        await setup.clock.advance(6.0)
        assert setup.worker(A).role == "decode"
        if outcome == "found":
            await setup.deliver(Added(make_spec(A)))
            assert setup.worker(A).role == "decode"
        else:
            await setup.clock.advance(HOLD_SECONDS)
        assert ended(setup, outcome) == 1

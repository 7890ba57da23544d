"""Workers that are about to leave: no new requests, and nothing else is taken from them yet."""

from extproc.workers.observer import WorkerObserver
from extproc.workers.source import Added, DrainingChanged, Removed, RoleChanged
from extproc.workers.worker import Worker
from tests.builders import make_spec
from tests.fakes import FakeEngineClient, settle

from .manager_setup import A, B, Gate, ManagerSetup, running


async def test_a_draining_worker_leaves_its_pool_and_stays_registered() -> None:
    async with running(ManagerSetup()) as setup:
        for url in (A, B):
            setup.client.tell(url, "m")
        await setup.deliver(Added(make_spec(A)), Added(make_spec(B)))
        worker = setup.worker(A)
        await setup.deliver(DrainingChanged(A, True))
        assert setup.pool() == [B]
        assert setup.registry.get(A) is worker
        assert worker.draining
        # Responses of its streams are still attributed to it.
        assert setup.registry.at_address("10.0.0.1:8000") is worker


async def test_a_worker_may_stop_draining_with_its_load() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)))
        worker = setup.worker(A)
        await setup.deliver(DrainingChanged(A, True), DrainingChanged(A, False))
        assert setup.pool() == [A]
        assert setup.worker(A) is worker


async def test_draining_does_not_wait_for_an_answer_of_the_worker() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", FakeEngineClient.info("m"), gate)
        await setup.deliver(Added(make_spec(A)))
        setup.manager.recheck(setup.worker(A))
        await settle()
        assert gate.entered == 1
        await setup.deliver(DrainingChanged(A, True))
        assert setup.pool() == []
        gate.open()


async def test_a_removed_worker_is_not_picked_while_it_is_being_asked() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", FakeEngineClient.info("m"), gate)
        await setup.deliver(Added(make_spec(A)))
        setup.manager.recheck(setup.worker(A))
        await settle()
        await setup.deliver(Removed(A))
        assert setup.pool() == []
        gate.open()
        await settle()
        assert setup.registry.get(A) is None


async def test_a_worker_that_drains_before_it_has_joined_gets_no_requests() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", gate)
        await setup.deliver(Added(make_spec(A)), DrainingChanged(A, True))
        gate.open()
        await settle()
        assert setup.worker(A).draining
        assert setup.pool() == []


async def test_a_worker_that_comes_again_does_not_drain() -> None:
    async with running(ManagerSetup()) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)), DrainingChanged(A, True), Removed(A))
        await setup.deliver(Added(make_spec(A)))
        assert setup.pool() == [A]


async def test_a_worker_that_is_back_in_another_role_is_used_once_the_role_is_known() -> None:
    async with running(ManagerSetup()) as setup:
        prefill = FakeEngineClient.info("m", disaggregation_mode="prefill")
        gate = Gate(FakeEngineClient.info("m", disaggregation_mode="decode"))
        setup.client.script(A, "/server_info", prefill, gate)
        await setup.deliver(Added(make_spec(A)), DrainingChanged(A, True))
        await setup.deliver(RoleChanged(A, "decode"), DrainingChanged(A, False))
        assert setup.worker(A).draining
        gate.open()
        await settle()
        assert not setup.worker(A).draining
        assert setup.worker(A).role == "decode"


async def test_a_worker_that_drains_again_before_it_was_back_gets_no_requests() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", FakeEngineClient.info("m"), gate)
        await setup.deliver(Added(make_spec(A)), DrainingChanged(A, True))
        setup.manager.recheck(setup.worker(A))
        await settle()
        await setup.deliver(DrainingChanged(A, False), DrainingChanged(A, True))
        gate.open()
        await settle()
        assert setup.worker(A).draining


async def test_a_worker_that_leaves_before_it_was_back_gets_no_requests() -> None:
    async with running(ManagerSetup()) as setup:
        gate = Gate(FakeEngineClient.info("m"))
        setup.client.script(A, "/server_info", FakeEngineClient.info("m"), gate)
        await setup.deliver(Added(make_spec(A)), DrainingChanged(A, True))
        worker = setup.worker(A)
        setup.manager.recheck(worker)
        await settle()
        await setup.deliver(DrainingChanged(A, False), Removed(A))
        gate.open()
        await settle()
        assert setup.registry.get(A) is None
        assert worker.draining


async def test_observers_keep_what_they_know_of_a_draining_worker_until_it_leaves() -> None:
    left: list[str] = []

    class Noting(WorkerObserver):
        async def left(self, worker: Worker) -> None:
            left.append(worker.url)

    async with running(ManagerSetup(observers=[Noting()])) as setup:
        setup.client.tell(A, "m")
        await setup.deliver(Added(make_spec(A)), DrainingChanged(A, True))
        # Its KV subscription and its pages are theirs.
        assert left == []
        await setup.deliver(Removed(A))
        assert left == [A]

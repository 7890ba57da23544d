"""What the outcomes of requests do to the breakers of a pool."""

import statistics
from typing import get_args

import pytest

from extproc.config.models import PolicyName
from extproc.routing.lease import Lease
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.worker import Worker
from tests.builders import Fleet, make_shared, make_worker

VIA = "via_upstream"
CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN


class Pool:
    """Four workers, and requests that they answer."""

    def __init__(self, count: int = 4, policy: PolicyName = "round_robin", seed: int = 0) -> None:
        self.workers = [
            make_worker(f"http://10.0.0.{n}:8000", order=n) for n in range(1, count + 1)
        ]
        self.fleet = Fleet(self.workers, policy=policy, shared=make_shared(seed=seed))

    async def answers(self, status: int, *, seconds: float = 0.0) -> Worker:
        """One request, answered with this status by the worker it goes to."""
        lease = await self.begin()
        self.fleet.clock.tick(seconds)
        lease.responded(status, lease.decision.destinations[0], VIA, streamed=False)
        lease.close()
        return lease.claim.worker

    async def begin(self) -> Lease:
        lease = await self.fleet.route()
        assert isinstance(lease, Lease)
        return lease

    def answer(self, worker: Worker, status: int) -> None:
        """The worker answers a request that was sent a moment ago."""
        outcomes, now = self.fleet.lease_parts.outcomes, self.fleet.clock.monotonic()
        if status < 500:
            outcomes.succeeded(worker, "m", now, now)
        else:
            outcomes.server_error(worker, "m", now, now)

    def states(self) -> list[BreakerState]:
        return [worker.breaker.state for worker in self.workers]


async def test_a_client_whose_requests_fail_everywhere_opens_nothing() -> None:
    pool = Pool()
    for _ in range(500):
        await pool.answers(500, seconds=0.05)
        assert OPEN not in pool.states()
    for _ in range(100):
        await pool.answers(500)
        await pool.answers(200, seconds=0.05)
        assert OPEN not in pool.states()


async def test_a_worker_that_fails_alone_loses_its_traffic() -> None:
    pool = Pool()
    broken, errors = pool.workers[1], 0
    for _ in range(400):
        lease = await pool.begin()
        failed = lease.claim.worker is broken
        errors += failed
        address = lease.decision.destinations[0]
        lease.responded(500 if failed else 200, address, VIA, streamed=False)
        lease.close()
        pool.fleet.clock.tick(0.05)
    assert not broken.breaker.would_allow(pool.fleet.clock.monotonic())
    assert errors <= 7  # in 20 seconds


async def test_bursts_of_requests_that_fail_everywhere_open_nothing() -> None:
    """The policy sends them to the first worker that may be tried; others are served meanwhile."""
    pool = Pool(6)
    for second in range(120):
        for worker in pool.workers[1:]:
            pool.answer(worker, 200)
        for _ in range(14 if second % 3 == 0 else 0):
            now = pool.fleet.clock.monotonic()
            (target, *_) = pool.fleet.registry.candidates("m", "plain", now)
            pool.answer(target, 500)
        now = pool.fleet.clock.monotonic()
        avoided = [worker for worker in pool.workers if not worker.breaker.would_allow(now)]
        assert len(avoided) <= 1
        pool.fleet.clock.tick(1.0)
    assert OPEN not in pool.states()


async def test_a_full_pool_is_used_anyway_and_serves_as_soon_as_it_can() -> None:
    pool = Pool()
    for _ in range(60):
        await pool.answers(503, seconds=0.05)
    assert CLOSED not in pool.states()
    served = {await pool.answers(200, seconds=0.01) for _ in range(250)}
    assert served == set(pool.workers)
    assert pool.states() == [CLOSED] * 4


POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_silent_worker_loses_its_traffic_when_patient_clients_leave(
    policy: PolicyName,
) -> None:
    # By chance a policy may send more than its share in the first seconds.
    hung = [await hung_requests(policy, seed) for seed in range(5)]
    assert statistics.mean(hung) <= 16
    assert max(hung) <= 20


async def hung_requests(policy: PolicyName, seed: int) -> int:
    """How many of 3300 requests a silent worker gets, its later probes included."""
    pool = Pool(policy=policy, seed=seed)
    silent, waiting, hung = pool.workers[2], [], 0
    for _ in range(3300):  # 10 requests a second for 330 seconds, clients that wait 3 seconds
        lease = await pool.begin()
        if lease.claim.worker is silent:
            waiting.append((pool.fleet.clock.monotonic(), lease))
            hung += 1
        else:
            lease.responded(200, lease.decision.destinations[0], VIA, streamed=True)
            lease.close()
        pool.fleet.clock.tick(0.1)
        while waiting and pool.fleet.clock.monotonic() - waiting[0][0] >= 3.0:
            waiting.pop(0)[1].close()
    assert silent.breaker.state is not CLOSED
    # It returns by a probe.
    for _ in range(1300):
        await pool.answers(200, seconds=0.1)
    assert silent.breaker.state is CLOSED
    await pool.fleet.close()
    return hung


async def test_a_client_that_gives_up_a_thousand_requests_at_once_changes_nothing() -> None:
    for seconds in (0.5, 10.0):
        pool = Pool()
        leases = [await pool.begin() for _ in range(1000)]
        pool.fleet.clock.tick(seconds)
        await pool.answers(200)
        for lease in leases:
            lease.close()
        assert pool.states() == [CLOSED] * 4


async def test_clients_that_leave_before_long_answers_can_end_blame_no_worker() -> None:
    """The worker has only requests that are not streamed: it answers them after a minute."""
    pool = Pool()
    for _ in range(8):
        await pool.answers(200, seconds=60.0)  # how long such answers take
    leases = [await pool.begin() for _ in range(8)]
    worker = leases[0].claim.worker
    pool.fleet.clock.tick(5.0)
    others = [lease for lease in leases if lease.claim.worker is not worker]
    for lease in others:
        lease.responded(200, lease.decision.destinations[0], VIA, streamed=False)
        lease.close()
    impatient = [await pool.begin() for _ in range(40)]
    pool.fleet.clock.tick(5.0)
    pool.answer(others[0].claim.worker, 200)
    for lease in impatient:
        lease.close()
        pool.fleet.clock.tick(0.3)
    assert pool.states() == [CLOSED] * 4


async def test_clients_that_leave_a_pool_that_never_answers_blame_no_worker() -> None:
    pool = Pool()
    for _ in range(100):
        lease = await pool.begin()
        pool.fleet.clock.tick(3.0)
        lease.close()
    assert pool.states() == [CLOSED] * 4


async def test_a_worker_that_answers_others_is_not_silent() -> None:
    pool = Pool(2)
    for _ in range(20):
        slow = [await pool.begin(), await pool.begin()]
        pool.fleet.clock.tick(2.5)
        await pool.answers(200)
        await pool.answers(200)
        for lease in slow:
            lease.close()
    assert pool.states() == [CLOSED] * 2


@pytest.mark.parametrize("retry_after", [None, 1.0])
async def test_a_pool_with_more_requests_than_it_takes_serves_nearly_what_it_can(
    retry_after: float | None,
) -> None:
    """Workers that are avoided together, and then hit together, would stand idle in between."""
    pool, takes, seconds = Pool(6, "least_load"), 8, 1.0
    running: list[tuple[float, Lease]] = []
    served = 0
    for _ in range(3200):  # 53 requests a second, of which the pool can serve 48
        now = pool.fleet.clock.monotonic()
        while running and running[0][0] <= now:
            running.pop(0)[1].close()
        lease = await pool.begin()
        busy_with = sum(one.claim.worker is lease.claim.worker for _, one in running)
        address, full = lease.decision.destinations[0], busy_with >= takes
        lease.responded(503 if full else 200, address, VIA, True, 1, (), retry_after)
        if full:
            lease.close()
        else:
            served += 1
            running.append((now + seconds, lease))
        pool.fleet.clock.tick(1 / 53)
    assert served >= 0.9 * 48 * 3200 / 53

"""A claim is taken in one step and given back in one, and no probe or booking is left behind."""

from collections.abc import Sequence

from extproc.routing.claim import Claims
from extproc.routing.placement import Compared, Placed
from extproc.routing.rank import Rank
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.prefill_speed import PrefillSpeed
from extproc.workers.rank_load import RankLoad
from extproc.workers.worker import Worker
from tests.builders import make_shared, make_worker

NOW = 1000.0
TOKENS = 500


class Ranks:
    """As many ranks for each worker as the test says."""

    def __init__(self, counts: dict[Worker, int]) -> None:
        self._ranks = {
            worker: [
                Rank(worker, number, order=number, load=RankLoad(PrefillSpeed()))
                for number in range(count)
            ]
            for worker, count in counts.items()
        }

    def of(self, worker: Worker) -> Sequence[Rank]:
        return self._ranks.get(worker, ())

    def loads(self, worker: Worker) -> list[int]:
        return [rank.load.in_flight for rank in self.of(worker)]


class Case:
    """A chosen worker with four ranks, and others that may serve instead."""

    def __init__(self) -> None:
        self.chosen, self.small, self.plain = (
            make_worker(f"http://10.0.0.{n}:8000", order=n, threshold=1) for n in (1, 2, 3)
        )
        self.ranks = Ranks({self.chosen: 4, self.small: 1})
        self.shared = make_shared()
        self.claims = Claims(self.shared.tickets, self.ranks, self.shared.metrics.last_resort)

    def placed(self, dp_rank: int) -> Placed:
        return Placed(
            self.ranks.of(self.chosen)[dp_rank],
            "hit",
            cached_tokens=0,
            total_tokens=TOKENS,
            predicted_tokens=0,
            prefill_tokens=TOKENS,
            prompt=None,
            compared=Compared({}, {}),
        )

    def half_open(self) -> None:
        self.chosen.breaker.failure(NOW)
        assert self.chosen.breaker.would_allow(NOW + 30)


def test_a_claim_counts_on_the_worker_and_on_its_rank_until_it_is_released() -> None:
    case = Case()
    claim = case.claims.take(case.chosen, NOW, case.placed(2))
    assert (case.chosen.in_flight, case.ranks.loads(case.chosen)) == (1, [0, 0, 1, 0])
    for _ in range(2):
        claim.release()
        assert (case.chosen.in_flight, case.ranks.loads(case.chosen)) == (0, [0, 0, 0, 0])


def test_a_moved_claim_counts_on_the_first_rank_of_a_worker_with_fewer() -> None:
    case = Case()
    claim = case.claims.take(case.chosen, NOW, case.placed(2))
    claim.move(case.small, NOW)
    assert (case.chosen.in_flight, case.small.in_flight) == (0, 1)
    assert (case.ranks.loads(case.chosen), case.ranks.loads(case.small)) == ([0] * 4, [1])
    (rank,) = case.ranks.of(case.small)
    assert rank.load.prefill_tokens_ahead(NOW) == TOKENS
    claim.started(NOW)
    claim.release()
    assert case.ranks.loads(case.small) == [0]


def test_a_moved_claim_counts_on_no_rank_of_a_worker_without_ranks() -> None:
    case = Case()
    claim = case.claims.take(case.chosen, NOW, case.placed(0))
    claim.move(case.plain, NOW)
    assert (case.plain.in_flight, case.ranks.loads(case.chosen)) == (1, [0] * 4)
    # It may come back: a gateway can report two addresses.
    claim.move(case.small, NOW)
    assert case.ranks.loads(case.small) == [0]
    claim.started(NOW)
    claim.release()
    assert (case.plain.in_flight, case.small.in_flight) == (0, 0)


def test_a_released_claim_cannot_be_moved() -> None:
    case = Case()
    claim = case.claims.take(case.chosen, NOW, case.placed(0))
    claim.release()
    claim.move(case.small, NOW)
    assert (case.small.in_flight, case.ranks.loads(case.small)) == (0, [0])


def test_a_claim_of_a_half_open_worker_takes_the_probe_and_frees_it() -> None:
    case = Case()
    case.half_open()
    claim = case.claims.take(case.chosen, NOW + 30)
    assert case.chosen.breaker.state is BreakerState.HALF_OPEN
    assert not case.chosen.breaker.would_allow(NOW + 30)
    claim.give_back_probe()
    assert case.chosen.breaker.would_allow(NOW + 30)
    # The probe is another request's by now.
    other = case.claims.take(case.chosen, NOW + 30)
    claim.release()
    assert not case.chosen.breaker.would_allow(NOW + 30)
    other.release()
    assert case.chosen.breaker.would_allow(NOW + 30)


def test_releasing_a_claim_after_an_outcome_does_not_touch_the_breaker() -> None:
    case = Case()
    case.half_open()
    claim = case.claims.take(case.chosen, NOW + 30)
    case.chosen.breaker.failure(NOW + 30)
    claim.release()
    assert case.chosen.breaker.state is BreakerState.OPEN
    assert not case.chosen.breaker.would_allow(NOW + 31)

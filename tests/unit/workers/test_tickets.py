"""Tickets are counted once and released once; the janitor aborts stale requests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial

import pytest
from prometheus_client import CollectorRegistry

from extproc.errors import RouterError
from extproc.metrics.service import Metrics
from extproc.workers.tickets import Ticket, Tickets
from extproc.workers.worker import Worker
from tests.builders import make_worker
from tests.fakes import FakeClock

STALE_TOTAL = "extproc_stale_requests_total"


class Owner:
    """A request that does something when it is aborted."""

    def __init__(self, on_abort: Callable[[], object]) -> None:
        self.on_abort = on_abort

    def abort(self, error: RouterError) -> None:
        assert error.code == "stale_request_expired"
        self.on_abort()


class Book:
    def __init__(self, stale_seconds: float = 600.0) -> None:
        self.clock = FakeClock()
        self.prometheus = CollectorRegistry()
        self.load = Tickets(self.clock, stale_seconds, Metrics(self.prometheus).stale_requests)

    def book(self, worker: Worker) -> Ticket:
        return self.load.book(worker, self.clock.monotonic())

    def stale_total(self) -> float:
        return self.prometheus.get_sample_value(STALE_TOTAL) or 0.0


@asynccontextmanager
async def running(book: Book, work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        await book.clock.advance(0.0)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_ticket_counts_until_it_is_released() -> None:
    book, worker = Book(), make_worker()
    tickets = [book.book(worker) for _ in range(3)]
    assert (worker.in_flight, len(book.load)) == (3, 3)
    tickets[1].release()
    assert (worker.in_flight, len(book.load)) == (2, 2)


def test_a_ticket_is_released_once() -> None:
    book, worker = Book(), make_worker()
    ticket, other = book.book(worker), book.book(worker)
    for _ in range(3):
        ticket.release()
    assert (worker.in_flight, len(book.load)) == (1, 1)
    other.release()
    assert (worker.in_flight, len(book.load)) == (0, 0)


def test_a_moved_ticket_counts_on_its_new_worker() -> None:
    book, chosen, served = Book(), make_worker(), make_worker("http://10.0.0.2:8000")
    ticket = book.book(chosen)
    ticket.move(served, 0.0)
    assert (chosen.in_flight, served.in_flight) == (0, 1)
    ticket.move(served, 0.0)
    assert (chosen.in_flight, served.in_flight) == (0, 1)
    ticket.release()
    assert (chosen.in_flight, served.in_flight) == (0, 0)


def test_a_released_ticket_cannot_be_moved() -> None:
    book, chosen, served = Book(), make_worker(), make_worker("http://10.0.0.2:8000")
    ticket = book.book(chosen)
    ticket.release()
    ticket.move(served, 0.0)
    assert (chosen.in_flight, served.in_flight) == (0, 0)


def test_the_load_of_a_replaced_worker_is_neither_inherited_nor_negative() -> None:
    book, old, new = Book(), make_worker(), make_worker()
    ticket = book.book(old)
    other = book.book(new)
    ticket.release()
    assert (old.in_flight, new.in_flight) == (0, 1)
    other.release()
    assert new.in_flight == 0


def test_stale_requests_are_aborted_once_and_oldest_first() -> None:
    book, aborted = Book(stale_seconds=10.0), list[int]()
    for index in range(3):
        book.book(make_worker()).owner = Owner(partial(aborted.append, index))
        book.clock.tick(1.0)
    book.clock.tick(7.0)  # ages 10, 9, 8
    assert book.load.sweep() == 1
    assert aborted == [0]
    book.clock.tick(2.0)
    assert book.load.sweep() == 2
    assert book.load.sweep() == 0
    assert aborted == [0, 1, 2]
    assert book.stale_total() == 3


def test_an_abort_alone_does_not_release_the_ticket() -> None:
    book, worker = Book(stale_seconds=10.0), make_worker()
    ticket = book.book(worker)
    ticket.owner = Owner(lambda: None)
    book.clock.tick(100.0)
    book.load.sweep()
    assert (worker.in_flight, len(book.load)) == (1, 1)
    ticket.release()
    assert worker.in_flight == 0


def test_a_request_that_ends_when_aborted_is_released() -> None:
    book, worker = Book(stale_seconds=10.0), make_worker()
    tickets = [book.book(worker) for _ in range(3)]

    def all_end() -> None:
        for ticket in tickets:
            ticket.release()

    for ticket in tickets:
        # The end of one request also ends the others, as when a connection breaks.
        ticket.owner = Owner(all_end)
    book.clock.tick(10.0)
    book.load.sweep()
    assert (worker.in_flight, len(book.load)) == (0, 0)
    assert book.stale_total() == 1


def test_a_ticket_released_in_time_is_never_stale() -> None:
    book, aborted = Book(stale_seconds=10.0), list[int]()
    ticket = book.book(make_worker())
    ticket.owner = Owner(lambda: aborted.append(1))
    ticket.release()
    book.clock.tick(100.0)
    assert book.load.sweep() == 0
    assert not aborted


def test_a_ticket_without_an_abort_action_does_not_hide_the_others() -> None:
    book, aborted = Book(stale_seconds=10.0), list[int]()
    book.book(make_worker())
    book.book(make_worker()).owner = Owner(lambda: aborted.append(1))
    book.clock.tick(10.0)
    assert book.load.sweep() == 1
    assert aborted == [1]


def test_an_estimated_release_happens_once_at_its_time() -> None:
    book, worker = Book(), make_worker()
    ticket = book.book(worker)
    ticket.release_after(15.0)
    book.clock.tick(5.0)
    ticket.release_after(15.0)
    book.clock.tick(9.9)
    book.load.release_due()
    assert worker.in_flight == 1
    book.clock.tick(0.1)
    book.load.release_due()
    assert (worker.in_flight, len(book.load)) == (0, 0)
    book.clock.tick(100.0)
    book.load.release_due()
    assert worker.in_flight == 0


def test_a_ticket_released_before_its_estimate_is_not_released_again() -> None:
    book, worker = Book(), make_worker()
    ticket, other = book.book(worker), book.book(worker)
    ticket.release_after(15.0)
    ticket.release()
    book.clock.tick(20.0)
    book.load.release_due()
    assert worker.in_flight == 1
    other.release()


@pytest.mark.parametrize(
    ("stale_seconds", "period"),
    [(600.0, 60.0), (604800.0, 60.0), (300.0, 30.0), (10.0, 1.0), (2.0, 1.0), (1.0, 1.0)],
)
async def test_the_janitor_sweeps_ten_times_per_time_out_and_at_least_every_minute(
    stale_seconds: float, period: float
) -> None:
    book = Book(stale_seconds)
    async with running(book, book.load.run_janitor()):
        await book.clock.advance(3 * period)
        assert book.clock.slept == pytest.approx([period] * 4)


async def test_the_janitor_aborts_stale_requests() -> None:
    book, aborted = Book(stale_seconds=600.0), list[float]()
    async with running(book, book.load.run_janitor()):
        ticket = book.book(make_worker())
        ticket.owner = Owner(lambda: aborted.append(book.clock.monotonic()))
        await book.clock.advance(599.0)
        assert not aborted
        await book.clock.advance(61.0)
        assert len(aborted) == 1


async def test_estimates_are_released_within_a_second_of_their_time() -> None:
    book, worker = Book(stale_seconds=600.0), make_worker()
    async with running(book, book.load.run_estimates()):
        await book.clock.advance(0.5)
        book.book(worker).release_after(15.0)
        await book.clock.advance(14.9)
        assert worker.in_flight == 1
        await book.clock.advance(1.1)
        assert worker.in_flight == 0


def test_a_shorter_time_out_ends_requests_that_are_too_old_by_it() -> None:
    book, worker = Book(600.0), make_worker()
    ended: list[str] = []
    book.book(worker).owner = Owner(lambda: ended.append("old"))
    book.clock.tick(50.0)
    book.book(worker).owner = Owner(lambda: ended.append("young"))
    book.load.limit(30.0)
    assert ended == ["old"]

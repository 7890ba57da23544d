"""The load of a rank stays plausible, whatever happens in whatever order."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from msgspec import Struct

from extproc.workers.prefill_speed import PrefillSpeed
from extproc.workers.rank_load import Booking, RankLoad

# Reports count for 3 s.
_STALE_SECONDS = 4.0
_COUNTS = st.integers(-5, 200)
_MAYBE = st.none() | st.integers(-5, 5000)
_STEPS = st.sampled_from([0.0, 0.001, 0.2, 1.0, 3.0, 10.0, 100.0])


class Report(Struct, frozen=True):
    """A report, plausible or not."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    max_total_num_tokens: int
    num_waiting_uncached_tokens: int | None
    max_running_requests: int | None
    total_prefill_uncached_tokens: int | None
    total_prefill_busy_us: int | None


_REPORTS = st.builds(
    Report,
    _COUNTS,
    _COUNTS,
    st.integers(-5, 5000),
    st.integers(-5, 5000),
    _MAYBE,
    _MAYBE,
    _MAYBE,
    st.none() | st.integers(-5, 10_000_000),
)


class Requests(RuleBasedStateMachine):
    """A rank and requests that end before, after and without the start of their response."""

    bookings = Bundle("bookings")

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.load = RankLoad(PrefillSpeed(default_tokens_per_second=1000.0))
        self.open: dict[Booking, int] = {}
        self.started_or_ended: set[Booking] = set()

    @rule(target=bookings, tokens=st.integers(-1, 5000), streamed=st.booleans())
    def book(self, tokens: int, streamed: bool) -> Booking:
        booking = self.load.book(tokens, self.now, streamed=streamed)
        self.open[booking] = max(1, tokens)
        return booking

    @rule(booking=bookings)
    def start(self, booking: Booking) -> None:
        booking.started(self.now)
        self.started_or_ended.add(booking)

    @rule(booking=bookings)
    def release(self, booking: Booking) -> None:
        booking.release(self.now)
        self.open.pop(booking, None)

    @rule(booking=consumes(bookings))
    def release_for_good(self, booking: Booking) -> None:
        self.release(booking)

    @rule(report=_REPORTS)
    def report(self, report: Report) -> None:
        self.load.report(report, self.now)

    @rule(seconds=_STEPS)
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def every_figure_is_one_that_can_be(self) -> None:
        load, now = self.load, self.now
        assert load.in_flight == len(self.open)
        # Read before the queue: no figure depends on which figure was read before.
        running = load.running(now)
        ahead = load.prefill_tokens_ahead(now)
        assert running == load.running(now)
        assert ahead == load.prefill_tokens_ahead(now)
        assert ahead >= 0
        assert running >= len(self.open.keys() & self.started_or_ended)
        assert load.requests(now) >= len(self.open)
        assert 0 <= load.slot_wait_seconds(1000, now) < 1e6
        assert ahead / load.prefill_tokens_per_second <= load.prefill_seconds_ahead(now) < 1e9
        occupancy = load.occupancy(now)
        assert occupancy is None or load.kv_usage(now) <= occupancy <= 1
        assert 50 <= load.prefill_tokens_per_second <= 2_000_000

    @invariant()
    def the_queue_is_what_was_not_seen_to_start(self) -> None:
        waiting = [booking for booking in self.open if booking not in self.started_or_ended]
        if not waiting or not all(booking.streamed for booking in waiting):
            return  # prefills that are not streamed may have ended
        tokens = sum(self.open[booking] for booking in waiting)
        # The first prefill may be nearly done; a fresh report may include other requests.
        assert self.load.prefill_tokens_ahead(self.now) >= tokens - self.open[waiting[0]]
        assert self.load.prefill_tokens_ahead(self.now + _STALE_SECONDS) <= tokens

    def teardown(self) -> None:
        for booking in self.open:
            booking.release(self.now)
        later = self.now + _STALE_SECONDS
        assert self.load.in_flight == 0
        assert self.load.requests(later) == 0
        assert self.load.running(later) == 0
        assert self.load.prefill_tokens_ahead(later) == 0
        assert self.load.slot_wait_seconds(1000, later) == 0
        # The next request finds an idle rank.
        self.load.book(100, later)
        assert self.load.prefill_tokens_ahead(later) == 100


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 200), st.sampled_from([0.0, 0.5, 3.0]), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_the_load_of_an_engine_that_follows_the_model_is_exact(
    prompts: list[tuple[int, float, bool]],
) -> None:
    """Prompts too short to learn from, prefilled in order at the assumed speed."""
    speed = 100.0
    load = RankLoad(PrefillSpeed(default_tokens_per_second=speed))
    arrived = free_at = 0.0
    # Future ends of prefills, in order; ends of streamed ones are observed.
    ends: list[tuple[float, Booking]] = []
    for tokens, gap, streamed in prompts:
        arrived += gap
        for ends_at, booking in ends:
            if ends_at <= arrived and booking.streamed:
                booking.started(ends_at)
        ends = [(ends_at, booking) for ends_at, booking in ends if ends_at > arrived]
        assert abs(load.prefill_tokens_ahead(arrived) - max(0, free_at - arrived) * speed) < 1e-3
        assert load.in_flight - load.running(arrived) == len(ends)
        free_at = max(free_at, arrived) + tokens / speed
        ends.append((free_at, load.book(tokens, arrived, streamed=streamed)))

"""Tests the sequence's decisions one by one, without sockets."""

import pytest

from extproc.kv.actions import Action, Apply, CancelReplay, Clear, RequestReplay, Trust
from extproc.kv.reorder_buffer import ReorderLimits
from extproc.kv.sequence import RankSequence


def sequence(*, has_replay: bool = True, limits: ReorderLimits | None = None) -> RankSequence:
    return RankSequence(has_replay=has_replay, limits=limits or ReorderLimits())


def following(count: int, *, has_replay: bool = True) -> RankSequence:
    """A connected sequence that has applied that many batches."""
    made = sequence(has_replay=has_replay)
    made.connected()
    if has_replay:
        made.replay_ended()
    for seq in range(count):
        assert Apply(payload(seq)) in made.live(seq, payload(seq))
    return made


def payload(seq: int, engine: str = "a") -> bytes:
    return f"{engine}{seq}".encode()


def seen(actions: list[Action]) -> list[Action]:
    """The actions without changes of trust."""
    return [action for action in actions if not isinstance(action, Trust)]


def test_nothing_happens_before_a_connection() -> None:
    made = sequence()
    assert made.live(0, b"x") == []
    assert made.replayed(0, b"x") == []
    assert made.replay_ended() == []
    assert made.replay_failed() == []
    assert made.retry() == []


def test_connecting_requests_everything_and_lets_live_batches_wait() -> None:
    made = sequence()
    assert made.connected() == [Trust(False, "replaying"), RequestReplay(0)]
    assert made.connected() == []
    assert made.live(1, payload(1)) == []
    assert made.replayed(0, payload(0)) == [Apply(payload(0))]
    assert made.replayed(1, payload(1)) == [Apply(payload(1))]
    assert made.live(2, payload(2)) == []
    assert made.replay_ended() == [Apply(payload(2)), Trust(True, "complete")]
    assert made.live(3, payload(3)) == [Apply(payload(3))]


def test_a_reconnect_requests_the_last_batch_to_verify_the_engine() -> None:
    made = following(3)
    assert made.disconnected() == [Trust(False, "disconnected")]
    assert made.connected() == [Trust(False, "verifying"), RequestReplay(2)]
    assert made.replayed(2, payload(2)) == []
    assert made.replayed(3, payload(3)) == [Apply(payload(3))]
    assert made.replay_ended() == [Trust(True, "complete")]
    assert made.restarts == 0


@pytest.mark.parametrize("published", [0, 1, 3, 5])
def test_another_batch_or_no_batch_with_the_last_number_shows_a_restart(published: int) -> None:
    made = following(3)
    made.disconnected()
    made.connected()
    actions = made.replayed(2, payload(2, "b")) if published > 2 else made.replay_ended()
    assert seen(actions) == [Clear("restarted"), RequestReplay(0)]
    applied = [action for seq in range(published) for action in made.replayed(seq, b"b%d" % seq)]
    assert applied == [Apply(b"b%d" % seq) for seq in range(published)]
    assert made.replay_ended() == [Trust(True, "complete")]
    assert made.restarts == 1


def test_a_last_batch_that_is_out_of_the_buffer_leaves_a_gap() -> None:
    """The next number does not prove that the engine is the same."""
    made = following(3)
    made.disconnected()
    made.connected()
    assert seen(made.replayed(3, payload(3))) == [Clear("gap"), Apply(payload(3))]
    assert made.replay_ended() == [Trust(True, "partial")]


def test_a_number_that_goes_back_on_one_connection_shows_a_restart() -> None:
    made = following(3)
    assert seen(made.live(0, payload(0, "b"))) == [Clear("restarted"), RequestReplay(0)]
    made = following(1)
    assert seen(made.live(0, payload(0, "b"))) == [Clear("restarted"), RequestReplay(0)]
    made = following(3, has_replay=False)
    assert seen(made.live(0, b"b0")) == [Clear("restarted"), Apply(b"b0")]
    assert not made.partial


def test_batches_that_waited_before_the_numbers_went_back_are_dropped() -> None:
    made = following(1)
    made.live(4, payload(4))
    made.live(0, b"b0")
    assert seen(made.replay_ended()) == [Apply(b"b0")]


def test_numbers_of_the_previous_connection_do_not_count() -> None:
    made = following(3)
    made.disconnected()
    made.connected()
    assert made.live(0, b"b0") == []
    assert seen(made.replay_ended()) == [Clear("restarted"), RequestReplay(0)]
    assert made.replay_ended() == [Apply(b"b0"), Trust(True, "complete")]
    assert made.restarts == 1


def test_a_live_batch_that_the_replay_brought_is_not_applied_again() -> None:
    made = sequence()
    made.connected()
    made.replayed(0, payload(0))
    made.replayed(1, payload(1))
    made.replay_ended()
    assert made.live(1, payload(1)) == []
    assert made.live(2, payload(2)) == [Apply(payload(2))]


def test_a_gap_is_requested_and_filled() -> None:
    made = following(2)
    assert made.live(4, payload(4)) == [Trust(False, "gap"), RequestReplay(2)]
    for seq in (2, 3, 4):
        assert made.replayed(seq, payload(seq)) == [Apply(payload(seq))]
    assert made.replay_ended() == [Trust(True, "complete")]
    assert made.gaps == 1


def test_a_gap_without_replay_clears_only_what_was_applied() -> None:
    made = following(2, has_replay=False)
    assert made.live(4, payload(4)) == [
        Trust(False, "gap"),
        Clear("gap"),
        Apply(payload(4)),
        Trust(True, "partial"),
    ]
    fresh = sequence(has_replay=False)
    fresh.connected()
    assert seen(fresh.live(7, payload(7))) == [Apply(payload(7))]


def test_a_gap_in_an_answer_is_requested_at_once() -> None:
    made = sequence()
    made.connected()
    made.replayed(0, payload(0))
    assert made.replayed(5, payload(5)) == [RequestReplay(1)]


def test_a_failed_replay_that_made_progress_is_continued() -> None:
    made = sequence()
    made.connected()
    made.replayed(0, payload(0))
    assert made.replay_failed() == [RequestReplay(1)]
    assert made.live(1, payload(1)) == []
    assert seen(made.replay_failed()) == [Apply(payload(1))]
    assert made.degraded
    assert not made.partial


def test_a_failed_verification_clears() -> None:
    made = following(3)
    made.disconnected()
    made.connected()
    made.live(3, payload(3))
    assert made.replay_failed() == [
        Clear("replay_failed"),
        Apply(payload(3)),
        Trust(True, "partial"),
    ]


def test_a_rebuild_replaces_the_pages_only_if_it_goes_back_further() -> None:
    def degraded() -> RankSequence:
        made = sequence()
        made.connected()
        made.live(5, payload(5))
        made.replay_failed()
        assert seen(made.retry()) == [RequestReplay(0)]
        assert made.retry() == []
        assert made.live(6, payload(6)) == [Apply(payload(6))]
        return made

    made = degraded()
    assert made.replayed(3, payload(3)) == [
        Clear("rebuilding"),
        Trust(False, "replaying"),
        Apply(payload(3)),
    ]
    assert made.partial
    made = degraded()
    assert made.replayed(5, payload(5)) == [CancelReplay()]
    made = degraded()
    assert made.replay_failed() == []
    assert made.degraded
    made = degraded()
    assert made.replay_ended() == []
    assert not made.degraded


def test_a_disconnect_ends_the_replay() -> None:
    made = sequence()
    made.connected()
    made.live(0, payload(0))
    assert made.disconnected() == [CancelReplay(), Trust(False, "disconnected")]


@pytest.mark.parametrize(
    "limits",
    [ReorderLimits(rank_batches=3), ReorderLimits(rank_bytes=6), ReorderLimits(total_bytes=6)],
    ids=["batches", "bytes", "total"],
)
def test_batches_without_room_in_the_reorder_buffer_are_requested_again(
    limits: ReorderLimits,
) -> None:
    made = sequence(limits=limits)
    made.connected()
    for seq in range(5):
        made.live(seq, payload(seq))
    assert made.dropped == 3
    assert limits.waiting_bytes == 4
    made.replayed(0, payload(0))
    assert made.replay_ended() == [RequestReplay(1)]
    for seq in range(1, 5):
        assert made.replayed(seq, payload(seq)) == [Apply(payload(seq))]
    assert made.replay_ended() == [Trust(True, "complete")]
    assert limits.waiting_bytes == 0


def test_a_batch_dropped_during_an_empty_answer_is_requested() -> None:
    made = sequence(limits=ReorderLimits(rank_batches=2))
    made.connected()
    for seq in range(3):
        made.live(seq, payload(seq))
    assert made.replay_ended() == [RequestReplay(0)]


def test_a_batch_larger_than_the_reorder_buffer_is_dropped() -> None:
    limits = ReorderLimits(rank_bytes=6)
    made = sequence(limits=limits)
    made.connected()
    made.live(0, b"1234567")
    assert (made.dropped, limits.waiting_bytes) == (1, 0)
    assert made.replay_ended() == [Trust(True, "complete")]
    assert made.live(1, b"1") == [Trust(False, "gap"), RequestReplay(0)]


def test_an_unreadable_batch_is_requested_once_more() -> None:
    made = following(3)
    assert made.unreadable(payload(2), ask=True) == [Trust(False, "unreadable"), RequestReplay(2)]
    assert made.live(3, payload(3)) == []
    assert made.replayed(2, b"readable") == [Apply(b"readable")]
    assert made.replay_ended() == [Apply(payload(3)), Trust(True, "complete")]


@pytest.mark.parametrize("end", ["replay_ended", "replay_failed"])
def test_an_unreadable_batch_that_is_not_replayed_voids_the_batches_before(end: str) -> None:
    made = following(3)
    made.unreadable(payload(2), ask=True)
    assert getattr(made, end)() == [Clear("unreadable"), Trust(True, "partial")]
    assert seen(made.live(3, payload(3))) == [Apply(payload(3))]
    made = following(3)
    made.unreadable(payload(2), ask=True)
    assert seen(made.disconnected()) == [CancelReplay(), Clear("unreadable")]


def test_an_unreadable_batch_that_may_not_be_requested_voids_the_batches_before() -> None:
    made = following(3)
    assert made.unreadable(payload(2), ask=False) == [Clear("unreadable"), Trust(True, "partial")]
    made = following(3, has_replay=False)
    assert seen(made.unreadable(payload(2), ask=True)) == [Clear("unreadable")]
    # Later batches may be with the applier already.
    made = following(3)
    assert seen(made.unreadable(payload(1), ask=True)) == [Clear("unreadable")]
    assert made.partial
    # After a reconnect, the engine still has to send the same batch again.
    made = following(3)
    made.unreadable(payload(2), ask=False)
    made.disconnected()
    assert seen(made.connected()) == [RequestReplay(2)]
    assert seen(made.replayed(2, payload(2))) == []


def test_after_many_batches_a_replay_checks_for_lost_ones() -> None:
    made = following(3)
    assert made.caught_up() == [RequestReplay(3)]
    assert made.replay_ended() == []
    made = following(3)
    made.caught_up()
    assert made.replayed(3, payload(3)) == [Apply(payload(3))]
    assert made.replay_ended() == []


def test_without_a_replay_a_rank_is_untrusted_after_many_batches() -> None:
    made = following(3, has_replay=False)
    assert made.caught_up() == [Trust(False, "behind")]
    assert made.live(3, payload(3)) == [Apply(payload(3)), Trust(True, "complete")]
    made = following(3)
    made.caught_up()
    assert made.replay_failed() == [Trust(False, "behind")]
    assert made.live(3, payload(3)) == [Apply(payload(3)), Trust(True, "complete")]
    fresh = sequence()
    fresh.connected()
    fresh.replay_ended()
    assert fresh.caught_up() == []


def test_large_batches_differ_if_either_end_differs() -> None:
    for place in (0, 99_999):
        batch = bytearray(100_000)
        made = sequence()
        made.connected()
        made.replayed(0, bytes(batch))
        made.replay_ended()
        made.disconnected()
        made.connected()
        batch[place] = 1
        assert seen(made.replayed(0, bytes(batch))) == [Clear("restarted"), RequestReplay(0)]

"""Tests that the batches applied are always consecutive batches of one engine process."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from extproc.kv.actions import Action, Apply, CancelReplay, Clear, RequestReplay, Trust
from extproc.kv.reorder_buffer import ReorderLimits
from extproc.kv.sequence import RankSequence

_BUFFERED = 8
_Batch = tuple[int, int]  # (engine process, number)


def _payload(batch: _Batch) -> bytes:
    return f"{batch[0]}:{batch[1]}".encode()


class EngineAndNetwork(RuleBasedStateMachine):
    """One rank behind a lossy network, and an applier that only records."""

    def __init__(self) -> None:
        super().__init__()
        # The engine.
        self.process = 0
        self.published = 0
        # In flight: live batches, and the messages of the present answer; None is its end.
        self.live: list[_Batch] = []
        self.answer: list[_Batch | None] | None = None
        self.asked: int | None = None
        self.connected = False
        # The applier.
        self.applied: list[_Batch] = []
        self.trusted = False
        self.failed = False
        self.clears = 0
        # The applier cannot read the next batch, which may contain removals.
        self.garbles = False
        self.asks = False
        self.unseen: _Batch | None = None
        self.cleared_unseen = False

    @initialize(has_replay=st.booleans(), batches=st.sampled_from([2, 100]))
    def begin(self, has_replay: bool, batches: int) -> None:
        self.has_replay = has_replay
        self.limits = ReorderLimits(rank_batches=batches)
        self.sequence = RankSequence(has_replay=has_replay, limits=self.limits)

    def do(self, actions: list[Action]) -> None:
        """Carry out actions as the stream does: the Clear for an unreadable batch comes first."""
        waiting = [*actions]
        while waiting:
            match waiting.pop(0):
                case Apply(payload):
                    process, seq = payload.decode().split(":")
                    batch = (int(process), int(seq))
                    # In order, at most once, and never batches of two engines together.
                    assert self.unseen in (None, batch)
                    assert not self.applied or batch == (
                        self.applied[-1][0],
                        self.applied[-1][1] + 1,
                    )
                    if self.garbles:
                        self.garbles = False
                        self.unseen = batch
                        asked = self.sequence.unreadable(payload, ask=self.asks)
                        if asked and isinstance(asked[0], Clear):
                            self.clear()
                            asked.pop(0)
                        waiting += asked
                    else:
                        self.unseen = None
                        self.applied.append(batch)
                case Clear():
                    assert self.applied or self.unseen or self.cleared_unseen, "nothing to clear"
                    self.clear()
                case Trust(trusted, reason):
                    self.trusted = trusted
                    assert trusted == (reason in ("complete", "partial"))
                case RequestReplay(start):
                    assert self.has_replay
                    self.asked, self.answer = start, None
                case CancelReplay():
                    self.asked = self.answer = None

    def clear(self) -> None:
        self.cleared_unseen = self.unseen is not None
        self.unseen = None
        self.applied.clear()
        self.clears += 1

    @rule(asks=st.booleans())
    def garble(self, asks: bool) -> None:
        self.garbles, self.asks = True, asks

    @precondition(lambda self: self.trusted and not self.live)
    @rule(asks=st.booleans())
    def publish_garbled(self, asks: bool) -> None:
        self.garble(asks=asks)
        self.publish(1, arrives=True)
        self.deliver_live(1)

    @rule()
    def caught_up(self) -> None:
        self.do(self.sequence.caught_up())

    @rule(count=st.integers(1, 4), arrives=st.booleans())
    def publish(self, count: int, arrives: bool) -> None:
        for _ in range(count):
            if self.connected and arrives:
                self.live.append((self.process, self.published))
            self.published += 1

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 5))
    def deliver_live(self, count: int) -> None:
        for batch in self.live[:count]:
            self.do(self.sequence.live(batch[1], _payload(batch)))
        del self.live[:count]

    @precondition(lambda self: not self.connected)
    @rule()
    def connect(self) -> None:
        self.connected = True
        self.do(self.sequence.connected())

    @precondition(lambda self: self.connected)
    @rule(restarts=st.booleans())
    def disconnect(self, restarts: bool) -> None:
        self.connected = False
        self.live.clear()
        self.do(self.sequence.disconnected())
        assert self.asked is None
        assert not self.trusted
        if restarts:
            self.restart()

    @precondition(lambda self: not self.connected)
    @rule()
    def restart(self) -> None:
        self.process += 1
        self.published = 0

    @precondition(lambda self: self.asked is not None and self.answer is None)
    @rule(dropped_from=st.none() | st.integers(0, _BUFFERED), dropped=st.integers(1, 3))
    def serve_replay(self, dropped_from: int | None, dropped: int) -> None:
        assert self.asked is not None
        first = max(self.asked, self.published - _BUFFERED)
        batches: list[_Batch | None] = [(self.process, seq) for seq in range(first, self.published)]
        # A full queue loses batches in the middle, not at the start.
        if dropped_from:
            del batches[dropped_from : dropped_from + dropped]
        self.answer = [*batches, None]

    @precondition(lambda self: self.answer)
    @rule(count=st.integers(1, 10))
    def deliver_replay(self, count: int) -> None:
        for _ in range(count):
            if not self.answer:
                break
            frame = self.answer.pop(0)
            if frame is None:
                self.asked = self.answer = None
                self.do(self.sequence.replay_ended())
            else:
                self.do(self.sequence.replayed(frame[1], _payload(frame)))

    @precondition(lambda self: self.asked is not None)
    @rule()
    def time_out(self) -> None:
        self.asked = self.answer = None
        self.do(self.sequence.replay_failed())

    @rule()
    def retry(self) -> None:
        self.do(self.sequence.retry())

    @precondition(lambda self: self.connected)
    @rule()
    def calm(self) -> None:
        """Deliver everything, then one more batch, which shows every gap that is left."""
        self.garbles = False
        self.deliver_all()
        self.publish(1, arrives=True)
        self.deliver_all()
        assert self.trusted
        assert self.unseen is None
        assert self.applied[-1] == (self.process, self.published - 1)
        assert self.sequence.partial == (self.applied[0][1] > 0)
        assert self.limits.waiting_bytes == 0

    def deliver_all(self) -> None:
        for _ in range(50):
            self.deliver_live(len(self.live))
            if self.asked is None:
                return
            if self.answer is None:
                self.serve_replay(None, 1)
            self.deliver_replay(len(self.answer or ()))
        raise AssertionError("asks for ever")

    @invariant()
    def a_trusted_rank_holds_batches_of_the_running_engine(self) -> None:
        if self.trusted:
            assert self.connected
            assert self.unseen is None
            assert all(process == self.process for process, _ in self.applied)
            if not self.sequence.partial and self.applied:
                assert self.applied[0][1] == 0


TestEngineAndNetwork = EngineAndNetwork.TestCase
TestEngineAndNetwork.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)

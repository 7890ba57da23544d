"""What the numbers on a rank's KV events say: in order, lost, repeated, or a new engine.

Events arrive twice over: live, and replayed from the engine's buffer. Whether a batch may be
applied, and when all that was learnt has become worthless, is decided here without sockets or
time, so that every interleaving can be tried. The caller feeds what happened and carries out
the returned actions in order.

The rule for what is held: it may be less than what the worker has ("partial": the beginning is
out of the buffer's reach, or a gap could not be filled), but nothing may be in it that the
worker has dropped. So a gap that no replay fills clears it, since a removal may have been in
the gap, and so does every reconnect that can not be proved to lead to the same engine process.
A rank is trusted while this holds and its events flow.

Live events of two connections must not be mixed: `disconnected` and `connected` come between.
"""

import enum
from typing import Final

from extproc.kv.actions import Action, Apply, CancelReplay, Clear, RequestReplay, Trust
from extproc.kv.reorder_buffer import ReorderBuffer, ReorderLimits

__all__ = ["RankSequence"]

_BEFORE_FIRST: Final = -1
# In place of a number: whichever comes next will do.
_ANY: Final = -1
_DIGESTED_BYTES: Final = 512


class _Phase(enum.Enum):
    LOST = enum.auto()
    FOLLOWING = enum.auto()
    # A replay is to show the last applied batch again: is it still the same engine?
    VERIFYING = enum.auto()
    # A replay is to bring what is missing before the next live batch.
    FILLING = enum.auto()


def _digest(payload: bytes) -> int:
    """Tells batches apart, however large they are: the time stamp is at one end or the other.

    Python's hash is keyed, by the process.
    """
    return hash((len(payload), payload[:_DIGESTED_BYTES], payload[-_DIGESTED_BYTES:]))


class RankSequence:
    """The events of one rank, through reconnects, gaps and restarts.

    `partial` says that what is held does not go back to the engine's first batch. `degraded`
    says that a replay went unanswered: gaps are not asked about until `retry` or a reconnect.
    """

    def __init__(self, *, has_replay: bool, limits: ReorderLimits) -> None:
        self.partial = False
        self.degraded = False
        self.gaps = 0
        self.restarts = 0
        self._has_replay = has_replay
        self._phase = _Phase.LOST
        # The last batch applied since the last clear, by number and digest, and the first.
        self._last: tuple[int, int] | None = None
        self._first = 0
        self._next = _ANY
        self._last_live = _BEFORE_FIRST
        self._buffer = ReorderBuffer(limits)
        self._overflowed = False
        # The replay under way has brought something new.
        self._answered = False
        # Asked for everything while live events still apply: an answer replaces what is held.
        self._rebuild_asked = False
        # The last batch was unreadable and has been asked for again: until it comes, what is
        # held may be stale.
        self._asked_again = False
        # The request under way asks whether there is more than the live batches have brought.
        self._checking = False
        self._told: Trust | None = None
        self._actions: list[Action] = []

    @property
    def dropped(self) -> int:
        """Batches that were let go while they waited for a replay."""
        return self._buffer.dropped

    def connected(self) -> list[Action]:
        """A new connection delivers from now on; it may lead to a new engine process."""
        if self._phase is not _Phase.LOST:
            return []
        self._last_live = _BEFORE_FIRST
        self.degraded = False
        if not self._has_replay:
            # Nothing can show that it is the same process, however well the numbers fit.
            self._forget("reconnected")
            self._phase = _Phase.FOLLOWING
            self.partial = True
            self._tell_trusted()
        elif self._last is None:
            self._start_over()
        else:
            self._tell(False, "verifying")
            self._phase = _Phase.VERIFYING
            self._request(self._last[0])
        return self._take()

    def disconnected(self) -> list[Action]:
        """What is held stays, untrusted: the next connection shows whether it still holds."""
        if self._phase is not _Phase.LOST:
            if self._phase is not _Phase.FOLLOWING or self._rebuild_asked:
                self._actions.append(CancelReplay())
            if self._asked_again:
                self._forget("unreadable")
            self._phase = _Phase.LOST
            self._rebuild_asked = False
            self._buffer.drop()
        self._tell(False, "disconnected")
        return self._take()

    def live(self, seq: int, payload: bytes) -> list[Action]:
        """A batch from the live stream."""
        if self._phase is _Phase.LOST:
            return []
        if seq <= self._last_live:
            # A publisher never repeats itself: another one speaks through the same connection.
            self._buffer.drop()
            self._restart()
        self._last_live = seq
        if self._phase is _Phase.FOLLOWING:
            self._follow(seq, payload)
        elif not self._buffer.add(seq, payload):
            self._overflowed = True
        return self._take()

    def unreadable(self, payload: bytes, *, ask: bool) -> list[Action]:
        """A batch that was to be applied can not be: a removal may have been in it.

        With `ask` the engine is asked for it once more, if it is the newest. Otherwise all before
        it is void: a Clear comes first then, and is to be done before any action that waits.
        """
        newest = self._last is not None and self._last[1] == _digest(payload)
        following = self._phase is _Phase.FOLLOWING
        if newest and following and ask and self._has_replay and not self.degraded:
            self._tell(False, "unreadable")
            self._next -= 1
            self._phase = _Phase.FILLING
            self._asked_again = True
            self._request(self._next)
            return self._take()
        self._actions.append(Clear("unreadable"))
        self.partial = True
        if newest:
            self._first = self._next
        if following:
            self._tell_trusted()
        return self._take()

    def replayed(self, seq: int, payload: bytes) -> list[Action]:
        """A batch from the answer to the last request."""
        if self._rebuild_asked:
            self._begin_rebuild(seq)
        if self._phase is _Phase.VERIFYING:
            self._verify(seq, payload)
        elif self._phase is _Phase.FILLING:
            self._fill(seq, payload)
        return self._take()

    def replay_ended(self) -> list[Action]:
        """The answer to the last request is complete, as far as its sender knows."""
        if self._rebuild_asked:
            self._rebuild_asked = False
            self.degraded = False
        elif self._phase is _Phase.VERIFYING:
            # The same process would still have had that batch, or later ones.
            self._restart()
        elif self._phase is _Phase.FILLING:
            self._settle(refetch=self._answered or self._overflowed)
        return self._take()

    def replay_failed(self) -> list[Action]:
        """No end of the answer came in time."""
        if self._rebuild_asked:
            self._rebuild_asked = False
        elif self._phase is _Phase.FILLING and self._answered:
            self._request(self._next)
        elif self._phase in (_Phase.VERIFYING, _Phase.FILLING):
            self.degraded = True
            if self._phase is _Phase.VERIFYING:
                self._forget("replay_failed")
            if self._last is None:
                self._next = _ANY
                self.partial = True
            checked, known = self._checking, self._next
            self._settle(refetch=False)
            if checked and self._next == known:
                self._tell(False, "behind")
        return self._take()

    def retry(self) -> list[Action]:
        """Some time after a failed replay: try to get what is missing after all."""
        if self.degraded and self._phase is _Phase.FOLLOWING and not self._rebuild_asked:
            if self.partial:
                self._rebuild_asked = True
                self._request(0)
            else:
                self.degraded = False
        return self._take()

    def caught_up(self) -> list[Action]:
        """All live batches that had piled up are in: was one lost behind the last of them?

        A publisher whose queue is full drops what it publishes, and only the next batch would
        show it. Without a replay nothing can be believed until that comes.
        """
        if self._phase is _Phase.FOLLOWING and self._last is not None and not self.degraded:
            if self._has_replay:
                self._phase = _Phase.FILLING
                self._request(self._next)
                self._checking = True
            else:
                self._tell(False, "behind")
        return self._take()

    def _follow(self, seq: int, payload: bytes) -> None:
        if self._next == _ANY:
            self._begin_at(seq)
        if seq < self._next:
            return  # a replay has brought it already
        if seq > self._next:
            self.gaps += 1
            self._tell(False, "gap")
            if self._has_replay and not self.degraded:
                self._buffer.add(seq, payload)
                self._phase = _Phase.FILLING
                self._rebuild_asked = False
                self._request(self._next)
                return
            self._forget("gap")
            self._begin_at(seq)
        self._apply(seq, payload)
        self._tell_trusted()

    def _verify(self, seq: int, payload: bytes) -> None:
        expected = self._next - 1
        if seq < expected:
            return
        if seq == expected and (seq, _digest(payload)) != self._last:
            self._restart()
            return
        self._phase = _Phase.FILLING
        if seq == expected:
            self._answered = True
        else:
            self._begin_after_gap(seq)
            self._fill(seq, payload)

    def _fill(self, seq: int, payload: bytes) -> None:
        if seq < self._next:
            return
        if seq > self._next:
            if self._answered:
                # The engine's socket dropped part of its own answer.
                self._request(self._next)
                return
            self._begin_after_gap(seq)
        self._answered = True
        self._apply(seq, payload)

    def _begin_after_gap(self, seq: int) -> None:
        """The batches before are out of the buffer: asking from further back brings no more."""
        if self._last is not None:
            self.gaps += 1
        self._forget("gap")
        self._begin_at(seq)

    def _settle(self, *, refetch: bool) -> None:
        """No more comes from the replay: go on with the live batches that have waited."""
        waiting = self._buffer.take()
        self._phase = _Phase.FOLLOWING
        if self._asked_again:
            self._forget("unreadable")
            self.partial = True
        for place, (seq, payload) in enumerate(waiting):
            if self._next == _ANY:
                self._begin_at(seq)
            if seq < self._next:
                continue
            if seq > self._next:
                if refetch:
                    self._phase = _Phase.FILLING
                    for kept in waiting[place:]:
                        self._buffer.add(*kept)
                    self._request(self._next)
                    return
                self._tell(False, "gap")
                self._forget("gap")
                self._begin_at(seq)
            self._apply(seq, payload)
        self._tell_trusted()

    def _begin_rebuild(self, seq: int) -> None:
        self._rebuild_asked = False
        self.degraded = False
        if self._last is not None and seq >= self._first:
            self._actions.append(CancelReplay())  # it goes back no further than what is held
            return
        self._forget("rebuilding")
        self._start_over(request=False)

    def _restart(self) -> None:
        self.restarts += 1
        self._tell(False, "restarted")
        self._forget("restarted")
        self._rebuild_asked = False
        if self._has_replay:
            self._start_over()
        else:
            self._phase = _Phase.FOLLOWING

    def _start_over(self, *, request: bool = True) -> None:
        """Everything is to come from a replay."""
        self._tell(False, "replaying")
        self._phase = _Phase.FILLING
        self._next = 0
        self.partial = False
        if request:
            self._request(0)

    def _begin_at(self, seq: int) -> None:
        self._next = seq
        self.partial = seq > 0

    def _apply(self, seq: int, payload: bytes) -> None:
        if self._last is None:
            self._first = seq
        self._asked_again = False
        self._last = (seq, _digest(payload))
        self._next = seq + 1
        self._actions.append(Apply(payload))

    def _forget(self, reason: str) -> None:
        if self._last is not None:
            self._actions.append(Clear(reason))
        self._asked_again = False
        self._last = None
        self._next = _ANY

    def _request(self, start: int) -> None:
        self._answered = False
        self._overflowed = False
        self._checking = False
        self._actions.append(RequestReplay(start))

    def _tell_trusted(self) -> None:
        self._tell(True, "partial" if self.partial else "complete")

    def _tell(self, trusted: bool, reason: str) -> None:
        told = Trust(trusted, reason)
        if told != self._told:
            self._told = told
            self._actions.append(told)

    def _take(self) -> list[Action]:
        actions = self._actions
        self._actions = []
        return actions

"""Decides from the sequence numbers of a rank's event batches which batches to apply, and when.

Batches come live, and replayed from the engine's buffer. The numbers show whether a batch is next,
lost, repeated, or from a new engine process. Separate from sockets and time, so that tests can try
every order of events: the caller feeds what happened and carries out the returned actions in order.

The rule: the pages held may be fewer than those the worker has ("partial": the beginning is no
longer in the buffer, or a gap could not be filled), but no page may be held that the worker has
dropped. So a gap that no replay fills clears the pages, since a removal may have been in the gap.
So does every reconnect that does not provably lead to the same engine process. A rank is trusted
while the rule holds and its events flow.

Live batches of two connections must not be mixed: `disconnected` and `connected` come between.
"""

import enum
from typing import Final

from extproc.kv.actions import Action, Apply, CancelReplay, Clear, RequestReplay, Trust
from extproc.kv.reorder_buffer import ReorderBuffer, ReorderLimits

__all__ = ["RankSequence"]

_BEFORE_FIRST: Final = -1
# Instead of a number: any batch may come next.
_ANY: Final = -1
_DIGESTED_BYTES: Final = 512


class _Phase(enum.Enum):
    LOST = enum.auto()
    FOLLOWING = enum.auto()
    # A replay should bring the last applied batch again: is it still the same engine process?
    VERIFYING = enum.auto()
    # A replay should bring what is missing before the next live batch.
    FILLING = enum.auto()


def _digest(payload: bytes) -> int:
    """A hash that differs between batches of any size: the time stamp is at one of the two ends.

    Python's hash is keyed per process.
    """
    return hash((len(payload), payload[:_DIGESTED_BYTES], payload[-_DIGESTED_BYTES:]))


class RankSequence:
    """The sequence of one rank's batches, through reconnects, gaps and restarts.

    `partial` is true when the batches applied do not go back to the engine's first one.
    `degraded` is true after a replay without answer: until `retry` or a reconnect, no replay is
    requested for a gap.
    """

    def __init__(self, *, has_replay: bool, limits: ReorderLimits) -> None:
        self.partial = False
        self.degraded = False
        self.gaps = 0
        self.restarts = 0
        self._has_replay = has_replay
        self._phase = _Phase.LOST
        # Since the last clear: number and digest of the last batch applied, number of the first.
        self._last: tuple[int, int] | None = None
        self._first = 0
        self._next = _ANY
        self._last_live = _BEFORE_FIRST
        self._buffer = ReorderBuffer(limits)
        self._overflowed = False
        # The replay under way has brought a new batch.
        self._answered = False
        # A replay of everything is requested while live batches are applied; its answer replaces
        # what they brought.
        self._rebuild_asked = False
        # The last batch was unreadable and has been requested again; until it comes, the pages
        # may be stale.
        self._asked_again = False
        # The request under way checks whether the live batches have brought everything.
        self._checking = False
        # No message could be read so far: the port may be that of another service.
        self._malformed_only = False
        self._last_trust: Trust | None = None
        self._actions: list[Action] = []

    @property
    def dropped(self) -> int:
        """Number of batches that found no room while they waited for a replay."""
        return self._buffer.dropped

    def connected(self) -> list[Action]:
        """Note a new connection, which may lead to a new engine process."""
        if self._phase is not _Phase.LOST:
            return []
        self._last_live = _BEFORE_FIRST
        self.degraded = False
        if not self._has_replay:
            # However well the numbers fit, nothing proves that it is the same process.
            self._forget("reconnected")
            self._phase = _Phase.FOLLOWING
            self.partial = True
            self._trust()
        elif self._last is None:
            self._start_over()
        else:
            self._set_trust(False, "verifying")
            self._phase = _Phase.VERIFYING
            self._request(self._last[0])
        return self._take()

    def disconnected(self) -> list[Action]:
        """Note a lost connection; the pages stay, untrusted, until the next one verifies them."""
        if self._phase is not _Phase.LOST:
            if self._phase is not _Phase.FOLLOWING or self._rebuild_asked:
                self._actions.append(CancelReplay())
            if self._asked_again:
                self._forget("unreadable")
            self._phase = _Phase.LOST
            self._rebuild_asked = False
            self._buffer.drop()
        self._set_trust(False, "disconnected")
        return self._take()

    def malformed(self) -> list[Action]:
        """Note a message that cannot be read, before any batch could: nothing shows that this is
        a stream of KV events.
        """
        self._malformed_only = True
        self._set_trust(False, "malformed")
        return self._take()

    def decoded(self) -> list[Action]:
        """Note that a batch was applied, after `malformed`."""
        self._malformed_only = False
        if self._phase is _Phase.FOLLOWING:
            self._trust()
        return self._take()

    def live(self, seq: int, payload: bytes) -> list[Action]:
        """Take a batch from the live socket."""
        if self._phase is _Phase.LOST:
            return []
        if seq <= self._last_live:
            # A publisher never repeats a number, so another one uses the same connection.
            self._buffer.drop()
            self._restart()
        self._last_live = seq
        if self._phase is _Phase.FOLLOWING:
            self._follow(seq, payload)
        elif not self._buffer.add(seq, payload):
            self._overflowed = True
        return self._take()

    def unreadable(self, payload: bytes, *, ask: bool) -> list[Action]:
        """Note that a batch could not be applied: a removal may have been in it.

        With `ask` the newest batch is requested once more. Otherwise all before it is void: then
        the first action is a Clear, to be carried out before any action that still waits.
        """
        newest = self._last is not None and self._last[1] == _digest(payload)
        following = self._phase is _Phase.FOLLOWING
        if newest and following and ask and self._has_replay and not self.degraded:
            self._set_trust(False, "unreadable")
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
            self._trust()
        return self._take()

    def replayed(self, seq: int, payload: bytes) -> list[Action]:
        """Take a batch from the answer to the last request."""
        if self._rebuild_asked:
            self._begin_rebuild(seq)
        if self._phase is _Phase.VERIFYING:
            self._verify(seq, payload)
        elif self._phase is _Phase.FILLING:
            self._fill(seq, payload)
        return self._take()

    def replay_ended(self) -> list[Action]:
        """Note the end of the answer to the last request."""
        if self._rebuild_asked:
            self._rebuild_asked = False
            self.degraded = False
        elif self._phase is _Phase.VERIFYING:
            # The same process would still have that batch, or later ones.
            self._restart()
        elif self._phase is _Phase.FILLING:
            self._settle(refetch=self._answered or self._overflowed)
        return self._take()

    def replay_failed(self) -> list[Action]:
        """Note that the answer to the last request did not end in time."""
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
                self._set_trust(False, "behind")
        return self._take()

    def retry(self) -> list[Action]:
        """Request what is missing again, some time after a failed replay."""
        if self.degraded and self._phase is _Phase.FOLLOWING and not self._rebuild_asked:
            if self.partial:
                self._rebuild_asked = True
                self._request(0)
            else:
                self.degraded = False
        return self._take()

    def caught_up(self) -> list[Action]:
        """Check, after many live batches had piled up, whether one was lost behind the last.

        A publisher whose queue is full drops what it publishes, and only the next batch would
        show the gap. Without a replay the rank is not trusted until that batch comes.
        """
        if self._phase is _Phase.FOLLOWING and self._last is not None and not self.degraded:
            if self._has_replay:
                self._phase = _Phase.FILLING
                self._request(self._next)
                self._checking = True
            else:
                self._set_trust(False, "behind")
        return self._take()

    def _follow(self, seq: int, payload: bytes) -> None:
        if self._next == _ANY:
            self._begin_at(seq)
        if seq < self._next:
            return  # a replay has brought it before
        if seq > self._next:
            self.gaps += 1
            self._set_trust(False, "gap")
            if self._has_replay and not self.degraded:
                self._buffer.add(seq, payload)
                self._phase = _Phase.FILLING
                self._rebuild_asked = False
                self._request(self._next)
                return
            self._forget("gap")
            self._begin_at(seq)
        self._apply(seq, payload)
        self._trust()

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
                # The engine's socket dropped a part of the answer.
                self._request(self._next)
                return
            self._begin_after_gap(seq)
        self._answered = True
        self._apply(seq, payload)

    def _begin_after_gap(self, seq: int) -> None:
        """Begin anew at a batch: the batches before it are no longer in the engine's buffer."""
        if self._last is not None:
            self.gaps += 1
        self._forget("gap")
        self._begin_at(seq)

    def _settle(self, *, refetch: bool) -> None:
        """End the replay and go on with the live batches that have waited."""
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
                self._set_trust(False, "gap")
                self._forget("gap")
                self._begin_at(seq)
            self._apply(seq, payload)
        self._trust()

    def _begin_rebuild(self, seq: int) -> None:
        self._rebuild_asked = False
        self.degraded = False
        if self._last is not None and seq >= self._first:
            self._actions.append(CancelReplay())  # it goes back no further than what was applied
            return
        self._forget("rebuilding")
        self._start_over(request=False)

    def _restart(self) -> None:
        self.restarts += 1
        self._set_trust(False, "restarted")
        self._forget("restarted")
        self._rebuild_asked = False
        if self._has_replay:
            self._start_over()
        else:
            self._phase = _Phase.FOLLOWING

    def _start_over(self, *, request: bool = True) -> None:
        """Begin anew with a replay of everything."""
        self._set_trust(False, "replaying")
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

    def _trust(self) -> None:
        if not self._malformed_only:
            self._set_trust(True, "partial" if self.partial else "complete")

    def _set_trust(self, trusted: bool, reason: str) -> None:
        trust = Trust(trusted, reason)
        if trust != self._last_trust:
            self._last_trust = trust
            self._actions.append(trust)

    def _take(self) -> list[Action]:
        actions = self._actions
        self._actions = []
        return actions

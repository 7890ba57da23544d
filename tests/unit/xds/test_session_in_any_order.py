"""A client that answers when it likes, changes its mind and connects again, with both forms.

The machine keeps what such a client has, and holds the session to it after each message.
"""

from collections.abc import Mapping

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from extproc.xds.session import DeltaSession, Request, Resource, Response, Session, StateSession

NAMES = ("a", "b", "c")
SOME = st.sets(st.sampled_from(NAMES), min_size=1)


def resource(name: str, turn: int) -> Resource:
    return Resource(f"{name}{turn}", b"body", frozenset({f"{name}:{turn}"}))


class Client(RuleBasedStateMachine):
    """What a client has and waits for. `kind` is the form of the protocol."""

    kind: type[Session]

    @initialize(
        known=st.booleans(),
        wildcard=st.booleans(),
        names=SOME,
        present=st.sets(st.sampled_from(NAMES)),
    )
    def begin(self, known: bool, wildcard: bool, names: set[str], present: set[str]) -> None:
        self.turn = 0
        self.snapshot = {name: resource(name, 0) for name in present}
        self.known = known
        self.wildcard = wildcard
        self.wanted = set(NAMES) if wildcard else set(names)
        self.has: dict[str, Resource] = {}
        self.connect()

    def connect(self) -> None:
        self.session = self.kind(self.snapshot if self.known else None)
        self.waiting: Response | None = None
        self.nonces: list[str] = []
        self.rejections = 0
        # Rejected, or a removal that was rejected, and not changed since.
        self.refused: dict[str, Resource | None] = {}
        self.must_come: set[str] = set()
        # Asked for while they may have been on their way, so that they come twice.
        self.may_come: set[str] = set()
        self.told_gone: set[str] = set()
        self.take(self.session.receive(self.first_request()))

    def first_request(self) -> Request:
        return Request(names=() if self.wildcard else tuple(sorted(self.wanted)))

    @rule()
    def connect_again(self) -> None:
        self.connect()

    @rule(present=st.sets(st.sampled_from(NAMES)), fresh=st.sets(st.sampled_from(NAMES)))
    def change(self, present: set[str], fresh: set[str]) -> None:
        self.turn += 1
        self.known = True
        before = self.snapshot
        self.snapshot = {
            name: before[name]
            if name in before and name not in fresh
            else resource(name, self.turn)
            for name in present
        }
        self.take(self.session.update(self.snapshot))

    @rule(names=SOME)
    def renew(self, names: set[str]) -> None:
        self.must_come |= names
        self.take(self.session.renew(names))

    @precondition(lambda self: self.waiting is not None)
    @rule(error=st.sampled_from([None, None, "no"]))
    def reply(self, error: str | None) -> None:
        response, self.waiting = self.waiting, None
        assert response is not None
        if error is None:
            self.accept(response)
        else:
            self.rejections += 1
            told = self.told(response).items()
            self.refused.update((name, one) for name, one in told if name in self.wanted)
        self.take(self.session.receive(self.answer(response.nonce, error)))
        assert self.session.error == error

    @precondition(lambda self: self.nonces)
    @rule(data=st.data(), error=st.sampled_from([None, "no"]))
    def answer_out_of_turn(self, data: st.DataObject, error: str | None) -> None:
        """An answer with the nonce of an older response acknowledges nothing."""
        old = self.nonces if self.waiting is None else self.nonces[:-1]
        nonce = data.draw(st.sampled_from([*old, "never sent"]))
        before = dict(self.session.acknowledged)
        self.take(self.session.receive(self.answer(nonce, error)))
        assert self.session.acknowledged == before

    @precondition(lambda self: not self.wildcard)
    @rule(names=SOME)
    def subscribe(self, names: set[str]) -> None:
        for name in set(NAMES) - names:
            self.has.pop(name, None)
            self.refused.pop(name, None)
            self.told_gone.discard(name)
            self.must_come.discard(name)
        request = self.change_of(names)
        for name in names - self.wanted:
            self.told_gone.discard(name)
        self.may_come |= names - self.wanted
        self.wanted = set(names)
        self.take(self.session.receive(request))

    def change_of(self, names: set[str]) -> Request:
        """The request of a client that wants these names from now on."""
        raise NotImplementedError

    def answer(self, nonce: str, error: str | None) -> Request:
        raise NotImplementedError

    def accept(self, response: Response) -> None:
        for name, one in self.told(response).items():
            self.refused.pop(name, None)
            if one is None:
                self.has.pop(name, None)
            elif name in self.wanted:
                self.has[name] = one

    @staticmethod
    def told(response: Response) -> Mapping[str, Resource | None]:
        return {**response.resources, **dict.fromkeys(response.removed)}

    def take(self, response: Response | None) -> None:
        if response is None:
            return
        assert self.waiting is None, "one response at a time"
        assert self.known
        assert response.nonce not in self.nonces
        assert response.resources.keys() <= self.wanted
        for name, one in response.resources.items():
            assert one == self.snapshot[name], "always what is current"
        self.check(response)
        self.must_come -= response.resources.keys()
        self.may_come -= response.resources.keys()
        for name, one in response.resources.items():
            if self.refused.get(name) != one:
                self.refused.pop(name, None)
        self.nonces.append(response.nonce)
        self.waiting = response

    def check(self, response: Response) -> None:
        """Whether the response had to be sent."""
        raise NotImplementedError

    @invariant()
    def it_has_what_it_wants(self) -> None:
        if not hasattr(self, "session"):
            return
        assert self.session.rejections == self.rejections
        for name, one in self.session.acknowledged.items():
            assert name in self.wanted
            assert self.has.get(name, one) == one or self.known_of_old(name, one)
        if self.waiting is not None or not self.known:
            return
        assert not self.must_come & self.wanted & self.snapshot.keys(), "it was to be sent again"
        for name in self.wanted & self.snapshot.keys():
            current = self.snapshot[name]
            if self.refused.get(name) == current:
                continue
            assert self.has.get(name) == current
            assert self.session.acknowledged.get(name) == current

    def known_of_old(self, name: str, one: Resource) -> bool:
        """A version that the client named when it connected."""
        return False


class StateClient(Client):
    kind = StateSession

    def connect(self) -> None:
        # A server cannot know what it still has, so it is sent again.
        self.has = {}
        super().connect()

    def change_of(self, names: set[str]) -> Request:
        nonce = self.nonces[-1] if self.nonces and self.waiting is None else ""
        return Request(names=tuple(sorted(names)), nonce=nonce)

    def answer(self, nonce: str, error: str | None) -> Request:
        names = () if self.wildcard else tuple(sorted(self.wanted))
        return Request(names=names, nonce=nonce, error=error)

    def accept(self, response: Response) -> None:
        super().accept(response)
        self.has = {name: one for name, one in self.has.items() if name in response.resources}

    def check(self, response: Response) -> None:
        assert response.removed == ()
        wanted = {name: one for name, one in self.snapshot.items() if name in self.wanted}
        assert response.resources == wanted, "all of it"
        if self.nonces and not self.must_come and not self.may_come:
            settled = all(
                self.has.get(name) == one or self.refused.get(name) == one
                for name, one in wanted.items()
            )
            assert not settled or self.gone(wanted) or not wanted

    def gone(self, wanted: Mapping[str, Resource]) -> bool:
        return bool((self.has.keys() | self.refused.keys()) - wanted.keys())


class DeltaClient(Client):
    kind = DeltaSession

    def first_request(self) -> Request:
        self.has = {name: one for name, one in self.has.items() if name in self.wanted}
        self.at_start = dict(self.has)
        versions = {name: one.version for name, one in self.has.items()}
        return Request(names=super().first_request().names, known_versions=versions)

    def known_of_old(self, name: str, one: Resource) -> bool:
        return name in self.at_start and self.at_start[name].version == one.version

    def change_of(self, names: set[str]) -> Request:
        return Request(
            names=tuple(sorted(names - self.wanted)),
            unsubscribed=tuple(sorted(self.wanted - names)),
        )

    def answer(self, nonce: str, error: str | None) -> Request:
        return Request(nonce=nonce, error=error)

    @rule(names=SOME)
    def ask_again(self, names: set[str]) -> None:
        """It does not have these any more, or so it says."""
        names &= self.wanted
        if self.wildcard or not names:
            return
        self.must_come |= names
        for name in names:
            self.told_gone.discard(name)
            self.refused.pop(name, None)
            self.has.pop(name, None)
        self.take(self.session.receive(Request(names=tuple(sorted(names)))))

    def check(self, response: Response) -> None:
        assert self.told(response), "something has changed"
        for name, one in response.resources.items():
            if name not in self.must_come | self.may_come:
                assert self.has.get(name) != one, "it has that"
                assert self.refused.get(name) != one, "it has refused that"
            self.told_gone.discard(name)
        for name in response.removed:
            assert name not in self.snapshot
            assert name not in self.told_gone, "that was sent"
            self.told_gone.add(name)

    @invariant()
    def it_is_told_what_is_gone(self) -> None:
        if not hasattr(self, "session") or self.waiting is not None or not self.known:
            return
        gone = self.has.keys() - self.snapshot.keys()
        assert gone <= self.told_gone
        for name in gone:
            assert name in self.refused
        if not self.wildcard:
            assert self.wanted - self.snapshot.keys() <= self.told_gone


TestStateClient = StateClient.TestCase
TestDeltaClient = DeltaClient.TestCase
TestStateClient.settings = TestDeltaClient.settings = settings(
    max_examples=200, stateful_step_count=25
)

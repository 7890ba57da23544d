"""One client's stream of one resource type: requests in, responses out.

It decides what a client is sent and what it has acknowledged, without I/O, so that every order of
messages can be tested. At most one response is on its way: the next one is made when the client
has answered, from what is current then. A rejected resource is not sent again until it changes.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

from extproc.errors import ServiceError

__all__ = [
    "NAMES_MAX",
    "DeltaSession",
    "Request",
    "Resource",
    "Response",
    "Session",
    "StateSession",
    "StreamLimitError",
]

WILDCARD: Final = "*"

# A client needs two names for a model. Each message costs time for all names of its stream.
NAMES_MAX: Final = 4096


class StreamLimitError(ServiceError):
    """A client asks for more than a stream may; the text says what."""


class Resource(Struct, frozen=True):
    """A resource in the form in which it is sent. `version` is a hash of its content.

    `addresses` (`ip:port`) are the endpoints in it.
    """

    version: str
    body: bytes
    addresses: frozenset[str] = frozenset()


class Request(Struct, frozen=True, kw_only=True):
    """What a client says.

    With state of the world `names` are all that it wants; with delta those that it wants from now
    on. `unsubscribed` and `known_versions` are for delta. `error` is set in a rejection.
    """

    names: tuple[str, ...] = ()
    unsubscribed: tuple[str, ...] = ()
    known_versions: Mapping[str, str] = {}
    nonce: str = ""
    error: str | None = None


class Response(Struct, frozen=True, kw_only=True):
    nonce: str
    resources: Mapping[str, Resource]
    removed: tuple[str, ...] = ()


class Session:
    """What both forms of the protocol have in common."""

    def __init__(self, snapshot: Mapping[str, Resource] | None) -> None:
        """`snapshot` has the resources by name; None while they are not known."""
        # By name; None stands for a resource of which the client knows that it does not exist.
        self._told: dict[str, Resource | None] = {}
        self._on_its_way: dict[str, Resource | None] | None = None
        self._acknowledged: dict[str, Resource] = {}
        self._snapshot = snapshot
        self._names: set[str] = set()
        self._wildcard = False
        self._begun = False
        # To be sent again, although the client has them.
        self._again: set[str] = set()
        self._nonce = 0
        self.rejections = 0
        # The error of the last answer, None if that was an acknowledgement.
        self.error: str | None = None

    @property
    def acknowledged(self) -> Mapping[str, Resource]:
        """What the client uses, as far as it has said."""
        return self._acknowledged

    def subscribes_to(self, name: str) -> bool:
        return self._wildcard or name in self._names

    def update(self, snapshot: Mapping[str, Resource] | None) -> Response | None:
        """Take other resources; returns what is to be sent now."""
        self._snapshot = snapshot
        return self._next()

    def renew(self, names: Iterable[str]) -> Response | None:
        """Send these again, as far as the client wants them, although they are the same."""
        self._again |= set(names)
        return self._next()

    def receive(self, request: Request) -> Response | None:
        """Take a message of the client; returns what is to be sent now."""
        raise NotImplementedError

    def _next(self) -> Response | None:
        raise NotImplementedError

    def _respond(self, told: dict[str, Resource | None]) -> Response:
        self._nonce += 1
        self._on_its_way = told
        self._told.update(told)
        self._again -= told.keys()
        return Response(
            nonce=str(self._nonce),
            resources={name: one for name, one in told.items() if one is not None},
            removed=tuple(sorted(name for name, one in told.items() if one is None)),
        )

    def _settle(self, error: str | None) -> dict[str, Resource | None]:
        """The client has answered; returns what it has acknowledged, if it has."""
        settled, self._on_its_way = self._on_its_way or {}, None
        self.error = error
        if error is not None:
            self.rejections += 1
            return {}
        return settled

    def _is_answer(self, request: Request) -> bool:
        return self._on_its_way is not None and request.nonce == str(self._nonce)

    def _wanted(self) -> dict[str, Resource]:
        return {
            name: one for name, one in (self._snapshot or {}).items() if self.subscribes_to(name)
        }

    def _forget(self, names: Iterable[str]) -> None:
        """The client may not have these any more."""
        for name in names:
            self._told.pop(name, None)
            self._acknowledged.pop(name, None)
            if self._on_its_way is not None:
                self._on_its_way.pop(name, None)

    def _leave_out_others(self) -> None:
        """The client may have changed its mind about what it wants."""
        known = self._told.keys() | self._acknowledged.keys()
        self._forget([name for name in known if not self.subscribes_to(name)])
        self._again = {name for name in self._again if self.subscribes_to(name)}


class StateSession(Session):
    """State of the world: each response holds everything that the client wants."""

    def receive(self, request: Request) -> Response | None:
        if request.nonce and self._nonce and request.nonce != str(self._nonce):
            return None  # An answer to an older response: another one follows.
        if self._is_answer(request):
            for name, one in self._settle(request.error).items():
                if one is not None:
                    self._acknowledged[name] = one
        names = set(request.names)
        if not self._begun:
            self._wildcard = not names
        self._wildcard = WILDCARD in names or (self._wildcard and not names)
        self._names = names - {WILDCARD}
        self._begun = True
        self._leave_out_others()
        return self._next()

    def _next(self) -> Response | None:
        if not self._begun or self._snapshot is None or self._on_its_way is not None:
            return None
        wanted = self._wanted()
        again = not self._again.isdisjoint(wanted)
        if wanted == self._told and not again and (self._nonce or not self._wildcard):
            return None
        # What is missing in a response no longer exists.
        self._forget(self._told.keys() - wanted.keys())
        return self._respond(dict(wanted))


class DeltaSession(Session):
    """Delta: each response holds what has changed, and the names that are gone."""

    def receive(self, request: Request) -> Response | None:
        """Raises StreamLimitError; the stream must end then."""
        if self._is_answer(request):
            for name, one in self._settle(request.error).items():
                if one is None:
                    self._acknowledged.pop(name, None)
                else:
                    self._acknowledged[name] = one
        # A client that asks again for a name does not have it.
        self._forget(request.names)
        self._names.update(request.names)
        self._wildcard = (
            WILDCARD in self._names or self._wildcard or not (self._begun or request.names)
        )
        self._names.difference_update(request.unsubscribed)
        if WILDCARD in request.unsubscribed:
            self._wildcard = False
        self._names.discard(WILDCARD)
        if not self._begun:
            self._take_over(request.known_versions)
        self._begun = True
        self._check_sizes()
        self._leave_out_others()
        return self._next()

    def _check_sizes(self) -> None:
        """Names add up over the messages; beside a wildcard, removed names do so as well."""
        existing = len(self._snapshot or ())
        if len(self._names) > NAMES_MAX or len(self._told) > NAMES_MAX + existing:
            raise StreamLimitError(f"the stream names more than {NAMES_MAX} resources")

    def _take_over(self, versions: Mapping[str, str]) -> None:
        """The client has resources of an earlier stream, maybe from another replica."""
        for name, version in versions.items():
            current = (self._snapshot or {}).get(name)
            same = current is not None and current.version == version
            known = current if same and current is not None else Resource(version, b"")
            self._told[name] = self._acknowledged[name] = known

    def _next(self) -> Response | None:
        if not self._begun or self._snapshot is None or self._on_its_way is not None:
            return None
        told: dict[str, Resource | None] = {}
        for name, one in self._wanted().items():
            before = self._told.get(name)
            if before is None or before.version != one.version or name in self._again:
                told[name] = one
            elif name in self._acknowledged and self._acknowledged[name].version == one.version:
                # Of what the client had before this stream only the version was known.
                self._acknowledged[name] = one
        missing = (self._names | self._told.keys()) - self._snapshot.keys()
        for name in missing:
            if name not in self._told or self._told[name] is not None:
                told[name] = None
        return self._respond(told) if told else None

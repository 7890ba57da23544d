"""Resolves the name of a model in a request: a configured model, or an adapter that workers list.

An adapter is a model of its own to clients, and belongs to the pool of the model it was made for.
Clients name it as the engines list it, or as `model:adapter`. Separate from the registry, which
keeps workers: this module keeps names, and each of them is found with one look-up.

A configured model wins over an adapter with its name. An adapter that workers list for several
configured models is that of the first one in the configuration; the longer form names the others.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

from extproc.clock import Clock
from extproc.workers.adapters import NAME_MAX_CHARS

__all__ = ["ModelNames", "ResolvedModel"]

# Different names of adapters that are known at a time, over all workers.
_ADAPTERS_MAX: Final = 10_000
# So long after the last worker with an adapter has left, the adapter is still known.
_GONE_SECONDS: Final = 300.0
_GONE_MAX: Final = 1024
# Names with more colons are looked up each time.
_COLONS_MAX: Final = 8


class ResolvedModel(NamedTuple):
    """A configured model, and the adapter of it that is meant; None for the model itself."""

    model: str
    adapter: str | None


class _Listed(Struct, frozen=True):
    """What a worker lists. `models` are those that are not adapters themselves."""

    models: tuple[str, ...]
    adapters: frozenset[str]


class _Gone(NamedTuple):
    models: tuple[str, ...]
    until: float


class ModelNames:
    """The names of configured models and of adapters. `version` rises when one changes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # The configured models and their places in the configuration.
        self._order: dict[str, int] = {}
        # All configured models, and what was looked up since their workers changed.
        self._known: dict[str, ResolvedModel] = {}
        self._workers: dict[str, _Listed] = {}
        # The names among `_known` that were looked up, by each adapter that they can mean.
        self._found: dict[str, set[str]] = {}
        # The ids of the workers that list an adapter, by its name.
        self._holders: dict[str, dict[str, None]] = {}
        self._gone: dict[str, _Gone] = {}
        self.version = 0

    def serve(self, models: Sequence[str]) -> None:
        """From now on these models are configured."""
        self._order = {model: place for place, model in enumerate(models)}
        self._known = {model: self._configured(model) for model in models}
        self._found.clear()
        self.version += 1

    def find(self, name: str) -> ResolvedModel | None:
        """The configured model and the adapter of a name; None for an unknown one."""
        return self._known.get(name) or self._look_up(name)

    def listed(self, worker_id: str, models: Sequence[str], adapters: Collection[str]) -> None:
        """A worker serves these models, and has loaded these adapters and no others."""
        before = self._workers.get(worker_id)
        old = frozenset[str]() if before is None else before.adapters
        taken = self._taken(adapters, old)
        own = tuple([model for model in models if model not in taken])
        now = _Listed(own, taken)
        if now == before:
            return
        self._workers[worker_id] = now
        for adapter in old - taken:
            self._release(adapter, worker_id)
        for adapter in taken - old:
            self._gone.pop(adapter, None)
            self._holders.setdefault(adapter, {})[worker_id] = None
        same_models = before is not None and before.models == own
        self._forget(old ^ taken if same_models else old | taken)

    def left(self, worker_id: str) -> None:
        """A worker is not registered any more. Its adapters may come back with another one."""
        listed = self._workers.pop(worker_id, None)
        if listed is None:
            return
        until = self._clock.monotonic() + _GONE_SECONDS
        for adapter in listed.adapters:
            if self._release(adapter, worker_id):
                self._gone[adapter] = _Gone(listed.models, until)
        while len(self._gone) > _GONE_MAX:
            del self._gone[next(iter(self._gone))]
        self._forget(listed.adapters)

    def adapters(self) -> Iterator[ResolvedModel]:
        """The adapters that workers list for configured models, in no order."""
        for adapter in self._holders:
            if adapter not in self._order and (model := self._first_model(adapter)) is not None:
                yield ResolvedModel(model, adapter)

    def sizes(self) -> dict[str, int]:
        """How much is kept, for tests of what is left behind."""
        return {
            "workers": len(self._workers),
            "adapters": len(self._holders),
            "gone": len(self._gone),
            "found": len(self._known),
        }

    def _taken(self, adapters: Collection[str], old: frozenset[str]) -> frozenset[str]:
        """The adapters without those for which there is no room."""
        room = _ADAPTERS_MAX - len(self._holders)
        if len(adapters) <= room:
            return frozenset(adapters)
        taken = set()
        for adapter in adapters:
            if adapter not in old and adapter not in self._holders:
                room -= 1
                if room < 0:
                    continue
            taken.add(adapter)
        return frozenset(taken)

    def _release(self, adapter: str, worker_id: str) -> bool:
        """One worker less has the adapter; True if it was the last one."""
        holders = self._holders[adapter]
        del holders[worker_id]
        if not holders:
            del self._holders[adapter]
        return not holders

    def _forget(self, adapters: Collection[str]) -> None:
        """Forget what was found of these adapters."""
        if adapters:
            self.version += 1
        for adapter in adapters:
            for name in list(self._found.get(adapter, ())):
                self._forget_name(name)
            if adapter in self._order:
                self._known[adapter] = self._configured(adapter)

    def _configured(self, model: str) -> ResolvedModel:
        """A configured model can be an adapter of its workers: it then has their namespace."""
        return ResolvedModel(model, model if model in self._holders else None)

    def _look_up(self, name: str) -> ResolvedModel | None:
        if len(name) <= NAME_MAX_CHARS and (model := self._first_model(name)) is not None:
            return self._note(name, ResolvedModel(model, name))
        for model, adapter in self._split(name):
            if self._has(model, adapter):
                return self._note(name, ResolvedModel(model, adapter))
        return self._look_up_gone(name)

    def _note(self, name: str, found: ResolvedModel) -> ResolvedModel:
        if name.count(":") <= _COLONS_MAX:
            self._known[name] = found
            for adapter in _possible_adapters(name):
                self._found.setdefault(adapter, set()).add(name)
        return found

    def _forget_name(self, name: str) -> None:
        del self._known[name]
        for adapter in _possible_adapters(name):
            names = self._found[adapter]
            names.discard(name)
            if not names:
                del self._found[adapter]

    def _look_up_gone(self, name: str) -> ResolvedModel | None:
        """Find an adapter whose last worker has just left."""
        if (model := self._first(self._gone_models(name))) is not None:
            return ResolvedModel(model, name)
        for model, adapter in self._split(name):
            if model in self._gone_models(adapter):
                return ResolvedModel(model, adapter)
        return None

    def _split(self, name: str) -> Iterator[tuple[str, str]]:
        """The models and adapters that `model:adapter` can mean: both may have colons."""
        for model in self._order if ":" in name else ():
            if name.startswith(f"{model}:") and len(name) - len(model) - 1 <= NAME_MAX_CHARS:
                yield model, name[len(model) + 1 :]

    def _gone_models(self, adapter: str) -> tuple[str, ...]:
        gone = self._gone.get(adapter)
        if gone is None:
            return ()
        if gone.until <= self._clock.monotonic():
            del self._gone[adapter]
            return ()
        return gone.models

    def _first_model(self, adapter: str) -> str | None:
        """The first configured model for which a worker lists the adapter."""
        holders = self._holders.get(adapter)
        if not holders:
            return None
        return self._first({model for one in holders for model in self._workers[one].models})

    def _first(self, models: Collection[str]) -> str | None:
        order = self._order
        return min(
            (model for model in models if model in order), key=order.__getitem__, default=None
        )

    def _has(self, model: str, adapter: str) -> bool:
        """True if a worker of the model lists the adapter."""
        holders = self._holders.get(adapter, ())
        return any(model in self._workers[one].models for one in holders)


def _possible_adapters(name: str) -> Iterator[str]:
    """The name itself, and what follows each of its colons."""
    yield name
    at = name.find(":")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(":", at + 1)

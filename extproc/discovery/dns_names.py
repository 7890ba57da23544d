"""Discovery from host names: every address of a name is a worker.

That is how a headless Service and the replicas of a compose file appear. Each name is looked up
again when its records expire. A name server does not say why an address is missing, and some answer
with a part of the addresses in turn. So a worker that is missing gets no new requests at once, and
is removed only when it has not come back in time. A lookup that fails, or that finds no address at
all, says nothing about the workers: those known last stay in use.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Final

import structlog
from msgspec import Struct

from extproc.clock import Clock, wait_for_first
from extproc.config.schema import DnsConfig
from extproc.config.worker_urls import parse_nameserver
from extproc.discovery.cluster_source import SourceParts
from extproc.discovery.name_lookup import Addresses, LookupFailedError, NameLookup, ServerLookup
from extproc.discovery.static_urls import listed_urls
from extproc.discovery.worker_union import Reading, Sighting, WorkerUnion
from extproc.metrics.service import DiscoveryMetrics
from extproc.worker_url import WorkerUrl
from extproc.workers.source import Listed, WorkerEvent
from extproc.workers.source_health import SourceHealth
from extproc.workers.worker import Role, WorkerSpec, configured_spec

__all__ = ["DnsNames", "LookupTimes", "NamedWorkers", "dns_source"]

_log = structlog.get_logger()

_OBJECTS: Final = "names"
_ADDRESSES_MAX: Final = 1000
_RETRY_FIRST_SECONDS: Final = 1.0
_RETRY_MAX_SECONDS: Final = 5.0
_DOUBLINGS_MAX: Final = 6
_WARNING_INTERVAL_SECONDS: Final = 60.0
_FIXES: Final = {
    "name_not_found": "check the name in discovery.dns.urls, and that its workers run",
    "no_addresses": "check that the workers of the name run, and discovery.dns.address_family",
    "unreachable": "check discovery.dns.nameservers, or /etc/resolv.conf",
    "timeout": "check the name servers and the network policy",
}
_ANY_FIX: Final = "check the name server; the known workers stay in use"


class NamedWorkers(Struct, frozen=True):
    """The workers at the addresses of the host in `url`; without a role, the engines say it."""

    url: WorkerUrl
    role: Role | None = None

    def at(self, host: str) -> WorkerSpec:
        """The worker at one address."""
        return configured_spec(self.url._replace(host=host), self.role)


class LookupTimes(Struct, frozen=True, kw_only=True):
    """How often names are looked up, and how long a worker may be missing."""

    ttl_min_seconds: float
    ttl_max_seconds: float
    leave_seconds: float


class _Trouble(Struct):
    """A name whose lookups fail: how often in a row, and what was warned of last."""

    failures: int = 0
    reason: str = ""
    warned_at: float = 0.0


class DnsNames:
    """A WorkerSource: the workers at the addresses of names."""

    def __init__(
        self,
        names: Sequence[NamedWorkers],
        lookup: NameLookup,
        times: LookupTimes,
        *,
        clock: Clock,
        metrics: DiscoveryMetrics,
        health: SourceHealth,
    ) -> None:
        self._names = names
        self._lookup = lookup
        self._times = times
        self._clock = clock
        self._up = metrics.up(_OBJECTS)
        self._up.set(0)
        self._errors = metrics.errors
        self._health = health
        self._union = WorkerUnion()
        # What was found since the events were last read, and what was reported, by name.
        self._found: dict[NamedWorkers, Sequence[str]] = {}
        self._reported: dict[NamedWorkers, dict[str, None]] = {}
        self._changed = asyncio.Event()
        # Names without any answer so far. That there is no such name is an answer, too.
        self._unanswered = {name.url for name in names}
        self._troubles: dict[WorkerUrl, _Trouble] = {}
        # Names with more addresses than are used.
        self._cut: set[WorkerUrl] = set()

    async def events(self) -> AsyncGenerator[WorkerEvent, None]:
        tasks = [asyncio.create_task(self._follow(name)) for name in self._names]
        listed = False
        try:
            while True:
                await self._wait()
                found, self._found = self._found, {}
                now = self._clock.monotonic()
                for name, hosts in found.items():
                    for event in self._compare(name, hosts, now):
                        yield event
                for event in self._union.expire(now):
                    yield event
                if not listed and not self._unanswered:
                    listed = True
                    yield Listed()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._health.forget(_OBJECTS)

    def _compare(
        self, name: NamedWorkers, hosts: Sequence[str], now: float
    ) -> Iterator[WorkerEvent]:
        """What has changed since the last answer for this name; each address is an object."""
        before, self._reported[name] = self._reported.get(name, {}), dict.fromkeys(hosts)
        for host in before:
            if host not in self._reported[name]:
                until = now + self._times.leave_seconds
                yield from self._union.delete(f"{name.url} {host}", until)
        for host in hosts:
            if host not in before:
                yield from self._union.put(f"{name.url} {host}", Reading([Sighting(name.at(host))]))

    async def _wait(self) -> None:
        """Return when a lookup has ended, or when a worker is to be removed."""
        at = self._union.next_expiry
        if at is None:
            await self._changed.wait()
        else:
            left = max(0.0, at - self._clock.monotonic())
            await wait_for_first(self._changed.wait(), self._clock.sleep(left))
        self._changed.clear()

    async def _follow(self, name: NamedWorkers) -> None:
        """Look the name up for ever."""
        while True:
            try:
                found = await self._lookup.find(name.url.host)
            except LookupFailedError as error:
                seconds = self._failed(name, error)
            except Exception as error:
                _log.exception("lookup_failed", name=name.url.host)
                seconds = self._failed(name, LookupFailedError("invalid", type(error).__name__))
            else:
                seconds = self._answered(name, found)
            if not self._troubles and not self._unanswered:
                self._up.set(1)
                self._health.works(_OBJECTS)
            self._changed.set()
            await self._clock.sleep(seconds)

    def _answered(self, name: NamedWorkers, found: Addresses) -> float:
        """Take the addresses; returns the seconds until the next lookup."""
        if self._troubles.pop(name.url, None) is not None:
            _log.info("discovery_recovered", objects=_OBJECTS, name=name.url.host)
        self._unanswered.discard(name.url)
        self._found[name] = self._limited(name, found)
        longest = self._times.ttl_max_seconds
        return self._clamped(longest if found.ttl_seconds is None else found.ttl_seconds)

    def _clamped(self, seconds: float) -> float:
        return min(max(seconds, self._times.ttl_min_seconds), self._times.ttl_max_seconds)

    def _limited(self, name: NamedWorkers, found: Addresses) -> Sequence[str]:
        """The addresses that are used: the lowest ones, so that they stay the same."""
        if len(found.hosts) <= _ADDRESSES_MAX:
            self._cut.discard(name.url)
            return found.hosts
        self._errors(_OBJECTS, "too_many_addresses").inc()
        if name.url not in self._cut:
            self._cut.add(name.url)
            _log.warning(
                "too_many_addresses",
                name=name.url.host,
                count=len(found.hosts),
                of=_ADDRESSES_MAX,
                fix="divide the workers among several names",
            )
        return found.hosts[:_ADDRESSES_MAX]

    def _failed(self, name: NamedWorkers, error: LookupFailedError) -> float:
        """Note the failure; returns the seconds until the next lookup."""
        if error.reason in ("name_not_found", "no_addresses"):
            self._unanswered.discard(name.url)
        trouble = self._note(name, error.reason, error.detail)
        doublings = min(trouble.failures, _DOUBLINGS_MAX)
        trouble.failures += 1
        seconds: float = min(_RETRY_FIRST_SECONDS * 2**doublings, _RETRY_MAX_SECONDS)
        return self._clamped(seconds)

    def _note(self, name: NamedWorkers, reason: str, detail: str) -> _Trouble:
        """Count a trouble, and warn once a minute or for a new reason."""
        self._errors(_OBJECTS, reason).inc()
        self._up.set(0)
        now = self._clock.monotonic()
        self._health.fails(_OBJECTS, reason, now)
        trouble = self._troubles.setdefault(name.url, _Trouble())
        if trouble.reason != reason or now - trouble.warned_at >= _WARNING_INTERVAL_SECONDS:
            trouble.reason, trouble.warned_at = reason, now
            _log.warning(
                "discovery_failing",
                objects=_OBJECTS,
                name=name.url.host,
                reason=reason,
                error=detail,
                fix=_FIXES.get(reason, _ANY_FIX),
            )
        return trouble


def dns_source(config: DnsConfig, parts: SourceParts) -> DnsNames:
    """A WorkerSource of the configured names; the configuration has checked them."""
    nameservers = [parse_nameserver(text) for text in config.nameservers]
    return DnsNames(
        [NamedWorkers(url, role) for url, role in listed_urls(config)],
        ServerLookup(config.address_family, nameservers),
        LookupTimes(
            ttl_min_seconds=config.ttl_min_secs,
            ttl_max_seconds=config.ttl_max_secs,
            leave_seconds=config.leave_secs,
        ),
        clock=parts.clock,
        metrics=parts.metrics,
        health=parts.health,
    )

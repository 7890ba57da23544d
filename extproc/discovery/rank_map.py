"""Says at which pods of a group the data-parallel ranks of its worker publish their KV events.

An engine on several pods is one worker, that of its leader. What the other pods of the group say
about their ranks is brought together here, and each leader's worker is given the addresses. It is
separate from the union, in which an object speaks of its own workers only.
"""

from collections.abc import Iterable, Mapping

import msgspec

from extproc.discovery.worker_union import Reading

__all__ = ["RankMap"]


class RankMap:
    """The readings of the objects that belong to a group; all others pass unchanged."""

    def __init__(self) -> None:
        # By group, then by object.
        self._groups: dict[str, dict[str, Reading]] = {}
        self._group_of: dict[str, str] = {}
        # What the workers of an object were last given.
        self._given: dict[str, tuple[tuple[int, str], ...]] = {}

    def replace(self, readings: Mapping[str, Reading]) -> dict[str, Reading]:
        """Take over a complete list of objects, by key; returns them with the addresses."""
        for key in [one for one in self._group_of if one not in readings]:
            self._keep(key, Reading())
        for key, reading in readings.items():
            self._keep(key, reading)
        return {key: self._completed(key, reading) for key, reading in readings.items()}

    def put(self, key: str, reading: Reading) -> dict[str, Reading]:
        """Take over one object; returns those that may have changed by that, this one first."""
        groups = {self._group_of.get(key, ""), reading.group}
        self._keep(key, reading)
        changed = {key: reading}
        for group in groups:
            changed |= self._groups.get(group, {})
        return {one: self._completed(one, found) for one, found in changed.items()}

    def _keep(self, key: str, reading: Reading) -> None:
        before = self._group_of.pop(key, None)
        if before is not None:
            del self._groups[before][key]
            if not self._groups[before]:
                del self._groups[before]
        if reading.group:
            self._group_of[key] = reading.group
            self._groups.setdefault(reading.group, {})[key] = reading
        if not reading.sightings:
            self._given.pop(key, None)

    def _completed(self, key: str, reading: Reading) -> Reading:
        if not reading.group or not reading.sightings:
            return reading
        if key not in self._given or not all(one.draining for one in reading.sightings):
            self._given[key] = _united(
                one.rank_hosts for one in self._groups[reading.group].values()
            )
        # Otherwise the pods of the group end one after the other: it keeps what it has until then.
        hosts = self._given[key]
        sightings = [
            msgspec.structs.replace(one, spec=msgspec.structs.replace(one.spec, rank_hosts=hosts))
            for one in reading.sightings
        ]
        return msgspec.structs.replace(reading, sightings=sightings)


def _united(pods: Iterable[Mapping[int, str]]) -> tuple[tuple[int, str], ...]:
    """The ranks that exactly one address claims, each with that address."""
    found: dict[int, set[str]] = {}
    for hosts in pods:
        for rank, host in hosts.items():
            found.setdefault(rank, set()).add(host)
    return tuple((rank, min(found[rank])) for rank in sorted(found) if len(found[rank]) == 1)

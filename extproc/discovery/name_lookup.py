"""Looks up all addresses of a host name, with the time for which they are valid.

The system's own resolver tells no time to live. So this asks the name servers itself, as the system
would: `/etc/hosts` first, then the servers and search domains of `/etc/resolv.conf`. Separate from
the source of workers, so that only this module knows the library.
"""

import asyncio
import errno
import ipaddress
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

import dns.asyncresolver
import dns.exception
import dns.name
import dns.nameserver
import dns.resolver
from msgspec import Struct

from extproc.config.schema import IP_VERSIONS, DnsLookupFamily
from extproc.errors import ServiceError

__all__ = ["Addresses", "LookupFailedError", "NameLookup", "ServerLookup"]

LookupReason = Literal[
    "invalid", "name_not_found", "no_addresses", "refused", "server_error", "timeout", "unreachable"
]

_HOSTS_FILE: Final = Path("/etc/hosts")
_RESOLV_CONF: Final = Path("/etc/resolv.conf")
# For one name and one kind of record, over all servers and search domains.
_LIFETIME_SECONDS: Final = 5.0
_RECORDS: Final = {4: "A", 6: "AAAA"}
_CODES: Final[dict[str, LookupReason]] = {"SERVFAIL": "server_error", "REFUSED": "refused"}
_FILE_MAX_BYTES: Final = 4 * 1024 * 1024

_Stamp = tuple[int, int, int]


class Addresses(Struct, frozen=True):
    """The addresses of a name, in order; valid for so many seconds.

    `ttl_seconds` is None where nothing says it, as in `/etc/hosts`.
    """

    hosts: tuple[str, ...]
    ttl_seconds: float | None


class LookupFailedError(ServiceError):
    """The addresses of a name are unknown; `detail` is for operators."""

    def __init__(self, reason: LookupReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class NameLookup(Protocol):
    """Finds the addresses of names."""

    async def find(self, name: str) -> Addresses:
        """At least one address; raises LookupFailedError."""
        ...


class ServerLookup:
    """The name servers, asked for addresses of one choice of families."""

    def __init__(
        self,
        family: DnsLookupFamily,
        nameservers: Sequence[tuple[str, int]] = (),
        hosts_file: Path = _HOSTS_FILE,
        resolv_conf: Path = _RESOLV_CONF,
    ) -> None:
        """`nameservers` are addresses and ports; without them, those of `resolv_conf`."""
        self._versions = IP_VERSIONS[family]
        self._nameservers = nameservers
        self._hosts_file = hosts_file
        self._resolv_conf = resolv_conf
        # The files as they were read last.
        self._hosts: dict[str, list[str]] = {}
        self._hosts_stamp: _Stamp | None = None
        self._resolver: dns.asyncresolver.Resolver | None = None
        self._resolver_stamp: _Stamp | None = None

    async def find(self, name: str) -> Addresses:
        await asyncio.to_thread(self._read_files)
        listed = self._hosts.get(name.lower().removesuffix("."), [])
        for version in self._versions:
            if hosts := _usable(listed, version):
                return Addresses(hosts, None)
        missing = []
        for version in self._versions:
            try:
                return await self._ask(name, version)
            except LookupFailedError as error:
                # Only if there is no address of the first family does the second one count.
                if error.reason not in ("name_not_found", "no_addresses"):
                    raise
                missing.append(error)
        raise missing[0]

    async def _ask(self, name: str, version: int) -> Addresses:
        """Ask the servers for one kind of record; raises LookupFailedError."""
        kind = _RECORDS[version]
        if self._resolver is None:
            detail = f"{self._resolv_conf} names no server, or cannot be read"
            raise LookupFailedError("unreachable", detail)
        try:
            answer = await self._resolver.resolve(
                name, kind, search=True, raise_on_no_answer=False, lifetime=_LIFETIME_SECONDS
            )
        except dns.resolver.NXDOMAIN:
            raise LookupFailedError("name_not_found", "there is no such name") from None
        except dns.exception.Timeout:
            raise LookupFailedError("timeout", "no answer of a name server in time") from None
        except dns.resolver.NoNameservers as error:
            raise LookupFailedError(_reason(error), _shown(error)) from None
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise LookupFailedError("invalid", _shown(error)) from None
        found = [] if answer.rrset is None else [str(record) for record in answer.rrset]
        hosts = _usable(found, version)
        if not hosts:
            raise LookupFailedError("no_addresses", f"the name has no usable {kind} record")
        return Addresses(hosts, float(answer.chaining_result.minimum_ttl))

    def _read_files(self) -> None:
        """Read the files that have changed; a file that cannot be read counts as empty."""
        stamp = _stamp(self._hosts_file)
        if stamp != self._hosts_stamp:
            self._hosts, self._hosts_stamp = _read_hosts(self._hosts_file), stamp
        stamp = _stamp(self._resolv_conf)
        if self._resolver is None or stamp != self._resolver_stamp:
            self._resolver, self._resolver_stamp = self._make_resolver(), stamp

    def _make_resolver(self) -> dns.asyncresolver.Resolver | None:
        resolver = dns.asyncresolver.Resolver(configure=False)
        try:
            resolver.read_resolv_conf(str(self._resolv_conf))
        except (dns.exception.DNSException, OSError, ValueError):
            if not self._nameservers:
                return None
        if self._nameservers:
            resolver.nameservers = [
                dns.nameserver.Do53Nameserver(address, port) for address, port in self._nameservers
            ]
        # Many addresses fit into one packet with it; more come over TCP.
        resolver.use_edns(0)
        return resolver


def _usable(found: Collection[str], version: int) -> tuple[str, ...]:
    """The addresses of this version to which one can connect, in order."""
    usable = set()
    for text in found:
        address = ipaddress.ip_address(text)
        zoned = address.version == 6 and address.is_link_local
        if address.version == version and not (
            address.is_unspecified or address.is_multicast or zoned
        ):
            usable.add(address)
    return tuple([str(address) for address in sorted(usable)])


def _read_hosts(path: Path) -> dict[str, list[str]]:
    """The addresses in a hosts file, by lower-case name."""
    found: dict[str, list[str]] = {}
    try:
        with path.open("rb") as file:
            text = file.read(_FILE_MAX_BYTES).decode(errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        try:
            ipaddress.ip_address(address)
        except ValueError:
            continue
        for name in names:
            found.setdefault(name.lower().removesuffix("."), []).append(address)
    return found


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _reason(error: dns.resolver.NoNameservers) -> LookupReason:
    """Why no server gave an answer; what a server said counts more than that one was not there."""
    errors = [one[3] for one in error.kwargs.get("errors", [])]
    for text in errors:
        if isinstance(text, str):
            return _CODES.get(text, "invalid")
    if any(isinstance(one, OSError) for one in errors):
        return "unreachable"
    return "invalid"


def _shown(error: Exception) -> str:
    """The text of an error, without what changes from one to the next."""
    if isinstance(error, dns.resolver.NoNameservers):
        parts = []
        for server, _, port, text, _ in error.kwargs.get("errors", []):
            said = (
                errno.errorcode.get(text.errno or 0, "error") if isinstance(text, OSError) else text
            )
            parts.append(f"{server} port {port}: {said or type(text).__name__}")
        return "; ".join(parts) or "no name server can be asked"
    return str(error) or type(error).__name__

"""Rules for the URLs of workers: those in the configuration, and those that are added later.

Separate from the other rules because the admin server applies them to a URL of its own.
"""

import contextlib
import ipaddress
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import urlsplit

from extproc.config.discovery import DnsConfig
from extproc.config.schema import Config
from extproc.config.server import is_loopback
from extproc.worker_url import WorkerUrl, parse_worker_url

__all__ = [
    "checked_worker_url",
    "group_address_problem",
    "listed_url_problems",
    "normalised",
    "parse_nameserver",
]

_DNS_PORT: Final = 53
_PORT_MAX: Final = 65_535
_BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")
_LOOPBACK: Final = "loopback"


def checked_worker_url(text: str, config: Config) -> WorkerUrl:
    """Parse the URL of a worker; raises ValueError if it is wrong or leads back here."""
    url = parse_worker_url(text)
    if owner := dict(_own_addresses(config)).get((_place(url.host), url.port)):
        raise ValueError(f"this is {owner}; requests would go in a circle")
    return url


def group_address_problem(url: WorkerUrl) -> str | None:
    """Why this cannot be the address of one worker, None if it can."""
    address = _address(url.host)
    if address is None:
        return None
    if address.is_unspecified or address.is_multicast or address == _BROADCAST:
        return "not the address of one host; write the address or the name of the worker"
    return None


def normalised(urls: Iterable[str]) -> Iterator[str]:
    """The URLs in their normal form; those that cannot be parsed are left out."""
    for text in urls:
        with contextlib.suppress(ValueError):
            yield str(parse_worker_url(text))


def parse_nameserver(text: str) -> tuple[str, int]:
    """Address and port of `ip` or `ip:port`; raises ValueError with a message for the operator."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text)), _DNS_PORT
    host, colon, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    valid_port = port.isascii() and port.isdigit() and 0 < int(port) <= _PORT_MAX
    if address is None or not colon or not valid_port or (address.version == 6) != ("[" in host):
        raise ValueError("expected an IP address, or ip:port with IPv6 in brackets")
    return str(address), int(port)


def listed_url_problems(config: Config) -> Iterator[str]:
    """The problems of the backend's lists of URLs, as `key: sentence`."""
    section = config.discovery.listed
    if section is None:
        return
    path = f"discovery.{config.discovery.backend}"
    if not section.urls:
        yield f"{path}.urls: at least one worker URL is needed"
    seen: dict[str, int] = {}
    for index, text in enumerate(section.urls):
        key = f"{path}.urls[{index}]"
        try:
            url = checked_worker_url(text, config)
        except ValueError as error:
            yield f"{key}: {error}"
            with contextlib.suppress(ValueError):
                seen.setdefault(str(parse_worker_url(text)), index)
            continue
        if isinstance(section, DnsConfig) and (problem := _name_problem(url, text)):
            yield f"{key}: {problem}"
        if str(url) in seen:
            yield f"{key}: the same worker as {path}.urls[{seen[str(url)]}]"
        seen.setdefault(str(url), index)
    roles: dict[str, str] = {}
    by_role = {"prefill_urls": section.prefill_urls, "decode_urls": section.decode_urls}
    for name, urls in by_role.items():
        for index, text in enumerate(urls):
            key = f"{path}.{name}[{index}]"
            found = next(normalised([text]), "")
            if found not in seen:
                yield f"{key}: not one of {path}.urls"
            if found in roles:
                yield f"{key}: the same worker as {roles[found]}"
            roles.setdefault(found, key)
    if isinstance(section, DnsConfig):
        yield from _lookup_problems(section, path)


def _name_problem(url: WorkerUrl, text: str) -> str | None:
    """Why the addresses of this name cannot be workers."""
    if url.tls:
        return (
            "https is not possible, since certificates hold names and a worker here is an "
            "address; list https workers under static_urls"
        )
    if url.is_ip:
        return "this is an address, which has no addresses; list it under static_urls"
    if urlsplit(text.strip()).port is None:
        return f"the port is missing, write http://{url.host}:PORT"
    return None


def _lookup_problems(section: DnsConfig, path: str) -> Iterator[str]:
    if section.ttl_min_secs > section.ttl_max_secs:
        yield f"{path}.ttl_min_secs: must not be more than ttl_max_secs ({section.ttl_max_secs:g})"
    for index, text in enumerate(section.nameservers):
        try:
            parse_nameserver(text)
        except ValueError as error:
            yield f"{path}.nameservers[{index}]: {error}"


def _own_addresses(config: Config) -> Iterator[tuple[tuple[str, int], str]]:
    """Addresses of this service and of Envoy as `_place` writes them, with their keys."""
    server, envoy = config.server, config.envoy
    for key, host, port in (
        ("envoy.port", envoy.host, envoy.port),
        ("envoy.admin_port", "127.0.0.1", envoy.admin_port),
        ("server.port", server.host, server.port),
        ("server.admin_port", server.admin_host, server.admin_port),
    ):
        yield (_place(host), port), key


def _place(host: str) -> str:
    """The same text for all spellings of a host; "loopback" stands for this machine.

    A connection to the unspecified address goes to this machine, and a server that listens there
    can be reached over loopback.
    """
    address = _address(host)
    if address is None:
        name = host.removesuffix(".").lower()
        return _LOOPBACK if is_loopback(name) or name.endswith(".localhost") else name
    return _LOOPBACK if address.is_loopback or address.is_unspecified else str(address)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address of a literal, as IPv4 where IPv6 holds that; None for a name."""
    try:
        address = ipaddress.ip_address(host.removesuffix("."))
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address

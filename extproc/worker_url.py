"""Parses worker URLs for configuration, discovery and the rendered Envoy configuration.

The normalised string identifies a worker, so a trailing slash or an explicit default port must
not make a second worker out of one.
"""

import ipaddress
import re
import socket
from typing import Final, NamedTuple
from urllib.parse import urlsplit

__all__ = ["WorkerUrl", "format_endpoint", "parse_kv_endpoint", "parse_worker_url"]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
# `host:port` as a whole, without text before or behind the brackets of an IPv6 address.
_NETLOC: Final = re.compile(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<name>[A-Za-z0-9._-]+))(?::\d*)?")
# libzmq writes IPv6 with and without brackets, and several forms of "all addresses".
_KV_ENDPOINT: Final = re.compile(
    r"tcp://(?P<host>\*|\[[0-9A-Fa-f:.]+\]|::|[A-Za-z0-9._-]+):(?P<port>\d{1,5})"
)
_WILDCARDS: Final = ("*", "0.0.0.0", "::")  # noqa: S104 (to be replaced, never listened on)
_NUMERIC: Final = re.compile(r"\d+|0[xX][0-9A-Fa-f]*")
_NAME_MAX_CHARS: Final = 253
_LABEL_MAX_CHARS: Final = 63


class WorkerUrl(NamedTuple):
    """A worker's address: host without brackets, IPv6 in one spelling, port always a number."""

    scheme: str
    host: str
    port: int

    @property
    def tls(self) -> bool:
        return self.scheme == "https"

    @property
    def is_ip(self) -> bool:
        """True for an IP literal, which needs no resolution."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        """The normalised URL, with IPv6 in brackets and an explicit port."""
        return f"{self.scheme}://{format_endpoint(self.host, self.port)}"


def format_endpoint(host: str, port: int) -> str:
    """`ip:port` as Envoy writes it: IPv6 as inet_ntop does and in brackets."""
    spelled = _one_spelling(host)
    return f"[{spelled}]:{port}" if ":" in spelled else f"{spelled}:{port}"


def _one_spelling(host: str) -> str:
    """An address as inet_ntop writes it; a name stays as it is."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return socket.inet_ntop(socket.AF_INET6, address.packed)


def parse_worker_url(text: str) -> WorkerUrl:
    """Parse `http(s)://host[:port][/]`; raises ValueError with a message for the operator."""
    stripped = text.strip()
    if not stripped:
        raise ValueError("an empty URL")
    if any(char.isspace() or ord(char) < 0x21 for char in stripped):
        raise ValueError("blanks and control characters are not allowed")
    try:
        parts = urlsplit(stripped)
        port = parts.port
    except ValueError:
        raise ValueError("not a valid URL with a port from 1 to 65535") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError("the scheme must be http or https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("credentials do not belong here; use workers.api_key")
    if not parts.hostname:
        raise ValueError("the host is missing")
    if not _is_host(parts.netloc):
        raise ValueError("the host must be a name, an IPv4 address or an IPv6 one in brackets")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(
            "a path, query or fragment is not supported: the client's path goes to the worker as is"
        )
    if port == 0:
        raise ValueError("port 0 cannot be connected to")
    host = _one_spelling(parts.hostname)
    return WorkerUrl(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme])


def _is_host(netloc: str) -> bool:
    found = _NETLOC.fullmatch(netloc)
    if found is None:
        return False
    if (ipv6 := found["ipv6"]) is not None:
        try:
            return ipaddress.IPv6Address(ipv6).scope_id is None
        except ValueError:
            return False
    name = found["name"].removesuffix(".")
    if _NUMERIC.fullmatch(name.rpartition(".")[2]):
        # Looks like IPv4; octal, hexadecimal and short forms mean different things to different
        # programs.
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            return False
    return len(name) <= _NAME_MAX_CHARS and all(
        0 < len(label) <= _LABEL_MAX_CHARS for label in name.split(".")
    )


def parse_kv_endpoint(text: str) -> tuple[str | None, int]:
    """Host and port of `tcp://…`; the host is without brackets, or None for the worker's own.

    Raises ValueError with a message for the operator.
    """
    found = _KV_ENDPOINT.fullmatch(text)
    if found is None or not 0 < int(found["port"]) <= 65_535:
        raise ValueError("expected tcp://host:port with a port from 1 to 65535")
    host = found["host"].strip("[]")
    return None if host in _WILDCARDS else host, int(found["port"])

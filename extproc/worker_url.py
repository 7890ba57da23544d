"""Worker URLs: one parser for configuration, discovery and the rendered proxy configuration.

The exact normalised string identifies a worker, so a trailing slash or a spelled-out default
port must not make a second worker out of one.
"""

import ipaddress
from typing import Final, NamedTuple
from urllib.parse import urlsplit

__all__ = ["WorkerUrl", "format_endpoint", "parse_worker_url"]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class WorkerUrl(NamedTuple):
    """A worker's address as configured: host without brackets, port always a number."""

    scheme: str
    host: str
    port: int

    @property
    def tls(self) -> bool:
        return self.scheme == "https"

    @property
    def is_ip(self) -> bool:
        """True for an IP literal: nothing to resolve."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        """The normalised URL, IPv6 in brackets, port always spelled out."""
        return f"{self.scheme}://{format_endpoint(self.host, self.port)}"


def format_endpoint(host: str, port: int) -> str:
    """`ip:port` as Envoy writes it: IPv6 in its shortest form and in brackets."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"{host}:{port}"
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def parse_worker_url(text: str) -> WorkerUrl:
    """Parse `http(s)://host[:port][/]`; raises ValueError with a sentence for the operator."""
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
    if not parts.hostname:
        raise ValueError("the host is missing")
    if parts.username is not None or parts.password is not None:
        raise ValueError("credentials do not belong here; use workers.api_key")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(
            "a path, query or fragment is not supported: the client's path goes to the worker as is"
        )
    if port == 0:
        raise ValueError("port 0 can not be dialled")
    return WorkerUrl(parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme])

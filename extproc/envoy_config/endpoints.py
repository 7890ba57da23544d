"""The file from which Envoy reads the workers' endpoints, as its EDS does from a server.

It holds addresses, since Envoy resolves no names in it: this service does, and writes the file
again when an address changes.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from extproc.envoy_config.clusters import lb_endpoint
from extproc.envoy_config.wire_form import typed
from extproc.worker_url import format_endpoint, parse_worker_url

__all__ = ["Endpoint", "endpoint_entry", "endpoints_text", "read_endpoints"]

_VERSION_CHARS = 16


class Endpoint(Struct, frozen=True, order=True):
    """A worker at `address` (`ip:port`), by its URL, from which its TLS settings follow."""

    address: str
    url: str


def endpoints_text(cluster: str, endpoints: Iterable[Endpoint]) -> bytes:
    """The file, as Envoy reads it; the same endpoints give the same text."""
    entries: dict[str, dict[str, Any]] = {}
    for one in sorted(endpoints):
        # Two names of one host are one endpoint.
        entries.setdefault(one.address, endpoint_entry(one))
    assignment = typed(
        "config.endpoint.v3.ClusterLoadAssignment",
        cluster_name=cluster,
        endpoints=[{"lb_endpoints": list(entries.values())}],
    )
    version = hashlib.sha256(msgspec.json.encode(assignment)).hexdigest()[:_VERSION_CHARS]
    text = msgspec.json.encode({"version_info": version, "resources": [assignment]})
    return msgspec.json.format(text, indent=1) + b"\n"


def read_endpoints(text: bytes) -> frozenset[Endpoint]:
    """The endpoints in a file of `endpoints_text`; empty if it is another file."""
    try:
        found = msgspec.json.decode(text)
        groups = found["resources"][0]["endpoints"]
        return frozenset(_endpoint(entry) for group in groups for entry in group["lb_endpoints"])
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, ValueError):
        return frozenset()


def endpoint_entry(one: Endpoint) -> dict[str, Any]:
    """The endpoint in the JSON form of `envoy.config.endpoint.v3.LbEndpoint`."""
    at = parse_worker_url(f"http://{one.address}")
    return lb_endpoint(parse_worker_url(one.url), at.host, at.port)


def _endpoint(entry: dict[str, Any]) -> Endpoint:
    found = entry["endpoint"]["address"]["socket_address"]
    scheme = "https" if "metadata" in entry else "http"
    host, port = found["address"], found["port_value"]
    name = format_endpoint(entry["endpoint"].get("hostname", host), port)
    url = str(parse_worker_url(f"{scheme}://{name}"))
    return Endpoint(format_endpoint(host, port), url)

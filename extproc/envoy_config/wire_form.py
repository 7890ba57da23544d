"""Builds the small pieces that every part of an Envoy configuration uses."""

import ipaddress
from typing import Any, Final

__all__ = ["UNLIMITED", "duration", "host_is_ip", "socket_address", "typed"]

# Envoy's default of 1024 suits short requests. A generation holds a connection to its worker and a
# stream to this service for minutes, so the router must limit load, not a breaker that answers 503
# to the 1025th request. Fits 32 bits.
UNLIMITED: Final = 1_000_000_000


def typed(type_name: str, **fields: Any) -> dict[str, Any]:
    """An Any in its JSON form; `type_name` is what follows `type.googleapis.com/envoy.`."""
    return {"@type": f"type.googleapis.com/envoy.{type_name}", **fields}


def duration(seconds: float) -> str:
    """Seconds in protobuf's JSON form, at most nanoseconds, without trailing zeros."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def host_is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def socket_address(host: str, port: int) -> dict[str, Any]:
    """A TCP address; Envoy expects IPv6 without brackets here."""
    return {"socket_address": {"address": host, "port_value": port}}

"""The configuration keys of what this service listens on: gRPC for Envoy, HTTP for operators."""

import ipaddress
from typing import Annotated

from msgspec import Meta

from extproc.config.section import KIBIBYTE, MEBIBYTE, SECONDS, Port, Seconds, Section, Text

__all__ = ["ServerConfig", "ServerTlsConfig", "is_loopback"]


class ServerTlsConfig(Section, frozen=True, kw_only=True):
    cert_file: Annotated[Text, Meta(description="PEM certificate chain of the gRPC server.")]
    key_file: Annotated[Text, Meta(description="PEM private key of the gRPC server.")]
    client_ca_file: Annotated[
        str | None,
        Meta(description="PEM CA bundle. If set, clients must present a certificate (mTLS)."),
    ] = None


class ServerConfig(Section, frozen=True, kw_only=True):
    host: Annotated[
        Text, Meta(description="Address of the gRPC server; `0.0.0.0` or `::` for all addresses.")
    ] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Port of the gRPC server.")] = 9002
    unix_socket: Annotated[
        str | None,
        Meta(
            description="Path of a Unix socket on which the gRPC server listens, too. The "
            "rendered Envoy configuration then uses it instead of TCP."
        ),
    ] = None
    admin_host: Annotated[
        Text, Meta(description="Address of the admin HTTP server (`/metrics`, `/workers`, …).")
    ] = "127.0.0.1"
    admin_port: Annotated[Port, Meta(description="Port of the admin HTTP server.")] = 9090
    admin_token_file: Annotated[
        str | None,
        Meta(
            description="File that holds a token. If set, requests to the admin server need "
            "`authorization: Bearer` with this token; `/healthz` and `/readyz` stay open for "
            "probes."
        ),
    ] = None
    admin_token_env: Annotated[
        str | None,
        Meta(
            description="Name of the environment variable that holds the token, instead of "
            "`server.admin_token_file`."
        ),
    ] = None
    max_body_bytes: Annotated[
        int,
        Meta(
            ge=KIBIBYTE,
            le=1024 * MEBIBYTE,
            description="Largest request body in bytes. A larger one gets a 413.",
        ),
    ] = 32 * MEBIBYTE
    max_requests: Annotated[
        int,
        Meta(
            ge=1,
            le=10_000_000,
            description="Most requests in flight, until the end of their responses. Each takes "
            "about 21 KiB of this service's memory. A further one gets a 503 with `retry-after`.",
        ),
    ] = 10_000
    max_buffered_bytes: Annotated[
        int,
        Meta(
            ge=2 * KIBIBYTE,
            le=1024 * 1024 * MEBIBYTE,
            description="Most bytes of request bodies that wait for a decision, at least twice "
            "`max_body_bytes`. A quarter is kept for bodies of up to 1 MiB. A body counts from "
            "its announcement. A further one gets a 503 with `retry-after`. This service takes "
            "up to three times as much memory for them.",
        ),
    ] = 512 * MEBIBYTE
    step_deadline_secs: Annotated[
        Seconds,
        Meta(
            description="Time limit for one routing decision. Must be shorter than "
            "`envoy.message_timeout_secs`, so that the client gets this service's error reply."
        ),
    ] = 5 * SECONDS
    drain_secs: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="After SIGTERM, requests are still answered for this long at most, while "
            "the health check reports NOT_SERVING.",
        ),
    ] = 10 * SECONDS
    watch_secs: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="Interval at which this file, and the certificates and keys that it "
            "names, are looked at for changes. A change is applied when two looks in a row see "
            "it. 0 leaves it to SIGHUP.",
        ),
    ] = 1 * SECONDS
    tls: Annotated[
        ServerTlsConfig | None, Meta(description="TLS on the TCP port; without it, plain text.")
    ] = None

    @property
    def admin_is_exposed(self) -> bool:
        """True if other machines may reach the admin server."""
        return not is_loopback(self.admin_host)


def is_loopback(host: str) -> bool:
    """True for an address or name that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

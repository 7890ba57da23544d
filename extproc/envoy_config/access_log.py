"""Renders the access log: one JSON line per request, without prompts and credentials.

A line names the outcome, the worker and the decision. Prompts are in bodies, which are not
logged. `authorization` is not among the fields, and the query string is cut off, since clients
put API keys there, too.
"""

from typing import Any, Final

from extproc.envoy_config.wire_form import typed
from extproc.headers import (
    DECISION_NAMESPACE,
    ERROR_CODE_HEADER,
    EXTPROC_FILTER,
    REQUEST_ID_HEADER,
)

__all__ = ["access_log"]

_STREAMS: Final = {"/dev/stdout": "StdoutAccessLog", "/dev/stderr": "StderrAccessLog"}


def _latency(field: str) -> str:
    return f"%FILTER_STATE({EXTPROC_FILTER}:FIELD:{field})%"


def _decision(key: str) -> str:
    return f"%DYNAMIC_METADATA({DECISION_NAMESPACE}:{key})%"


_FIELDS: Final = {
    "time": "%START_TIME%",
    "listener": "ingress",
    "request_id": f"%REQ({REQUEST_ID_HEADER.upper()})%",
    "method": "%REQ(:METHOD)%",
    "path": "%PATH(NQ)%",
    "protocol": "%PROTOCOL%",
    "status": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "error_code": f"%RESP({ERROR_CODE_HEADER.upper()})%",
    "duration_ms": "%DURATION%",
    "first_byte_ms": "%RESPONSE_DURATION%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "upstream_cluster": "%UPSTREAM_CLUSTER%",
    "upstream_host": "%UPSTREAM_HOST%",
    "upstream_hosts_attempted": "%UPSTREAM_HOSTS_ATTEMPTED%",
    "upstream_attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "upstream_failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    # The decision, from dynamic metadata of this service.
    "model": _decision("model"),
    "policy": _decision("policy"),
    "reason": _decision("reason"),
    "destination": _decision("destination"),
    # The router's latency as Envoy sees it, in microseconds.
    "extproc_request_headers_us": _latency("request_header_latency_us"),
    "extproc_request_body_us": _latency("request_body_max_latency_us"),
    "extproc_response_headers_us": _latency("response_header_latency_us"),
}


def access_log(path: str | None, *, listener: str = "ingress") -> list[dict[str, Any]]:
    """The loggers for `envoy.access_log`.

    A request that passes two listeners has a line of each, with the same request id.

    Standard output and error have loggers of their own: opening /dev/stdout as a file fails where
    it is a socket or belongs to another user.
    """
    if path is None:
        return []
    fields = {**_FIELDS, "listener": listener}
    log_format = {"json_format": fields, "omit_empty_values": False}
    if path in _STREAMS:
        stream = typed(
            f"extensions.access_loggers.stream.v3.{_STREAMS[path]}", log_format=log_format
        )
        return [{"name": "envoy.access_loggers.stream", "typed_config": stream}]
    file = typed(
        "extensions.access_loggers.file.v3.FileAccessLog", path=path, log_format=log_format
    )
    return [{"name": "envoy.access_loggers.file", "typed_config": file}]

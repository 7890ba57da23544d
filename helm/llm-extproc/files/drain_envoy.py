"""Lets the running responses of Envoy end: what a pod with `mode: gateway` does before it stops.

    python drain_envoy.py ADMIN_PORT WAIT_SECS DRAIN_SECS

Kubernetes stops the service first and Envoy after it, and Envoy cuts its streams when it stops. So
this runs before both. It waits until clients have noticed that the pod ends, lets Envoy close
connections after their next response, and returns when no request is left, or after DRAIN_SECS.
"""

import sys
import time
import urllib.request

_POLL_SECONDS = 0.5
_TIMEOUT_SECONDS = 5
_OPEN_REQUESTS = "http.ingress.downstream_rq_active"


def drain(port: int, wait_secs: float, drain_secs: float) -> None:
    """Return when Envoy has no request, or when the time is over."""
    time.sleep(wait_secs)
    deadline = time.monotonic() + drain_secs
    try:
        _ask(port, "/healthcheck/fail", "POST")
        while _open_requests(port) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        sys.stderr.write(f"Envoy does not answer at port {port}, so nothing can drain: {error}\n")


def _open_requests(port: int) -> int:
    text = _ask(port, f"/stats?filter=^{_OPEN_REQUESTS}$", "GET")
    return sum(int(line.rpartition(":")[2]) for line in text.splitlines() if line.strip())


def _ask(port: int, path: str, method: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310
        content: bytes = answer.read()
    return content.decode()


if __name__ == "__main__":
    drain(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))

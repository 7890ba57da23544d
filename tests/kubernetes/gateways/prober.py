"""Probes one pod, and writes into its status whether it is ready, as a kubelet does.

A program of its own, since it goes on between tests.
"""

import argparse
import http.client
import json
import ssl
import sys
import time
import urllib.request
from pathlib import Path
from typing import Final

_PERIOD_SECONDS: Final = 0.2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--pod", required=True)
    parser.add_argument("--ip", required=True)
    parser.add_argument("--probe", required=True, help="URL that answers 200 if the pod is ready")
    given = parser.parse_args()
    config = json.loads(given.kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
    url = f"{cluster['server']}/api/v1/namespaces/{given.namespace}/pods/{given.pod}/status"
    headers = {
        "Authorization": f"Bearer {user['token']}",
        "Content-Type": "application/strategic-merge-patch+json",
    }
    written: bool | None = None
    while True:
        if (ready := _answers(given.probe)) != written:
            status = {
                "phase": "Running",
                "podIP": given.ip,
                "podIPs": [{"ip": given.ip}],
                "conditions": [{"type": "Ready", "status": str(ready)}],
            }
            data = json.dumps({"status": status}).encode()
            patch = urllib.request.Request(url, data, headers, method="PATCH")
            try:
                urllib.request.urlopen(patch, context=tls, timeout=5).close()
                written = ready
            except (OSError, http.client.HTTPException) as error:
                sys.stderr.write(f"{error}\n")
        time.sleep(_PERIOD_SECONDS)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


if __name__ == "__main__":
    main()

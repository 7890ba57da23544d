"""Writes what Envoy reads at its start: the first step of a pod with `mode: gateway`.

    python write_envoy_files.py CONFIG FOLDER

Envoy starts before the service and refuses to start without its list of endpoints. So an empty list
is written, and the service replaces it when it has found the workers.
"""

import subprocess
import sys
from pathlib import Path


def write(config: Path, folder: Path) -> int:
    """Write envoy.yaml and workers.json; returns the exit code of `extproc envoy-config`."""
    endpoints = folder / "workers.json"
    if not endpoints.exists():
        endpoints.write_text('{"resources": []}\n', encoding="utf-8")
    return subprocess.run(  # noqa: S603
        ["extproc", "envoy-config", "--config", config, "--output", folder / "envoy.yaml"],  # noqa: S607
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(write(Path(sys.argv[1]), Path(sys.argv[2])))

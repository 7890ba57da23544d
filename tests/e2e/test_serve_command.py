"""`extproc serve` in a process of its own: exit codes and output."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from extproc import __version__
from tests.unit.configs import discovery, raw_config, written

SERVE = [sys.executable, "-m", "extproc", "serve", "--config"]


@pytest.mark.parametrize("key", ["port", "admin_port"])
def test_serve_with_a_port_in_use_is_1_and_names_the_key(tmp_path: Path, key: str) -> None:
    with socket.socket() as taken, socket.socket() as free:
        for each in (taken, free):
            each.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"port": free.getsockname()[1], "admin_port": free.getsockname()[1]}
        ports[key] = taken.getsockname()[1]
        free.close()
        command = [*SERVE, written(tmp_path, raw_config(server=ports))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"server.{key}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_says_that_it_started_and_ends_well_by_sigterm(tmp_path: Path) -> None:
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        server = {"port": first.getsockname()[1], "admin_port": second.getsockname()[1]}
    # The worker's port is closed: the start does not depend on workers.
    raw = raw_config(
        server=server,
        observability={"log_format": "json"},
        discovery=discovery("http://127.0.0.1:1"),
    )
    command = [*SERVE, written(tmp_path, raw)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        started = json.loads(process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in rest
    assert started["event"] == "started"
    assert started["version"] == __version__
    assert "m" in started["models"]
    assert str(server["port"]) in started["grpc"]

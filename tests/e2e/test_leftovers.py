"""A test that leaves something open fails itself, with a message that names what is open."""

import subprocess
import sys
from pathlib import Path

from tests.leftovers import OpenThings

# What a test leaves open, by its name, and what the message must contain.
_LOUD = {
    "file": ("kept.append(open(__file__))", "test_many.py"),
    "socket": (
        "kept.append(socket.create_server(('127.0.0.1', 0)))",
        "AF_INET socket ('127.0.0.1', ",
    ),
    "lost_socket": (
        "ring = [socket.create_server(('127.0.0.1', 0))]; ring.append(ring)",
        "unclosed <socket.socket ",
    ),
    "lost_transport": (
        "ours, theirs = socket.socketpair(); theirs.close(); "
        "ring = [await asyncio.open_connection(sock=ours)]; ring.append(ring)",
        "unclosed transport ",
    ),
    "process": ("kept.append(subprocess.Popen(['sleep', '60']))", ": sleep 60"),
    "zombie": ("subprocess.Popen(['true']).returncode = 0", "not waited for"),
    "thread": (
        "threading.Thread(target=threading.Event().wait, daemon=True, name='t').start()",
        "thread 't'",
    ),
    "task": ("kept.append(asyncio.create_task(asyncio.sleep(60), name='t'))", "name='t'"),
}
_QUIET = [
    "with socket.socket(), open(__file__): subprocess.run(['true'], check=True)",
    "threading.Thread(target=print).start()",
    "kept.append(asyncio.create_task(asyncio.sleep(0.1)))",
    "gc.collect()",
]


def test_what_is_left_open_fails_the_test_that_opened_it(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    lines = ["import asyncio, gc, socket, subprocess, threading", "kept = []"]
    for name, (body, _) in _LOUD.items():
        lines.append(f"async def test_loud_{name}(): {body}")
        lines += [f"async def test_quiet_{name}():", *(f"    {line}" for line in _QUIET)]
    (tmp_path / "test_many.py").write_text("\n".join(lines))
    report = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"),
            *("-c", "pyproject.toml", "--rootdir", ".", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for name, (_, message) in _LOUD.items():
        _, found, rest = report.partition(f"ERROR at teardown of test_loud_{name} ")
        assert found, (name, report)
        assert message in rest.partition("ERROR at teardown")[0], (name, report)
    assert f"{2 * len(_LOUD)} passed, {len(_LOUD)} errors in" in report, report


def test_what_takes_a_moment_to_end_is_waited_for() -> None:
    before = OpenThings.now()
    with subprocess.Popen(["sleep", "0.3"]) as process:
        new = OpenThings.now().names - before.names
        assert [name for name in new if name.startswith(f"process {process.pid}: ")]
    assert before.left_since() == []

"""A stderr without a reader must not stop the service."""

import subprocess
import sys

PROGRAM = """
import sys
import structlog
from extproc.config.schema import ObservabilityConfig
from extproc.logs import configure_logging

configure_logging(ObservabilityConfig())
log = structlog.get_logger()
for _ in range(30_000):
    log.info("a_line_of_some_length", padding="x" * 100)
sys.stdout.write("done")
sys.stdout.flush()
"""


def test_lines_are_dropped_if_the_reader_of_stderr_is_slow() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    # Nothing reads stderr yet. 30 000 lines are far more than the pipe and the backlog can hold.
    assert process.stdout.read(4) == b"done"
    _, lines = process.communicate(timeout=60)
    assert b"log_lines_dropped" in lines
    assert process.returncode == 0

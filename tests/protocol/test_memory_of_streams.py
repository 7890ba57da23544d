"""Streams that Envoy has reset leave no memory behind, also outside Python's own."""

import subprocess
import sys

import pytest

# 80 to 105 were lost where the read was cancelled or a status was sent. Some noise remains, since
# memory is not given back at once.
LOST_BYTES_MAX = 60


def test_streams_that_are_reset_leave_no_memory_behind() -> None:
    argv = [sys.executable, "-m", "tests.protocol.reset_streams"]
    lost = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    if not lost:
        pytest.skip("this C library does not tell how much memory is allocated")
    assert float(lost) < LOST_BYTES_MAX

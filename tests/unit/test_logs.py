"""Level and format of the log. Each test runs a process, because logging is global."""

import functools
import json
import subprocess
import sys

import pytest

_PROGRAM = """
import logging, sys
import structlog
from extproc.config.schema import ObservabilityConfig
early = structlog.get_logger()
from extproc.logs import configure_logging
configure_logging(ObservabilityConfig(log_level=sys.argv[1], log_format=sys.argv[2]))
for level in ("debug", "info", "warning", "error"):
    getattr(early, level)(f"ours_{level}", worker="http://a:1", text="two words\\nand a line")
    getattr(logging.getLogger("some.library"), level)("library %s", level)
try:
    raise ValueError("boom")
except ValueError:
    early.exception("failed", model="m")
    logging.getLogger("some.library").exception("library failed")
"""
# What the program logs after the loop, at error.
_ENDING = ["failed", "library failed"]


@functools.cache
def lines(level: str, log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM, level, log_format],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["ours_debug", "ours_info", "ours_warning", "library warning"]),
        ("info", ["ours_info", "ours_warning", "library warning"]),
        ("warn", ["ours_warning", "library warning"]),
        ("warning", ["ours_warning", "library warning"]),
        ("error", []),
    ],
)
def test_the_level_takes_effect_and_libraries_stay_at_warning(
    level: str, expected: list[str]
) -> None:
    events = [json.loads(line)["event"] for line in lines(level, "json")]
    assert events == [*expected, "ours_error", "library error", *_ENDING]


def test_json_has_one_object_per_line_with_the_same_fields() -> None:
    records = [json.loads(line) for line in lines("info", "json")]
    assert all({"event", "level", "timestamp"} <= record.keys() for record in records)
    ours = records[0]
    assert (ours["level"], ours["worker"]) == ("info", "http://a:1")
    assert ours["text"] == "two words\nand a line"
    assert ours["timestamp"].endswith("Z")
    assert {record["level"] for record in records} == {"info", "warning", "error"}


def test_json_has_the_traceback_in_the_same_line() -> None:
    for record in [json.loads(line) for line in lines("info", "json")][-2:]:
        assert "ValueError: boom" in record["exception"]


def test_text_has_one_line_of_keys_and_values_per_event() -> None:
    ours, warning, library, *_ = lines("info", "text")[:3]
    assert ours.startswith("timestamp=")
    assert "level='info'" in ours
    assert "event='ours_info'" in ours
    assert "worker='http://a:1'" in ours
    assert "two words\\nand a line" in ours
    assert "ours_warning" in warning
    assert "level='warning'" in library
    assert "library warning" in library


def test_text_has_the_traceback_too() -> None:
    assert sum("ValueError: boom" in line for line in lines("error", "text")) == 2

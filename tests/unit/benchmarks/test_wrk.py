"""The script for wrk, and reading its output."""

import json

import pytest

from benchmarks.wrk import WrkError, chat_body, find_wrk, parse_output, script

OUTPUT = """\
Running 1s test @ http://127.0.0.1:1/v1/chat/completions
  1 threads and 1 connections
Requests/sec:    334.00
wrk-result {"requests": 334, "micros": 1000966, "p50": 2895, "p99": 5286, \
"errors": {"connect": 0, "read": 0, "write": 0, "status": 3, "timeout": 0}}
"""


@pytest.mark.parametrize("size", [120, 1200, 33_000])
def test_a_body_has_exactly_the_asked_size(size: int) -> None:
    body = chat_body("m", size)
    assert len(body.encode()) == size
    assert json.loads(body)["model"] == "m"


def test_a_body_too_small_for_its_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        chat_body("m", 10)


def test_a_result_is_found_among_what_wrk_prints() -> None:
    result = parse_output(OUTPUT)
    assert (result.requests, result.p50_us, result.p99_us) == (334, 2895, 5286)
    assert result.seconds == pytest.approx(1.000966)


def test_only_errors_that_happened_are_kept() -> None:
    assert parse_output(OUTPUT).errors == {"status": 3}


def test_output_without_a_result_is_shown() -> None:
    with pytest.raises(WrkError, match="unable to connect"):
        parse_output("unable to connect to 127.0.0.1:1 Connection refused")


def test_the_script_quotes_the_body_and_prints_what_is_parsed() -> None:
    body = chat_body("m", 200)
    text = script(body)
    assert f"wrk.body = [=[{body}]=]" in text
    # Lua's string.format sees single percent signs only.
    assert '{"requests": %d,' in text
    assert "%%" not in text


def test_a_missing_wrk_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(WrkError, match="apt-get install wrk"):
        find_wrk()

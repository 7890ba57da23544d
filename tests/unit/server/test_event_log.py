"""Lines that clients cause are bounded, and the others are counted."""

import structlog

from extproc.server.event_log import EventLog
from extproc.server.steps import LogEvent, log_event


def refusals(code: str, count: int) -> list[LogEvent]:
    return [log_event("info", "request_refused", code=code)] * count


async def test_each_kind_of_line_has_its_own_bound() -> None:
    log = EventLog()
    with structlog.testing.capture_logs() as lines:
        log.write(refusals("bad_request", 50))
        log.write(refusals("not_found", 3))
        log.flush()
    codes = [line["code"] for line in lines if line["event"] == "request_refused"]
    assert codes == ["bad_request"] * 20 + ["not_found"] * 3
    (left_out,) = [line for line in lines if line["event"] == "log_lines_left_out"]
    assert left_out == {
        "event": "log_lines_left_out",
        "log_level": "warning",
        "of": "request_refused",
        "code": "bad_request",
        "count": 30,
    }


async def test_each_period_begins_anew() -> None:
    log = EventLog()
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            log.write(refusals("bad_request", 20))
            log.flush()
        log.flush()
    assert len(lines) == 40

"""A request head that is looked up equals one that is parsed; reports of attempts are read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc._protos import llm_extproc_pb2 as pb
from extproc.server.messages import RequestHeadTable, read_attempt

_ID = "7b81811c-9cbc-4f3b-aa0a-52d02348ad88"
_OTHER_ID = "00000000-0000-4000-8000-000000000001"


def _message(headers: list[tuple[str, str]], *, observability: bool = False) -> bytes:
    return pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(
            headers=pb.HeaderMap(
                headers=[
                    pb.HeaderValue(key=key, raw_value=value.encode()) for key, value in headers
                ]
            )
        ),
        protocol_config=pb.ProtocolConfiguration(request_body_mode=pb.ProcessingMode.BUFFERED),
        observability_mode=observability,
    ).SerializeToString()


def _learn(table: RequestHeadTable, raw: bytes) -> tuple[object, str, int]:
    return table.read(raw, pb.ProcessingRequest.FromString(raw))


def _post(request_id: str, length: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":path", "/generate"),
        ("x-request-id", request_id),
        ("content-length", length),
    ]


def test_a_second_request_of_a_kind_is_looked_up_with_its_own_id_and_length() -> None:
    table = RequestHeadTable()
    first = _message(_post(_ID, "1200"))
    assert table.find(first) is None
    head, request_id, length = _learn(table, first)
    assert (request_id, length) == (_ID, 1200)
    assert table.find(_message(_post(_OTHER_ID, "3456"))) == (head, _OTHER_ID, 3456)


def test_the_order_of_the_two_headers_does_not_matter() -> None:
    table = RequestHeadTable()
    _learn(table, _message(_post(_ID, "10")[::-1]))
    found = table.find(_message(_post(_OTHER_ID, "99")[::-1]))
    assert found is not None
    assert found[1:] == (_OTHER_ID, 99)


def test_another_path_is_another_head() -> None:
    table = RequestHeadTable()
    _learn(table, _message(_post(_ID, "10")))
    assert table.find(_message([(":path", "/other"), *_post(_ID, "10")])) is None


def test_only_the_first_of_repeated_ids_counts() -> None:
    table = RequestHeadTable()
    raw = _message([("x-request-id", "short"), *_post(_ID, "10")])
    # The cut finds the long one, the parser the first: such a message is never kept.
    assert _learn(table, raw)[1] == "short"
    assert table.find(raw) is None


def test_messages_in_observability_mode_are_not_kept() -> None:
    table = RequestHeadTable()
    raw = _message(_post(_ID, "10"), observability=True)
    _learn(table, raw)
    assert table.find(raw) is None


def test_a_message_with_a_malformed_length_is_parsed_each_time() -> None:
    table = RequestHeadTable()
    raw = _message(_post(_ID, "1_0"))
    assert _learn(table, raw)[2] == -1
    assert table.find(raw) is None


_NAMES = st.sampled_from([":method", ":path", "x-request-id", "content-length", "x-extproc-debug"])
_VALUES = st.one_of(
    st.uuids().map(str),
    st.integers(0, 10**21).map(str),
    st.sampled_from(["GET", "POST", "true", "/v1/models", "é"]),
    st.text(max_size=40),
)


@given(st.lists(st.lists(st.tuples(_NAMES, _VALUES), max_size=7), min_size=1, max_size=4))
def test_a_look_up_gives_the_same_as_parsing(requests: list[list[tuple[str, str]]]) -> None:
    table, fresh = RequestHeadTable(), RequestHeadTable()
    for headers in requests * 2:
        raw = _message(headers)
        found = table.find(raw)
        if found is None:
            found = table.read(raw, pb.ProcessingRequest.FromString(raw))
        assert found == _learn(fresh, raw)


@given(st.binary(max_size=600))
def test_any_bytes_can_be_looked_up(raw: bytes) -> None:
    RequestHeadTable().find(raw + b"\x0a\x0cx-request-id\x1a\x24" + raw)
    RequestHeadTable().find(raw + b"\x0a\x0cx-request-id\x1a\x24\x0a\x0econtent-length\x1a")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3),
        ("0", 0),
        ("", None),
        ("-1", None),
        ("1.5", 1.5),
        ("9999999999999", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_a_retry_after_in_seconds_is_read_from_the_report_of_an_attempt(
    value: str, seconds: float | None
) -> None:
    headers = [(":status", "503"), ("retry-after", value)]
    message = pb.ProcessingRequest(
        response_headers=pb.HttpHeaders(
            headers=pb.HeaderMap(
                headers=[pb.HeaderValue(key=key, raw_value=text.encode()) for key, text in headers]
            )
        )
    )
    report = read_attempt(message)
    assert (report.status, report.retry_after_seconds) == (503, seconds)
    assert (report.number, report.address) == (0, "")

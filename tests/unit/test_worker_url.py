"""Worker URLs: one worker has one spelling, and URLs without a reachable address are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.worker_url import WorkerUrl, format_endpoint, parse_kv_endpoint, parse_worker_url


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("http://10.0.0.1:30000", "http://10.0.0.1:30000"),
        ("http://10.0.0.1:30000/", "http://10.0.0.1:30000"),
        ("http://10.0.0.1:30000//", "http://10.0.0.1:30000"),
        ("  http://worker:8000\n", "http://worker:8000"),
        ("http://worker", "http://worker:80"),
        ("http://worker:", "http://worker:80"),
        ("http://worker:80", "http://worker:80"),
        ("https://worker", "https://worker:443"),
        ("https://worker:443/", "https://worker:443"),
        ("HTTP://Worker.Example:080", "http://worker.example:80"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://[0:0:0:0:0:0:0:1]:8000/", "http://[::1]:8000"),
        ("http://[2001:DB8::0001]", "http://[2001:db8::1]:80"),
        ("http://worker:65535", "http://worker:65535"),
    ],
)
def test_one_worker_has_one_spelling(text: str, normal: str) -> None:
    url = parse_worker_url(text)
    assert str(url) == normal
    assert url == parse_worker_url(normal)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("worker:8000", "scheme"),
        ("10.0.0.1:8000", "scheme|not a valid"),
        ("//worker:8000", "scheme"),
        ("ftp://worker", "scheme"),
        ("tcp://worker:1", "scheme"),
        ("http://", "host"),
        ("http://:8000", "host"),
        ("http:///path", "host"),
        ("http://worker:0", "port 0"),
        ("http://worker:65536", "port"),
        ("http://worker:-1", "port"),
        ("http://worker:http", "port"),
        ("http://[::1", "not a valid"),
        ("http://user@worker", "credentials"),
        ("http://user:secret@worker", "credentials"),
        ("http://@worker", "credentials"),
        ("http://worker/v1", "path"),
        ("http://worker?x=1", "query"),
        ("http://worker#x", "fragment"),
        ("http://wor ker", "blanks"),
        ("http://wor\tker", "blanks"),
        ("http://wor\x00ker", "control"),
        ("http://wor\x7fker", "."),
        # A comma would split the list of destinations in two.
        ("http://a,b:80", "."),
        ("http://wor\\ker", "."),
        ("http://wor\u200bker", "."),
        ("http://wor\ud800ker", "."),
        # Python's parser drops what stands beside the brackets: another host than was written.
        ("http://other[::1]:80", "."),
        ("http://[::1]other:80", "."),
        # An IPvFuture literal, which would be taken for a host name.
        ("http://[v1.x]:80", "."),
    ],
)
def test_a_url_that_cannot_be_dialled_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_worker_url(text)


def test_credentials_are_not_repeated_in_the_error() -> None:
    with pytest.raises(ValueError, match="credentials") as caught:
        parse_worker_url("http://user:hunter2@worker")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "is_ip"),
    [
        ("10.0.0.1", True),
        ("[::1]", True),
        ("worker", False),
        ("1.2.3.4.", False),
    ],
)
def test_only_a_literal_is_an_ip(host: str, is_ip: bool) -> None:
    assert parse_worker_url(f"http://{host}:1").is_ip is is_ip


def test_the_scheme_says_whether_it_is_tls() -> None:
    assert parse_worker_url("https://worker").tls
    assert not parse_worker_url("http://worker:443").tls


@pytest.mark.parametrize(
    ("host", "endpoint"),
    [
        ("10.0.0.1", "10.0.0.1:80"),
        ("::1", "[::1]:80"),
        ("2001:0db8:0000::0001", "[2001:db8::1]:80"),
        ("worker", "worker:80"),
        # As inet_ntop writes it, and so Envoy.
        ("::ffff:10.0.0.1", "[::ffff:10.0.0.1]:80"),
    ],
)
def test_an_endpoint_is_written_as_envoy_writes_it(host: str, endpoint: str) -> None:
    assert format_endpoint(host, 80) == endpoint


_URLISH = st.text(alphabet="htps:/[]@.%?#\\ -_,aZ09é\x7f\u200b", max_size=30)


@given(st.one_of(st.text(max_size=40), _URLISH.map(lambda rest: f"http://{rest}"), _URLISH))
def test_any_text_is_refused_with_a_sentence_or_has_a_stable_spelling(text: str) -> None:
    refusal: ValueError | None = None
    try:
        url = parse_worker_url(text)
    except ValueError as error:
        refusal = error
    if refusal is not None:
        assert str(refusal)
        assert not isinstance(refusal, UnicodeError)
        return
    assert 1 <= url.port <= 65535
    again = parse_worker_url(str(url))
    assert str(again) == str(url)
    assert (again.scheme, again.port, again.is_ip) == (url.scheme, url.port, url.is_ip)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_address_survives_a_round_trip(address: object, port: int) -> None:
    url = WorkerUrl("http", str(address), port)
    assert str(parse_worker_url(str(url))) == str(url)
    assert parse_worker_url(str(url)).is_ip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp://*:5557", (None, 5557)),
        ("tcp://0.0.0.0:5557", (None, 5557)),
        ("tcp://:::5557", (None, 5557)),
        ("tcp://[::]:5557", (None, 5557)),
        ("tcp://10.0.0.1:1", ("10.0.0.1", 1)),
        ("tcp://[2001:db8::1]:65535", ("2001:db8::1", 65535)),
        ("tcp://engine-0.pods:5557", ("engine-0.pods", 5557)),
    ],
)
def test_where_an_engine_publishes(text: str, expected: tuple[str | None, int]) -> None:
    assert parse_kv_endpoint(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "tcp://", "tcp://*", "tcp://*:", "tcp://*:65536", "udp://*:1", "tcp://a b:1", "*:1"],
)
def test_what_is_no_such_place(text: str) -> None:
    with pytest.raises(ValueError, match="tcp://host:port"):
        parse_kv_endpoint(text)

"""Header names are written once, and the filter forwards exactly the headers the service reads."""

import re
from pathlib import Path
from typing import Any

import pytest

from extproc import headers
from extproc._protos import llm_extproc_pb2 as pb
from extproc.config.loading import parse_config
from extproc.envoy_config import render_bootstrap
from extproc.server.decode_session import DecodeSession
from extproc.server.messages import RequestHeadTable, ResponseTable, client_headers_of
from extproc.steering import DATA_PARALLEL_RANK_HEADER
from tests.protocol.exchange import header_map
from tests.unit.server.building import make_context

ROOT = Path(__file__).parents[2]
# The contract with prefill workers, as in sgl-router.
PREFILL = {"authorization", "traceparent", "tracestate", "x-correlation-id"}
PREFILL_PREFIXES = {"x-request-id-", "x-sgl-"}
# Headers of clients that this service has no use for.
UNUSED = ("accept", "cookie", "user-agent", "x-forwarded-for", "x-real-ip", "x-sg", "x-request-i")


def names() -> set[str]:
    """Every header that extproc.headers names, one for each prefix, and some it does not name.

    Headers that steer engines are not among them: Envoy removes them before the filter.
    """
    found = {f"{prefix}any" for prefix in headers.PREFILL_HEADER_PREFIXES} | set(UNUSED)
    for name in headers.__all__:
        value = getattr(headers, name)
        found |= {value} if isinstance(value, str) else set(value)
    return found


def patterns(listener: int) -> list[dict[str, str]]:
    """The forward rules of a listener's filter: 0 is the ingress, 1 the decode pass."""
    config = parse_config(
        {
            "models": [{"id": "m"}],
            "discovery": {"backend": "static_urls", "static_urls": {"urls": ["http://w:1"]}},
        }
    )
    found = render_bootstrap(config)["static_resources"]["listeners"][listener]
    (chain,) = found["filter_chains"]
    (manager,) = chain["filters"]
    processor = manager["typed_config"]["http_filters"][-2]["typed_config"]
    rules: list[dict[str, str]] = processor["forward_rules"]["allowed_headers"]["patterns"]
    return rules


def is_forwarded(name: str, rules: list[dict[str, str]]) -> bool:
    return any(
        name == rule["exact"] if "exact" in rule else name.startswith(rule["prefix"])
        for rule in rules
    )


def read_by_the_route_pass(fields: dict[str, str]) -> tuple[Any, ...]:
    """All that the service takes from the headers of a request, and of a response."""
    head = pb.HttpHeaders(headers=header_map(fields))
    request = pb.ProcessingRequest(request_headers=head)
    raw = request.SerializeToString()
    response = ResponseTable().learn(b"", pb.ProcessingRequest(response_headers=head))
    return RequestHeadTable().read(raw, request), client_headers_of(raw, "r"), response


@pytest.mark.parametrize("name", sorted(names() - {headers.CONTENT_LENGTH_HEADER}))
def test_the_route_filter_forwards_exactly_what_the_service_reads(name: str) -> None:
    nothing = read_by_the_route_pass({})
    values = ("true", "200", "text/event-stream")
    is_read = any(read_by_the_route_pass({name: value}) != nothing for value in values)
    assert is_read == is_forwarded(name, patterns(0))


def read_by_the_decode_pass(name: str, value: str) -> tuple[Any, ...]:
    """All that the service takes from the headers of a request of the second pass."""
    session = DecodeSession(make_context())
    fields = {headers.DECODE_ORDER_HEADER: "1;h;p;a:1"} | {name: value}
    head = pb.HttpHeaders(headers=header_map(fields))
    session.receive(pb.ProcessingRequest(request_headers=head).SerializeToString())
    response = ResponseTable().learn(b"", pb.ProcessingRequest(response_headers=head))
    return session.question, session.request_id, session.debug, response


@pytest.mark.parametrize("name", sorted(names()))
def test_the_decode_filter_forwards_exactly_what_the_service_reads(name: str) -> None:
    nothing = read_by_the_decode_pass("unused", "")
    values = ("true", "200", "text/event-stream", "2;h;p;a:1")
    is_read = any(read_by_the_decode_pass(name, value) != nothing for value in values)
    assert is_read == is_forwarded(name, patterns(1))


def test_the_prefill_headers_are_those_of_sgl_router() -> None:
    rules = patterns(0)
    assert {rule["prefix"] for rule in rules if "prefix" in rule} == PREFILL_PREFIXES
    for name in PREFILL:
        assert {"exact": name} in rules
        assert (name, "v") in client_headers_of(
            pb.ProcessingRequest(
                request_headers=pb.HttpHeaders(headers=header_map({name: "v"}))
            ).SerializeToString(),
            "r",
        ).headers


def test_header_names_are_written_in_one_module() -> None:
    written = re.compile(
        r"""["'](x-(?:extproc|envoy|gateway|router|data|override)-[a-z-]*[a-z])["']"""
    )
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "extproc").rglob("*.py")
        # The simulator stands in for engines and shares no code with the service.
        if not {"_protos", "simulator"} & set(path.parts)
        for name in written.findall(path.read_text(encoding="utf-8"))
    }
    steering = {("extproc/steering.py", DATA_PARALLEL_RANK_HEADER)}
    assert {module for module, _ in found - steering} == {"extproc/headers.py"}

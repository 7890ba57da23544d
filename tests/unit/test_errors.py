"""Errors as a client sees them: the envelope and the codes."""

import importlib
import inspect
import json
import pkgutil
import re

import pytest

import extproc
from extproc import errors
from extproc.errors import (
    ConfigError,
    RouterError,
    ServiceError,
    anthropic_envelope,
    envelope,
    is_anthropic,
)
from tests.unit.error_factories import error_factories


@pytest.mark.parametrize(
    ("error", "code", "status", "message"),
    [
        (errors.bad_request("x is y"), "bad_request", 400, "bad request: x is y"),
        (errors.body_required(), "bad_request", 400, "bad request: "),
        (
            errors.not_disaggregated(),
            "bad_request",
            400,
            "bad request: this path is not available for a model with separate prefill and decode "
            "workers",
        ),
        (errors.model_not_found("m"), "model_not_found", 404, "model not found: m"),
        (errors.not_found(), "not_found", 404, ""),
        (
            errors.no_tokenizer("m"),
            "tokenizer_not_configured",
            404,
            "no tokenizer is configured for the model m",
        ),
        (errors.method_not_allowed("POST"), "method_not_allowed", 405, ""),
        (errors.request_timeout(), "request_timeout", 408, ""),
        (errors.payload_too_large(1024), "payload_too_large", 413, "1024"),
        (errors.body_over_gateway_buffer(), "payload_too_large", 413, "buffer"),
        (errors.prefill_refused(422, b"{}"), "prefill_refused", 422, ""),
        (
            errors.unsupported_content_encoding('br"\n' + "x" * 100),
            "unsupported_content_encoding",
            415,
            f"the content encoding br{'x' * 38} is not decoded here",
        ),
        (errors.internal_error(), "internal_error", 500, "internal error"),
        (errors.prefill_failed(), "prefill_failed", 502, ""),
        (
            errors.no_healthy_workers(),
            "no_healthy_workers",
            503,
            "no healthy workers available for the requested model",
        ),
        (
            errors.no_prefill_workers(),
            "no_prefill_workers_available",
            503,
            "no prefill workers available for the requested model",
        ),
        (
            errors.no_decode_workers(),
            "no_decode_workers_available",
            503,
            "no decode workers available for the requested model",
        ),
        (errors.routing_timeout(), "routing_timeout", 503, ""),
        (errors.service_overloaded(), "service_overloaded", 503, ""),
        (errors.unsupported_body_mode(), "body_mode_unsupported", 503, ""),
        (
            errors.stale_request_expired(),
            "stale_request_expired",
            504,
            "request expired before completion",
        ),
    ],
    ids=lambda value: value.code if isinstance(value, RouterError) else "",
)
def test_each_error_has_its_code_status_and_message(
    error: RouterError, code: str, status: int, message: str
) -> None:
    assert (error.code, error.status) == (code, status)
    assert message in error.message
    assert error.message
    assert ("retry-after" in dict(error.headers)) is (status == 503)
    assert isinstance(error, Exception)


def test_every_error_has_a_message_and_a_retry_after_if_it_is_a_503() -> None:
    made = [make() for make in error_factories()]
    assert len({error.message for error in made}) == len(made)
    for error in made:
        assert error.message
        assert ("retry-after" in dict(error.headers)) is (error.status == 503)


def test_every_exception_of_the_service_is_in_the_drawn_tree() -> None:
    """Those of the simulator are not: it stands for engines."""
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    found = set()
    for info in pkgutil.walk_packages(extproc.__path__, "extproc."):
        if info.name.startswith(("extproc.simulator", "extproc.__main__", "extproc._protos")):
            continue
        module = importlib.import_module(info.name)
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Exception) and kind.__module__ == info.name:
                assert issubclass(kind, RouterError | ServiceError), kind
                found |= {name} if not name.startswith("_") else set()
    assert found == drawn


def test_retry_after_of_a_503_is_in_whole_seconds() -> None:
    assert int(dict(errors.no_healthy_workers().headers)["retry-after"]) >= 1


def test_a_405_lists_the_allowed_methods() -> None:
    assert dict(errors.method_not_allowed("POST, OPTIONS").headers) == {"allow": "POST, OPTIONS"}


def test_retry_after_is_added_to_other_headers() -> None:
    headers = RouterError("c", 503, "m", (("x-a", "b"),)).headers
    assert dict(headers).keys() == {"retry-after", "x-a"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
        (499, "invalid_request_error"),
        (500, "server_error"),
        (503, "server_error"),
        (504, "server_error"),
    ],
)
def test_the_envelope_is_that_of_the_openai_api(status: int, kind: str) -> None:
    body = json.loads(envelope("some_code", status, 'a "message" – with é', "req-1"))
    assert body.keys() == {"error"}
    assert body["error"] == {
        "type": kind,
        "code": "some_code",
        "message": 'a "message" – with é',
        "request_id": "req-1",
    }


def test_a_long_model_name_is_shortened() -> None:
    error = errors.model_not_found("x" * 1_000_000)
    assert len(error.message) < 300
    assert error.message.startswith("model not found: xxx")
    assert error.message.endswith("…")


@pytest.mark.parametrize("length", [1, 199, 200])
def test_a_usual_model_name_is_shown_whole(length: int) -> None:
    assert errors.model_not_found("x" * length).message == "model not found: " + "x" * length


def test_a_router_error_prints_its_code_and_not_its_message() -> None:
    assert str(errors.model_not_found("secret")) == "model_not_found"


def test_a_config_error_holds_and_prints_every_problem() -> None:
    error = ConfigError(["a: x", "b: y"])
    assert error.problems == ["a: x", "b: y"]
    assert str(error) == "a: x\nb: y"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_clients_of_the_anthropic_api_get_its_envelope(status: int, kind: str) -> None:
    body = json.loads(anthropic_envelope("some_code", status, 'a "message"', "req-1"))
    error = {"type": kind, "code": "some_code", "message": 'a "message"'}
    assert body == {"type": "error", "error": error, "request_id": "req-1"}


def test_only_the_messages_api_is_anthropics() -> None:
    assert all(
        map(is_anthropic, ("/v1/messages", "/v1/messages?beta=true", "/v1/messages/batches"))
    )
    assert not any(map(is_anthropic, ("", "/v1/chat/completions", "/v1/models?x=/v1/messages")))

"""What a worker's answer means, how often it is asked, and that no answer causes an error."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.worker_url import parse_worker_url
from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError
from extproc.workers.introspection import Introspection, apply_introspection, introspect
from extproc.workers.worker import Role
from tests.builders import make_spec
from tests.fakes import FakeClock, FakeEngineClient

URL = "http://10.0.0.1:8000"


def answer(body: Any, status: int = 200) -> EngineAnswer:
    return EngineAnswer(status, body if isinstance(body, bytes) else json.dumps(body).encode())


async def ask(client: FakeEngineClient, clock: FakeClock | None = None) -> Introspection:
    """Introspect; the fake clock skips the waits between attempts."""
    clock = clock or FakeClock()
    task = asyncio.create_task(introspect(client, parse_worker_url(URL), clock, 3, ranks_max=64))
    await clock.advance(60.0)
    assert task.done()
    return await task


async def ask_for(body: Any, status: int = 200) -> Introspection:
    client = FakeEngineClient()
    client.script(URL, "/server_info", answer(body, status))
    return await ask(client)


@pytest.mark.parametrize("believed", ["plain", "prefill", "decode"])
@pytest.mark.parametrize(
    ("fields", "role", "port", "warned"),
    [
        ({}, None, 1234, False),
        ({"disaggregation_bootstrap_port": 8998}, None, 1234, False),
        ({"disaggregation_mode": "null"}, "plain", None, False),
        ({"disaggregation_mode": "null", "disaggregation_bootstrap_port": 1}, "plain", None, False),
        (
            {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 8998},
            "prefill",
            8998,
            False,
        ),
        ({"disaggregation_mode": "prefill"}, "prefill", 1234, True),
        (
            {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": None},
            "prefill",
            1234,
            True,
        ),
        ({"disaggregation_mode": "decode"}, "decode", None, False),
        (
            {"disaggregation_mode": "decode", "disaggregation_bootstrap_port": 8998},
            "decode",
            None,
            False,
        ),
        ({"disaggregation_mode": "both"}, None, 1234, True),
        ({"disaggregation_mode": ""}, None, 1234, True),
        ({"disaggregation_mode": 7}, None, 1234, True),
        ({"disaggregation_mode": ["prefill"]}, None, 1234, True),
    ],
)
async def test_the_role_is_read_from_the_answer(
    believed: Role, fields: dict[str, Any], role: Role | None, port: int | None, warned: bool
) -> None:
    found = await ask_for({"served_model_name": "m"} | fields)
    assert found.role == role
    assert bool(found.warning) is warned
    spec = apply_introspection(make_spec(URL, role=believed, bootstrap_port=1234), found)
    assert spec.role == (role or believed)
    assert spec.bootstrap_port == port
    assert spec.model_ids == ("m",)


@pytest.mark.parametrize("port", [0, -1, 65536, 10**30, "8998", 8998.0, True, [8998], {}])
async def test_an_invalid_bootstrap_port_is_warned_about(port: object) -> None:
    found = await ask_for(
        {
            "served_model_name": "m",
            "disaggregation_mode": "prefill",
            "disaggregation_bootstrap_port": port,
        }
    )
    # The role is certain; to treat it as a plain worker would be worse.
    assert (found.role, found.bootstrap_port) == ("prefill", None)
    assert found.warning
    assert found.model_ids == ("m",)


@pytest.mark.parametrize("name", ["", None, 5, True, ["m"], {"a": 1}, "x" * 100_000])
async def test_an_invalid_model_name_is_ignored(name: object) -> None:
    found = await ask_for({"served_model_name": name, "disaggregation_mode": "decode"})
    assert found.model_ids == ()
    assert found.role == "decode"
    assert not found.problem


async def test_unknown_fields_are_ignored() -> None:
    found = await ask_for(
        {
            "model_path": "/models/other",
            "models": ["other"],
            "id": "other",
            "internal_states": {"x": ["y"] * 1000},
            "served_model_name": "m",
        }
    )
    assert found == Introspection(model_ids=("m",), engine="sglang")


async def test_fields_missing_in_the_answer_stay_as_discovery_had_them() -> None:
    spec = make_spec(URL, role="decode", model_ids=("from-discovery",))
    assert apply_introspection(spec, await ask_for({})) == spec


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"5",
        b'{"served_model_name": "m"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"served_model_name": ' + b"[" * 100_000,
        b'{"served_model_name": "\xff"}',
        b'{"served_model_name": "\\ud800"}',
    ],
    ids=lambda body: repr(body[:24]),
)
async def test_an_answer_that_is_not_json_is_a_problem_without_a_second_attempt(
    body: bytes,
) -> None:
    client = FakeEngineClient()
    client.script(URL, "/server_info", answer(body))
    found = await ask(client)
    assert found.problem
    assert found.model_ids == ()
    assert len(client.calls) == 1


@pytest.mark.parametrize("number", [b"1e999", b"9" * 5000, b"-1e999"])
async def test_a_huge_number_spoils_only_its_own_field(number: bytes) -> None:
    found = await ask_for(
        b'{"served_model_name": "m", "disaggregation_bootstrap_port": ' + number + b"}"
    )
    assert found.model_ids == ("m",)


@pytest.mark.parametrize("status", [400, 401, 403, 410, 429, 204, 301])
async def test_an_answer_below_500_is_final(status: int) -> None:
    client = FakeEngineClient()
    client.script(URL, "/server_info", answer({}, status))
    found = await ask(client)
    assert str(status) in found.problem
    assert [call[1] for call in client.calls] == ["/server_info"]


@pytest.mark.parametrize(
    "failing", [EngineUnreachableError("refused"), answer(b"", 500), answer(b"", 503)]
)
async def test_there_are_three_attempts_with_waits_of_100_and_200_ms(
    failing: EngineAnswer | Exception,
) -> None:
    client, clock = FakeEngineClient(), FakeClock()
    client.script(URL, "/server_info", failing)
    found = await ask(client, clock)
    assert found.problem
    assert len(client.calls) == 3
    assert clock.slept == pytest.approx([0.1, 0.2])
    assert {timeout for _, _, timeout in client.calls} == {2.0}


async def test_a_worker_that_answers_a_later_attempt_is_used() -> None:
    client, clock = FakeEngineClient(), FakeClock()
    client.script(
        URL,
        "/server_info",
        answer(b"", 503),
        EngineUnreachableError("refused"),
        client.info("m"),
    )
    found = await ask(client, clock)
    assert found == Introspection(model_ids=("m",), engine="sglang")
    assert clock.slept == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("status", [404, 405])
async def test_an_engine_without_server_info_is_asked_for_its_models(status: int) -> None:
    client = FakeEngineClient()
    client.script(URL, "/server_info", answer(b"Not Found", status))
    models = {"object": "list", "data": [{"id": "base", "x": 1}, {"id": ""}, {"id": "lora"}]}
    client.script(URL, "/v1/models", answer(models))
    found = await ask(client)
    assert found.model_ids == ("base", "lora")
    assert found.role is None
    assert not found.problem


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"data": 5}', b'{"data": [{"id": 5}]}', b'{"data": [{"id": "\xff"}]}'],
)
async def test_an_invalid_model_list_is_a_problem(body: bytes) -> None:
    client = FakeEngineClient()
    client.script(URL, "/server_info", answer(b"", 404))
    client.script(URL, "/v1/models", answer(body))
    found = await ask(client)
    assert found.model_ids == ()
    assert found.problem


@pytest.mark.parametrize("failing", [EngineUnreachableError("refused"), answer(b"", 500)])
async def test_the_model_list_has_three_attempts_too(failing: EngineAnswer | Exception) -> None:
    client = FakeEngineClient()
    client.script(URL, "/server_info", answer(b"", 404))
    client.script(URL, "/v1/models", failing)
    found = await ask(client)
    assert found.problem
    assert client.asked(URL) == ["/server_info"] + ["/v1/models"] * 3


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "served_model_name": _JSON,
        "disaggregation_mode": _JSON | st.sampled_from(["null", "prefill", "decode"]),
        "disaggregation_bootstrap_port": _JSON,
        "data": _JSON,
    },
)


@given(st.binary(max_size=60) | _FIELDS.map(lambda fields: json.dumps(fields).encode()))
def test_no_answer_of_a_worker_raises(body: bytes) -> None:
    async def both_paths() -> None:
        for script in (
            {"/server_info": answer(body)},
            {"/server_info": answer(b"", 404), "/v1/models": answer(body)},
        ):
            client = FakeEngineClient()
            for path, scripted in script.items():
                client.script(URL, path, scripted)
            found = await introspect(client, parse_worker_url(URL), FakeClock(), 3, ranks_max=64)
            spec = apply_introspection(make_spec(URL), found)
            assert all(spec.model_ids)

    asyncio.run(both_paths())

"""The answer to `/v1/models`."""

import json
from typing import Any

from extproc.server.model_list import ModelList
from extproc.workers.model_names import ModelNames
from tests.fakes import FakeClock


def make_names(*models: str) -> ModelNames:
    names = ModelNames(FakeClock())
    names.serve(models)
    return names


def shown(body: bytes) -> list[dict[str, Any]]:
    answer: dict[str, Any] = json.loads(body)
    assert answer["object"] == "list"
    return list(answer["data"])


def test_models_are_listed_in_the_order_of_the_configuration() -> None:
    listed = shown(ModelList(["m", "a"], make_names("m", "a"))())
    assert listed == [
        {"id": name, "object": "model", "created": 0, "owned_by": "sglang"} for name in ("m", "a")
    ]


def test_adapters_follow_with_their_parents() -> None:
    names = make_names("m", "n")
    body = ModelList(["m", "n"], names)
    body()
    names.listed("w", ["n"], ["sql", "chat"])
    names.listed("v", ["m", "unknown"], ["sql"])
    names.listed("u", ["unknown"], ["other"])
    adapters = [(one["id"], one["parent"]) for one in shown(body())[2:]]
    assert adapters == [("chat", "n"), ("sql", "m")]
    names.left("v")
    assert [(one["id"], one["parent"]) for one in shown(body())[2:]] == [
        ("chat", "n"),
        ("sql", "n"),
    ]


def test_a_configured_model_is_listed_once() -> None:
    names = make_names("m", "sql")
    names.listed("w", ["m", "sql"], ["sql"])
    assert [one["id"] for one in shown(ModelList(["m", "sql"], names)())] == ["m", "sql"]


def test_the_number_of_adapters_is_bounded() -> None:
    names = make_names("m")
    for worker in range(4):
        names.listed(str(worker), ["m"], [f"{worker}-{n}" for n in range(1000)])
    assert len(shown(ModelList(["m"], names)())) == 1001


def test_the_answer_is_made_once_for_each_change() -> None:
    names = make_names("m")
    body = ModelList(["m"], names)
    assert body() is body()

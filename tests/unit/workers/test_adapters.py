"""Reading a worker's list of models: which of them are adapters."""

import json
from typing import Any

import pytest

from extproc.workers.adapters import ADAPTERS_MAX, ModelList, read_model_list


def listing(*cards: tuple[Any, Any]) -> bytes:
    data = [{"id": name, "parent": parent, "object": "model"} for name, parent in cards]
    return json.dumps({"object": "list", "data": data}).encode()


def read(*cards: tuple[Any, Any]) -> ModelList:
    found = read_model_list(listing(*cards))
    assert found is not None
    return found


def test_a_model_with_a_parent_of_the_list_is_an_adapter() -> None:
    found = read(("base", None), ("alias", None), ("sql", "base"), ("chat", "alias"))
    assert found == ModelList(models=("base", "alias"), adapters=("sql", "chat"))


@pytest.mark.parametrize("parent", ["elsewhere", "", 5, {}, [], "sql"])
def test_a_model_with_another_parent_is_a_model(parent: Any) -> None:
    found = read(("base", None), ("sql", parent))
    assert found == ModelList(models=("base", "sql"))


def test_a_name_that_is_a_model_and_an_adapter_is_a_model() -> None:
    assert read(("base", None), ("base", "base")) == ModelList(models=("base",))


def test_repeated_names_count_once() -> None:
    assert read(("m", None), ("a", "m"), ("m", None), ("a", "m")) == ModelList(
        models=("m",), adapters=("a",)
    )


@pytest.mark.parametrize("name", ["a:b", "org/a", "模型", " ", '"', "\\", "a" * 256])
def test_odd_names_are_taken(name: str) -> None:
    assert read(("m", None), (name, "m")).adapters == (name,)


@pytest.mark.parametrize("name", ["a\nb", "\x00", "\x1b[31m", "\u202e", "a\tb"])
def test_names_that_cannot_be_printed_are_left_out(name: str) -> None:
    assert read(("m", None), (name, "m")) == ModelList(models=("m",), left_out=1)


@pytest.mark.parametrize("name", ["", "a" * 257])
def test_empty_and_long_names_are_not_there(name: str) -> None:
    assert read(("m", None), (name, "m")) == ModelList(models=("m",))


def test_only_so_many_adapters_are_taken() -> None:
    found = read(("m", None), *((f"a{n}", "m") for n in range(10_000)))
    assert len(found.adapters) == ADAPTERS_MAX
    assert found.left_out == 10_000 - ADAPTERS_MAX


def test_only_so_many_models_are_taken() -> None:
    assert len(read(*((f"m{n}", None) for n in range(100))).models) == 32


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"data":5}', b'{"data":[{"id":5}]}', b"\xff", b"[" * 100_000]
)
def test_another_answer_is_not_a_list_of_models(body: bytes) -> None:
    assert read_model_list(body) is None

"""Names of models and adapters, as requests give them and as workers list them."""

import string
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.workers.model_names import ModelNames
from tests.fakes import FakeClock


def make_names(*models: str) -> ModelNames:
    names = ModelNames(FakeClock())
    names.serve(models)
    return names


def test_a_configured_model_is_itself() -> None:
    names = make_names("m", "a:b")
    assert names.find("m") == ("m", None)
    assert names.find("a:b") == ("a:b", None)


@pytest.mark.parametrize("name", ["", "x", ":", "m:", ":m", "m:x", "n:sql", "sql:m", "m:" * 9999])
def test_other_names_are_unknown(name: str) -> None:
    names = make_names("m")
    names.listed("w", ["m"], ["sql"])
    assert names.find(name) is None


def test_an_adapter_has_two_names() -> None:
    names = make_names("m")
    names.listed("w", ["m"], ["sql"])
    assert names.find("sql") == ("m", "sql")
    assert names.find("m:sql") == ("m", "sql")


@pytest.mark.parametrize("adapter", ["a:b", "模型", "org/name", " ", "m:m", "{}", "x" * 256])
def test_names_may_be_odd(adapter: str) -> None:
    names = make_names("m", "m:m:m")
    names.listed("w", ["m"], [adapter])
    assert names.find(adapter) == ("m", adapter)
    assert names.find(f"m:{adapter}") in ((("m", adapter)), ("m:m:m", None))


def test_an_adapter_that_is_unloaded_is_unknown_at_once() -> None:
    names = make_names("m")
    names.listed("v", ["m"], ["sql"])
    names.listed("w", ["m"], ["sql"])
    names.listed("v", ["m"], [])
    assert names.find("sql") == ("m", "sql")
    names.listed("w", ["m"], ["other"])
    assert names.find("sql") is None
    assert names.find("m:sql") is None
    assert names.find("other") == ("m", "other")


async def test_an_adapter_whose_worker_left_is_known_for_five_minutes() -> None:
    clock = FakeClock()
    names = ModelNames(clock)
    names.serve(["m"])
    names.listed("w", ["m"], ["sql"])
    assert names.find("m:sql") == ("m", "sql")
    names.left("w")
    await clock.advance(299.0)
    assert names.find("sql") == ("m", "sql")
    assert names.find("m:sql") == ("m", "sql")
    assert names.find("n:sql") is None
    await clock.advance(1.0)
    assert names.find("sql") is None
    assert names.find("m:sql") is None


def test_a_worker_that_is_back_without_an_adapter_does_not_bring_it_back() -> None:
    names = make_names("m")
    names.listed("w", ["m"], ["sql"])
    names.left("w")
    names.listed("w", ["m"], ["other"])
    # Another worker may still come back with it.
    assert names.find("sql") == ("m", "sql")
    names.listed("w", ["m"], ["sql"])
    names.listed("w", ["m"], [])
    assert names.find("sql") is None


def test_a_configured_model_wins_over_an_adapter_and_has_its_namespace() -> None:
    names = make_names("sql", "m")
    assert names.find("sql") == ("sql", None)
    names.listed("w", ["m", "sql"], ["sql", "other"])
    assert names.find("sql") == ("sql", "sql")
    assert names.find("m:sql") == ("m", "sql")
    # The adapter is no base of others.
    assert names.find("other") == ("m", "other")
    assert [one.adapter for one in names.adapters()] == ["other"]
    names.listed("w", ["m"], [])
    assert names.find("sql") == ("sql", None)


def test_an_adapter_of_two_models_is_that_of_the_first() -> None:
    names = make_names("n", "m")
    names.listed("v", ["m"], ["sql"])
    assert names.find("sql") == ("m", "sql")
    names.listed("w", ["n"], ["sql"])
    assert names.find("sql") == ("n", "sql")
    assert names.find("m:sql") == ("m", "sql")
    assert names.find("n:sql") == ("n", "sql")
    names.left("w")
    assert names.find("sql") == ("m", "sql")
    assert names.find("n:sql") is None


def test_adapters_of_models_that_are_not_configured_are_unknown() -> None:
    names = make_names("m")
    names.listed("w", ["other"], ["sql"])
    assert names.find("sql") is None
    assert names.find("other:sql") is None
    names.serve(["other"])
    assert names.find("sql") == ("other", "sql")
    assert names.find("m") is None


def test_a_worker_that_serves_another_model_takes_its_adapters_along() -> None:
    names = make_names("m", "n")
    names.listed("w", ["m"], ["sql"])
    assert names.find("sql") == ("m", "sql")
    names.listed("w", ["n"], ["sql"])
    assert names.find("sql") == ("n", "sql")
    assert names.find("m:sql") is None


def test_the_number_of_names_is_bounded() -> None:
    names = make_names("m")
    for worker in range(30):
        names.listed(str(worker), ["m"], [f"{worker}-{n}" for n in range(1024)])
    assert sum(1 for _ in names.adapters()) == 10_000
    assert names.find("0-1") == ("m", "0-1")
    assert names.find("29-1") is None
    # Those that are known already need no room.
    names.listed("30", ["m"], ["0-1", "new"])
    names.left("0")
    assert names.find("0-1") == ("m", "0-1")
    names.listed("30", ["m"], ["new"])
    assert names.find("new") == ("m", "new")
    for worker in range(31):
        names.left(str(worker))
    assert not list(names.adapters())
    assert names.sizes() == {"workers": 0, "adapters": 0, "gone": 1024, "found": 1}


def test_adapters_that_come_and_go_leave_nothing_behind() -> None:
    names = make_names("m")
    for n in range(5000):
        names.listed("w", ["m"], [f"{n}"])
        assert names.find(f"m:{n}") is not None
        assert names.find(f"{n}") is not None
        assert names.find(f"{n - 1}") is None
    assert names.sizes() == {"workers": 1, "adapters": 1, "gone": 0, "found": 3}


def test_the_version_rises_only_with_a_change() -> None:
    names = make_names("m")
    before = names.version
    names.listed("w", ["m"], ["sql"])
    assert names.version > before
    before = names.version
    names.listed("w", ["m"], ["sql"])
    names.listed("v", ["m"], [])
    names.left("v")
    names.left("nobody")
    assert names.version == before


def test_a_name_with_colons_follows_all_adapters_that_it_can_mean() -> None:
    names = make_names("m", "m:n")
    names.listed("v", ["m:n"], ["b"])
    assert names.find("m:n:b") == ("m:n", "b")
    names.listed("w", ["m"], ["n:b"])
    assert names.find("m:n:b") == ("m", "n:b")
    names.listed("u", ["m:n"], ["m:n:b"])
    assert names.find("m:n:b") == ("m:n", "m:n:b")
    for worker in "uvw":
        names.listed(worker, ["m"], [])
    assert names.find("m:n:b") is None
    assert names.sizes()["found"] == 2


_models = st.sampled_from(["m", "n", "m:n", "a"])
_adapters = st.sampled_from(["a", "b", "n", "n:b", ":"])
_listing = st.tuples(
    st.sampled_from("vw"),
    st.lists(_models, max_size=2, unique=True),
    st.lists(_adapters, max_size=3, unique=True),
)


@given(st.lists(st.one_of(_listing, st.sampled_from("vw")), max_size=8), st.data())
def test_what_was_looked_up_before_makes_no_difference(
    steps: Iterable[tuple[str, list[str], list[str]] | str], data: st.DataObject
) -> None:
    """The same as a new object after the same steps, whatever was asked in between."""
    asked, silent = make_names("m", "m:n", "a"), make_names("m", "m:n", "a")
    everything = [
        *"mnab",
        "n:b",
        "m:n:b",
        ":",
        *(f"{m}:{a}" for m in ("m", "m:n", "a") for a in "anb"),
    ]
    for step in steps:
        for names in (asked, silent):
            if isinstance(step, str):
                names.left(step)
            else:
                names.listed(*step)
        for name in data.draw(st.lists(st.sampled_from(everything), max_size=4)):
            asked.find(name)
    assert [asked.find(name) for name in everything] == [silent.find(name) for name in everything]


@given(st.text(alphabet=string.printable, max_size=600))
def test_any_text_can_be_asked_for(name: str) -> None:
    names = make_names("m")
    names.listed("w", ["m"], ["sql"])
    found = names.find(name)
    assert found is None or found[0] == "m"

"""The service's tokens are those of the engines, on every body that they serve."""

from pathlib import Path
from typing import Final

import pytest

from tests.engines.bodies import all_bodies
from tests.engines.compare import BATCH, DIFFER, NONE, SAME, compare_model
from tests.engines.vectors import MODEL_NAMES, read_vectors, vector_files

# Bodies that the engine serves and for which there are no tokens, with the reason.
_WITHOUT: Final = {
    "vllm": {
        # The template would be rendered by something else than vLLM's rules.
        "chat/kwargs-of-tokenize": "unsupported",
        "chat/kwargs-of-tools": "unsupported",
        # The service answers these itself: no model, or a `stream` that is not a boolean.
        "chat/no-model": "bad_request",
        "chat/stream-as-string": "bad_request",
        # How long the model is, and with it what is cut off, is known to the engine alone.
        "chat/truncate-to-model": "unsupported",
        "chat/truncate-too-long": "unsupported",
        "completions/truncate-to-model": "unsupported",
        "completions/truncate-too-long": "unsupported",
        # vLLM takes true for 1 in a list of ids.
        "completions/ids-true": "malformed",
        # Tools that a system message adds, and a call without an id, get names by chance.
        "messages/tool-addition": "unsupported",
        "messages/use-without-id": "unsupported",
        "responses/previous-messages": "unsupported",
    },
    "sglang": {
        # The service answers these itself: no model, or a `stream` that is not a boolean.
        "chat/no-model": "bad_request",
        "chat/stream-as-string": "bad_request",
        # SGLang takes true for 1 in a list of ids, and a negative id for what it is.
        "completions/ids-negative": "malformed",
        "completions/ids-true": "malformed",
        # How a suffix is used depends on a template that only the engine has.
        "completions/suffix": "unsupported",
        # References to tools and results of a search.
        "messages/result-reference": "unsupported",
        "messages/search-result": "unsupported",
        # Without `thinking`, a parser of thoughts keeps them and a server without one drops them.
        "messages/thinking-block": "unsupported",
        "messages/thinking-block-alone": "unsupported",
        "messages/thinking-block-later": "unsupported",
        "messages/thinking-block-without-signature": "unsupported",
        "messages/two-thinking-blocks": "unsupported",
        "responses/choice-allowed": "unsupported",
        # Only the engine can read it.
        "responses/reasoning-encrypted": "unsupported",
    },
}
_WITHOUT_MAX: Final = 0.02
_ENGINES: Final = tuple(_WITHOUT)


def _files() -> list[tuple[str, Path]]:
    return [(engine, path) for engine in _ENGINES for path in vector_files(engine)]


def test_there_are_vectors_of_every_engine() -> None:
    assert {engine for engine, _ in _files()} == set(_ENGINES)


@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize(("engine", "path"), _files())
def test_tokens_are_those_of_the_engine(engine: str, path: Path, model: str) -> None:
    vectors = read_vectors(path)
    answers = vectors["models"][model]["answers"]
    compared = compare_model(engine, vectors["version"], model, answers)
    assert [one for one in compared if one.outcome == DIFFER] == []
    without = {one.body.name: one.detail for one in compared if one.outcome == NONE}
    assert without.items() <= _WITHOUT[engine].items()
    served = sum(one.outcome in (SAME, NONE, BATCH) for one in compared)
    assert served > 150
    assert len(without) <= _WITHOUT_MAX * len(all_bodies())

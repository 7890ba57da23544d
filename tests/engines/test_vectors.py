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
        "chat/no-model": "bad_request",
        "chat/stream-as-string": "bad_request",
        # Only some encoders of the engine know this member of a message.
        "chat/prefix-member": "unsupported",
        # The engine takes these for ids, and fails with them later.
        "completions/ids-negative": "malformed",
        "completions/ids-true": "malformed",
        # The template for completions is the engine's own.
        "completions/suffix": "unsupported",
        # References to tools and search results, which a result of a tool can have.
        "messages/result-reference": "unsupported",
        "messages/search-result": "unsupported",
        "messages/thinking-block-of-user": "unsupported",
        "responses/choice-allowed": "unsupported",
        # Only the engine can read what it encrypted.
        "responses/reasoning-encrypted": "unsupported",
        "responses/tool-namespace": "unsupported",
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
    compared = compare_model(vectors, model)
    assert [one for one in compared if one.outcome == DIFFER] == []
    without = {one.body.name: one.detail for one in compared if one.outcome == NONE}
    assert without.items() <= _WITHOUT[engine].items()
    served = sum(one.outcome in (SAME, NONE, BATCH) for one in compared)
    assert served > 150
    assert len(without) <= _WITHOUT_MAX * len(all_bodies())

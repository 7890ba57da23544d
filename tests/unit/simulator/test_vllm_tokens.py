"""What a worker like vLLM makes of a body is what vLLM makes of it, by the engine's own vectors."""

from typing import Any

import pytest

from extproc.simulator.errors import ApiError
from extproc.simulator.vllm_bodies import vllm_readers
from extproc.simulator.vllm_chats import VllmChatError
from extproc.simulator.vllm_tokens import VllmTokenizer
from tests.engines.bodies import Body, all_bodies
from tests.engines.make_models import MAX_MODEL_TOKENS
from tests.engines.vectors import MODEL_NAMES, MODELS, read_vectors, vector_files

_VECTORS = {path.name: read_vectors(path) for path in vector_files("vllm")}


def _answer(tokenizer: VllmTokenizer, body: Body) -> dict[str, Any] | None:
    """What the worker computes, in the form of a vector; None if it refuses the body."""
    try:
        asked = vllm_readers[body.path](body.data)
        prompts = [list(tokenizer.encode_prompt(prompt)) for prompt in asked.prompts]
    except (ApiError, VllmChatError):
        return None
    answer: dict[str, Any] = {"prompts": prompts}
    if asked.cache_salt:
        answer["cache_salt"] = asked.cache_salt
    if not asked.reads_cache:
        answer["reads_cache"] = False
    return answer


@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize("file", _VECTORS)
def test_tokens_are_those_of_the_engine(file: str, model: str) -> None:
    tokenizer = VllmTokenizer(str(MODELS / model), MAX_MODEL_TOKENS)
    vectors = _VECTORS[file]["models"][model]["answers"]
    compared = 0
    for body in all_bodies():
        vector = dict(vectors[body.name])
        assert vector.pop("digest") == body.digest
        answer = _answer(tokenizer, body)
        # Members that decide nothing but a refusal are not checked by the simulator.
        if "refused" not in vector:
            assert answer == vector, body.name
            compared += 1
    assert compared > 500

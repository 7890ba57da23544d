"""Of chats with images, the beginning is known as vLLM computes it, and never more than that.

The vectors are those of the engine's own server; see make_vllm_vectors.
"""

import asyncio
from typing import Any, Final

import pytest

from extproc.clock import SystemClock
from extproc.engines.engine import engine_named
from extproc.tokenization.encoder import Encoded, EncoderSettings, PromptEncoder
from tests.engines.bodies import Body, media_bodies
from tests.engines.vectors import MODELS, SEEING_NAMES, read_vectors, vector_files

(_FILE,) = vector_files("vllm", "media")
_VECTORS: Final[dict[str, Any]] = read_vectors(_FILE)
# What the engine cuts after the image was put in cannot be known.
_UNKNOWN: Final = {"media/chat/completions/truncated"}
# Tokens that depend on what follows them: some of a word, a few blanks, and in the format
# "string" all of the text of the message, behind whose beginning the engine puts the image.
_LOST_MAX: Final = 8


def _encoded(model: str, body: Body) -> Encoded:
    async def encode() -> Encoded:
        encoder = PromptEncoder.load(MODELS / model, EncoderSettings(), SystemClock())
        try:
            rules = engine_named("vllm", _VECTORS["version"]).rules
            return await encoder.encode(await encoder.read(rules, body.path, body.data, None))
        finally:
            encoder.close()

    return asyncio.run(encode())


@pytest.mark.parametrize("model", SEEING_NAMES)
@pytest.mark.parametrize("body", media_bodies(), ids=lambda body: body.name)
def test_the_beginning_is_what_the_engine_computes(model: str, body: Body) -> None:
    answer = _VECTORS["models"][model]["answers"][body.name]
    assert answer["digest"] == body.digest
    encoded = _encoded(model, body)
    assert (encoded.ids, encoded.reason) == (None, "multimodal")
    if body.name in _UNKNOWN:
        assert encoded.beginning is None
        return
    assert encoded.beginning is not None
    ((prompt),) = answer["prompts"]
    first = answer["media"][0][0]
    beginning = encoded.beginning.tolist()
    assert beginning == prompt[: len(beginning)]
    assert len(beginning) <= first
    if "placeholder" not in body.name:
        assert first - len(beginning) <= _LOST_MAX

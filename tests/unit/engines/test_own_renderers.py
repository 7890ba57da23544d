"""Models that an engine renders with its own code have no tokens from their chat template."""

import pytest
from msgspec import json

from extproc.engines.engine import EngineName, engine_named
from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import TemplateFacts, read_prompt

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("engine", "model_type", "own"),
    [
        ("vllm", "deepseek_v32", True),
        ("vllm", "deepseek_v4", True),
        ("vllm", "gpt_oss", True),
        ("vllm", "kimi_k3", True),
        ("vllm", "qwen3", False),
        ("vllm", "", False),
        ("sglang", "deepseek_v4", True),
        ("sglang", "kimi_k3", True),
        # With a chat template, it is used.
        ("sglang", "deepseek_v32", False),
        ("sglang", "", False),
    ],
)
def test_the_reason_says_that_the_engine_renders_the_chat(
    engine: EngineName, model_type: str, own: bool, path: str
) -> None:
    prompt = read_prompt(engine_named(engine).rules, path, json.encode(BODIES[path]))
    assert prompt.chat is not None
    facts = TemplateFacts(model_type=model_type)
    if not own:
        assert prompt.chat.for_template(facts, {}).messages
        return
    with pytest.raises(UnmappableError) as caught:
        prompt.chat.for_template(facts, {})
    assert caught.value.reason == "rendered_by_engine"

"""Chats of a worker with a model's folder become the tokens that the model's library makes."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from extproc.simulator.chats import chat as chat_of
from extproc.simulator.settings import SimulatorSettings
from extproc.simulator.tokens import Tokenizer

from .clients import CHAT, Launch, chat
from .kv_clients import KvClient, generate, publishing
from .model_folders import CHATML, PARTS, model_folder

USER = {"role": "user", "content": "Grüße, <|im_end|> \n\n "}
SYSTEM = {"role": "system", "content": "Be brief.  "}
FUNCTION = {"name": "weather", "parameters": {"type": "object"}, "description": "<rain & sun>"}
TOOL = {"type": "function", "function": FUNCTION}
# The engine's own model of a tool has this field as well.
PRINTED_TOOL = {**TOOL, "defer_loading": None}


def ids(folder: str, messages: list[dict[str, Any]], **fields: Any) -> list[int]:
    return [*Tokenizer(folder).encode_chat(chat_of(messages, **fields))]


def text(folder: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    found: str = Tokenizer(folder)._model.decode(  # type: ignore[union-attr]
        ids(folder, messages, **fields), skip_special_tokens=False
    )
    return found


def expected(folder: str, messages: list[dict[str, Any]], **fields: Any) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **fields
    )
    found: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
    return found


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, PARTS])
@pytest.mark.parametrize("tools", [None, [PRINTED_TOOL]])
def test_a_chat_has_the_tokens_of_the_library(
    tmp_path: Path, template: str, adds_bos: bool, in_config: bool, tools: Any
) -> None:
    folder = model_folder(tmp_path, template, adds_bos=adds_bos, in_config=in_config)
    messages = [SYSTEM, USER, {"role": "assistant", "content": "yes"}, USER]
    assert ids(folder, messages, tools=tools) == expected(folder, messages, tools=tools)


def test_a_file_comes_before_the_config(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "from the file", chat_template="from the config")
    assert text(folder, [USER]) == "from the file"


def test_one_of_several_templates_is_for_tools(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    folder = model_folder(tmp_path, None, chat_template=named)
    assert text(folder, [USER]) == "plain"
    assert text(folder, [USER], tools=[TOOL]) == "weather"


def test_arguments_of_the_client_reach_the_template(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, PARTS)
    arguments = {"thinking": False, "effort": "little"}
    messages = [USER]
    assert ids(folder, messages, template_arguments=arguments) == expected(
        folder, messages, **arguments
    )


def test_content_in_parts(tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": " one"},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "text", "text": "two"},
    ]
    messages = [{"role": "user", "content": parts}]
    folder = model_folder(tmp_path, PARTS)
    assert text(folder, messages) == "<s><|im_start|>userone[image]two</s>"
    folder = model_folder(tmp_path, CHATML)
    joined = "<|im_start|>user\n one two<|im_end|>\n"
    assert text(folder, messages) == f"{joined}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        ("{% for part in message.content %}", "onetwo"),
        ("{% for part in message['content'][1:] | reverse %}", "two"),
        ("{% for part in msg.content if part %}", "onetwo"),
        ("{% for part in [message.content] %}", ""),  # a string in a list has no text
    ],
)
def test_templates_that_loop_get_parts(tmp_path: Path, loop: str, said: str) -> None:
    template = (
        "{% for message in messages %}{% set msg = message %}"
        + loop
        + "{{ part.text }}{% endfor %}{% endfor %}"
    )
    folder = model_folder(tmp_path, template)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    # No tokens at all are sent as the one with id 0, which is "!".
    assert text(folder, [{"role": "user", "content": parts}]) == (said or "!")


def test_messages_without_content_and_tool_messages(tmp_path: Path) -> None:
    function = {"name": "weather", "arguments": '{"where": "Köln", "days": 2}'}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}] * 2, "tool_call_id": "1"},
    ]
    folder = model_folder(tmp_path, PARTS)
    assert text(folder, messages) == (
        '<s><|im_start|>assistantwhere="Köln";days=2;<|im_start|>toolrain rain</s>'
    )


def test_messages_and_calls_are_printed_as_the_engine_models_them(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "{% for m in messages %}{{ m | tojson }}{% endfor %}")
    call = {"function": {"name": "weather", "arguments": "{}"}, "unknown": 1}
    messages: list[dict[str, Any]] = [
        {"content": "hi", "role": "user", "name": "left out"},
        {"role": "Assistant", "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]
    assert text(folder, messages) == (
        '{"role": "user", "content": "hi"}'
        '{"role": "assistant", "content": "", "tool_calls": [{"id": null, "index": null, '
        '"type": "function", "function": {"name": "weather", "arguments": {}}}]}'
        '{"role": "tool", "content": "rain", "tool_call_id": "1"}'
    )


def test_a_trailing_assistant_message_is_continued_or_answered(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, adds_bos=True)
    messages = [USER, {"role": "assistant", "content": "\nWell"}]
    begun = Tokenizer(folder).encode("\nWell")
    assert ids(folder, messages, continues=True) == [*expected(folder, [USER]), *begun]
    asked = [USER, {"role": "user", "content": "\nWell"}]
    assert ids(folder, messages) == expected(folder, asked)


def test_a_template_that_wants_bare_functions(tmp_path: Path) -> None:
    template = "{% if tools %}{{ tools[0].name + tools[0].description }}{% endif %}"
    folder = model_folder(tmp_path, template)
    assert text(folder, [USER], tools=[TOOL]) == "weather<rain & sun>"


async def test_chats_and_completions_over_the_wire(launch: Launch, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, adds_bos=True)
    worker = await launch(publishing(tokenizer_path=folder, page_size=1))
    body = chat("hello", max_tokens=1, tools=[TOOL], tool_choice="auto", reasoning_effort="none")
    _, answer = await worker.post(CHAT, body)
    prompt = expected(folder, body["messages"], tools=[PRINTED_TOOL])
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    _, answer = await worker.post("/generate", generate(prompt))
    assert answer["meta_info"]["cached_tokens"] == len(prompt) - 1
    bare = expected(folder, body["messages"])
    for choice in ("none", {"type": "function", "function": {"name": "other"}}):
        _, answer = await worker.post(CHAT, body | {"tool_choice": choice})
        assert answer["usage"]["prompt_tokens"] == len(bare)
    _, answer = await worker.post("/v1/completions", {"prompt": "hello", "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == 6  # with a BOS
    _, answer = await worker.post("/v1/messages", chat("hello", max_tokens=1, system="Be brief."))
    system = [{"role": "system", "content": "Be brief."}, *body["messages"]]
    assert answer["usage"]["input_tokens"] == len(expected(folder, system))


async def test_the_next_turn_finds_the_answer(launch: Launch, tmp_path: Path) -> None:
    worker = await launch(publishing(tokenizer_path=model_folder(tmp_path), page_size=1))
    body = chat("hello", max_tokens=4)
    _, answer = await worker.post(CHAT, body)
    first = answer["usage"]["prompt_tokens"]
    body["messages"] += [answer["choices"][0]["message"], {"role": "user", "content": "more"}]
    _, answer = await worker.post(CHAT, body)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == first + 4


async def test_events_carry_the_tokens_of_the_template(launch: Launch, tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    worker = await launch(publishing(tokenizer_path=folder, page_size=2))
    client = KvClient(worker)
    try:
        body = chat("hello", max_tokens=0)
        await worker.post(CHAT, body)
        stored = (await client.replay())[1].events[0]
    finally:
        client.close()
    prompt = expected(folder, body["messages"])
    assert stored["token_ids"] == prompt[: len(prompt) // 2 * 2]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "nobody", "content": "?"}]},
        chat(chat_template_kwargs={"bos_token": 7, "messages": 3}),
        chat(tools=[{"type": "function"}]),
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"arguments": "not JSON"}}]}
            ]
        },
    ],
)
async def test_a_template_failure_is_a_400(
    launch: Launch, tmp_path: Path, body: dict[str, Any]
) -> None:
    worker = await launch(SimulatorSettings(tokenizer_path=model_folder(tmp_path, PARTS)))
    status, answer = await worker.post(CHAT, body)
    assert (status, answer["error"]["code"]) == (400, 400)


async def test_a_folder_without_a_template_serves_completions(
    launch: Launch, tmp_path: Path
) -> None:
    worker = await launch(SimulatorSettings(tokenizer_path=model_folder(tmp_path, None)))
    status, answer = await worker.post(CHAT, chat())
    assert (status, answer["error"]["message"]) == (
        400,
        "the tokenizer folder has no chat template",
    )
    body = {"prompt": "hello", "max_tokens": 0}
    assert (await worker.post("/v1/completions", body))[0] == 200


def test_a_broken_folder_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer_path"):
        Tokenizer(str(tmp_path))
    folder = model_folder(tmp_path, "{% for %}")
    with pytest.raises(ValueError, match=r"tokenizer_path.*chat template"):
        Tokenizer(folder)

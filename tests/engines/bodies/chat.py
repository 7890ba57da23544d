"""Chats without tools, for /v1/chat/completions."""

from typing import Any, Final

_Body = dict[str, Any] | str

_HI: Final = {"role": "user", "content": "What is the weather in Paris today?"}
_SYSTEM: Final = {"role": "system", "content": "You are a helpful assistant."}
_ANSWER: Final = {"role": "assistant", "content": "The weather is sunny."}
_THANKS: Final = {"role": "user", "content": "Thank you, and tomorrow?"}
_TALK: Final = [_SYSTEM, _HI, _ANSWER, _THANKS]
_OPEN: Final = [_HI, {"role": "assistant", "content": "The weather is"}]
_PIXEL: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)
_IMAGE: Final = {"type": "image_url", "image_url": {"url": _PIXEL}}
_AUDIO: Final = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}


def _text(text: Any, **members: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **members}


def _said(content: Any, role: Any = "user", **members: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **members}]}


def _talk(**members: Any) -> dict[str, Any]:
    return {"messages": _TALK, **members}


def _open(**members: Any) -> dict[str, Any]:
    return {"messages": _OPEN, **members}


_PLAIN: Final[dict[str, _Body]] = {
    "one-message": {"messages": [_HI]},
    "system": {"messages": [_SYSTEM, _HI]},
    "conversation": _talk(),
    "long-conversation": {"messages": [_SYSTEM, *[_HI, _ANSWER] * 20, _THANKS]},
    "long-text": _said("The weather of a city is sunny. " * 60),
    "longer-than-the-model": _said("question " * 20000),
    "no-messages": {"messages": []},
    "messages-missing": {},
    "messages-null": {"messages": None},
    "message-is-a-string": {"messages": ["hi"]},
    "second-system": {"messages": [_SYSTEM, _HI, _ANSWER, _SYSTEM, _THANKS]},
    "two-systems-first": {"messages": [_SYSTEM, {"role": "system", "content": "Be brief."}, _HI]},
    "system-alone": {"messages": [_SYSTEM]},
    "assistant-first": {"messages": [_ANSWER, _HI]},
    "user-twice": {"messages": [_HI, _THANKS]},
    "no-model": '{"messages": [{"role": "user", "content": "hi"}]}',
    "other-model": _talk(model="other"),
    "stream": _talk(stream=True, stream_options={"include_usage": True}, max_tokens=4),
    "sampling": _talk(temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, stop=["."], n=1),
    "two-choices": _talk(n=2),
    "max-tokens": _talk(max_tokens=1),
    "max-completion-tokens": _talk(max_completion_tokens=1),
    "max-tokens-zero": _talk(max_tokens=0),
    "user-and-metadata": _talk(user="someone", metadata={"a": "b"}, store=False),
    "unknown-member": _talk(something_new=[1, 2]),
    "stream-as-string": _talk(stream="yes"),
    "temperature-as-string": _talk(temperature="0.5"),
    "spaces-kept": _said("  two blanks before and after  \n\n"),
    "doubled-key": (
        '{"model":"m","messages":[{"role":"user","content":"first"}],'
        '"messages":[{"role":"user","content":"second"}]}'
    ),
    "message-doubled-key": (
        '{"model":"m","messages":[{"role":"user","content":"first","content":"second"}]}'
    ),
    "not-json": '{"model":"m","messages":[',
    "nan": '{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":NaN}',
    "list-body": "[]",
}

_ROLES: Final[dict[str, _Body]] = {
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, _HI]},
    "developer-after-system": {
        "messages": [_SYSTEM, {"role": "developer", "content": "Be brief."}, _HI]
    },
    "developer-before-system": {
        "messages": [{"role": "developer", "content": "Be brief."}, _SYSTEM, _HI]
    },
    "developer-later": {
        "messages": [_HI, _ANSWER, {"role": "developer", "content": "Be brief."}, _THANKS]
    },
    "developer-parts": {
        "messages": [{"role": "developer", "content": [_text("Be brief."), _text("Be kind.")]}, _HI]
    },
    "two-developers": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            _HI,
        ]
    },
    "unknown-role": {"messages": [{"role": "critic", "content": "I think so."}, _HI]},
    "role-missing": {"messages": [{"content": "hi"}]},
    "role-null": _said("hi", role=None),
    "role-number": _said("hi", role=3),
    "role-upper-case": _said("hi", role="User"),
    "role-empty": _said("hi", role=""),
    "function-role": {
        "messages": [_HI, {"role": "function", "name": "get_weather", "content": "sunny"}]
    },
    "names": {
        "messages": [
            {**_SYSTEM, "name": "rules"},
            {**_HI, "name": "anna"},
            {**_ANSWER, "name": "b"},
        ]
    },
    "name-null": _said("hi", name=None),
    "name-empty": _said("hi", name=""),
    "name-number": _said("hi", name=7),
    "unknown-message-member": _said("hi", weight=1, extra={"a": [1]}),
}

_CONTENTS: Final[dict[str, _Body]] = {
    "content-null": _said(None),
    "content-missing": {"messages": [{"role": "user"}]},
    "content-empty": _said(""),
    "content-number": _said(42),
    "content-float": _said(1.5),
    "content-true": _said(True),
    "content-object": _said({"type": "text", "text": "hi"}),
    "assistant-null": {"messages": [_HI, {"role": "assistant", "content": None}, _THANKS]},
    "assistant-missing": {"messages": [_HI, {"role": "assistant"}, _THANKS]},
    "assistant-empty": {"messages": [_HI, {"role": "assistant", "content": ""}, _THANKS]},
    "system-empty": {"messages": [{"role": "system", "content": ""}, _HI]},
    "system-null": {"messages": [{"role": "system", "content": None}, _HI]},
    "one-part": _said([_text("What is the weather?")]),
    "two-parts": _said([_text("What is the weather?"), _text("In Paris.")]),
    "three-parts-with-blanks": _said([_text(" a "), _text("\n"), _text("b")]),
    "no-parts": _said([]),
    "empty-part": _said([_text("")]),
    "empty-part-among-others": _said([_text("a"), _text(""), _text("b")]),
    "string-part": _said(["What is", " the weather?"]),
    "string-and-text-part": _said(["What is", _text("the weather?")]),
    "system-parts": {
        "messages": [{"role": "system", "content": [_text("Be"), _text("kind")]}, _HI]
    },
    "assistant-parts": {
        "messages": [_HI, {"role": "assistant", "content": [_text("It is"), _text("sunny")]}, _HI]
    },
    "part-cache-control": _said([_text("hi", cache_control={"type": "ephemeral"})]),
    "part-unknown-type": _said([{"type": "note", "note": "hi"}]),
    "part-without-type": _said([{"text": "hi"}]),
    "part-text-null": _said([_text(None)]),
    "part-text-missing": _said([{"type": "text"}]),
    "part-text-number": _said([_text(5)]),
    "part-null": _said([None]),
    "input-text-part": _said([{"type": "input_text", "text": "hi"}]),
    "output-text-part": {
        "messages": [
            _HI,
            {"role": "assistant", "content": [{"type": "output_text", "text": "sunny"}]},
            _THANKS,
        ]
    },
    "refusal-part": {
        "messages": [
            _HI,
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]},
            _THANKS,
        ]
    },
    "refusal-part-after-text": {
        "messages": [
            _HI,
            {
                "role": "assistant",
                "content": [_text("No."), {"type": "refusal", "refusal": "I will not."}],
            },
            _THANKS,
        ]
    },
    "refusal-member": {
        "messages": [_HI, {"role": "assistant", "content": None, "refusal": "No."}, _THANKS]
    },
    "thinking-part": {
        "messages": [
            _HI,
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm"}, _text("Sunny.")],
            },
            _THANKS,
        ]
    },
    "image": _said([_text("What is this?"), _IMAGE]),
    "image-first": _said([_IMAGE, _text("What is this?")]),
    "image-later": {"messages": [_SYSTEM, _HI, _ANSWER, {"role": "user", "content": [_IMAGE]}]},
    "audio": _said([_text("Write this down."), _AUDIO]),
    "image-empty": _said([{"type": "image_url", "image_url": {"url": ""}}]),
    "image-null": _said([_text("hi"), {"type": "image_url", "image_url": None}]),
}

_ODD_TEXTS: Final[dict[str, _Body]] = {
    "unicode": _said("Grüße, 你好, こんにちは, 👩‍👩‍👧‍👦, e\u0301, \u200b\u00a0\u2028."),
    "special-token-in-text": _said("<|im_end|>\n<|im_start|>system\nx<|end|><|eot_id|></turn>"),
    "first-token-in-text": _said("<|begin_of_text|><s><|begin_of_text|>hi"),
    "thought-tokens-in-text": _said("<think>hm</think><tool_call>{}</tool_call>"),
    "lone-surrogate": '{"model":"m","messages":[{"role":"user","content":"a\\ud800b"}]}',
    "paired-surrogates": '{"model":"m","messages":[{"role":"user","content":"a\\ud83d\\ude00b"}]}',
    "null-character": '{"model":"m","messages":[{"role":"user","content":"a\\u0000b"}]}',
    "line-ends": _said("a\r\nb\rc\n\n\td"),
    "jinja-in-text": _said("{{ messages }} {% for a in b %} {# c #}"),
    "html-in-text": _said('<b>"it\'s" & more</b>'),
    "byte-order-mark": '\ufeff{"model":"m","messages":[{"role":"user","content":"hi"}]}',
}

_ENDINGS: Final[dict[str, _Body]] = {
    "trailing-assistant": _open(),
    "trailing-assistant-parts": {
        "messages": [_HI, {"role": "assistant", "content": [_text("The weather"), _text("is")]}]
    },
    "trailing-assistant-empty": {"messages": [_HI, {"role": "assistant", "content": ""}]},
    "trailing-system": {"messages": [_HI, _SYSTEM]},
    "no-generation-prompt": _talk(add_generation_prompt=False),
    "generation-prompt": _talk(add_generation_prompt=True),
    "generation-prompt-null": _talk(add_generation_prompt=None),
    "trailing-assistant-no-generation-prompt": _open(add_generation_prompt=False),
    "continue": _open(continue_final_message=True, add_generation_prompt=False),
    "continue-with-generation-prompt": _open(continue_final_message=True),
    "continue-both": _open(continue_final_message=True, add_generation_prompt=True),
    "continue-user": _talk(continue_final_message=True, add_generation_prompt=False),
    "continue-with-blanks": {
        "messages": [_HI, {"role": "assistant", "content": "  The weather is "}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "continue-parts": {
        "messages": [_HI, {"role": "assistant", "content": [_text("The weather"), _text("is")]}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "continue-empty": {
        "messages": [_HI, {"role": "assistant", "content": ""}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "continue-text-seen-before": {
        "messages": [_HI, _ANSWER, _HI, _ANSWER],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "prefix-member": {
        "messages": [_HI, {"role": "assistant", "content": "The weather is", "prefix": True}]
    },
}

_THOUGHTS: Final[dict[str, _Body]] = {
    "reasoning-content": {
        "messages": [_HI, {**_ANSWER, "reasoning_content": "I look outside."}, _THANKS]
    },
    "reasoning": {"messages": [_HI, {**_ANSWER, "reasoning": "I look outside."}, _THANKS]},
    "reasoning-and-reasoning-content": {
        "messages": [_HI, {**_ANSWER, "reasoning": "one", "reasoning_content": "two"}, _THANKS]
    },
    "reasoning-empty": {"messages": [_HI, {**_ANSWER, "reasoning_content": ""}, _THANKS]},
    "reasoning-null": {"messages": [_HI, {**_ANSWER, "reasoning_content": None}, _THANKS]},
    "reasoning-without-content": {
        "messages": [_HI, {"role": "assistant", "reasoning_content": "I look."}, _THANKS]
    },
    "reasoning-of-user": _said("hi", reasoning_content="hm"),
    "thought-in-content": {
        "messages": [_HI, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSunny"}, _HI]
    },
    "effort-low": _talk(reasoning_effort="low"),
    "effort-high": _talk(reasoning_effort="high"),
    "effort-none": _talk(reasoning_effort="none"),
    "effort-minimal": _talk(reasoning_effort="minimal"),
    "effort-xhigh": _talk(reasoning_effort="xhigh"),
    "effort-max": _talk(reasoning_effort="max"),
    "effort-unknown": _talk(reasoning_effort="extreme"),
    "effort-null": _talk(reasoning_effort=None),
    "reasoning-object": _talk(reasoning={"effort": "low"}),
    "thinking-enabled": _talk(thinking={"type": "enabled"}),
    "thinking-disabled": _talk(thinking={"type": "disabled"}),
    "enable-thinking-on-top": _talk(enable_thinking=False),
    "include-reasoning-false": _talk(include_reasoning=False),
    "separate-reasoning": _talk(separate_reasoning=False),
    "thinking-budget": _talk(thinking_token_budget=10),
    "no-thinking": _talk(chat_template_kwargs={"enable_thinking": False}),
    "thinking": _talk(chat_template_kwargs={"enable_thinking": True}),
    "thinking-as-string": _talk(chat_template_kwargs={"enable_thinking": "false"}),
    "effort-and-kwargs": _talk(
        reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"}
    ),
    "effort-and-no-thinking": _talk(
        reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}
    ),
}

_OPTIONS: Final[dict[str, _Body]] = {
    "kwargs-empty": _talk(chat_template_kwargs={}),
    "kwargs-null": _talk(chat_template_kwargs=None),
    "kwargs-unknown": _talk(chat_template_kwargs={"something": [1, "a", None]}),
    "kwargs-of-bos": _talk(chat_template_kwargs={"bos_token": "<|begin|>"}),
    "kwargs-of-generation-prompt": _talk(chat_template_kwargs={"add_generation_prompt": False}),
    "kwargs-of-continuation": _open(chat_template_kwargs={"continue_final_message": True}),
    "kwargs-of-tools": _talk(chat_template_kwargs={"tools": [{"name": "f"}]}),
    "kwargs-of-messages": _talk(chat_template_kwargs={"messages": [_HI]}),
    "kwargs-of-tokenize": _talk(chat_template_kwargs={"tokenize": False}),
    "kwargs-of-template": _talk(
        chat_template_kwargs={"chat_template": "{{ messages[0].content }}"}
    ),
    "kwargs-of-documents": _talk(chat_template_kwargs={"documents": [{"title": "a"}]}),
    "kwargs-as-list": _talk(chat_template_kwargs=[1]),
    "chat-template": _talk(chat_template="{{ messages[0].content }}"),
    "documents": _talk(documents=[{"title": "Weather", "text": "It is sunny."}]),
    "documents-empty": _talk(documents=[]),
    "add-special-tokens": _talk(add_special_tokens=True),
    "no-special-tokens": _talk(add_special_tokens=False),
    "truncate": _talk(truncate_prompt_tokens=12),
    "truncate-to-model": _talk(truncate_prompt_tokens=-1),
    "truncate-zero": _talk(truncate_prompt_tokens=0),
    "truncate-below": _talk(truncate_prompt_tokens=-2),
    "truncate-more-than-there-is": _talk(truncate_prompt_tokens=4000),
    "truncate-more-than-the-model": _talk(truncate_prompt_tokens=100000),
    "truncate-right": _talk(truncate_prompt_tokens=12, truncation_side="right"),
    "truncate-left": _talk(truncate_prompt_tokens=12, truncation_side="left"),
    "truncate-too-long": {
        "messages": [{"role": "user", "content": "question " * 20000}],
        "truncate_prompt_tokens": -1,
        "max_tokens": 8,
    },
    "json-object": _talk(response_format={"type": "json_object"}),
    "json-schema": _talk(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}},
        }
    ),
    "structured-outputs": _talk(structured_outputs={"choice": ["yes", "no"]}),
    "structured-regex": _talk(structured_outputs={"regex": "[a-z]+"}),
    "prompt-logprobs": _talk(prompt_logprobs=1),
    "logprobs": _talk(logprobs=True, top_logprobs=2),
    "echo": _talk(echo=True),
    "cache-salt": _talk(cache_salt="tenant"),
    "cache-salt-empty": _talk(cache_salt=""),
    "cache-salt-null": _talk(cache_salt=None),
    "cache-salt-number": _talk(cache_salt=5),
    "priority": _talk(priority=3),
    "return-token-ids": _talk(return_token_ids=True),
    "skip-special-tokens": _talk(skip_special_tokens=False),
    "stop-token-ids": _talk(stop_token_ids=[3], ignore_eos=True, min_tokens=1),
    "logit-bias": _talk(logit_bias={"5": 1}),
    "lora-path": _talk(lora_path="adapter"),
    "input-ids": _talk(input_ids=[1, 2, 3]),
    "prompt-embeds": _talk(prompt_embeds="AAAA"),
    "kv-transfer": _talk(kv_transfer_params={"do_remote_decode": False}),
    "mm-kwargs": _talk(mm_processor_kwargs={}),
    "beam-search": _talk(use_beam_search=True, n=2, max_tokens=2),
}

BODIES: Final[dict[str, _Body]] = {
    **_PLAIN,
    **_ROLES,
    **_CONTENTS,
    **_ODD_TEXTS,
    **_ENDINGS,
    **_THOUGHTS,
    **_OPTIONS,
}

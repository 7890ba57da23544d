"""Prompts without a chat, for /v1/completions."""

from typing import Any, Final

_Body = dict[str, Any] | str

_TEXT: Final = "What is the weather in Paris today?"
_IDS: Final = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def _ask(prompt: Any = _TEXT, **members: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 4, **members}


BODIES: Final[dict[str, _Body]] = {
    "text": _ask(),
    "ids": _ask(_IDS),
    "ids-in-list": _ask([_IDS]),
    "one-text-in-list": _ask([_TEXT]),
    "two-texts": _ask([_TEXT, "And tomorrow?"]),
    "two-lists-of-ids": _ask([_IDS, _IDS[:3]]),
    "mixed": _ask([_TEXT, _IDS]),
    "empty": _ask(""),
    "empty-list": _ask([]),
    "empty-text-in-list": _ask([""]),
    "null": _ask(None),
    "missing": {"max_tokens": 4},
    "number": _ask(5),
    "ids-beyond-vocabulary": _ask([5, 100000]),
    "ids-negative": _ask([5, -1]),
    "ids-float": _ask([5.0, 6.5]),
    "ids-true": _ask([True, 5]),
    "object": _ask({"prompt": _TEXT}),
    "stream": _ask(stream=True),
    "two-choices": _ask(n=2),
    "best-of": _ask(best_of=2),
    "echo": _ask(echo=True),
    "echo-nothing-more": _ask(echo=True, max_tokens=0),
    "suffix": _ask(suffix=" Thank you."),
    "suffix-empty": _ask(suffix=""),
    "suffix-null": _ask(suffix=None),
    "prompt-logprobs": _ask(prompt_logprobs=1),
    "prompt-logprobs-none": _ask(prompt_logprobs=0),
    "logprobs": _ask(logprobs=2),
    "echo-with-logprobs": _ask(echo=True, logprobs=1),
    "no-special-tokens": _ask(add_special_tokens=False),
    "special-tokens": _ask(add_special_tokens=True),
    "special-tokens-null": _ask(add_special_tokens=None),
    "ids-with-special-tokens": _ask(_IDS, add_special_tokens=True),
    "truncate": _ask(truncate_prompt_tokens=5),
    "truncate-to-model": _ask(truncate_prompt_tokens=-1),
    "truncate-zero": _ask(truncate_prompt_tokens=0),
    "truncate-ids": _ask(_IDS, truncate_prompt_tokens=5),
    "truncate-right": _ask(truncate_prompt_tokens=5, truncation_side="right"),
    "truncate-ids-right": _ask(_IDS, truncate_prompt_tokens=5, truncation_side="right"),
    "truncate-two": _ask([_TEXT, "And tomorrow? And the day after it?"], truncate_prompt_tokens=5),
    "truncate-too-long": _ask("question " * 20000, truncate_prompt_tokens=-1),
    "truncate-without-special-tokens": _ask(truncate_prompt_tokens=5, add_special_tokens=False),
    "too-long": _ask("question " * 20000),
    "long": _ask("The weather of a city is sunny. " * 60),
    "cache-salt": _ask(cache_salt="tenant"),
    "cache-salt-empty": _ask(cache_salt=""),
    "embeds": _ask(None, prompt_embeds="AAAA"),
    "text-and-embeds": _ask(prompt_embeds="AAAA"),
    "json-object": _ask(response_format={"type": "json_object"}),
    "structured-outputs": _ask(structured_outputs={"regex": "[a-z]+"}),
    "special-token-in-text": _ask("<|im_start|>user\nhi<|im_end|>"),
    "first-token-in-text": _ask("<|begin_of_text|>hi"),
    "unicode": _ask("Grüße, 你好, 👩‍👩‍👧‍👦, e\u0301, \u200b."),
    "lone-surrogate": '{"model":"m","prompt":"a\\ud800b","max_tokens":4}',
    "null-character": '{"model":"m","prompt":"a\\u0000b","max_tokens":4}',
    "blanks": _ask("   \n\n  "),
    "doubled-key": '{"model":"m","prompt":"first","prompt":"second","max_tokens":4}',
    "lora-path": _ask(lora_path="adapter"),
    "beam-search": _ask(use_beam_search=True, n=2),
}

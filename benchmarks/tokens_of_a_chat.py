"""Measures the tokens of a chat's next turn, compared with encoding the whole chat.

    python -m benchmarks.tokens_of_a_chat [--rounds 40] [--vocabulary 16000]

Chats with templates shaped like those of real models grow turn by turn; each turn adds about
two kilobytes, on top of a system prompt of 16 kB. "whole" is one call that encodes the rendered
text of the last turn. The other figures are steps of a request: reading the body, rendering,
encoding. Times are in microseconds, the median over rounds. Each round is a new chat, so only
its own earlier turns are cached; all chats have the same tools, as with agents. The tokenizers
are trained on this repository.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from extproc.clock import SystemClock
from extproc.engines.engine import DEFAULT_ENGINE
from extproc.tokenization.chat_template import ChatTemplates
from extproc.tokenization.encoder import EncoderSettings, PromptEncoder
from extproc.tokenization.prompts import read_prompt
from extproc.tokenization.tokenizer_files import read_tokenizer
from tests.unit.tokenization.small_tokenizers import (
    CHATML_TOKENS,
    FAMILIES,
    LLAMA_SPLIT,
    LLAMA_TOKENS,
    O200K_SPLIT,
    QWEN_SPLIT,
    THOUGHT_TOKENS,
    byte_level_bpe,
    model_folder,
    special,
    template,
)

SGLANG = DEFAULT_ENGINE.rules

_TURNS: Final = 8
_SYSTEM_CHARS: Final = 16_000
_TOOLS: Final = 20
_QUESTION_CHARS: Final = 400
_ANSWER_CHARS: Final = 1_700
_PATH: Final = "/v1/chat/completions"
_SOURCES: Final = Path(__file__).parent.parent
_KINDS: Final[dict[str, tuple[str, list[AddedToken], bool]]] = {
    "llama": (LLAMA_SPLIT, special(LLAMA_TOKENS), False),
    "qwen": (QWEN_SPLIT, special([*CHATML_TOKENS, *THOUGHT_TOKENS]), True),
    "hermes": (O200K_SPLIT, special(CHATML_TOKENS), False),
}


class _Words:
    """Prose and code of this repository, shuffled by lines, so that all chats differ."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        files = [*_SOURCES.glob("extproc/**/*.py"), *_SOURCES.glob("docs/**/*.md")]
        self.sources = [file.read_text() for file in sorted(files)]
        self._lines = [line for text in self.sources for line in text.splitlines() if line]

    def text(self, chars: int) -> str:
        lines: list[str] = []
        while chars > 0:
            lines.append(self._random.choice(self._lines))
            chars -= len(lines[-1]) + 1
        return "\n".join(lines)


def _chat(words: _Words) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": words.text(_SYSTEM_CHARS)}]
    for _ in range(_TURNS):
        messages.append({"role": "user", "content": words.text(_QUESTION_CHARS)})
        messages.append({"role": "assistant", "content": words.text(_ANSWER_CHARS)})
    return messages[:-1]


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, (time.perf_counter() - started) * 1e6


def _tools(words: _Words, count: int) -> list[dict[str, Any]]:
    def parameter() -> dict[str, str]:
        return {"type": "string", "description": words.text(80)}

    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{n}",
                "description": words.text(400),
                "parameters": {
                    "type": "object",
                    "properties": {f"parameter_{p}": parameter() for p in range(6)},
                    "required": ["parameter_0"],
                },
            },
        }
        for n in range(count)
    ]


async def _family(family: str, rounds: int, vocabulary: int, tool_count: int) -> None:
    words = _Words(1)
    tools = _tools(words, tool_count)
    split, tokens, nfc = _KINDS[family]
    trained = byte_level_bpe(split, tokens, nfc=nfc, vocabulary=vocabulary, texts=words.sources)
    with tempfile.TemporaryDirectory() as temporary:
        config = {**FAMILIES[family][1], "chat_template": template(family)}
        folder = model_folder(Path(temporary), trained, config)
        encoder = PromptEncoder.load(folder, EncoderSettings(), SystemClock())
        files = read_tokenizer(folder)
        templates = ChatTemplates(files)
        figures: dict[str, list[float]] = {}
        for _ in range(rounds):
            chat = _chat(words)
            measured = await _round(encoder, templates, files.tokenizer, chat, tools)
            for name, value in measured.items():
                figures.setdefault(name, []).append(value)
        encoder.close()
    medians = {name: median(values) for name, values in figures.items()}
    ratio = medians["turn 8: encode"] / medians["whole: encode"]
    ratio_all = medians["turn 8: all"] / medians["whole: encode"]
    print(f"\n{family}, {tool_count} tools: cache {'on' if encoder.stats.cached else 'off'}")
    for name, value in medians.items():
        print(f"  {name:34} {value:10.0f}")
    print(f"  {'turn 8 over whole, encode alone':34} {ratio:10.3f}")
    print(f"  {'turn 8 over whole, all of it':34} {ratio_all:10.3f}")


async def _round(
    encoder: PromptEncoder,
    templates: ChatTemplates,
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    tools: list[dict[str, Any]],
) -> dict[str, float]:
    bodies = [
        json.dumps({"messages": messages[: 2 + 2 * turn], "tools": tools}).encode()
        for turn in range(_TURNS)
    ]
    for body in bodies[:-1]:
        await encoder.encode(read_prompt(SGLANG, _PATH, body))
    body = bodies[-1]
    prompt, read = _timed(lambda: read_prompt(SGLANG, _PATH, body))
    rendered, render = _timed(lambda: templates.render(prompt.chat, 1 << 22))
    started = time.perf_counter()
    encoded = await encoder.encode(prompt)
    render_and_encode = (time.perf_counter() - started) * 1e6
    whole, alone = _timed(lambda: tokenizer.encode(rendered.text, add_special_tokens=False))
    (fast,), alone_fast = _timed(
        lambda: tokenizer.encode_batch_fast([rendered.text], add_special_tokens=False)
    )
    assert encoded.ids is not None
    assert encoded.ids.tolist() == whole.ids == fast.ids
    return {
        "body, bytes": len(body),
        "tokens": len(encoded.ids),
        "turn 8: read_prompt": read,
        "turn 8: render": render,
        "turn 8: encode": render_and_encode - render,
        "turn 8: all": read + render_and_encode,
        "whole: encode": alone,
        "whole: encode_batch_fast": alone_fast,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    options = parser.parse_args()
    for tool_count in (0, _TOOLS):
        for family in _KINDS:
            asyncio.run(_family(family, options.rounds, options.vocabulary, tool_count))


if __name__ == "__main__":
    main()

"""The encoder of a model: its limits, threads and counters, and texts to ids and back."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extproc.clock import SystemClock
from extproc.engines.engine import DEFAULT_ENGINE, engine_named
from extproc.tokenization import chat_template
from extproc.tokenization.encoder import Encoded, EncoderSettings, PromptEncoder
from extproc.tokenization.errors import (
    EncodeFailedError,
    EncoderBusyError,
    TextTooLongError,
    TokenizerError,
    UnknownTokenError,
)
from extproc.tokenization.fields import decode_fields
from extproc.tokenization.plain_encoder import PlainEncoder
from extproc.tokenization.pool import BoundedPool
from extproc.tokenization.prompts import Prompt, read_prompt
from extproc.tokenization.reasons import REASONS
from tests.unit.tokenization.small_tokenizers import (
    CHATML_TOKENS,
    LLAMA_SPLIT,
    byte_level_bpe,
    family_folder,
    model_folder,
    o200k,
    special,
    template,
)

SGLANG = DEFAULT_ENGINE.rules
CHAT = "/v1/chat/completions"


def _encoder(folder: Path, family: str = "qwen", **settings: Any) -> PromptEncoder:
    return PromptEncoder.load(
        family_folder(family, folder), EncoderSettings(**settings), SystemClock()
    )


def _text(text: str) -> Prompt:
    return Prompt(text=text)


def _chat(*contents: str) -> Prompt:
    messages = [{"role": "user", "content": content} for content in contents]
    return read_prompt(SGLANG, "/v1/chat/completions", json.dumps({"messages": messages}).encode())


def _words(count: int, salt: str = "") -> str:
    return " ".join(f"word{salt}{n}" for n in range(count))


async def test_a_prompt_without_tokens_keeps_its_reason(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path)
    assert await encoder.encode(Prompt(reason="batch")) == Encoded(None, "batch")
    assert await encoder.encode(Prompt()) == Encoded(None, "no_text")
    assert encoder.stats.failures == {**dict.fromkeys(REASONS, 0), "batch": 1, "no_text": 1}


async def test_the_ids_of_a_body_are_its_tokens(tmp_path: Path) -> None:
    prompt = read_prompt(SGLANG, "/generate", b'{"input_ids": [3, 1]}')
    encoded = await _encoder(tmp_path).encode(prompt)
    assert encoded.ids is prompt.ids
    assert encoded.reason == ""


async def test_a_model_without_a_template_has_tokens_for_texts_only(tmp_path: Path) -> None:
    encoder = PromptEncoder.load(model_folder(tmp_path, o200k()), EncoderSettings(), SystemClock())
    assert await encoder.encode(_chat("x")) == Encoded(None, "no_chat_template")
    encoded = await encoder.encode(_text("x"))
    assert encoded.ids is not None
    assert encoded.ids.tolist() == o200k().encode("x").ids


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": "{% if %}"}, "does not compile"),
        ({"chat_template": 7}, "neither"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path, o200k(), config)
    with pytest.raises(TokenizerError, match=message) as caught:
        PromptEncoder.load(folder, EncoderSettings(), SystemClock())
    assert str(tmp_path) in str(caught.value)


async def test_prompts_over_the_limits_are_too_long(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, max_chars=100, max_messages=3)
    assert (await encoder.encode(_text("x" * 100))).reason == ""
    assert (await encoder.encode(_text("x" * 101))).reason == "too_long"
    assert (await encoder.encode(_chat("x" * 90))).reason == "too_long"
    assert (await encoder.encode(_chat("a", "b", "c"))).reason in ("", "too_long")
    assert (await encoder.encode(_chat("a", "b", "c", "d"))).reason == "too_long"
    ids = np.arange(101, dtype=np.uint64)
    assert (await encoder.encode(Prompt(ids=ids))).reason == "too_long"
    assert (await encoder.encode(Prompt(ids=ids[:100]))).reason == ""
    assert encoder.stats.failures["too_long"] >= 4
    with pytest.raises(TextTooLongError):
        await encoder.tokenize("x" * 101)


async def test_long_new_text_is_encoded_in_a_thread(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, "llama", inline_chars=1000)
    stats = encoder.stats
    await encoder.encode(_text(_words(50)))
    assert (stats.inline, stats.off_loop) == (1, 0)
    text = _words(1000)
    first = await encoder.encode(_text(text))
    assert (stats.inline, stats.off_loop) == (1, 1)
    again = await encoder.encode(_text(text))
    assert (stats.inline, stats.off_loop) == (2, 1)
    assert first.ids is not None
    assert again.ids is not None
    assert first.ids.tolist() == again.ids.tolist()
    assert stats.segments > stats.segment_hits > 5
    assert stats.cache_entries > 0
    assert stats.cache_bytes > len(text)
    assert stats.seconds > 0
    assert (stats.evictions, stats.rejected_busy) == (0, 0)
    assert (stats.cached, stats.uncached_because) == (True, "")


async def test_the_loop_runs_while_a_thread_encodes(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, "llama", cache_bytes=0)
    task = asyncio.create_task(encoder.encode(_text(_words(100_000))))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    encoded = task.result()
    assert encoded.ids is not None
    assert len(encoded.ids) > 100_000
    assert turns > 100


async def test_large_bodies_are_read_and_rendered_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _encoder(tmp_path, inline_body_bytes=1000, inline_messages=3)
    threads: list[str] = []
    render = encoder._templates.render

    def noting(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return render(*arguments, **options)

    monkeypatch.setattr(encoder._templates, "render", noting)
    for content in ("short", _words(500)):
        body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
        prompt = await encoder.read(SGLANG, "/v1/chat/completions", body, None)
        encoded = await encoder.encode(prompt)
        assert encoded.ids is not None
        direct = await encoder.encode(_chat(content))
        assert direct.ids is not None
        assert encoded.ids.tolist() == direct.ids.tolist()
    assert [name.startswith("tokens") for name in threads] == [False, False, True, True]
    threads.clear()
    for count in (3, 4):
        await encoder.encode(_chat(*["a"] * count))
    assert [name.startswith("tokens") for name in threads] == [False, True]


async def test_large_bodies_that_are_not_json_are_malformed(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, inline_body_bytes=1000, max_body_bytes=2000)
    assert (await encoder.read(SGLANG, "/v1/completions", b"{" * 2000, None)).reason == "malformed"
    assert (await encoder.read(SGLANG, "/v1/completions", b"{" * 16_001, None)).reason == "too_long"


# -- a pool that is full


class _Gate:
    """Work that goes on until it is let go."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = 0

    def __call__(self) -> str:
        self.begun += 1
        assert self.open.wait(30)
        return "done"


@pytest.fixture
def gate() -> Any:
    gate = _Gate()
    yield gate
    gate.open.set()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_the_queue_of_the_pool_is_bounded(gate: _Gate) -> None:
    pool = BoundedPool(1, 2)
    tasks = [asyncio.create_task(pool.run(gate)) for _ in range(3)]
    await _until(lambda: gate.begun == 1)
    with pytest.raises(EncoderBusyError):
        await pool.run(gate)
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    tasks.append(asyncio.create_task(pool.run(gate)))
    gate.open.set()
    assert await asyncio.gather(tasks[0], *tasks[2:]) == ["done"] * 3
    assert await pool.run(gate) == "done"
    pool.close()


async def test_work_of_a_cancelled_caller_counts_until_it_ends(gate: _Gate) -> None:
    pool = BoundedPool(1, 0)
    task = asyncio.create_task(pool.run(gate))
    await _until(lambda: gate.begun == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(EncoderBusyError):
        await pool.run(gate)
    gate.open.set()
    await _until(lambda: pool._pending == 0)
    assert await pool.run(gate) == "done"
    pool.close()


async def test_a_failure_in_a_thread_is_raised_to_its_caller() -> None:
    def failing() -> None:
        raise EncodeFailedError("x")

    pool = BoundedPool(1, 0)
    for _ in range(3):
        with pytest.raises(EncodeFailedError):
            await pool.run(failing)
    pool.close()


async def test_a_closed_pool_refuses_work() -> None:
    pool = BoundedPool(1, 0)
    pool.close()
    for _ in range(2):
        with pytest.raises(EncoderBusyError, match="closed"):
            await pool.run(lambda: None)


async def test_with_a_full_queue_the_reason_is_busy(tmp_path: Path, gate: _Gate) -> None:
    encoder = _encoder(tmp_path, threads=1, max_waiting=0, inline_chars=100, inline_body_bytes=5000)
    occupied = asyncio.create_task(encoder._pool.run(gate))
    await _until(lambda: gate.begun == 1)
    long = _words(100)
    assert await encoder.encode(_text(long)) == Encoded(None, "busy")
    assert await encoder.encode(_chat(_words(1000))) == Encoded(None, "busy")
    assert (await encoder.read(SGLANG, "/v1/completions", b" " * 6000, None)).reason == "busy"
    assert encoder.stats.rejected_busy == 2
    with pytest.raises(EncoderBusyError):
        await encoder.tokenize(long)
    # What is short needs no thread.
    assert (await encoder.encode(_text("short"))).reason == ""
    gate.open.set()
    await occupied
    assert (await encoder.encode(_text(long))).reason == ""
    encoder.close()
    assert (await encoder.encode(_text(_words(100, "new")))).reason == "busy"


async def test_a_text_that_the_tokenizer_refuses_is_an_encode_error(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path)
    assert await encoder.encode(_text("\ud800")) == Encoded(None, "encode_error")
    with pytest.raises(EncodeFailedError):
        await encoder.tokenize("\ud800")


# -- texts and ids by themselves


async def test_a_text_is_tokenized_without_added_tokens_and_back(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, "llama")
    text = "Hello <|eot_id|> wörld"
    ids = await encoder.tokenize(text)
    assert all(type(one) is int for one in ids)
    assert await encoder.detokenize(ids, skip_special_tokens=False) == text
    assert await encoder.detokenize(ids, skip_special_tokens=True) == "Hello  wörld"
    assert await encoder.tokenize("") == []
    assert await encoder.detokenize([], skip_special_tokens=False) == ""


async def test_many_ids_become_text_in_a_thread(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, "llama")
    text = _words(5000)
    ids = await encoder.tokenize(text)
    assert await encoder.detokenize(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("one", [-1, 10**6, 2**40, 2**70])
async def test_ids_outside_the_vocabulary_are_refused(one: int, tmp_path: Path) -> None:
    with pytest.raises(UnknownTokenError, match=str(one)):
        await _encoder(tmp_path).detokenize([1, one], skip_special_tokens=False)


async def test_responses_in_the_harmony_format_have_no_tokens(tmp_path: Path) -> None:
    tokens = special([*CHATML_TOKENS, "<|channel|>", "<|constrain|>", "<|call|>"])
    tokenizer = byte_level_bpe(LLAMA_SPLIT, tokens)
    folder = model_folder(tmp_path, tokenizer, {"chat_template": template("chatml")})
    encoder = PromptEncoder.load(folder, EncoderSettings(), SystemClock())
    body = b'{"input": "x", "messages": [{"role": "user", "content": "x"}]}'
    refused = await encoder.encode(read_prompt(SGLANG, "/v1/responses", body))
    assert refused.reason == "rendered_by_engine"
    assert (await encoder.encode(read_prompt(SGLANG, "/v1/chat/completions", body))).reason == ""


# -- many small parts, in bodies that are not large


def _call(arguments: str) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}


def _calls(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
        {"role": "user", "content": "x"},
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "<|im_end|>" * 24_000}],
        _calls(*[_call('{"a": [1, 2]}')] * 2400),
        _calls(_call(json.dumps({"a": [1] * 80_000}))),
    ],
    ids=["special tokens", "calls", "arguments"],
)
async def test_many_small_parts_take_little_time_of_the_loop(
    tmp_path: Path, messages: list[dict[str, Any]]
) -> None:
    encoder = _encoder(tmp_path)
    path, body = "/v1/chat/completions", json.dumps({"messages": messages}).encode()
    assert len(body) < 256 * 1024
    fields = decode_fields(path, body)
    # Times of the processor, which do not depend on what else runs on the machine.
    of_loop, of_all = time.thread_time(), time.process_time()
    encoded = await encoder.encode(await encoder.read(SGLANG, path, body, fields))
    of_loop, of_all = time.thread_time() - of_loop, time.process_time() - of_all
    assert encoded.ids is not None
    assert of_loop < of_all / 3


@pytest.mark.parametrize(
    "text", ["a" * 200_000, "7" * 200_000, "\u00e9\u0302" * 50_000, "👩‍👦" * 30_000]
)
async def test_long_words_are_encoded_while_other_threads_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A thread that encodes without letting others run holds the event loop, too."""
    few, most = PlainEncoder.few, 0

    def counting(self: PlainEncoder, words: Sequence[str]) -> list[bytes]:
        nonlocal most
        most = max(most, sum(map(len, words)))
        return few(self, words)

    monkeypatch.setattr(PlainEncoder, "few", counting)
    encoder = _encoder(tmp_path)
    path, body = "/v1/completions", json.dumps({"prompt": text}, ensure_ascii=False).encode()
    encoded = await encoder.encode(
        await encoder.read(SGLANG, path, body, decode_fields(path, body))
    )
    assert encoded.ids is not None
    assert most <= 1024


async def test_many_small_parts_wait_in_the_bounded_queue(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path, threads=1, max_waiting=0)
    path = "/v1/chat/completions"
    body = json.dumps({"messages": _calls(*[_call("{}")] * 2000)}).encode()
    release = threading.Event()
    running = asyncio.create_task(encoder._pool.run(release.wait))
    await asyncio.sleep(0)
    prompt = await encoder.read(SGLANG, path, body, decode_fields(path, body))
    assert prompt.reason == "busy"
    release.set()
    await running


async def test_a_long_message_is_rendered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _encoder(tmp_path)
    render, rendered = encoder._templates.render, 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal rendered
        rendered += 1
        return render(*arguments, **options)

    # Only the steps are looked at: a busy machine may use up the time.
    monkeypatch.setattr(chat_template, "SECONDS_MAX", 1000.0)
    monkeypatch.setattr(encoder._templates, "render", counting)
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>a</think>" + "word " * 40_000},
        {"role": "user", "content": "x"},
    ]
    body = json.dumps({"messages": messages}).encode()
    encoded = await encoder.encode(read_prompt(SGLANG, "/v1/chat/completions", body))
    assert encoded.ids is not None
    assert rendered == 1


async def test_a_rendering_that_takes_long_begins_again_in_a_thread(tmp_path: Path) -> None:
    source = (
        "{% for n in range(30000) %}{% endfor %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    folder = model_folder(tmp_path, o200k(), {"chat_template": source})
    encoder = PromptEncoder.load(folder, EncoderSettings(), SystemClock())
    encoded = await encoder.encode(_chat("x"))
    assert encoded.ids is not None
    assert encoded.ids.tolist() == o200k().encode("x").ids


# -- chats with images

_SEEING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|im_start|>image<|im_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)


def _seeing(folder: Path, **settings: Any) -> PromptEncoder:
    path = family_folder("qwen", folder)
    (path / "chat_template.jinja").write_text(_SEEING)
    return PromptEncoder.load(path, EncoderSettings(**settings), SystemClock())


def _with_image(url: str, system: str = "Be brief.") -> bytes:
    image = {"type": "image_url", "image_url": {"url": url}}
    content = [{"type": "text", "text": "What is this"}, image]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    return json.dumps({"model": "m", "messages": messages}).encode()


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
async def test_of_a_chat_with_an_image_the_beginning_is_known(tmp_path: Path, engine: Any) -> None:
    encoder = _seeing(tmp_path)
    body = _with_image("data:" + "A" * 10_000)
    prompt = await encoder.read(engine_named(engine).rules, CHAT, body, None)
    assert (prompt.media, prompt.media_bytes) == (1, len("image_url") + len("data:") + 10_000)
    found = await encoder.encode(prompt)
    assert (found.ids, found.reason) == (None, "multimodal")
    assert found.beginning is not None
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is"
    assert found.beginning.tolist() == await encoder.tokenize(text)
    assert sum(encoder.stats.failures.values()) == 0
    encoder.close()


async def test_of_a_chat_with_a_placeholder_as_text_less_is_known(tmp_path: Path) -> None:
    encoder = _seeing(tmp_path)
    body = _with_image("http://x", system="You see <image> here.")
    found = await encoder.encode(await encoder.read(SGLANG, CHAT, body, None))
    assert found.beginning is not None
    assert found.beginning.tolist() == await encoder.tokenize("<|im_start|>system\nYou see")
    encoder.close()


async def test_a_template_that_shows_no_image_leaves_nothing_known(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path)
    body = _with_image("http://x")
    for engine in ("sglang", "vllm"):
        found = await encoder.encode(
            await encoder.read(engine_named(engine).rules, CHAT, body, None)
        )
        assert (found.reason, found.beginning) == ("multimodal", None)
    assert encoder.stats.failures["multimodal"] == 2
    encoder.close()


async def test_a_body_may_be_larger_if_it_is_an_image(tmp_path: Path) -> None:
    encoder = _seeing(tmp_path, inline_body_bytes=1000, max_body_bytes=20_000)
    large = _with_image("data:" + "A" * 100_000)
    found = await encoder.encode(await encoder.read(SGLANG, CHAT, large, None))
    assert found.beginning is not None
    for body in (
        _with_image("data:" + "A" * 200_000),
        json.dumps({"messages": [{"role": "user", "content": "a"}] * 3000}).encode(),
    ):
        assert (await encoder.read(SGLANG, CHAT, body, None)).reason == "too_long"
    encoder.close()

"""Turns prompts into token ids without holding the event loop.

Short work is done on the loop, since handing it to a thread costs more than the work itself.
Large chats are rendered, and more than a few thousand new characters are encoded, in a small pool
of threads; the tokenizer lets the loop run meanwhile. The queue of the pool is bounded: a request
without tokens is still routed by load, while a request that waits is late.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from extproc.clock import Clock
from extproc.tokenization.body_shape import (
    LARGEST_WITH_MEDIA,
    has_many_parts,
    is_mostly_media,
)
from extproc.tokenization.chat_template import ChatTemplates, RenderedChat
from extproc.tokenization.errors import (
    EncodeFailedError,
    EncoderBusyError,
    TextTooLongError,
    TokenizerError,
    UnknownTokenError,
    UnmappableError,
)
from extproc.tokenization.fields import BodyFields
from extproc.tokenization.pool import BoundedPool
from extproc.tokenization.prompts import (
    Chat,
    ContentFormat,
    Prompt,
    PromptRules,
    prompt_of,
    read_prompt,
)
from extproc.tokenization.reasons import (
    BUSY,
    ENCODE_ERROR,
    MULTIMODAL,
    NO_TEXT,
    REASONS,
    RENDERED_BY_ENGINE,
    TEMPLATE_LIMIT,
    TOO_LONG,
    UNSUPPORTED,
)
from extproc.tokenization.text_encoder import TextEncoder
from extproc.tokenization.tokenizer_files import read_tokenizer
from extproc.tokenization.vocabulary import Vocabulary

__all__ = ["Encoded", "EncoderSettings", "EncoderStats", "PromptEncoder"]

_Result = TypeVar("_Result")

# So many ids are turned into text on the loop.
_DECODED_INLINE_MAX_TOKENS: Final = 4096
# Of the time of a rendering: 5 ms. What takes more begins again in a thread.
_INLINE_SHARE: Final = 0.02


class Encoded(NamedTuple):
    """The token ids of a prompt (uint64), or None with the reason.

    `member` is the member of the body that the reason is about, empty if it is not known. Of a
    prompt with images, audio or video, `beginning` are the ids before the first of them, as far
    as they do not depend on what follows; None if they are not known.
    """

    ids: NDArray[np.uint64] | None
    reason: str
    member: str = ""
    beginning: NDArray[np.uint64] | None = None


class EncoderSettings(Struct, frozen=True, kw_only=True):
    """How one model's prompts are encoded.

    `template_name` picks one of several chat templates for all requests, as the engine's
    `--hf-chat-template-name` does; `template_kwargs` are the engine's
    `--default-chat-template-kwargs`. `content_format` is vLLM's `--chat-template-content-format`,
    None for "auto", and `hides_unchosen_tools` its `--exclude-tools-when-tool-choice-none`. A
    prompt gets no tokens if its text or rendered chat has
    more than `max_chars` characters, if it has more than `max_chars` token ids or `max_messages`
    messages, or if its body is larger than `max_body_bytes`, eight times that for bodies that
    consist of images, audio or video. Up to `inline_chars` new characters
    are encoded on the event loop, and chats of up to `inline_body_bytes` and `inline_messages`
    are rendered there. All larger work waits for one of `threads`, in a queue of `max_waiting`.
    """

    template_name: str | None = None
    template_kwargs: dict[str, Any] = {}
    content_format: ContentFormat | None = None
    hides_unchosen_tools: bool = False
    cache_bytes: int = 64 * 1024 * 1024
    max_chars: int = 4_000_000
    # Decoding JSON holds the interpreter, even in a thread.
    max_body_bytes: int = 8 * 1024 * 1024
    max_messages: int = 10_000
    inline_chars: int = 4096
    inline_body_bytes: int = 256 * 1024
    # A template may go through all messages for each message.
    inline_messages: int = 256
    threads: int = 2
    max_waiting: int = 64


class EncoderStats:
    """Numbers since the start, for a collector of metrics.

    `failures` counts prompts without tokens by reason. `seconds` is the time that all threads
    together spent on rendering and encoding, without waiting.
    """

    def __init__(self, texts: TextEncoder) -> None:
        self._texts = texts
        self.inline = 0
        self.off_loop = 0
        self.seconds = 0.0
        self.failures = dict.fromkeys(REASONS, 0)

    @property
    def segments(self) -> int:
        """Number of pieces that were looked up."""
        return self._texts.segments

    @property
    def segment_hits(self) -> int:
        """Number of pieces whose tokens were in the cache."""
        return self._texts.segment_hits

    @property
    def cache_bytes(self) -> int:
        return self._texts.cache_bytes

    @property
    def cache_entries(self) -> int:
        return len(self._texts.cache)

    @property
    def evictions(self) -> int:
        return self._texts.cache.evictions

    @property
    def rejected_busy(self) -> int:
        return self.failures[BUSY]

    @property
    def cached(self) -> bool:
        """True if pieces are cached. If not, `uncached_because` has the reason.

        That is empty if the settings turn the cache off.
        """
        return self._texts.cached

    @property
    def uncached_because(self) -> str:
        return self._texts.unsafe


class PromptEncoder:
    """The tokenizer and the chat templates of one model, for use in one event loop."""

    def __init__(
        self,
        texts: TextEncoder,
        templates: ChatTemplates,
        vocabulary: Vocabulary,
        settings: EncoderSettings,
        clock: Clock,
    ) -> None:
        self._texts = texts
        self._templates = templates
        self._vocabulary = vocabulary
        self._settings = settings
        self._clock = clock
        self._pool = BoundedPool(settings.threads, settings.max_waiting)
        self.stats = EncoderStats(texts)

    @classmethod
    def load(cls, path: Path, settings: EncoderSettings, clock: Clock) -> "PromptEncoder":
        """Read a model's folder, or a tokenizer.json and the files beside it.

        Raises TokenizerError, which names the file.
        """
        files = read_tokenizer(path)
        templates = ChatTemplates(
            files,
            template_name=settings.template_name,
            default_kwargs=settings.template_kwargs,
            content_format=settings.content_format,
            hides_unchosen_tools=settings.hides_unchosen_tools,
        )
        vocabulary = Vocabulary(files.tokenizer, files.special_tokens)
        try:
            texts = TextEncoder(files.tokenizer, settings.cache_bytes)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error
        return cls(texts, templates, vocabulary, settings, clock)

    async def read(
        self,
        rules: PromptRules,
        path: str,
        body: bytes | bytearray,
        fields: BodyFields | None,
    ) -> Prompt:
        """The prompt in a body by an engine's rules, from decoded `fields` where they are given.

        Without `fields` the body is decoded here, in a thread if it is large. It is not decoded
        if it is larger than `max_body_bytes` or the queue is full; then the prompt has a reason.
        """
        if fields is not None:
            if not has_many_parts(body):
                return prompt_of(rules, path, fields, len(body))
            # The size lets the rendering, too, take place in a thread.
            size = max(len(body), self._settings.inline_body_bytes + 1)
            try:
                return await self._pool.run(lambda: prompt_of(rules, path, fields, size))
            except EncoderBusyError:
                return Prompt(reason=BUSY, body_bytes=size)
        if len(body) <= self._settings.inline_body_bytes:
            return read_prompt(rules, path, body)
        if len(body) > self._settings.max_body_bytes * LARGEST_WITH_MEDIA:
            return Prompt(reason=TOO_LONG, body_bytes=len(body))
        try:
            return await self._pool.run(lambda: self._read_large(rules, path, body))
        except EncoderBusyError:
            return Prompt(reason=BUSY, body_bytes=len(body))

    def _read_large(self, rules: PromptRules, path: str, body: bytes | bytearray) -> Prompt:
        if len(body) > self._settings.max_body_bytes and not is_mostly_media(body):
            return Prompt(reason=TOO_LONG, body_bytes=len(body))
        return read_prompt(rules, path, body)

    async def encode(self, prompt: Prompt) -> Encoded:
        """The token ids that the engine will compute for a prompt, or the reason without them."""
        member = ""
        try:
            if prompt.reason:
                raise UnmappableError(prompt.reason, prompt.member)
            if prompt.ids is None:
                ids = await self._encode(prompt)
            elif len(prompt.ids) <= self._settings.max_chars:
                ids = prompt.ids
            else:
                raise UnmappableError(TOO_LONG)
            if prompt.chat is not None and prompt.chat.has_media:
                return Encoded(None, MULTIMODAL, beginning=ids)
            keep = prompt.keep_tokens
            if keep is not None and keep < len(ids):
                ids = self._cut(ids, keep, prompt)
            if not len(ids):
                raise UnmappableError(NO_TEXT)
            return Encoded(ids, "")
        except UnmappableError as refused:
            reason, member = refused.reason, refused.member
        except EncoderBusyError:
            reason = BUSY
        except EncodeFailedError:
            reason = ENCODE_ERROR
        self.stats.failures[reason] += 1
        return Encoded(None, reason, member)

    async def tokenize(self, text: str) -> list[int]:
        """The ids of a text, for /v1/tokenize. No special tokens are added, and those written in
        the text are encoded as special tokens.

        Raises TextTooLongError, EncodeFailedError and EncoderBusyError.
        """
        if len(text) > self._settings.max_chars:
            raise TextTooLongError(f"more than {self._settings.max_chars} characters")
        ids: list[int] = (await self._encode_text(text, False)).tolist()
        return ids

    async def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids; raises UnknownTokenError and EncoderBusyError."""
        for one in ids:
            if one not in self._vocabulary:
                raise UnknownTokenError(f"{one} is not a token id of this model")
        if len(ids) <= _DECODED_INLINE_MAX_TOKENS:
            return self._vocabulary.text(ids, skip_special_tokens)
        return await self._pool.run(lambda: self._vocabulary.text(ids, skip_special_tokens))

    def shown(self, ids: Sequence[int]) -> str:
        """The text of a few ids; those that are not in the vocabulary are shown as numbers."""
        if all(one in self._vocabulary for one in ids):
            return self._vocabulary.text(ids, False)
        return "".join(
            self._vocabulary.text([one], False) if one in self._vocabulary else f"<id {one}>"
            for one in ids
        )

    def close(self) -> None:
        """Cancel the work that is waiting. Running work finishes in its thread."""
        self._pool.close()

    async def _encode(self, prompt: Prompt) -> NDArray[np.uint64]:
        """All ids, or those before the first medium."""
        chat, settings = prompt.chat, self._settings
        if chat is None:
            if prompt.text is None:
                raise UnmappableError(NO_TEXT)
            if len(prompt.text) > settings.max_chars:
                raise UnmappableError(TOO_LONG)
            return await self._encode_text(prompt.text, prompt.with_special)
        if chat.length > settings.max_messages:
            raise UnmappableError(TOO_LONG)
        if self._vocabulary.harmony and chat.harmony_is_special:
            raise UnmappableError(RENDERED_BY_ENGINE)
        if chat.has_media and prompt.keep_tokens is not None:
            # How many of the kept tokens are those of media is not known.
            raise UnmappableError(MULTIMODAL)
        render = partial(self._render, chat)
        if prompt.body_bytes > settings.inline_body_bytes or chat.length > settings.inline_messages:
            rendered = await self._off_loop(render)
        else:
            try:
                rendered = self._at_once(partial(render, share=_INLINE_SHARE))
            except UnmappableError as refused:
                if refused.reason != TEMPLATE_LIMIT:
                    raise
                rendered = await self._off_loop(render)
        ids = await self._encode_text(rendered.text, rendered.with_special)
        if rendered.cut and rendered.with_special:
            _, after = self._texts.around or (0, 0)
            ids = ids[: len(ids) - after]
        if rendered.continued:
            # The engine encodes the beginning of the answer separately, with special tokens, and
            # then drops only the token that begins a text.
            more = await self._encode_text(rendered.continued, True)
            if len(more) and more[0] == self._vocabulary.first_token:
                more = more[1:]
            ids = np.concatenate((ids, more))
        return ids

    def _render(self, chat: Chat, *, share: float = 1.0) -> RenderedChat:
        """The text of a chat; before a medium, as far as its tokens do not depend on the medium."""
        rendered = self._templates.render(chat, self._settings.max_chars, share=share)
        if not rendered.cut:
            return rendered
        around = self._texts.around
        text = self._texts.certain_beginning(rendered.text)
        if not text or around is None or (rendered.text_encoded_twice and around != (0, 0)):
            raise UnmappableError(MULTIMODAL)
        return structs.replace(rendered, text=text)

    def _cut(self, ids: NDArray[np.uint64], keep: int, prompt: Prompt) -> NDArray[np.uint64]:
        """The ids that are kept of more than `keep`; raises UnmappableError."""
        if prompt.keep_side == "start":
            return ids[:keep]
        before, after = 0, 0
        chat = prompt.chat
        if (
            prompt.keep_side == "text_end"
            and prompt.ids is None
            and (prompt.with_special if chat is None else chat.with_special)
        ):
            around = self._texts.around
            if around is None:
                raise UnmappableError(UNSUPPORTED, "truncate_prompt_tokens")
            before, after = around
        if keep <= before + after:
            raise UnmappableError(UNSUPPORTED, "truncate_prompt_tokens")
        return np.concatenate((ids[:before], ids[len(ids) - keep + before :]))

    async def _encode_text(self, text: str, with_special: bool) -> NDArray[np.uint64]:
        texts = self._texts
        if len(text) > self._settings.inline_body_bytes or texts.has_many_pieces(text):
            self.stats.off_loop += 1
            return await self._off_loop(lambda: texts.encode(texts.look_up(text, with_special)))
        looked_up = self._at_once(partial(texts.look_up, text, with_special))
        if looked_up.missing_chars <= self._settings.inline_chars:
            self.stats.inline += 1
            return self._at_once(partial(texts.encode, looked_up))
        self.stats.off_loop += 1
        return await self._off_loop(partial(texts.encode, looked_up))

    def _at_once(self, work: Callable[[], _Result]) -> _Result:
        started = self._clock.monotonic()
        result = work()
        self.stats.seconds += self._clock.monotonic() - started
        return result

    async def _off_loop(self, work: Callable[[], _Result]) -> _Result:
        def timed() -> tuple[_Result, float]:
            started = self._clock.monotonic()
            return work(), self._clock.monotonic() - started

        result, seconds = await self._pool.run(timed)
        self.stats.seconds += seconds
        return result

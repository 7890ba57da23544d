"""Turns text into token ids, in pieces whose ids are cached.

Texts are cut into pieces only where that gives the same ids as the whole text; other tokenizers
get whole texts. A piece that is not in the cache is looked up by its words, where it can be cut
into words. Looking up and encoding are two steps: the first shows how much is left to encode, and
by that the caller decides whether the second needs a thread.
"""

import os
from itertools import islice
from threading import Lock
from typing import Any, Final

import msgspec
import numpy as np
import structlog
from msgspec import Struct
from numpy.typing import NDArray
from tokenizers import Tokenizer

from extproc.tokenization.caches import SegmentCache
from extproc.tokenization.certain_end import CertainEnd
from extproc.tokenization.errors import TokenizerError
from extproc.tokenization.pieces import PieceSplitter, SplitPlan, split_plan
from extproc.tokenization.plain_encoder import PlainEncoder, packed
from extproc.tokenization.samples import sample_texts
from extproc.tokenization.word_encoder import WordEncoder

__all__ = ["LookedUp", "TextEncoder"]

_log = structlog.get_logger()

# For shorter pieces an entry costs more than it saves.
_PIECE_MIN_CHARS: Final = 64
_PIECE_STRIDE_CHARS: Final = 1024
_PROOF_STRIDE_CHARS: Final = 8
_PROOF_TOKENS: Final = 48
_PROOF_WORDS_BYTES: Final = 1 << 20
# A text is looked at for many added tokens if it is longer.
_SHORT_TEXT_CHARS: Final = 16 * 1024
_MANY_TOKENS: Final = 1024
_STARTS_MAX: Final = 16
# One part in so many of the memory is for words.
_WORDS_SHARE: Final = 8


class _Serialised(Struct):
    """The parts of a tokenizer that decide how its texts can be cut, without the vocabulary."""

    added_tokens: list[dict[str, Any]]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    post_processor: dict[str, Any] | None
    model: "_Model"
    truncation: Any = None
    padding: Any = None


class _Model(Struct):
    type: str
    dropout: float | None = None


class LookedUp(Struct):
    """A text, and the tokens that are known of its pieces.

    `known` has the tokens of each piece, uint32, or None for a piece that is in `missing`, in
    the same order. `whole`: the text is not cut, and the tokenizer adds the special tokens.
    """

    known: list[bytes | None]
    missing: list[str]
    missing_chars: int
    with_special: bool
    whole: bool


class TextEncoder:
    """A tokenizer with a cache of pieces and words; safe to use from several threads.

    `cache_bytes` 0 turns the cache off. Raises TokenizerError for a tokenizer that does not
    serialise or cannot encode.
    """

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = tokenizer
        self._lock = Lock()
        self._plain = PlainEncoder(tokenizer)
        for_words = cache_bytes // _WORDS_SHARE
        self.cache = SegmentCache(cache_bytes - for_words)
        self.segments = 0
        self.segment_hits = 0
        plan = _plan(tokenizer)
        self.unsafe = plan.unsafe or _difference(tokenizer, plan)
        if self.unsafe:
            _log.warning("tokens_not_cached", reason=self.unsafe)
        self._before, self._after = (
            (packed(side) for side in plan.around) if plan.around else (b"", b"")
        )
        self._around_known = plan.around is not None
        tokens = plan.raw_tokens + plan.normalized_tokens
        self._token_starts = "".join({token[0] for token in tokens})
        self._certain = None if self.unsafe else CertainEnd(plan)
        self._splitter: PieceSplitter | None = None
        self._words: WordEncoder | None = None
        if not self.unsafe and cache_bytes:
            if plan.words is not None:
                self._words = WordEncoder(self._plain, plan.words, for_words)
            self._splitter = PieceSplitter(
                plan, min_chars=_PIECE_MIN_CHARS, stride_chars=_PIECE_STRIDE_CHARS
            )

    @property
    def cached(self) -> bool:
        """True if pieces are cached."""
        return self._splitter is not None

    @property
    def around(self) -> tuple[int, int] | None:
        """Number of special tokens before and after a text; None if it is not known."""
        if not self._around_known:
            return None
        return len(self._before) // 4, len(self._after) // 4

    def certain_beginning(self, text: str) -> str:
        """The beginning of a text that has the same tokens whatever follows the text.

        It is empty for a tokenizer whose texts cannot be cut.
        """
        return "" if self._certain is None else text[: self._certain.of(text)]

    @property
    def cache_bytes(self) -> int:
        """Memory taken by pieces and words."""
        return self.cache.bytes + (self._words.size_bytes if self._words is not None else 0)

    def has_many_pieces(self, text: str) -> bool:
        """True for a text that may have so many added tokens that cutting it takes long."""
        if len(text) <= _SHORT_TEXT_CHARS or self._splitter is None:
            return False
        starts = self._token_starts
        if len(starts) > _STARTS_MAX:
            return True
        return sum(map(text.count, starts)) > _MANY_TOKENS

    def look_up(self, text: str, with_special: bool) -> LookedUp:
        """Cut a text and find the tokens of its pieces.

        `with_special` adds the special tokens of the post-processor.
        """
        if self._splitter is None or (with_special and not self._around_known):
            return LookedUp([None], [text], len(text), with_special, True)
        pieces = self._splitter.split(text)
        get = self.cache.get
        with self._lock:
            known = [get(piece) for piece in pieces]
            missing = [piece for piece, tokens in zip(pieces, known, strict=True) if tokens is None]
            self.segments += len(pieces)
            self.segment_hits += len(pieces) - len(missing)
        return LookedUp(known, missing, sum(map(len, missing)), with_special, False)

    def encode(self, looked_up: LookedUp) -> NDArray[np.uint64]:
        """The ids of the whole text; encodes and caches the pieces that were missing.

        Raises EncodeFailedError.
        """
        if looked_up.whole:
            (ids,) = self._plain.many(looked_up.missing, with_special=looked_up.with_special)
            return _ids(ids)
        found = looked_up.known
        if looked_up.missing:
            encode = self._plain.many if self._words is None else self._words.encode
            fresh = encode(looked_up.missing)
            self._keep(looked_up.missing, fresh)
            rest = iter(fresh)
            found = [next(rest) if tokens is None else tokens for tokens in found]
        joined = b"".join(found)  # type: ignore[arg-type]
        if looked_up.with_special:
            joined = self._before + joined + self._after
        return _ids(joined)

    def _keep(self, pieces: list[str], fresh: list[bytes]) -> None:
        room = self.cache.share_bytes
        with self._lock:
            for piece, tokens in zip(pieces, fresh, strict=True):
                room -= self.cache.put(piece, tokens)
                if room <= 0:
                    break


def _ids(tokens: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(tokens, np.uint32).astype(np.uint64)


def _plan(tokenizer: Tokenizer) -> SplitPlan:
    try:
        serialised = msgspec.json.decode(tokenizer.to_str(), type=_Serialised)
    except Exception as error:
        raise TokenizerError(f"the tokenizer does not serialise: {error}") from error
    return split_plan(msgspec.to_builtins(serialised), tokenizer.encode_special_tokens)


def _difference(tokenizer: Tokenizer, plan: SplitPlan) -> str:
    """How the ids of pieces and of whole texts differ; empty if they are equal."""
    splitters = [
        PieceSplitter(plan, min_chars=1, stride_chars=_PROOF_STRIDE_CHARS),
        PieceSplitter(plan, min_chars=_PIECE_MIN_CHARS, stride_chars=_PIECE_STRIDE_CHARS),
    ]
    tokens = plan.raw_tokens + plan.normalized_tokens
    step = max(1, len(tokens) // _PROOF_TOKENS)
    texts = sample_texts(list(islice(tokens, 0, None, step)))
    words = None
    if plan.words is not None:
        words = WordEncoder(PlainEncoder(tokenizer), plan.words, _PROOF_WORDS_BYTES)
    try:
        plain = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        special = tokenizer.encode_batch_fast(texts, add_special_tokens=True)
        for text, whole, around in zip(texts, plain, special, strict=True):
            ids = whole.ids
            for splitter in splitters:
                pieces = splitter.split(text)
                encoded = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
                if [one for piece in encoded for one in piece.ids] != ids:
                    return "pieces of a sample differ"
            if words is not None and words.encode([text]) != [packed(ids)]:
                return "words of a sample differ"
            if plan.around is not None:
                before, after = plan.around
                if [*before, *ids, *after] != around.ids:
                    return "special tokens around a sample differ"
    except Exception as error:
        raise TokenizerError(f"the tokenizer cannot encode: {error}") from error
    return ""

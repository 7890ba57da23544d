"""Finds the tokens of new text from the tokens of its words.

The next turn of a chat is new text made of old words. Looking words up takes a tenth of the time
of encoding them. A text is split at its blanks, and each blank begins the word after it. Where a
text cannot be cut before a blank (see `pieces`), the words around it stay together as a group.
Groups, and words that are not known, are looked up once more by their parts: nearly every number
is new, but its groups of three digits are not.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from extproc.tokenization.caches import WordCache
from extproc.tokenization.pieces import WordPlan
from extproc.tokenization.plain_encoder import PlainEncoder

__all__ = ["WordEncoder"]

# With more unknown parts the whole text is encoded, which is twice as fast, and only some parts
# are learnt.
_NEW_MAX: Final = 256
_LEARNT_MAX: Final = 32
_FEW: Final = 16
# A microsecond each, in which no other thread runs. One word can be as long as a body.
_FEW_CHARS: Final = 1024


class _Gap(NamedTuple):
    """A place in a text whose tokens are not known; `text` is the text there.

    `word` is the text without its blank where it is a single word, else None.
    """

    tokens: list[bytes | None]
    place: int
    text: str
    word: str | None


class WordEncoder:
    """Keeps about `max_bytes` of words; safe to use from several threads."""

    def __init__(self, plain: PlainEncoder, plan: WordPlan, max_bytes: int) -> None:
        self._plain = plain
        self._parts_of = plan.parts.findall if plan.parts is not None else None
        self._has_added_token = plan.added_token.search if plan.added_token is not None else None
        # By the text after the blank that belongs to them.
        self._words = WordCache(max_bytes // 2)
        self._parts = WordCache(max_bytes // 2)

    @property
    def size_bytes(self) -> int:
        return self._words.size_bytes + self._parts.size_bytes

    def encode(self, pieces: Sequence[str]) -> list[bytes]:
        """The tokens of each piece; raises EncodeFailedError."""
        found: list[list[bytes | None]] = []
        gaps: list[_Gap] = []
        for piece in pieces:
            words = piece.split(" ")
            tokens = self._words.get(words)
            tokens[0] = None if words[0] else b""
            found.append(tokens)
            if None in tokens:
                _find_gaps(words, tokens, gaps)
        if gaps and not self._fill(gaps):
            return self._plain.many(pieces)
        return [b"".join(tokens) for tokens in found]  # type: ignore[arg-type]

    def _fill(self, gaps: Sequence[_Gap]) -> bool:
        """Put the tokens into the gaps; False if too many parts are unknown."""
        parts = [self._cut(gap.text) for gap in gaps]
        known = [self._parts.get(texts) for texts in parts]
        unknown: dict[str, None] = {}
        for texts, tokens in zip(parts, known, strict=True):
            if None in tokens:
                for text, given in zip(texts, tokens, strict=True):
                    if given is None:
                        unknown[text] = None
        if len(unknown) > _NEW_MAX:
            self._learn(list(unknown)[:_LEARNT_MAX])
            return False
        learnt = self._learn(list(unknown)) if unknown else {}
        for gap, texts, tokens in zip(gaps, parts, known, strict=True):
            if None in tokens:
                tokens = [
                    learnt[text] if given is None else given
                    for text, given in zip(texts, tokens, strict=True)
                ]
            joined = b"".join(tokens)  # type: ignore[arg-type]
            gap.tokens[gap.place] = joined
            if gap.word is not None:
                self._words.put(gap.word, joined)
        return True

    def _learn(self, texts: list[str]) -> dict[str, bytes]:
        is_little = len(texts) <= _FEW and sum(map(len, texts)) <= _FEW_CHARS
        encode = self._plain.few if is_little else self._plain.many
        learnt = dict(zip(texts, encode(texts), strict=True))
        for text, tokens in learnt.items():
            self._parts.put(text, tokens)
        return learnt

    def _cut(self, text: str) -> list[str]:
        if self._parts_of is None or not text.isascii():
            return [text]
        if self._has_added_token is not None and self._has_added_token(text) is not None:
            return [text]
        return self._parts_of(text)


def _find_gaps(words: list[str], tokens: list[bytes | None], gaps: list[_Gap]) -> None:
    """Add the gaps in `tokens` to `gaps`; tokens of words that belong to a gap become empty."""
    last = len(words) - 1
    place = -1
    for _ in range(tokens.count(None)):
        try:
            place = tokens.index(None, place + 1)
        except ValueError:
            return
        end = place
        # After any other character, the blank may belong to the token before it.
        while end < last and not "!" <= words[end][-1:] <= "~":
            end += 1
            tokens[end] = b""
        word: str | None = words[place]
        text = words[place] if end == place else " ".join(words[place : end + 1])
        if not place:
            word = None
        else:
            text = f" {text}"
            if end != place or not "!" <= words[place][-1:] <= "~":
                word = None
        gaps.append(_Gap(tokens, place, text, word))

"""Finds places where a text can be cut so that its pieces have the same tokens as the whole.

A tokenizer first splits a text at its added tokens, and then encodes each part between them
alone. So a text can be cut after an added token, with three exceptions: tokens that take the
blanks around them, tokens that must stand at a word's border, and pre-tokenizers that treat the
first piece differently. Special tokens that a post-processor adds belong to the whole text. Where
they are fixed ids before and after it, they are put around the pieces.

For the split expressions of the GPT-4 family, long parts are cut further:

* before a blank that follows a character other than white space. A blank is the first character
  of its pre-token, or among white space only, so no pre-token continues across that place;
* after a line break with no second line break before the next word. An alternative of the
  expression takes white space up to its last line break, before the alternative that looks ahead.

A text that ends at such a place has the same matches before it, and no alternative looks behind.
GPT-2's expression looks ahead at line breaks, so its texts are cut before blanks only. Only ASCII
characters count: all expression engines agree on them, and no canonical composition joins them to
a neighbour.

A text can be cut into words before the same blanks. For the GPT-4 family a word can be cut into
parts: between a letter and a mark other than an apostrophe, and before and after digits. Digits
are pre-tokens of their own, in groups of one or three from the first digit. White space before
digits stays with them unless it is a single blank, since its tokens depend on what follows.

All of this is decided from the serialised tokenizer. An unknown component counts as unsafe.
"""

import re
from typing import Any, Final, TypeAlias

from msgspec import Struct

__all__ = ["AROUND_NOTHING", "PieceSplitter", "SplitPlan", "WordPlan", "split_plan"]

# Pre-tokenizers that look at one piece at a time and not at its place in the text.
_SAFE_PRE_TOKENIZERS: Final = frozenset(
    {
        "BertPreTokenizer",
        "ByteLevel",
        "CharDelimiterSplit",
        "Digits",
        "Punctuation",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    }
)
_SAFE_NORMALIZERS: Final = frozenset(
    {
        "BertNormalizer",
        "ByteLevel",
        "Lowercase",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Precompiled",
        "Prepend",
        "Replace",
        "Strip",
        "StripAccents",
    }
)
_MODELS: Final = frozenset({"BPE", "Unigram", "WordLevel", "WordPiece"})

_LLAMA_3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2: Final = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_4_FAMILY: Final = frozenset({_LLAMA_3, _QWEN_2, _O200K})

# The place to cut is the end of a match.
_BEFORE_BLANK: Final = r"[!-~](?= )"
_AFTER_BREAK: Final = r"\n(?=[!-.0-~]| +[!-~])"
_CUT_GPT_4: Final = re.compile(f"{_BEFORE_BLANK}|{_AFTER_BREAK}")
_CUT_GPT_2: Final = re.compile(_BEFORE_BLANK)
# Finds such a place inside an added token.
_CUT_INSIDE: Final = re.compile(r"[!-~] |\n.", re.DOTALL)
# The parts of an ASCII word, which may begin with a blank: groups of digits, and other text up to
# the next digits, up to a mark after a letter, or up to the end of a line.
_PART_ENDS: Final = rf"[A-Za-z]++(?=[!-&(-/:-@\[-`{{-~])|{_AFTER_BREAK}"
_PARTS: Final = (
    r"[0-9]{1,%d}|^ (?=[0-9])|"
    rf"(?:[^0-9A-Za-z\s]+|[A-Za-z]++(?![!-&(-/:-@\[-`{{-~])|(?!{_AFTER_BREAK})\s[0-9]*)+"
    rf"(?:{_PART_ENDS})?|{_PART_ENDS}"
)
_PARTS_BY_THREE: Final = re.compile(_PARTS % 3)
_PARTS_BY_ONE: Final = re.compile(_PARTS % 1)


_Branch: TypeAlias = "dict[str, _Branch]"
_END: Final = ""


class WordPlan(Struct, frozen=True):
    """How texts may be cut into words, before blanks.

    `parts` finds the parts of an ASCII word that has no `added_token` in it; None: words are not
    cut into parts.
    """

    parts: re.Pattern[str] | None = None
    added_token: re.Pattern[str] | None = None


class SplitPlan(Struct, frozen=True):
    """How texts of one tokenizer may be cut.

    `unsafe` is the reason if texts cannot be cut at all, else empty. `raw_tokens` and
    `normalized_tokens` are the added tokens after which a text may be cut, of the tokenizer's
    first and second pass over the text. `inner` finds further places between them. `words` says
    how a text may be cut into words; None: it may not. `around` are the special ids to add before
    and after a text; None: only the tokenizer can add them.
    """

    unsafe: str = ""
    raw_tokens: tuple[str, ...] = ()
    normalized_tokens: tuple[str, ...] = ()
    inner: re.Pattern[str] | None = None
    words: WordPlan | None = None
    around: tuple[tuple[int, ...], tuple[int, ...]] | None = None


AROUND_NOTHING: Final[tuple[tuple[int, ...], tuple[int, ...]]] = ((), ())


def split_plan(tokenizer: dict[str, Any], split_special_tokens: bool) -> SplitPlan:
    """The plan for a tokenizer in its serialised form.

    `split_special_tokens` is the option of the same name, which is not part of that form.
    """
    unsafe = _unsafe(tokenizer, split_special_tokens)
    if unsafe:
        return SplitPlan(unsafe)
    normalizers = _flat(tokenizer.get("normalizer"), "normalizers")
    added = [token for token in tokenizer.get("added_tokens", []) if token["content"]]
    raw = tuple(token["content"] for token in added if not token["normalized"])
    # The tokenizer finds these in the normalised text, but texts are cut before that.
    normalized = tuple(token["content"] for token in added if token["normalized"])
    seen = normalized if not normalizers else ()
    inner = _inner(tokenizer, normalizers) if len(seen) == len(normalized) else None
    tokens = (*raw, *seen)
    can_be_cut = any(_CUT_INSIDE.search(token) for token in tokens)
    words = None
    if inner is not None and not can_be_cut:
        words = WordPlan(_parts_of_words(tokenizer), _alternatives(tokens))
    return SplitPlan(
        raw_tokens=raw,
        normalized_tokens=seen,
        inner=inner,
        words=words,
        around=_around(tokenizer.get("post_processor")),
    )


def _unsafe(tokenizer: dict[str, Any], split_special_tokens: bool) -> str:
    model = tokenizer.get("model") or {}
    if model.get("type") not in _MODELS:
        return f"model {model.get('type')}"
    if model.get("dropout"):
        return "dropout"
    if split_special_tokens:
        return "split_special_tokens"
    if tokenizer.get("truncation") is not None or tokenizer.get("padding") is not None:
        return "truncation or padding"
    for token in tokenizer.get("added_tokens", []):
        for flag in ("lstrip", "rstrip", "single_word"):
            if token[flag]:
                return f"an added token with {flag}"
    for part in _flat(tokenizer.get("normalizer"), "normalizers"):
        if part.get("type") not in _SAFE_NORMALIZERS:
            return f"normalizer {part.get('type')}"
    for part in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") in _SAFE_PRE_TOKENIZERS:
            continue
        # With any other scheme, Metaspace treats the first piece differently.
        if part.get("type") != "Metaspace" or part.get("prepend_scheme") not in (
            "always",
            "never",
        ):
            return f"pre-tokenizer {part.get('type')}"
    return ""


def _flat(part: Any, inside: str) -> list[dict[str, Any]]:
    """All members of a part that may be a sequence of sequences."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [leaf for member in part.get(inside, []) for leaf in _flat(member, inside)]


def _inner(tokenizer: dict[str, Any], normalizers: list[dict[str, Any]]) -> re.Pattern[str] | None:
    if any(part.get("type") != "NFC" for part in normalizers):
        return None
    if tokenizer["model"]["type"] != "BPE":
        return None
    parts = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    if len(parts) == 1:
        return _CUT_GPT_2 if parts[0].get("use_regex") is True else None
    split, byte_level = parts[0], parts[-1]
    if (
        len(parts) == 2
        and split.get("type") == "Split"
        and split.get("behavior") == "Isolated"
        and split.get("invert") is False
        and byte_level.get("use_regex") is False
        and (split.get("pattern") or {}).get("Regex") in _GPT_4_FAMILY
    ):
        return _CUT_GPT_4
    return None


def _parts_of_words(tokenizer: dict[str, Any]) -> re.Pattern[str] | None:
    """The expression for the parts of a word, if the words of this tokenizer have parts."""
    split, *_ = _flat(tokenizer["pre_tokenizer"], "pretokenizers")
    expression = (split.get("pattern") or {}).get("Regex")
    if expression not in _GPT_4_FAMILY:
        return None
    return _PARTS_BY_ONE if expression == _QWEN_2 else _PARTS_BY_THREE


def _around(post_processor: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The ids that a post-processor adds before and after a single text; None if not known."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    for part in _flat(post_processor, "processors"):
        kind = part.get("type")
        if kind == "ByteLevel":
            continue
        if kind in ("BertProcessing", "RobertaProcessing"):
            more: tuple[tuple[int, ...], tuple[int, ...]] | None = (
                (part["cls"][1],),
                (part["sep"][1],),
            )
        elif kind == "TemplateProcessing":
            more = _around_template(part)
        else:
            more = None
        # How two of them combine is not known.
        if more is None or before or after:
            return None
        before, after = more
    return before, after


def _around_template(part: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    sides: list[tuple[int, ...]] = [()]
    for item in part.get("single", []):
        if "Sequence" in item:
            sides.append(())
        elif "SpecialToken" in item:
            token = part["special_tokens"].get(item["SpecialToken"]["id"])
            if token is None:
                return None
            sides[-1] += tuple(token["ids"])
        else:
            return None
    return (sides[0], sides[1]) if len(sides) == 2 else None


class PieceSplitter:
    """Cuts texts by a plan, from left to right, so that equal beginnings give equal pieces.

    A piece ends with the first added token that makes it at least `min_chars` long. A piece
    without such a token ends at the first inner place after `stride_chars`.
    """

    def __init__(self, plan: SplitPlan, *, min_chars: int, stride_chars: int) -> None:
        self._raw = _alternatives(plan.raw_tokens)
        self._normalized = _alternatives(plan.normalized_tokens)
        self._inner = plan.inner
        self._min_chars = min_chars
        self._stride_chars = stride_chars

    def split(self, text: str) -> list[str]:
        """The pieces, which join to `text`; an empty text has no pieces."""
        pieces: list[str] = []
        start = gap = 0
        for first, end in self.token_spans(text):
            if first - start > self._stride_chars:
                start = self._split_gap(text, start, gap, first, pieces)
            if end - start >= self._min_chars:
                pieces.append(text[start:end])
                start = end
            gap = end
        if len(text) - start > self._stride_chars:
            start = self._split_gap(text, start, gap, len(text), pieces)
        if start < len(text):
            pieces.append(text[start:])
        return pieces

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        """The start and the end of each added token of both passes, in ascending order."""
        raw = self._raw
        if self._normalized is None:
            return [] if raw is None else [match.span() for match in raw.finditer(text)]
        spans = []
        gap = 0
        for match in raw.finditer(text) if raw is not None else ():
            spans += [m.span() for m in self._normalized.finditer(text, gap, match.start())]
            spans.append(match.span())
            gap = match.end()
        spans += [m.span() for m in self._normalized.finditer(text, gap)]
        return spans

    def _split_gap(self, text: str, start: int, gap: int, end: int, pieces: list[str]) -> int:
        """Cut the text from `start` inside the gap between two tokens; returns the last place."""
        if self._inner is None:
            return start
        while end - start > self._stride_chars:
            # Both characters around the place have to lie in the gap.
            match = self._inner.search(text, max(start + self._stride_chars, gap), end)
            if match is None:
                break
            pieces.append(text[start : match.end()])
            start = match.end()
        return start


def _alternatives(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """An expression that finds the leftmost, longest token, as the tokenizer does.

    Tokens share their common beginnings. Otherwise, hundreds of reserved tokens would be tried
    one after another at each place.
    """
    if not tokens:
        return None
    root: _Branch = {}
    for token in tokens:
        branch = root
        for character in token:
            branch = branch.setdefault(character, {})
        branch[_END] = {}
    return re.compile(_expression(root))


def _expression(branch: _Branch) -> str:
    prefix = ""
    while len(branch) == 1 and _END not in branch:
        ((character, branch),) = branch.items()
        prefix += re.escape(character)
    choices = [
        re.escape(character) + _expression(further)
        for character, further in branch.items()
        if character != _END
    ]
    if not choices:
        return prefix
    # Longer tokens are tried first.
    return f"{prefix}(?:{'|'.join(choices)})" + ("?" if _END in branch else "")

"""Where a text can be cut so that its pieces have, one after the other, the tokens of the whole.

A tokenizer splits a text at its added tokens first and runs everything else on what lies between,
each on its own. So right after an added token is a place to cut, unless something reaches across:
tokens that swallow the blanks around them or want a word's border, and pre-tokenizers that treat
the first piece differently. What a post-processor adds belongs to the whole text; where that is
fixed ids before and after, they are put around the pieces.

Long texts between added tokens are cut further for the split expressions of the GPT-4 family,
before a blank that something other than white space precedes, and after a line break that no other
follows before the next word. A blank is matched first in its pre-token or among white space only,
so that no pre-token goes on into it. White space with a line break in it is taken up to its last
line break by an alternative that comes before the one that looks ahead. Ending the text at such a
place therefore changes no match before it, and nothing looks behind. GPT-2's expression looks
ahead at line breaks, too, and is cut before blanks only. Only ASCII counts, in which all
expression engines agree, and which no canonical composition joins to a neighbour.

Before the same blanks a text can be cut into its words, each of which is a piece of its own. A
word of the GPT-4 family can be cut further between a letter and a mark, with which no pre-token
goes on but with an apostrophe, and before and after digits, which are pre-tokens of their own in
groups of one or three, counted from the first of a run: what white space before them becomes
depends on what follows, unless it is a single blank, so it stays with them.

All is decided from the serialised tokenizer. A component that is not known is not safe.
"""

import re
from typing import Any, Final, TypeAlias

from msgspec import Struct

__all__ = ["AROUND_NOTHING", "PieceSplitter", "SplitPlan", "WordPlan", "split_plan"]

# Pre-tokenizers that see one piece at a time and do not ask where it lies.
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
# An added token with such a place in it, whatever follows the token.
_CUT_INSIDE: Final = re.compile(r"[!-~] |\n.", re.DOTALL)
# The parts of an ASCII word, which may begin with a blank: digits, and what ends before them,
# between a letter and a mark, or after a line break.
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
    """How texts may be cut before blanks, with added tokens in them, too.

    `parts` finds all parts of an ASCII word without any `added_token`; None: it has none.
    """

    parts: re.Pattern[str] | None = None
    added_token: re.Pattern[str] | None = None


class SplitPlan(Struct, frozen=True):
    """How texts of one tokenizer may be cut.

    `unsafe` says why not at all, else it is empty. `raw_tokens` and `normalized_tokens` are the
    added tokens after which a text may be cut, those of the tokenizer's first pass over the
    text and those of its second. `inner` finds further places between them; `words`: how a text
    may be cut into its words, None if not. `around`: the ids that are added before and after a
    text where special tokens are wanted, None if that can only be left to the tokenizer.
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
    # These are looked for in the normalised text, which the cutting does not see.
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
        # Any other scheme of Metaspace asks whether a piece is the first.
        if part.get("type") != "Metaspace" or part.get("prepend_scheme") not in (
            "always",
            "never",
        ):
            return f"pre-tokenizer {part.get('type')}"
    return ""


def _flat(part: Any, inside: str) -> list[dict[str, Any]]:
    """The members of a sequence of sequences; a part alone is one of one."""
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
    """For a tokenizer whose texts can be cut inside."""
    split, *_ = _flat(tokenizer["pre_tokenizer"], "pretokenizers")
    expression = (split.get("pattern") or {}).get("Regex")
    if expression not in _GPT_4_FAMILY:
        return None
    return _PARTS_BY_ONE if expression == _QWEN_2 else _PARTS_BY_THREE


def _around(post_processor: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What a post-processor puts before and after a single text."""
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
        # How two of them work together is not known.
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
    """Cuts texts by a plan, always from the left, so that equal beginnings have equal pieces.

    A piece ends with the first added token that makes it at least `min_chars` long. Without one
    in sight, it is cut at the first inner place after `stride_chars`.
    """

    def __init__(self, plan: SplitPlan, *, min_chars: int, stride_chars: int) -> None:
        self._raw = _alternatives(plan.raw_tokens)
        self._normalized = _alternatives(plan.normalized_tokens)
        self._inner = plan.inner
        self._min_chars = min_chars
        self._stride_chars = stride_chars

    def split(self, text: str) -> list[str]:
        """Pieces that join to `text`; none of an empty one."""
        pieces: list[str] = []
        start = gap = 0
        for first, end in self._tokens(text):
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

    def _tokens(self, text: str) -> list[tuple[int, int]]:
        """Where the added tokens of both passes begin and end, in ascending order."""
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
        """Cut what begins at `start` inside the gap between two tokens; returns what is left."""
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
    """Finds the leftmost and of these the longest token, as the tokenizer does.

    Tokens with a common beginning share it, since hundreds of reserved ones would otherwise be
    tried one after the other.
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
    # What goes on is tried first: that makes it the longest.
    return f"{prefix}(?:{'|'.join(choices)})" + ("?" if _END in branch else "")

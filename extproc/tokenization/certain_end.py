"""Finds how much of the beginning of a text has tokens that do not depend on what follows.

A text whose end is unknown, such as that before an image, may not be encoded to its last
character: the next one can join it in a token, or in an added token. It is certain up to a place
where a text may be cut (see `pieces`), if no added token can begin before that place and end after
what is known.
"""

import re
from typing import Final

from extproc.tokenization.pieces import PieceSplitter, SplitPlan

__all__ = ["CertainEnd"]

# An inner place is looked for so far back first, then farther.
_FIRST_WINDOW_CHARS: Final = 256


class CertainEnd:
    """The rule for one tokenizer."""

    def __init__(self, plan: SplitPlan) -> None:
        self._tokens = PieceSplitter(plan, min_chars=1, stride_chars=1)
        self._inner = plan.inner
        added = (*plan.raw_tokens, *plan.normalized_tokens)
        self._beginnings = frozenset(
            token[:length] for token in added for length in range(1, len(token))
        )
        self._longest = max(map(len, added), default=1)

    def of(self, text: str) -> int:
        """The number of characters that have the same tokens whatever follows; can be 0."""
        limit = len(text)
        for length in range(1, min(self._longest, len(text) + 1)):
            if text[-length:] in self._beginnings:
                limit = len(text) - length
        last = 0
        for _, end in self._tokens.token_spans(text):
            if end > limit:
                break
            last = end
        return last if self._inner is None else _inner_end(self._inner, text, last, limit)


def _inner_end(inner: re.Pattern[str], text: str, start: int, end: int) -> int:
    """The last place between `start` and `end` where the text may be cut, otherwise `start`."""
    # What the expression looks ahead at has to be known as well.
    known = text[:end]
    window = _FIRST_WINDOW_CHARS
    while True:
        first = max(start, end - window)
        last = start
        for match in inner.finditer(known, first):
            last = match.end()
        if last > start or first == start:
            return last
        window *= 4

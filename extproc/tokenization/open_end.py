"""Lets a rendered chat end within its last message, which the model then continues.

transformers does this with a mark: it is appended to the message, and the rendered text is cut
where the mark is.
"""

from typing import Any, Final

from extproc.tokenization.errors import UnmappableError
from extproc.tokenization.prompts import Message
from extproc.tokenization.reasons import MALFORMED

__all__ = ["cut_at_mark", "marked"]

# With the blank at its end: a template that strips the message strips it as well.
_MARK: Final = "CONTINUE_FINAL_MESSAGE_TAG "
_BARE_MARK: Final = _MARK.strip()


def marked(messages: list[Message]) -> tuple[list[Message], str]:
    """The messages with a mark at the end of the last one, and the text of that.

    Raises UnmappableError if the last message has no text.
    """
    last = messages[-1]
    content: Any = last["content"]
    if type(content) is str:
        return [*messages[:-1], {**last, "content": content + _MARK}], content
    for index in range(len(content) - 1, -1, -1):
        part = content[index]
        if "text" in part:
            parts = [*content]
            parts[index] = {**part, "text": part["text"] + _MARK}
            return [*messages[:-1], {**last, "content": parts}], part["text"]
    raise UnmappableError(MALFORMED)


def cut_at_mark(text: str, last: str) -> str:
    """The rendered text up to the mark; raises UnmappableError if the message is not in it."""
    place = text.rfind(_BARE_MARK)
    if place < 0 or last.strip() not in text:
        raise UnmappableError(MALFORMED)
    before = text[:place]
    # If the template strips messages, it would have stripped the blanks before the mark.
    return before if text.startswith(_MARK, place) else before.rstrip()

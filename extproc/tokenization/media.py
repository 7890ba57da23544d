"""Images, audio and video in chats: where the text before the first of them ends.

Only the engine knows the tokens of a medium. The tokens before the first one are those of the
text before it, and where that text ends shows in two renderings that differ in nothing but their
media: it ends at the first difference, or before. Text that looks like an engine's placeholder
ends it, too, since an engine may put the medium there.
"""

import re
from typing import Any, Final

from extproc.tokenization.fields import BodyFields

__all__ = ["MEDIA_KINDS", "common_beginning", "media_in", "text_before_media"]

# The kinds of parts that templates get.
MEDIA_KINDS: Final = frozenset({"image", "audio", "video"})
# The placeholders of vLLM's and SGLang's models: one of these words after a bracket, or a count.
_PLACEHOLDER: Final = re.compile(
    r"[<\[][^\w\s]{0,3}(?:[a-z0-9]+[_.]){0,4}"
    r"(?:image|img|im_patch|audio|video|vision|media|speech|sound|placeholder|pad\b|unused\d"
    r"|endoftext\d|file\||patch\||so_)"
    r"|\b(?:image|audio|video|picture) ?\d+:",
    re.IGNORECASE,
)
_CONTENTS: Final = ("content", "output")
_SMALL_CHARS: Final = 256


def text_before_media(with_media: str, otherwise: str) -> str:
    """The text that two renderings begin with, as far as no medium can be in it.

    Empty if they are equal: then the template does not show the medium, and its place is unknown.
    """
    if with_media == otherwise:
        return ""
    common = with_media[: common_beginning(with_media, otherwise)]
    placeholder = _PLACEHOLDER.search(common)
    return common if placeholder is None else common[: placeholder.start()]


def common_beginning(one: str, other: str) -> int:
    """The number of characters that two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def media_in(fields: BodyFields) -> tuple[int, int]:
    """How many media a chat's fields have, and how many bytes of the body these take."""
    count = size = 0
    waiting: list[Any] = [getattr(fields, "messages", None), getattr(fields, "input", None)]
    while waiting:
        items = waiting.pop()
        for item in items if type(items) is list else ():
            if type(item) is not dict:
                continue
            waiting += [item[name] for name in _CONTENTS if type(item.get(name)) is list]
            kind = item.get("type")
            # Parts with text are the usual ones.
            if type(kind) is str and "text" not in item and "role" not in item:
                chars = _chars(item)
                if chars > _SMALL_CHARS or any(word in kind for word in MEDIA_KINDS):
                    count += 1
                    size += chars
    return count, size


def _chars(part: dict[str, Any]) -> int:
    """The characters of a part's texts, and of those in its objects."""
    texts = [*part.values()]
    for value in part.values():
        if type(value) is dict:
            texts += value.values()
    return sum(len(text) for text in texts if type(text) is str)

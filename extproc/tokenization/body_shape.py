"""Judges by the bytes of a body how long decoding it takes.

Decoding many small values takes much longer than a few long texts of the same size.
"""

from typing import Final

__all__ = ["LARGEST_WITH_MEDIA", "has_many_parts", "is_mostly_media"]

# A body with images may be so many times as large as others: its few long texts are decoded as
# fast as they are copied.
LARGEST_WITH_MEDIA: Final = 8
# A larger body is looked at for many small parts, which take longer than long texts.
_SMALL_BODY_BYTES: Final = 32 * 1024
_PARTS_INLINE_MAX: Final = 1024
_MEDIA_PARTS_MAX: Final = 16 * 1024


def has_many_parts(body: bytes | bytearray) -> bool:
    """True for JSON of many small values, such as calls of tools; prose has fewer commas."""
    return len(body) > _SMALL_BODY_BYTES and (
        body.count(b"{") + body.count(b"[") > _PARTS_INLINE_MAX
        or body.count(b",") > 8 * _PARTS_INLINE_MAX
    )


def is_mostly_media(body: bytes | bytearray) -> bool:
    """True for JSON of few values, which are long: images in base64, for instance."""
    return body.count(b",") + body.count(b'"') < _MEDIA_PARTS_MAX

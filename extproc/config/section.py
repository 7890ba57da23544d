"""The base class of configuration sections, and the types and units that their keys share."""

from typing import Annotated

from msgspec import Meta, Struct

__all__ = ["KIBIBYTE", "MEBIBYTE", "SECONDS", "Port", "Seconds", "Section", "Text"]

SECONDS = 1.0
KIBIBYTE = 1024
MEBIBYTE = 1024 * 1024

Text = Annotated[str, Meta(min_length=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(ge=0.001, le=604800)]


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every section: immutable once loaded."""

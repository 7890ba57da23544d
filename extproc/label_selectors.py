"""Label selectors in the grammar of Kubernetes: `a=b, c!=d, e in (f, g), h notin (i), j, !k`.

A selector is usually evaluated by the API server. Those that sort endpoint slices into prefill and
decode are evaluated here, and all are checked when the configuration is read.
"""

import re
from collections.abc import Mapping
from typing import Final, Literal

from msgspec import Struct

__all__ = ["LabelSelector", "parse_selector"]

_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY: Final = rf"(?:[a-z0-9][a-z0-9.-]{{0,252}}/)?{_NAME}"
_VALUE: Final = re.compile(rf"(?:{_NAME})?")
_TERM: Final = re.compile(
    rf"\s*(?:"
    rf"!\s*(?P<absent>{_KEY})"
    rf"|(?P<set_key>{_KEY})\s+(?P<set_op>in|notin)\s*\((?P<values>[^()]*)\)"
    rf"|(?P<key>{_KEY})\s*(?P<op>==|=|!=)\s*(?P<value>[^\s,=!()]*)"
    rf"|(?P<present>{_KEY})"
    rf")\s*(?P<end>,|$)"
)


class _Term(Struct, frozen=True, order=True):
    """`one_of` and `none_of` compare the value; `none_of` holds for an absent label, too."""

    key: str
    kind: Literal["one_of", "none_of", "present", "absent"]
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        match self.kind:
            case "one_of":
                return labels.get(self.key) in self.values
            case "none_of":
                return labels.get(self.key) not in self.values
            case "present":
                return self.key in labels
            case "absent":
                return self.key not in labels


class LabelSelector(Struct, frozen=True):
    """A parsed selector; two that are written differently and mean the same terms are equal."""

    terms: tuple[_Term, ...]

    def matches(self, labels: Mapping[str, str] | None) -> bool:
        """True if all terms hold; without terms, always."""
        found = labels or {}
        return all(term.matches(found) for term in self.terms)


def parse_selector(text: str) -> LabelSelector:
    """Parse a selector; raises ValueError with a message for the operator."""
    if not text.strip():
        raise ValueError("an empty selector would match everything")
    terms: set[_Term] = set()
    position = 0
    while True:
        found = _TERM.match(text, position)
        if found is None:
            raise ValueError(
                f"cannot be read at {text[position : position + 40].strip()!r}; expected terms "
                "such as app=sglang, tier!=test, zone in (a, b), gpu or !cpu, separated by commas"
            )
        terms.add(_term(found))
        position = found.end()
        if found["end"] != ",":
            return LabelSelector(tuple(sorted(terms)))


def _term(found: re.Match[str]) -> _Term:
    if key := found["absent"]:
        return _Term(key, "absent")
    if key := found["present"]:
        return _Term(key, "present")
    if key := found["set_key"]:
        values = [value.strip() for value in found["values"].split(",")]
        kind: Literal["one_of", "none_of"] = "one_of" if found["set_op"] == "in" else "none_of"
    else:
        key, values = found["key"], [found["value"]]
        kind = "none_of" if found["op"] == "!=" else "one_of"
    for value in values:
        if not _VALUE.fullmatch(value):
            raise ValueError(f"{value!r} cannot be the value of a label")
    return _Term(key, kind, tuple(sorted(set(values))))

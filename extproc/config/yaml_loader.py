"""Reads YAML so that what an operator wrote is what the service gets.

YAML 1.1 has surprises: `22:30` is a number to the base 60 and `010` is eight, of two equal keys the
second wins without notice, keys may be numbers, and aliases of aliases let a small file grow
without bound. All of these are problems here.
"""

import re
from typing import Any, Final

import yaml

from extproc.errors import ConfigError

__all__ = ["read_yaml"]

_ALIASES_MAX: Final = 100
_OTHER_BASE: Final = re.compile(r"[-+]?(?:0[0-9_]+|[0-9_]+(?::[0-9_]+)+(?:\.[0-9_]*)?)")
_STRING: Final = "tag:yaml.org,2002:str"
_MERGE: Final = "tag:yaml.org,2002:merge"


def read_yaml(text: str) -> tuple[object, list[str]]:
    """Return the decoded document, and what is wrong with it as `line N: sentence`.

    Of equal keys the first is taken; keys and numbers that may be read wrongly are taken as text.
    Raises ConfigError or an error of the library where nothing can be read.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data(), loader.problems
    finally:
        loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that collects in `problems` what it refuses."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.problems: list[str] = []
        self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._aliases
        if isinstance(event, yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > _ALIASES_MAX:
                raise ConfigError([f"more than {_ALIASES_MAX} YAML aliases"])
        node = super().compose_node(parent, index)
        anchor = getattr(event, "anchor", None)
        if anchor and not isinstance(event, yaml.AliasEvent) and self._aliases > before:
            line = event.start_mark.line + 1
            raise ConfigError([f"line {line}: an anchor around an alias is not supported"])
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        kept: list[tuple[yaml.Node, yaml.Node]] = []
        seen: set[str] = set()
        for key_node, value_node in node.value:
            if key_node.tag != _MERGE:
                key = self._key(key_node)
                if key is None:
                    continue
                if key in seen:
                    self._refuse(key_node, f"the key {key!r} is given twice")
                    continue
                seen.add(key)
            kept.append((key_node, value_node))
        node.value = kept
        return super().construct_mapping(node, deep)

    def _key(self, node: yaml.Node) -> str | None:
        """The key as text; None if it is a list or a mapping."""
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node, "a key must be text, not a list or a mapping")
            return None
        if node.tag != _STRING:
            kind = node.tag.rpartition(":")[2]
            self._refuse(node, f"the key {node.value} is read as {kind}, not as text: quote it")
            node.tag = _STRING
        return str(node.value)

    def _number(self, node: yaml.ScalarNode) -> Any:
        if _OTHER_BASE.fullmatch(node.value):
            base = "60" if ":" in node.value else "8"
            self._refuse(
                node,
                f"{node.value} would be read as a number to the base {base}: write a plain number, "
                "or quotes around a text",
            )
            return node.value
        if node.tag.endswith("int"):
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)

    def _text(self, node: yaml.ScalarNode) -> Any:
        return node.value

    def _refuse(self, node: yaml.Node, problem: str) -> None:
        self.problems.append(f"line {node.start_mark.line + 1}: {problem}")


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader._number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader._number)
# No key is a date; as text it gets an error that quotes it.
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", _StrictLoader._text)

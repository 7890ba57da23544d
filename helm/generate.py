"""Writes the generated files of the chart: `make docs`.

values.yaml, values.schema.json and the table in README.md come from the structs of the values;
files/restart-keys.yaml comes from the service's table of changes. Tests compare the files with what
this renders. Separate from docs/generate.py because a chart is published by itself.
"""

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml
from msgspec import NODEFAULT, UNSET, Meta, Struct, UnsetType

from extproc.config.changes import HOW_CHANGED
from extproc.config.loading import section_type
from extproc.config.schema import Config
from helm.gateway_objects import RECIPES, render_recipe
from helm.values import OWNED, Values

__all__ = ["CHART", "FILES", "render_readme", "render_schema", "render_values"]

CHART: Final = Path(__file__).resolve().parent / "llm-extproc"
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_COMMENT_COLUMNS: Final = 96
_NAMES: Final = {str: "text", int: "integer", float: "number", bool: "boolean", dict: "mapping"}


def render_schema() -> str:
    """values.schema.json: unknown keys are refused, and keys that the chart sets itself."""
    schema: dict[str, Any] = {
        "$schema": _DIALECT,
        "title": "Values of the chart llm-extproc",
        **msgspec.json.schema(Values),
    }
    for name, keys in OWNED.items():
        section = schema["$defs"].get(name, {"properties": {}})
        for key in keys:
            section["properties"].pop(key, None)
    for section in schema["$defs"].values():
        # The chart fills in the namespace of the release.
        if "namespace" in section.get("required", ()):
            section["required"].remove("namespace")
    return msgspec.json.format(msgspec.json.encode(schema), indent=1).decode() + "\n"


def render_values() -> str:
    """values.yaml: each value with its default, and its meaning as a comment."""
    head = "# Generated from helm/values.py with `make docs`. README.md has the same as a table.\n"
    return head + "\n".join(_yaml_section(Values, "")) + "\n"


def _yaml_section(section: type[Struct], indent: str) -> Iterator[str]:
    hints = get_type_hints(section, include_extras=True)
    for info in msgspec.structs.fields(section):
        comment = meaning(hints[info.name])
        for line in textwrap.wrap(comment, _COMMENT_COLUMNS - len(indent)):
            yield f"{indent}# {line}"
        inner = section_type(hints[info.name])
        default = _default(info)
        if inner is Config:
            yield f"{indent}{info.encode_name}: {{}}"
        elif default is UNSET:
            yield f"{indent}# {info.encode_name}: …"
        elif isinstance(default, Struct):
            yield f"{indent}{info.encode_name}:"
            yield from _yaml_struct(default, f"{indent}  ")
        else:
            yield f"{indent}{info.encode_name}: {_flow(default)}"


def _yaml_struct(value: Struct, indent: str) -> Iterator[str]:
    """A section with the values of this instance, which can differ from those of its type."""
    hints = get_type_hints(type(value), include_extras=True)
    for info in msgspec.structs.fields(type(value)):
        for line in textwrap.wrap(meaning(hints[info.name]), _COMMENT_COLUMNS - len(indent)):
            yield f"{indent}# {line}"
        own = getattr(value, info.name)
        if isinstance(own, Struct):
            yield f"{indent}{info.encode_name}:"
            yield from _yaml_struct(own, f"{indent}  ")
        elif own is UNSET:
            yield f"{indent}# {info.encode_name}: …"
        else:
            yield f"{indent}{info.encode_name}: {_flow(own)}"


def _default(info: Any) -> Any:
    if info.default_factory is not NODEFAULT:
        return info.default_factory()
    return UNSET if info.default is NODEFAULT else info.default


def _flow(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def render_restart_keys() -> str:
    """files/restart-keys.yaml: the keys of `config` whose change has to replace the pods."""
    keys = [key for key, how in HOW_CHANGED.items() if how == "restart"]
    set_or_not = [key for key, how in HOW_CHANGED.items() if how == "live_while_set"]
    sections = [key for key in keys if any(other.startswith(f"{key}.") for other in HOW_CHANGED)]
    content = {
        "values": [key for key in keys if key not in sections],
        "presence": sections + set_or_not,
    }
    head = "# Generated from extproc/config/changes.py with `make docs`.\n"
    return head + yaml.safe_dump(content, sort_keys=False)


def render_readme() -> str:
    """README.md of the chart: the text around the table stays as it is in the file."""
    page = (CHART / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- values: begin -->\n", "<!-- values: end -->\n"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    rows = "".join(_rows(Values, "", None))
    table = f"| value | type | default | meaning |\n|---|---|---|---|\n{rows}"
    return f"{before}{begin}\n{table}\n{end}{after}"


def _rows(section: type[Struct], path: str, values: Struct | None) -> Iterator[str]:
    hints = get_type_hints(section, include_extras=True)
    for info in msgspec.structs.fields(section):
        hint = hints[info.name]
        key = f"{path}.{info.encode_name}" if path else info.encode_name
        default = getattr(values, info.name) if values is not None else _default(info)
        inner = section_type(hint)
        if inner is None:
            shown = (
                "required"
                if info.required
                else f"`{_flow(default)}`"
                if default is not UNSET
                else ""
            )
            yield f"| `{key}` | {_type(hint)} | {shown} | {meaning(hint)} |\n"
        elif inner is Config:
            yield f"| `{key}` | mapping | required | {meaning(hint)} |\n"
        elif isinstance(default, list):
            yield f"| `{key}` | list | `{_flow(default)}` | {meaning(hint)} |\n"
            yield from _rows(inner, f"{key}[]", None)
        else:
            shown = "" if default is UNSET else "see below"
            yield f"| `{key}` | mapping | {shown} | {meaning(hint)} |\n"
            yield from _rows(inner, key, default if isinstance(default, Struct) else None)


def meaning(hint: Any) -> str:
    """The outermost description of a type."""
    if get_origin(hint) is not Annotated:
        return ""
    inner, *metas = get_args(hint)
    found = [meta.description for meta in metas if isinstance(meta, Meta) and meta.description]
    return found[-1] if found else meaning(inner)


def _type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(
            "null" if one is NoneType else _type(one) for one in arguments if one is not UnsetType
        )
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return "list"
    return _NAMES.get(origin or hint, getattr(hint, "__name__", str(hint)))


FILES: Final[Mapping[str, Callable[[], str]]] = {
    "values.schema.json": render_schema,
    "values.yaml": render_values,
    "files/restart-keys.yaml": render_restart_keys,
    "README.md": render_readme,
    **{f"files/gateways/{name}.yaml": partial(render_recipe, name) for name in RECIPES},
}

if __name__ == "__main__":
    for name, render in FILES.items():
        (CHART / name).parent.mkdir(exist_ok=True)
        (CHART / name).write_text(render(), encoding="utf-8")
        sys.stdout.write(f"helm/llm-extproc/{name} written\n")

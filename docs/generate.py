"""Writes the generated pages of the documentation: `make docs`.

docs/configuration.md comes from the configuration structs, the tables of docs/metrics.md from the
table of metrics. Tests compare the pages with what this renders, so that they cannot drift.
"""

import re
import sys
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import NODEFAULT, Meta, Struct, UnsetType

from extproc.config.changes import HOW_CHANGED
from extproc.config.json_schema import json_schema_text
from extproc.config.loading import section_type
from extproc.config.schema import Config
from extproc.metrics.specs import Label, Section, Spec
from extproc.metrics.table import TABLE

DOCS = Path(__file__).resolve().parent
PAGE_COLUMNS = 100

INTRODUCTION = """\
# Configuration

One file in YAML or TOML, named with `--config`. Its extension selects the format: `.yaml`, `.yml`
or `.toml`. `extproc check --config F` prints every problem of the file, one line each, with the key
first; it warns of names in `discovery.static_urls` that have several addresses. Unknown keys and
values are refused, because a setting without effect is worse than an error at start. Times are in
seconds, with fractions. Sizes are in bytes.

[schema.json](schema.json) is a JSON Schema of this file. `extproc schema` prints the schema of the
installed version. An editor with a YAML language server completes and checks the file if its first
line names the schema: `# yaml-language-server: $schema=schema.json`.

A change of this file is applied while the service runs, but for keys that are marked *Restart*; see
[reload.md](reload.md).

Envoy's file is made from the same configuration, also from keys outside `envoy`. When the service
logs `envoy_config_outdated`, render it again with `extproc envoy-config` and restart Envoy.

This page is generated from the code with `make docs`.

The smallest useful file:

```yaml
models:
  - id: meta-llama/Llama-3.1-8B-Instruct
    policy: min_ttft
    tokenizer_path: /models/llama-3.1-8b
discovery:
  backend: static_urls
  static_urls:
    urls: ["http://10.0.0.1:30000", "http://10.0.0.2:30000"]
```

## Rules that span keys

* At least one model is needed. Model ids are unique and printable ASCII, because they are sent in a
  header.
* The policies `cache_aware_zmq` and `min_ttft` need `models[].tokenizer_path`.
  `models[].kv_events` has at most one entry for each worker, and one without `url` for all others.
* `discovery.static_urls` is needed for the backend `static_urls`. URLs are `http` or `https`,
  without path, query or credentials. Two spellings of one worker (a trailing slash, a default
  port) are a duplicate. If the URL of an https worker has an IP address, its certificate must name
  that address.
* `discovery.dns` is needed for the backend `dns`. Its URLs are `http` with a name and a port. With
  it, rendering Envoy's file needs `envoy.endpoints: ads` or `envoy.endpoints_file`, as with the
  backends of a cluster.
* `discovery.k8s`, `discovery.k8s_pods` and `discovery.inference_pool` are needed for the backend of
  that name. The first two need `label_selector`, or both `prefill_selector` and `decode_selector`,
  which must differ, or all three. The section of another backend is refused.
* `server.step_deadline_secs` is shorter than `envoy.message_timeout_secs`, so that a slow decision
  ends with this service's error reply and not with the proxy's time-out.
* `envoy.stream_idle_timeout_secs` is longer than `proxy.request_timeout_secs`.
* `envoy.endpoints_file` is an absolute path that ends in `.json`. It is for
  `envoy.endpoints: file`, and `envoy.fail_open_host` is for `envoy.endpoints: ads`.
* The four ports differ. Header names begin with `x-`, but not with `x-envoy-`.
* `server.admin_token_file` and `server.admin_token_env` exclude each other.
* `workers.api_key` and `workers.api_key_file` exclude each other; `workers.forward_api_key`
  needs one of them.
* With `server.tls` and no `server.unix_socket`, `envoy.extproc.ca_file` is needed, and with
  `server.tls.client_ca_file` also `envoy.extproc.cert_file` and `key_file`.
"""


def render_configuration() -> str:
    """docs/configuration.md."""
    return "\n".join([INTRODUCTION, *_section(Config, "", "")]).rstrip() + "\n"


def _section(section: type[Struct], path: str, meaning: str) -> list[str]:
    hints = get_type_hints(section, include_extras=True)
    rows: list[str] = []
    nested: list[str] = []
    for field in msgspec.structs.fields(section):
        hint = hints[field.name]
        key = f"{path}.{field.encode_name}" if path else field.encode_name
        inner = section_type(hint)
        if inner is None:
            default = _default(field)
            meaning_here = _meaning(hint) + _restart(key)
            rows.append(f"| `{key}` | {_type(hint)} | {default} | {meaning_here} |")
            continue
        if "list" in _type(hint):
            key += "[]"
        note = _meaning(hint)
        if field.required:
            note += " Required."
        if key in HOW_CHANGED:
            note += _restart(key)
        nested += ["", *_section(inner, key, note)]
    heading = [f"## `{path}`", "", meaning, ""] if path else []
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    return [*heading, *table, *nested]


def _restart(key: str) -> str:
    """What a change of the key needs."""
    notes = {
        "live": "",
        "restart": " *Restart.*",
        "live_while_set": " *Restart* to set or remove it.",
    }
    return notes[HOW_CHANGED[key]]


def _default(field: Any) -> str:
    if field.default_factory is not NODEFAULT:
        return f"`{_literal(field.default_factory())}`"
    if field.default is NODEFAULT:
        return "required"
    return f"`{_literal(field.default)}`"


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metas(hint: Any) -> list[Meta]:
    if get_origin(hint) is Annotated:
        inner, *metas = get_args(hint)
        return [*_metas(inner), *(meta for meta in metas if isinstance(meta, Meta))]
    return []


def _meaning(hint: Any) -> str:
    return next((meta.description for meta in _metas(hint) if meta.description), "")


def _type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        bounds = ", ".join(
            f"{sign} {limit:g}" if isinstance(limit, float) else f"{sign} {limit}"
            for meta in _metas(hint)
            for sign, limit in (("≥", meta.ge), ("≤", meta.le))
            if limit is not None
        )
        name = _type(get_args(hint)[0])
        return f"{name} {bounds}" if bounds else name
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(
            "null" if member is NoneType else _type(member)
            for member in get_args(hint)
            if member is not UnsetType
        )
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "boolean"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def render_metrics() -> str:
    """docs/metrics.md: the text around the tables stays as it is in the file."""
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    begin, end = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    tables = "".join(_metrics_section(section) for section in TABLE)
    return f"{before}{begin}\n{tables}{end}{after}"


def _metrics_section(section: Section) -> str:
    text = f"{textwrap.fill(section.text, PAGE_COLUMNS)}\n\n" if section.text else ""
    rows = "".join(f"{_metrics_row(spec)}\n" for spec in section.specs)
    return (
        f"### {section.title}\n\n{text}| metric | type | labels | meaning |\n"
        f"|---|---|---|---|\n{rows}\n"
    )


def _metrics_row(spec: Spec) -> str:
    labels = ", ".join(f"`{name}`" for name in spec.label_names)
    notes = [note for label in spec.labels if (note := _label_note(label))]
    # Names in a help text have no back-ticks: it is read in other places, too.
    text = re.sub(r"(?<!`)\b(extproc_\w+|\w+\.\w+_\w+)", r"`\1`", spec.text)
    return f"| `{spec.name}` | {spec.kind} | {labels} | {' '.join([text, *notes])} |"


def _label_note(label: Label) -> str:
    values = [
        f"`{value}` ({meaning})" if meaning else f"`{value}`"
        for value, meaning in label.values.items()
    ]
    listed = [f"`{label.name}`: {', '.join(values)}."] if values else []
    return " ".join([*listed, *([label.note] if label.note else [])])


PAGES = {
    "configuration.md": render_configuration,
    "metrics.md": render_metrics,
    "schema.json": json_schema_text,
}

if __name__ == "__main__":
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
        sys.stdout.write(f"{name} written\n")

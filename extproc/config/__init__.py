"""The configuration file: its keys, its rules, and how it is read.

Begin with `schema`: `Config` has every section, with type, default, bounds and meaning of each key
(`models` has those of a model, `server` those of this service's ports, `envoy` those of the
rendered Envoy configuration). `loading` reads a file, `rules` checks what spans keys, `files`
checks the files that it names, `warnings` says what is probably not meant, and `json_schema`
describes the file for editors. While the service runs, `watch` sees that the file has changed,
`changes` compares it with the one in use, and `status` says what became of it.
docs/configuration.md is generated from the same structs.
"""

__all__ = [
    "changes",
    "envoy",
    "files",
    "json_schema",
    "loading",
    "models",
    "schema",
    "section",
    "server",
    "status",
    "warnings",
    "watch",
    "worker_urls",
]

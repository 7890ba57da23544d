"""Runs the real helm over the chart, and checks what it renders.

Objects of the Kubernetes API are checked against its published JSON Schemas, in which unknown
keys are refused. For objects of other operators (KEDA, Prometheus) there are no schemas offline, so
tests look at their content.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from helm.generate import CHART

__all__ = [
    "API_VERSION",
    "VALUES_FILES",
    "Release",
    "lint",
    "render",
    "run_helm",
    "run_tool",
    "schema_problems",
]

API_VERSION: Final = "v1.37.0"
VALUES_FILES: Final = sorted((CHART / "values").glob("*.yaml"))
_TOOLS: Final = Path(sys.prefix) / "kubernetes"
_SCHEMAS: Final = (
    _TOOLS / "kubernetes_validate" / "kubernetes-json-schema" / f"{API_VERSION}-local-strict"
)
_TIMEOUT_SECONDS: Final = 60


class Release:
    """The objects of one rendered release."""

    def __init__(self, objects: list[dict[str, Any]]) -> None:
        self.objects = objects

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.objects)

    def kinds(self) -> set[str]:
        return {str(one["kind"]) for one in self.objects}

    def one(self, kind: str, name: str = "") -> dict[str, Any]:
        """The only object of a kind, or the one whose name ends so."""
        (found,) = [
            one
            for one in self.objects
            if one["kind"] == kind
            and (not name or one["metadata"]["name"].endswith(name))
            and (name or not one["metadata"]["name"].endswith(("-test", "-scripts", "-dashboard")))
        ]
        return found

    @property
    def pod(self) -> dict[str, Any]:
        """The template of the Deployment's pods."""
        template: dict[str, Any] = self.one("Deployment")["spec"]["template"]
        return template

    @property
    def container(self) -> dict[str, Any]:
        (found,) = [one for one in self.pod["spec"]["containers"] if one["name"] == "extproc"]
        return dict(found)

    @property
    def config(self) -> dict[str, Any]:
        """The service's configuration, from its ConfigMap."""
        (found,) = [
            one["data"]["extproc.yaml"]
            for one in self.objects
            if one["kind"] == "ConfigMap" and "extproc.yaml" in one["data"]
        ]
        config: dict[str, Any] = yaml.safe_load(found)
        return config


def run_helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm; the result has its exit code and output."""
    return run_tool("helm", *arguments)


def run_tool(
    name: str, *arguments: str | Path, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run helm or kubectl, with this text as its standard input."""
    return subprocess.run(
        [_TOOLS / "bin" / name, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
        env={"HOME": "/nonexistent", "PATH": ""},
    )


def lint(values: Path) -> subprocess.CompletedProcess[str]:
    return run_helm("lint", CHART, "--strict", "--values", values)


def render(
    values: Path | None = None,
    more: Mapping[str, Any] | None = None,
    *,
    notes: bool = False,
    chart: Path = CHART,
) -> tuple[Release, str]:
    """The objects and helm's errors; no objects if it refuses the values.

    `more` are further values, by their dotted names.
    """
    arguments = ["install", "--dry-run=client"] if notes else ["template"]
    arguments += ["r", str(chart), "--namespace", "llm"]
    if values is not None:
        arguments += ["--values", str(values)]
    for name, value in (more or {}).items():
        arguments += ["--set-json", f"{name}={json.dumps(value)}"]
    done = _run_once(*arguments)
    if notes:
        return Release([]), done.stdout + done.stderr
    objects = yaml.safe_load_all(done.stdout) if done.returncode == 0 else ()
    return Release([one for one in objects if one]), done.stderr


@cache
def _run_once(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_helm(*arguments)


def schema_problems(thing: Mapping[str, Any]) -> list[str] | None:
    """What the schema of the object's kind refuses; None if the kind is not part of Kubernetes."""
    validator = _validator(str(thing["apiVersion"]), str(thing["kind"]))
    if validator is None:
        return None
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(thing)]


@cache
def _validator(api_version: str, kind: str) -> Draft202012Validator | None:
    group, _, version = api_version.rpartition("/")
    parts = [kind.lower(), *([group.split(".")[0]] if group else []), version]
    path = _SCHEMAS / f"{'-'.join(parts)}.json"
    if not path.exists():
        return None
    schema = json.loads(path.read_bytes())
    return Draft202012Validator(schema, registry=_definitions())


@cache
def _definitions() -> Registry[Any]:
    path = _SCHEMAS / "_definitions.json"
    definitions: Resource[Any] = Resource.opaque(json.loads(path.read_bytes()))
    # The address by which the schemas refer to it.
    address = "https://kubernetes.io/api/_definitions.json"
    registry: Registry[Any] = Registry().with_resource(address, definitions)
    return registry

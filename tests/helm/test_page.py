"""What the chart's page shows can be used as it stands there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from extproc.config.loading import parse_config
from helm.generate import CHART
from tests.helm.chart import VALUES_FILES, Release, render

PAGE = (CHART / "README.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """The text below a heading, to the next one of any level."""
    _, found, text = PAGE.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(r"^##+ ", text, maxsplit=1, flags=re.MULTILINE)[0]


def shown(heading: str) -> str:
    found = re.search(r"^```yaml\n(.*?)^```$", section(heading), re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


@pytest.mark.parametrize(
    "heading", ["## A gateway with an ext_proc filter", "## A gateway with InferencePools"]
)
@pytest.mark.parametrize("policy", [False, True])
def test_the_values_of_the_page_are_complete(heading: str, policy: bool, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(shown(heading), encoding="utf-8")
    peers: list[dict[str, Any]] = [{"namespaceSelector": {}}]
    more = {"networkPolicy.enabled": policy, "networkPolicy.gateways": peers}
    release, errors = render(path, more)
    assert release.objects, errors
    parse_config(release.config)
    assert "HTTPRoute" in release.kinds()


@pytest.mark.parametrize("key", ["allowedRoutes", "rights there", "config.discovery"])
def test_the_page_says_what_a_filter_needs_besides(key: str) -> None:
    assert key in section("## A gateway with an ext_proc filter")


def secrets_made() -> dict[str, set[str]]:
    """The keys of each Secret that the page's commands make."""
    made = {}
    for line in re.findall(r"^\$ (.* create secret generic .*)$", PAGE, re.MULTILINE):
        words = shlex.split(line, comments=True)
        assert words[:3] == ["kubectl", "-n", "llm"]
        made[words[words.index("generic") + 1]] = {
            word.partition("=")[2].partition("=")[0] for word in words if word.startswith("--from")
        }
    return made


def secrets_used(release: Release) -> dict[str, set[str]]:
    """The keys of each Secret that the pods need."""
    used: dict[str, set[str]] = {}
    pod = release.pod["spec"]
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        for one in container.get("env", []):
            reference: dict[str, Any] = one.get("valueFrom", {}).get("secretKeyRef", {})
            if reference:
                used.setdefault(reference["name"], set()).add(reference["key"])
    for volume in pod["volumes"]:
        if "secret" in volume:
            keys = {item["key"] for item in volume["secret"].get("items", [])}
            used.setdefault(volume["secret"]["secretName"], set()).update(keys)
    return used


@pytest.mark.parametrize("values", VALUES_FILES, ids=lambda path: path.stem)
def test_the_page_makes_each_secret_that_a_values_file_names(values: Path) -> None:
    release, errors = render(values)
    assert release.objects, errors
    made, text = secrets_made(), values.read_text(encoding="utf-8")
    for name, keys in secrets_used(release).items():
        assert keys <= made[name]
        assert "see README.md" in text


def test_there_are_secrets_in_three_of_the_files() -> None:
    releases = [render(values)[0] for values in VALUES_FILES]
    used = {name for release in releases for name in secrets_used(release)}
    assert used == {"extproc-admin", "hugging-face", "worker-api-key", "extproc-tls"}
    assert used == secrets_made().keys()
    assert secrets_made()["extproc-tls"] == {"tls.crt", "tls.key", "ca.crt"}


@pytest.mark.parametrize("kind", ["envoy-gateway", "istio"])
def test_a_recipe_asks_for_what_the_chart_sets_for_prefill_workers(kind: str) -> None:
    filter_values = {
        "kind": kind,
        "hostnames": ["a.org"],
        "gateway": {"name": "main"},
        "workers": {"service": "decode"},
    }
    more = {"mode": "service", "gatewayObjects.filter": filter_values}
    release, errors = render(CHART / "values" / "prefill-and-decode.yaml", more)
    assert release.objects, errors
    page = (CHART.parents[1] / "envoy" / kind / "README.md").read_text(encoding="utf-8")
    text = page.partition("\n## Prefill and decode workers\n")[2].partition("\n## ")[0]
    assert f"`pd.decode: {release.config['pd']['decode']}`" in text
    assert "`route-fail-closed.yaml`" in text
    assert ("`patch.yaml`" in text) is (kind == "envoy-gateway")

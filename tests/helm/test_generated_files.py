"""The chart's files agree with the service: keys, versions, metrics."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from extproc.metrics.table import TABLE
from helm.generate import CHART, FILES
from helm.values import OWNED
from tests.helm.chart import VALUES_FILES

ROOT = Path(__file__).resolve().parents[2]
# From kube-state-metrics.
METRICS_OF_OTHERS = {"kube_pod_status_ready"}


@pytest.mark.parametrize("name", FILES)
def test_a_generated_file_is_up_to_date(name: str) -> None:
    assert (CHART / name).read_text() == FILES[name](), "run `make docs`"


def test_the_schema_refuses_unknown_keys_everywhere() -> None:
    sections = json.loads((CHART / "values.schema.json").read_text())["$defs"]
    open_ones = [name for name, one in sections.items() if one["additionalProperties"] is not False]
    assert open_ones == []


def test_keys_that_the_chart_owns_are_not_in_the_schema() -> None:
    sections = json.loads((CHART / "values.schema.json").read_text())["$defs"]
    for name, keys in OWNED.items():
        if name in sections:
            assert not set(keys) & sections[name]["properties"].keys()


def test_the_chart_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version


@pytest.mark.parametrize("name", ["files/alerts.yaml", "files/dashboard.json"])
def test_alerts_and_dashboard_name_metrics_that_exist(name: str) -> None:
    known = {spec.name for section in TABLE for spec in section.specs}
    known |= {f"{spec.name}_bucket" for section in TABLE for spec in section.specs}
    used = set(re.findall(r"\b(?:extproc|kube)_[a-z_]+\b", (CHART / name).read_text()))
    assert used - known - METRICS_OF_OTHERS == set()
    assert len(used) > 10


def test_every_alert_says_what_it_means() -> None:
    (group,) = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    for rule in group["rules"]:
        if "alert" in rule:
            assert {"summary", "description"} <= rule["annotations"].keys()
        assert "SCOPE" in rule["expr"]


def test_the_readme_names_every_values_file() -> None:
    page = (CHART / "README.md").read_text()
    assert [path.name for path in VALUES_FILES if f"values/{path.name}" not in page] == []

"""The start in five commands works, as far as it can be tried without a registry and a cluster."""

import json
import re
import shlex

import yaml

from extproc.routing.request import CHAT_PATH
from helm.generate import CHART
from tests.helm.chart import Release, run_helm
from tests.helm.start import ROOT, START, commands_in

BUILD, COPY, INSTALL, TEST, FORWARD = commands_in("README.md")


def test_both_pages_have_the_same_five_commands() -> None:
    readme, chart = (commands_in(page) for page in START)
    assert readme == chart
    assert len(readme) == 5


def test_each_value_of_a_cluster_is_marked_in_the_file_to_adjust() -> None:
    lines = (ROOT / COPY[1]).read_text(encoding="utf-8").splitlines()
    marked = " ".join(line.partition("# EDIT")[0] for line in lines if "# EDIT" in line)
    keys = set(re.findall(r"(\w+):(?= )", marked))
    assert keys == {
        *("id", "endpoint", "replay_endpoint", "block_size", "label_selector", "port"),
        *("fail_open_host", "claimName", "subPath", "workers", "kvTokensPerWorker", "pageSize"),
        *("podSelector", "matchLabels", "app", "endPort"),
    }
    # With the same number twice, both lines are marked.
    assert marked.count(" port:") == 2


def test_the_first_request_of_the_readme_is_for_the_model_of_the_values_file() -> None:
    _, _, text = (ROOT / "README.md").read_text(encoding="utf-8").partition(START["README.md"])
    (line,) = re.findall(r"^curl .*$", text, re.MULTILINE)
    command, url, *_, body = shlex.split(line)
    assert command == "curl"
    local, _, _ = FORWARD[-1].partition(":")
    assert url == f"http://127.0.0.1:{local}{CHAT_PATH}"
    values = yaml.safe_load((ROOT / COPY[1]).read_text(encoding="utf-8"))
    request = json.loads(body)
    assert request["model"] == values["config"]["models"][0]["id"]
    assert request["messages"]


def test_the_image_is_the_one_of_the_chart() -> None:
    assert BUILD[:2] == ["docker", "build"]
    assert (ROOT / "Dockerfile").exists()
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    image = f"REGISTRY/llm-extproc:{version}"
    assert BUILD.count(image) == 2
    assert f"image.repository={image.partition(':')[0]}" in INSTALL


def release() -> Release:
    """What the third command installs, with the values file that the second one copies."""
    assert COPY[0] == "cp"
    assert INSTALL[:1] == ["helm"]
    arguments = [str(ROOT / COPY[1]) if one == COPY[2] else one for one in INSTALL[1:]]
    arguments[arguments.index("install")] = "template"
    arguments[arguments.index("helm/llm-extproc")] = str(CHART)
    done = run_helm(*arguments)
    assert done.returncode == 0, done.stderr
    return Release([one for one in yaml.safe_load_all(done.stdout) if one])


def test_the_release_has_what_the_last_two_commands_name() -> None:
    installed = release()
    image = installed.container["image"]
    assert image in BUILD
    hooks = [
        one["metadata"]["name"]
        for one in installed
        if one["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"
        and one["kind"] == "Pod"
    ]
    assert hooks, "helm test has nothing to run"
    assert TEST[:3] == ["helm", "-n", "llm"]
    assert TEST[4] == INSTALL[INSTALL.index("install") + 1]
    kind, _, name = FORWARD[FORWARD.index("port-forward") + 1].partition("/")
    assert kind == "service"
    _, _, port = FORWARD[-1].partition(":")
    services = {one["metadata"]["name"]: one for one in installed if one["kind"] == "Service"}
    ports = [one["port"] for one in services[name]["spec"]["ports"]]
    assert int(port) in ports

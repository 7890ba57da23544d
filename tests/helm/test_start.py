"""The start in five commands works, as far as it can be tried without a registry and a cluster."""

import yaml

from helm.generate import CHART
from tests.helm.chart import Release, run_helm
from tests.helm.start import ROOT, START, commands_in

BUILD, COPY, INSTALL, TEST, FORWARD = commands_in("README.md")


def test_both_pages_have_the_same_five_commands() -> None:
    readme, chart = (commands_in(page) for page in START)
    assert readme == chart
    assert len(readme) == 5


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

"""Installs the kinds that gateways and operators publish into an API server."""

from pathlib import Path

import yaml

from tests.helm.chart import run_tool

from .cluster import Cluster

__all__ = ["install_kinds"]


def install_kinds(cluster: Cluster, folder: Path) -> None:
    """Install all definitions of the folder, and wait until their objects can be read."""
    where = ("--kubeconfig", cluster.admin_kubeconfig())
    done = run_tool("kubectl", *where, "apply", "--server-side", "-f", str(folder))
    assert done.returncode == 0, done.stderr
    for path in folder.glob("*.yaml"):
        for definition in yaml.load_all(path.read_text(), yaml.CSafeLoader):
            spec = definition["spec"]
            for version in spec["versions"]:
                if version["served"]:
                    plural = spec["names"]["plural"]
                    cluster.wait_for(f"/apis/{spec['group']}/{version['name']}/{plural}?limit=1")

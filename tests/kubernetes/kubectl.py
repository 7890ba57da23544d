"""Runs kubectl in one namespace of the API server."""

from tests.helm.chart import run_tool

__all__ = ["Kubectl"]


class Kubectl:
    """kubectl with the credentials of a file, in a namespace."""

    def __init__(self, kubeconfig: str, name: str) -> None:
        self.kubeconfig = kubeconfig
        self.name = name

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        """The output; fails with what kubectl says."""
        where = ("--kubeconfig", self.kubeconfig, "--namespace", self.name)
        done = run_tool("kubectl", *where, *arguments, text=text)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refusal(self, *arguments: str, text: str) -> str:
        """What kubectl says about something that is refused."""
        where = ("--kubeconfig", self.kubeconfig, "--namespace", self.name)
        done = run_tool("kubectl", *where, *arguments, text=text)
        assert done.returncode != 0, done.stdout
        return done.stderr

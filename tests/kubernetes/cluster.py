"""etcd and kube-apiserver as child processes, and a namespace with a service account in it."""

import asyncio
import itertools
import json
import secrets
import signal
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import httpx2
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from lightkube.core.async_client import AsyncClient
from lightkube.models.authentication_v1 import TokenRequestSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.models.rbac_v1 import PolicyRule, RoleRef, Subject
from lightkube.resources.core_v1 import Namespace as NamespaceObject
from lightkube.resources.core_v1 import ServiceAccount, ServiceAccountToken
from lightkube.resources.rbac_authorization_v1 import Role, RoleBinding

from extproc.discovery.kube_api import open_client
from extproc.testing.stack import free_ports

from .programs import Programs

__all__ = ["Cluster", "Namespace", "Objects", "eventually"]

_START_SECONDS: Final = 120.0
_POLL_SECONDS: Final = 0.1
_ACCOUNT: Final = "router"
_names = itertools.count(1)


async def eventually(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait until the condition holds; fails with `what` if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.02)


class Cluster:
    """The control plane; no controller runs before a test starts it, so objects stay as written."""

    def __init__(self, servers: Path, folder: Path) -> None:
        """`servers` is the folder of the programs; everything else goes into `folder`."""
        self._servers = servers
        self._folder = folder
        self._port, etcd, peer = free_ports(3)
        self._etcd_url, self._peer_url = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
        self._token = secrets.token_hex(16)
        self.programs = Programs(folder)
        self.url = f"https://127.0.0.1:{self._port}"
        self.ca_file = folder / "ca.pem"

    def open(self) -> None:
        """Start both servers, and wait until they are ready."""
        self._write_keys()
        self._start("etcd", self._etcd_flags())
        self.start()

    def close(self) -> None:
        """End both servers, and all other programs."""
        self.programs.close()

    def serving(self) -> ssl.SSLContext:
        """The API server's certificate and key, for a proxy on the same address."""
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(self._folder / "server.pem", self._folder / "server.key")
        return tls

    def kubeconfig(self, path: Path, user: dict[str, str], url: str | None = None) -> str:
        """Write a file with these credentials and the server's address, or that of a proxy."""
        cluster = {"server": url or self.url, "certificate-authority": str(self.ca_file)}
        content = {
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": cluster}],
            "users": [{"name": "it", "user": user}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        }
        path.write_text(json.dumps(content))
        return str(path)

    def admin(self) -> AsyncClient:
        """A client that may do everything."""
        return open_client(self.admin_kubeconfig())

    def admin_kubeconfig(self) -> str:
        """A file with the credentials of that client."""
        return self.kubeconfig(self._folder / "admin.kubeconfig", {"token": self._token})

    def start(self) -> None:
        """Start the API server, on the same port and data as before."""
        self._start("kube-apiserver", self._server_flags())
        self.wait_for("/readyz")

    def wait_for(self, path: str) -> None:
        """Wait until the API server answers requests for this path."""
        end = time.monotonic() + _START_SECONDS
        while True:
            with suppress(OSError):
                self.get(path)
                return
            log = self.programs.log("kube-apiserver")
            assert self.programs.ended("kube-apiserver") is None, log
            assert time.monotonic() < end, log
            time.sleep(_POLL_SECONDS)

    def get(self, path: str) -> str:
        """What the API server answers; raises OSError unless that is a 200."""
        tls = ssl.create_default_context(cafile=str(self.ca_file))
        headers = {"Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, context=tls, timeout=5) as answer:
            return str(answer.read().decode())

    @contextmanager
    def slice_controller(self) -> Iterator[None]:
        """The controller that writes the EndpointSlices of Services runs; it ends as in a crash."""
        self._start("endpointslice-controller", ["--kubeconfig", self.admin_kubeconfig()])
        try:
            yield
        finally:
            ended = self.programs.signal("endpointslice-controller", signal.SIGKILL)
            assert ended == -signal.SIGKILL, self.programs.log("endpointslice-controller")

    def kill(self) -> None:
        """End the API server as a crash does."""
        self.programs.signal("kube-apiserver", signal.SIGKILL)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The API server keeps its connections and does not answer."""
        self.programs.signal("kube-apiserver", signal.SIGSTOP)
        try:
            yield
        finally:
            self.programs.signal("kube-apiserver", signal.SIGCONT)

    def _start(self, name: str, flags: list[str]) -> None:
        self.programs.start(name, [str(self._servers / name), *flags])

    def _server_flags(self) -> list[str]:
        folder = self._folder
        return [
            f"--etcd-servers={self._etcd_url}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            "--endpoint-reconciler-type=none",
            # Without it the server looks for a default route.
            "--advertise-address=192.0.2.1",
            f"--tls-cert-file={folder / 'server.pem'}",
            f"--tls-private-key-file={folder / 'server.key'}",
            "--authorization-mode=RBAC",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.test",
            f"--service-account-key-file={folder / 'accounts.key'}",
            f"--service-account-signing-key-file={folder / 'accounts.key'}",
            # There is no controller that makes the account `default`.
            "--disable-admission-plugins=ServiceAccount",
        ]

    def _etcd_flags(self) -> list[str]:
        return [
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            f"--initial-cluster=default={self._peer_url}",
            "--unsafe-no-fsync",
        ]

    def _write_keys(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.ca_file))
        server = authority.issue_cert("127.0.0.1")
        server.cert_chain_pems[0].write_to_path(str(self._folder / "server.pem"))
        server.private_key_pem.write_to_path(str(self._folder / "server.key"))
        (self._folder / "accounts.key").write_bytes(
            rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        (self._folder / "tokens.csv").write_text(f'{self._token},admin,admin,"system:masters"\n')


class Objects:
    """Writes objects into a namespace; the client may do everything."""

    def __init__(self, client: AsyncClient, name: str) -> None:
        self.client = client
        self.name = name

    async def put(self, made: Any) -> None:
        """Create an object, or replace the one of that name."""
        made.metadata.namespace = self.name
        try:
            await self.client.create(made)
        except httpx2.HTTPStatusError as error:
            if error.response.status_code != 409:
                raise
            await self.client.replace(made)

    async def token_of(self, account: str) -> str:
        """A token of this service account."""
        spec = TokenRequestSpec(audiences=["https://kubernetes.test"])
        found = await self.client.create(
            ServiceAccountToken(metadata=ObjectMeta(), spec=spec), account, namespace=self.name
        )
        assert found.status is not None
        assert found.status.token is not None
        return found.status.token


class Namespace(Objects):
    """A namespace; `kubeconfig` is that of its service account, with its token in a file."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(cluster.admin(), f"test-{next(_names)}-{secrets.token_hex(4)}")
        self.cluster = cluster
        self._token_file = folder / "token"
        self._folder = folder
        self.kubeconfig = self.kubeconfig_for(None)

    async def __aenter__(self) -> Self:
        await self.client.create(NamespaceObject(metadata=ObjectMeta(name=self.name)))
        await self.make_account()
        rules = [
            PolicyRule(
                apiGroups=["discovery.k8s.io"],
                resources=["endpointslices"],
                verbs=["list", "watch"],
            ),
            PolicyRule(apiGroups=[""], resources=["pods"], verbs=["list", "watch"]),
            PolicyRule(
                apiGroups=["inference.networking.k8s.io"],
                resources=["inferencepools"],
                resourceNames=["pool"],
                verbs=["list", "watch"],
            ),
        ]
        metadata = ObjectMeta(name=_ACCOUNT, namespace=self.name)
        await self.client.create(Role(metadata=metadata, rules=rules))
        await self.allow()
        return self

    async def __aexit__(self, *_: object) -> None:
        # Objects stay: there is no controller that empties a namespace.
        await self.client.close()

    def kubeconfig_for(self, url: str | None) -> str:
        """The file of the service account, for the API server or for a proxy at this address."""
        user = {"tokenFile": str(self._token_file)}
        return self.cluster.kubeconfig(self._folder / "router.kubeconfig", user, url)

    @property
    def token(self) -> str:
        """The token of the service account."""
        return self._token_file.read_text()

    async def make_account(self) -> None:
        """Make the service account and write a token of it to the file."""
        metadata = ObjectMeta(name=_ACCOUNT, namespace=self.name)
        await self.client.create(ServiceAccount(metadata=metadata))
        self._token_file.write_text(await self.token_of(_ACCOUNT))

    async def replace_account(self) -> None:
        """Make the account and its token again: the old token is refused from now on."""
        await self.client.delete(ServiceAccount, _ACCOUNT, namespace=self.name)
        await self.make_account()

    async def allow(self) -> None:
        """Bind the role to the account."""
        await self.client.create(
            RoleBinding(
                metadata=ObjectMeta(name=_ACCOUNT, namespace=self.name),
                roleRef=RoleRef(apiGroup="rbac.authorization.k8s.io", kind="Role", name=_ACCOUNT),
                subjects=[Subject(kind="ServiceAccount", name=_ACCOUNT, namespace=self.name)],
            )
        )

    async def forbid(self) -> None:
        """Take the role away from the account."""
        await self.client.delete(RoleBinding, _ACCOUNT, namespace=self.name)

"""The certificate that the gRPC server shows, which can be replaced while it serves.

gRPC asks for the certificate at each TLS handshake. So a new one is shown on the next connection,
and open connections, with their streams, stay as they are.
"""

from pathlib import Path

import grpc

from extproc.config.server import ServerTlsConfig

__all__ = ["Certificate", "Certificates"]

# What is shown at a handshake, read from its files.
Certificate = grpc.ServerCertificateConfiguration


class Certificates:
    """The certificate, its key and the authorities of clients, as read from the files."""

    def __init__(self, tls: ServerTlsConfig) -> None:
        """Read the files; raises OSError."""
        self._mutual = tls.client_ca_file is not None
        self._current = _read(tls)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that shows the current certificate at each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._current, lambda: self._current, require_client_authentication=self._mutual
        )

    def read(self, tls: ServerTlsConfig) -> Certificate:
        """Read the files for `use`; raises OSError. It blocks, and may run in a thread."""
        return _read(tls)

    def use(self, certificate: Certificate) -> None:
        """Show this certificate from the next handshake on."""
        self._current = certificate


def _read(tls: ServerTlsConfig) -> Certificate:
    client_ca = Path(tls.client_ca_file).read_bytes() if tls.client_ca_file else None
    return grpc.ssl_server_certificate_configuration(
        [(Path(tls.key_file).read_bytes(), Path(tls.cert_file).read_bytes())],
        root_certificates=client_ca,
    )

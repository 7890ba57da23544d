"""Serves the workers' endpoints to Envoys over ADS, and says which of them they know.

Begin with `session`: it decides what one client is sent, without I/O. `snapshot` makes the
resources from the registered workers, `gate` says which workers all Envoys have, `publisher` keeps
both up to date, and `service` is the gRPC service. Others import `publisher` and `service`.
"""

__all__ = ["publisher", "service"]

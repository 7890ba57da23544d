"""Serves clusters and the workers in them to Envoys over ADS, and says which workers they know.

Begin with `session`: it decides what one client is sent of one type, without I/O. `client` has the
sessions of a stream. `pools` says which workers are in which cluster, `resources` makes of that
what is sent, `gate` says which workers all Envoys have, `publisher` keeps all up to date, and
`service` is the gRPC service. Others import `publisher` and `service`.
"""

__all__ = ["publisher", "service"]

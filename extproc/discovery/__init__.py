"""Discovery backends: where the workers of an installation come from.

A backend is a class with the protocol `workers.source.WorkerSource`, which delivers events about
workers that appear and disappear; it is chosen in `sources.build_source`. Begin with `static_urls`,
the list in the configuration. `dns_names` makes a worker of every address of a host name, which
`name_lookup` finds.

`endpoint_slices`, `pods` and `inference_pool` are backends for a Kubernetes cluster. They say how
an object is read, which is plain code; `cluster_source` puts such a backend together. What is the
same for all kinds of objects stands apart: `rank_map` brings the pods of one engine together,
`worker_union` compares what the objects say, `list_watch` follows them, and `kube_api` alone talks
to the API server.
"""

__all__ = [
    "cluster_source",
    "dns_names",
    "endpoint_slices",
    "inference_pool",
    "pods",
    "static_urls",
]

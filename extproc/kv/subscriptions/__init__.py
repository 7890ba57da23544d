"""Subscriptions to the KV events of ranks: the only modules of kv that touch sockets.

Begin with `subscriber`: one task reads the sockets of all ranks in slices. A `rank_stream` feeds
what one rank sends to its `kv.sequence` and passes batches to its applier; `connection` and
`sockets` own the ZMQ sockets. Others import `subscriber` and, for the endpoint and the settings
of a subscription, `subscription`.
"""

__all__ = ["subscriber", "subscription"]

"""Tracks which KV pages each data-parallel rank caches, from the engines' KV events.

Begin with `indexer`: it follows ranks and holds the index that routing asks. A rank's events come
in through `subscriptions` and `sequence`, are decoded by `wire` and put into the `index` by
`event_applier`; what a rank holds, and whether that is trusted, is kept in its `rank_pages`.
Only `subscriptions` and `indexer` touch sockets, every other module is pure.
"""

__all__ = [
    "events",
    "index",
    "indexer",
    "prefix_hash",
    "rank_pages",
    "stats",
    "subscriptions",
    "wire",
]

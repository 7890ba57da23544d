"""The object that a KV-aware policy chooses: one data-parallel rank of one worker."""

from extproc.kv.rank_pages import RankPages
from extproc.workers.rank_load import RankLoad
from extproc.workers.worker import Worker

__all__ = ["Rank"]


class Rank:
    """One data-parallel rank of a worker, for as long as the worker is registered.

    `engine` is the one whose tokens its pages have. `order` rises with registration and is unique
    among ranks. `pages` are the KV pages that it holds, to be used while they are trusted; None if
    its KV events are not followed.
    """

    __slots__ = ("dp_rank", "engine", "load", "order", "pages", "worker")

    def __init__(
        self,
        worker: Worker,
        dp_rank: int,
        *,
        order: int,
        load: RankLoad,
        pages: RankPages | None = None,
    ) -> None:
        self.worker = worker
        self.engine = worker.engine
        self.dp_rank = dp_rank
        self.order = order
        self.load = load
        self.pages = pages

    def __repr__(self) -> str:
        return f"Rank({self.worker.url}, rank {self.dp_rank})"

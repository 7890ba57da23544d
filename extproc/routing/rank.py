"""What a KV-aware policy chooses: one data-parallel rank of one worker."""

from extproc.kv.rank_pages import RankPages
from extproc.workers.rank_load import RankLoad
from extproc.workers.worker import Worker

__all__ = ["Rank"]


class Rank:
    """One data-parallel rank of a worker, for as long as the worker is registered.

    `order` rises with registration and is unique among ranks. `holder` is what the rank
    holds, None while nothing that could be trusted is known of it.
    """

    __slots__ = ("dp_rank", "holder", "load", "order", "worker")

    def __init__(
        self,
        worker: Worker,
        dp_rank: int,
        *,
        order: int,
        load: RankLoad,
        holder: RankPages | None = None,
    ) -> None:
        self.worker = worker
        self.dp_rank = dp_rank
        self.order = order
        self.load = load
        self.holder = holder

    def __repr__(self) -> str:
        return f"Rank({self.worker.url}, rank {self.dp_rank})"

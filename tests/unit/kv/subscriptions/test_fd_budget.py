"""Tests that ranks leave enough file descriptors for everything else."""

import resource

import pytest

from extproc.kv.subscriptions.fd_budget import FdBudget, raise_descriptor_limit


@pytest.mark.parametrize(
    ("limit", "ranks", "replays"),
    [
        # (1024 - 512 - 32 * 4) / 6
        (1024, 64, 32),
        # (20000 - 2048 - 256 * 4) / 6
        (20_000, 2821, 256),
        (1 << 20, 174_250, 256),
        (10, 1, 1),
    ],
)
def test_ranks_and_replays_get_a_share_of_the_descriptors(
    limit: int, ranks: int, replays: int
) -> None:
    assert FdBudget.within(limit) == FdBudget(ranks, replays)


def test_the_limit_is_raised_as_far_as_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""How the workers of a policy are divided."""

import pytest

from extproc.demo.pools import divided_pool, plain_pool


def test_plain_workers_do_both() -> None:
    pool = plain_pool(4)
    (part,) = pool.parts
    assert (part.workers, pool.prefilling, pool.label, pool.apart) == (4, 4, "4", False)
    assert "--disaggregation-mode" not in part.options


@pytest.mark.parametrize(
    ("workers", "prefill", "decode"), [(2, 1, 1), (3, 2, 1), (4, 2, 2), (15, 8, 7), (16, 8, 8)]
)
def test_half_of_the_workers_prefill_rounded_up(workers: int, prefill: int, decode: int) -> None:
    pool = divided_pool(workers)
    assert [part.workers for part in pool.parts] == [prefill, decode]
    modes = [part.options["--disaggregation-mode"] for part in pool.parts]
    assert modes == ["prefill", "decode"]
    assert (pool.prefilling, pool.apart) == (prefill, True)
    assert pool.label == f"{prefill} prefill and {decode} decode"

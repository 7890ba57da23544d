"""How pairs of workers ended, in a line."""

from extproc.demo.pairs import pairs_ended, pairs_line


def test_pairs_are_counted_over_all_models() -> None:
    samples = {
        'extproc_pd_pairs_total{model="a",outcome="ok"}': 3.0,
        'extproc_pd_pairs_total{model="a",outcome="decode_failed"}': 1.0,
        'extproc_pd_pairs_total{model="b",outcome="ok"}': 4.0,
        'extproc_pd_decode_choices_total{model="a",reason="same_host"}': 4.0,
        'extproc_pd_decode_choices_total{model="b",reason="peer_busy"}': 5.0,
        'extproc_pd_decode_retries_total{model="b"}': 2.0,
    }
    assert pairs_ended(samples) == 8
    assert pairs_line(samples) == (
        "pairs of workers: 7 ok, 1 decode_failed; decode workers picked: 5 peer_busy, 4 same_host"
    )


def test_no_pairs() -> None:
    assert pairs_ended({"up": 1.0}) == 0
    assert pairs_line({"up": 1.0}) == "pairs of workers: none; decode workers picked: none"

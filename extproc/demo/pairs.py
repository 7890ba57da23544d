"""Reads the outcomes of prefill and decode pairs from the service's metrics."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Final

__all__ = ["pairs_ended", "pairs_line"]

_ENDED: Final = re.compile(r'extproc_pd_pairs_total\{.*outcome="(\w+)"')
_PICKED: Final = re.compile(r'extproc_pd_decode_choices_total\{.*reason="(\w+)"')


def pairs_ended(samples: Mapping[str, float]) -> int:
    """The number of ended pairs, with any outcome; `samples` as from `Stack.metrics`."""
    return _counts(samples, _ENDED).total()


def pairs_line(samples: Mapping[str, float]) -> str:
    """The outcomes of pairs and the reasons for their decode workers, over all models."""
    ended, picked = _listed(_counts(samples, _ENDED)), _listed(_counts(samples, _PICKED))
    return f"pairs of workers: {ended}; decode workers picked: {picked}"


def _counts(samples: Mapping[str, float], pattern: re.Pattern[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, value in samples.items():
        if found := pattern.match(name):
            counts[found[1]] += round(value)
    return counts


def _listed(counts: Counter[str]) -> str:
    """Counts as text, the most frequent first."""
    return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "none"

"""How the pairs of prefill and decode workers ended, from the service's own metrics."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Final

__all__ = ["pairs_ended", "pairs_line"]

_ENDED: Final = re.compile(r'extproc_pd_pairs_total\{.*outcome="(\w+)"')
_PICKED: Final = re.compile(r'extproc_pd_decode_choices_total\{.*reason="(\w+)"')


def pairs_ended(samples: Mapping[str, float]) -> int:
    """How many have ended, in whatever way; `samples` as from `Stack.metrics`."""
    return _counts(samples, _ENDED).total()


def pairs_line(samples: Mapping[str, float]) -> str:
    """How they ended and why their decode workers were picked, of all models together."""
    ended, picked = _listed(_counts(samples, _ENDED)), _listed(_counts(samples, _PICKED))
    return f"pairs of workers: {ended}; decode workers picked: {picked}"


def _counts(samples: Mapping[str, float], pattern: re.Pattern[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, value in samples.items():
        if found := pattern.match(name):
            counts[found[1]] += round(value)
    return counts


def _listed(counts: Counter[str]) -> str:
    """The most frequent first."""
    return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "none"

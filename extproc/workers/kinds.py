"""Decides which kind of workers serves a model: plain ones, or prefill and decode workers.

The kinds do not mix, so one worker with a wrong role is out of place beside the others. The kind
of most workers decides, and not that of the worker that answers first. Separate from the
membership, which carries out what is decided here.
"""

from collections.abc import Sequence

from extproc.workers.worker import WorkerSpec

__all__ = ["is_for_plain"]


def is_for_plain(specs: Sequence[WorkerSpec], *, configured: bool, now_plain: bool) -> bool:
    """True if plain workers should serve the model of all these workers, registered and refused.

    `configured`: the configuration says that prefill and decode workers serve it. `now_plain`:
    plain workers serve it now, which decides where nothing else does.
    """
    roles = [spec.role for spec in specs]
    if configured or any(spec.role_is_configured and spec.role != "plain" for spec in specs):
        return False
    plain = roles.count("plain")
    others = len(roles) - plain
    if plain != others:
        return plain > others
    # As many of each kind: the one that can serve alone.
    return now_plain or not ("prefill" in roles and "decode" in roles)

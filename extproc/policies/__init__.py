"""Policies: pure functions that choose one worker or one rank among candidates.

Begin with `base`: it says what a policy is shown and what it returns. Each policy has a module of
its own, and `factory` makes the one that a model's configuration names. `decode_affinity` chooses
the decode worker that takes over from a prefill worker. A policy does no I/O, reads no clock and
logs nothing.
"""

__all__ = ["base", "decode_affinity", "factory"]

"""Engines: everything in which inference engines differ for a router.

Begin with `engine`: it has an entry for each engine. `sglang` and `vllm` have its rules, by which
the prompt is read from a body and given to a chat template. Everything here is pure.
"""

__all__ = ["engine"]

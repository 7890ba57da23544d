"""Starts the real parts of an installation for the demo, the tests and the benchmarks.

Begin at `stack.Stack`: it runs the service and Envoy as processes on free loopback ports,
as an operator starts them. Nothing of the running service imports this package.
"""

__all__ = ["stack"]

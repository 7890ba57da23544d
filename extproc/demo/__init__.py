"""The `extproc demo` command: a whole installation on one machine, with traffic.

It starts the real Envoy, the service and simulated workers, and sends the same conversations
to several policies. Begin at `cli.run`; `testing.stack` starts Envoy and the service. Others
import `cli` (the command line) and `tiny_model` (tests and benchmarks).
"""

__all__ = ["cli", "tiny_model"]

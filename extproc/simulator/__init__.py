"""A simulated worker that behaves like SGLang on the wire and needs no GPU.

It exists so that tests, benchmarks and the demo run the router against something that
queues, prefills, decodes, streams, aborts and fails like an engine. The text it
generates is meaningless; the wire format, the order of events and the timing are
realistic. Begin at `http.start`, then read `inference`, `engine` and `ranks`. Only the
command line, the demo, tests and benchmarks import this package.
"""

__all__ = ["cache_events", "cli", "http", "radix_cache", "settings", "time_model"]

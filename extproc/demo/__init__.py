"""A whole installation on one machine: real Envoy, the service, workers, traffic.

`stack` starts the parts on free ports and is what the end-to-end tests and benchmarks use
too; `cli` is the `extproc demo` command.
"""

"""Renders Envoy's bootstrap from the configuration, so that the two cannot disagree.

Begin with `bootstrap`: it puts the `listener` with its `routes`, the `clusters` and the listener
of the `decode_pass` together. Time-outs, limits, header names and addresses are written once, in
the configuration. Rendering opens no connection and needs no other file, so it works anywhere.
One file serves workers of every role, since models and roles are learnt at run time.
`merge` adds the same parts to a file that an operator has already. `endpoints_file` keeps the file
up to date from which Envoy can read the workers.

Needs Envoy 1.38 or later; tested with 1.40.
"""

from extproc.envoy_config.bootstrap import bootstrap_problems, render_bootstrap, render_yaml
from extproc.envoy_config.clusters import pool_cluster, tls_contexts
from extproc.envoy_config.merge import merge_yaml

__all__ = [
    "bootstrap_problems",
    "endpoints",
    "endpoints_file",
    "merge_yaml",
    "pool_cluster",
    "render_bootstrap",
    "render_yaml",
    "tls_contexts",
]

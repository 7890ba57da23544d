"""Config -> Envoy's bootstrap, so that the two can not disagree.

Time-outs, limits, header names and addresses are written once, in our configuration; what
Envoy gets is rendered from it. Rendering contacts nobody and reads no file, so it can happen
on another machine than the one that serves. The same file serves every role of the static
workers, since models and roles are learnt from the workers at run time.

Needs Envoy 1.38 or later; tested with 1.40.
"""

from extproc.envoy_config.bootstrap import render_bootstrap, render_yaml

__all__ = ["render_bootstrap", "render_yaml"]

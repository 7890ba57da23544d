"""A worker that behaves like SGLang on the wire and needs no GPU.

It exists so that tests, benchmarks and the demo run the router against something that
queues, prefills, decodes, streams, aborts and breaks like an engine does. The text it
answers with is meaningless; the wire format, the order of events and the timing are what
it is for. It stands apart: nothing else in the package imports it but the command line.
"""

from extproc.simulator.http import RunningSimulator, create_app, start
from extproc.simulator.settings import SimulatorSettings

__all__ = ["RunningSimulator", "SimulatorSettings", "create_app", "start"]

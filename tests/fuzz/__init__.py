"""Coverage-guided fuzzing of what others send: bodies, KV events and chat templates.

`targets` has one function for each kind of input; it takes any bytes and raises if the code breaks
its promises. `python -m tests.fuzz bodies` runs one of them, `make fuzz` all.
"""

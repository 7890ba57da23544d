"""Storms of faults over the real Envoy, the real service and simulated workers.

`make faults` runs them. Begin with `storm`: it sends `traffic` while `faults` come and go on a
`fleet`, and then checks what must hold after every storm.
"""

"""What the service costs, measured side by side in one run.

Single figures of one machine say little, and a throughput run on shared cores swings by a
factor of two; each program here compares against a baseline that ran at the same time.
"""

"""Benchmarks of the service: each compares with a baseline that runs in the same run.

Absolute figures of one machine mean little, and throughput on shared cores varies by a factor
of two. Compare ratios.
"""

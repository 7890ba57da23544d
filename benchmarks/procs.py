"""Reads CPU time and resident memory of processes from /proc.

A direct read costs microseconds, so it does not change the figures.
"""

import os
from pathlib import Path
from typing import Final

__all__ = [
    "cpu_seconds",
    "machine_cpu_seconds",
    "parse_cpu_ticks",
    "parse_machine_ticks",
    "parse_rss_bytes",
    "rss_bytes",
]

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
# Fields 14 and 15 of proc_pid_stat(5), counted from the state (field 3) on.
_UTIME: Final = 14 - 3
_STIME: Final = 15 - 3


def parse_cpu_ticks(stat: str) -> int:
    """User and system ticks of all threads, from the text of /proc/PID/stat.

    The name of the process comes second, in parentheses, and may hold blanks and parentheses.
    """
    fields = stat.rpartition(")")[2].split()
    return int(fields[_UTIME]) + int(fields[_STIME])


def parse_machine_ticks(stat: str) -> int:
    """Ticks in which a core was busy or taken by the host, from the text of /proc/stat.

    The first line holds user, nice, system, idle, iowait, irq, softirq, steal; guest time is
    part of user time.
    """
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return user + nice + system + irq + softirq + steal


def parse_rss_bytes(status: str) -> int:
    """`VmRSS` in bytes, from the text of /proc/PID/status; raises ValueError without it."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "VmRSS":
            return int(value.split()[0]) * 1024
    raise ValueError("no VmRSS line (has the process ended?)")


def cpu_seconds(pid: int) -> float:
    """CPU time used so far by a process and all its threads; steps of 10 ms."""
    return parse_cpu_ticks(Path(f"/proc/{pid}/stat").read_text()) / _TICKS_PER_SECOND


def machine_cpu_seconds() -> float:
    """CPU time used so far by all processes of this machine."""
    return parse_machine_ticks(Path("/proc/stat").read_text()) / _TICKS_PER_SECOND


def rss_bytes(pid: int) -> int:
    """Resident memory in bytes."""
    return parse_rss_bytes(Path(f"/proc/{pid}/status").read_text())

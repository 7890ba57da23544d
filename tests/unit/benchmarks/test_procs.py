"""Readings of /proc, from text and from this very process."""

import os
import time

import pytest

from benchmarks.procs import (
    cpu_seconds,
    machine_cpu_seconds,
    parse_cpu_ticks,
    parse_machine_ticks,
    parse_rss_bytes,
    rss_bytes,
)


def test_cpu_ticks_are_user_and_system_time() -> None:
    # Fields 14 and 15 of proc_pid_stat(5) are 700 and 42.
    stat = "7 (envoy) S 1 7 7 0 -1 4194560 10 20 30 40 700 42 5 6 20 0 8 0 999"
    assert parse_cpu_ticks(stat) == 742


def test_a_process_name_may_hold_blanks_and_parentheses() -> None:
    stat = "7 (a (b) c) R 1 7 7 0 -1 4194560 10 20 30 40 1 2 5 6 20 0 8 0 999"
    assert parse_cpu_ticks(stat) == 3


def test_the_machine_is_busy_in_all_but_idle_and_waiting_time() -> None:
    # user 1, nice 2, system 3, idle 1000, iowait 100, irq 4, softirq 5, steal 6.
    assert parse_machine_ticks("cpu  1 2 3 1000 100 4 5 6 7 8\ncpu0 1 1 1 1") == 21


def test_resident_memory_is_given_in_kilobytes_of_1024() -> None:
    assert parse_rss_bytes("Name:\tenvoy\nVmPeak:\t 9 kB\nVmRSS:\t   12 kB\n") == 12_288


def test_a_process_that_has_ended_has_no_resident_memory() -> None:
    with pytest.raises(ValueError, match="ended"):
        parse_rss_bytes("Name:\tenvoy\nState:\tZ (zombie)\n")


def test_readings_of_this_process() -> None:
    before = cpu_seconds(os.getpid())
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    assert cpu_seconds(os.getpid()) > before
    assert machine_cpu_seconds() > before
    assert rss_bytes(os.getpid()) > 1_000_000

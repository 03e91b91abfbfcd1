"""What this process has used: CPU seconds and peak memory."""

from __future__ import annotations

import os
import sys
import time

import msgspec


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """CPU and memory of one process so far."""

    cpu_seconds: float
    """User and system time of all threads."""
    peak_memory_bytes: int
    """Largest resident set; 0 where the platform does not tell."""


def usage() -> Usage:
    """Measure this process."""
    return Usage(cpu_seconds=time.process_time(), peak_memory_bytes=_peak_memory_bytes())


def _peak_memory_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def load_average() -> float:
    """Return the machine's one-minute load average; -1 where there is none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return -1.0

"""Say which process holds a lease, and whether it still lives.

One idea: a process is named by its pid, the moment it started and the boot it belongs to, so a reused pid or a
rebooted machine is never taken for the old owner. One trap: a zombie still has its pid; it counts as dead.
"""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path

from leyden.interfaces import Owner

_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys/kernel/random/boot_id"


def current_owner() -> Owner:
    """Return the owner that stands for this process."""
    # Asked anew each time: after a fork the child is another process.
    return Owner(pid=os.getpid(), process_start=_process_start(os.getpid()) or "", boot_id=boot_id())


def is_alive(owner: Owner) -> bool:
    """Say whether `owner` still runs on this machine.

    False at once when the pid is gone, belongs to a process that started at another moment, or the machine has
    booted since. Where the platform tells no start time, the pid alone decides.
    """
    if owner.boot_id != boot_id():
        return False
    start = _process_start(owner.pid)
    if start is None:
        return False
    return not (start and owner.process_start) or start == owner.process_start


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Return what names this boot of the machine; empty where the platform does not say."""
    if _BOOT_ID.exists():
        return _BOOT_ID.read_text().strip()
    return _output_of("sysctl", "-n", "kern.bootsessionuuid") or ""


def _process_start(pid: int) -> str | None:
    """Return when process `pid` started, empty if unknown, `None` when there is no such process."""
    if not (_PROC / "self/stat").exists():
        return _process_start_by_ps(pid)
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        return ""
    # The command stands in parentheses and may hold spaces and parentheses itself; fields count after the last
    # one (proc(5)): state is field 3, starttime in clock ticks since boot is field 22.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _process_start_by_ps(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return _output_of("ps", "-o", "lstart=", "-p", str(pid)) or ""


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

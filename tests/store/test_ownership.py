"""A process is told from another with its pid, and from itself after a reboot."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leyden import ownership
from leyden.ownership import current_owner, is_alive


def test_this_process_is_alive_and_names_itself_alike() -> None:
    assert is_alive(current_owner())
    assert current_owner() == current_owner()
    assert current_owner().pid == os.getpid()


def test_another_start_or_another_boot_is_another_process() -> None:
    mine = current_owner()
    assert not is_alive(dataclasses.replace(mine, process_start="1"))
    assert not is_alive(dataclasses.replace(mine, boot_id="another"))


def test_a_running_child_is_alive_and_a_dead_one_is_not_even_before_it_is_waited_for() -> None:
    program = "from leyden.ownership import current_owner as o; print(o().process_start, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        start = child.stdout.readline().strip()
        owner = dataclasses.replace(current_owner(), pid=child.pid, process_start=start)
        assert is_alive(owner)
        child.kill()
        deadline = time.monotonic() + 10
        while is_alive(owner) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(owner), "a zombie holds nothing"
    assert not is_alive(owner)


def test_an_unknown_start_falls_back_to_the_pid() -> None:
    mine = dataclasses.replace(current_owner(), process_start="")
    assert is_alive(mine)


@pytest.mark.skipif(not os.path.exists("/proc/self/comm"), reason="needs Linux's /proc")
def test_a_process_name_with_parentheses_is_read_right() -> None:
    program = (
        "from leyden.ownership import current_owner; plain = current_owner()\n"
        "open('/proc/self/comm', 'w').write('a ) (R 1')\n"
        "assert ') (R 1' in open('/proc/self/stat').read() and current_owner() == plain"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_proc_ps_tells_when_a_process_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ownership, "_PROC", tmp_path)
    mine = current_owner()
    assert is_alive(mine)
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert not is_alive(dataclasses.replace(mine, pid=child.pid))

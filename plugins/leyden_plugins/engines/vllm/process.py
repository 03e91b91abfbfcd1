"""A server's process, and everything that it starts.

One idea: between us and the server stands `in_server/leyden_launch.py`, which ends the server when its standard input
is closed. The system closes that also when we are killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from leyden.errors import EngineError
from leyden_plugins.engines.vllm.flags import IN_SERVER

LAUNCHER = IN_SERVER / "leyden_launch.py"
GRACE_SECONDS = 20.0
"""How long launcher and server may take to end by themselves."""
TAIL_BYTES, TAIL_LINES = 16_384, 30


class Process:
    """One run of a server."""

    def __init__(self, python: str, command: Sequence[str], *, environ: Mapping[str, str], log: Path) -> None:
        """Start it. Blocks until its launcher runs.

        Args:
            python: runs the launcher.
            command: starts the server.
            environ: its whole environment.
            log: gets its output, behind what is there.

        Raises:
            EngineError: it cannot be started.
        """
        self.log = log
        with log.open("ab") as output:
            self._began_at = output.tell()
            self._launcher = subprocess.Popen(
                [python, str(LAUNCHER), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(environ),
                start_new_session=True,  # Ctrl-C in a terminal is for us
            )
        assert self._launcher.stdout is not None and self._launcher.stdin is not None  # pipes
        self._lifeline = self._launcher.stdin
        with self._launcher.stdout as first:
            said = first.readline().strip()
        if not said.isdigit():
            raise EngineError(f"the server could not be started:\n{self.tail()}")
        self.pid = int(said)
        """The server's, which is also the number of its process group."""

    @property
    def is_running(self) -> bool:
        """Whether launcher, and so server, run."""
        return self._launcher.poll() is None

    def tail(self) -> str:
        """Return the last lines that it wrote."""
        with self.log.open("rb") as output:
            output.seek(max(self._began_at, self.log.stat().st_size - TAIL_BYTES))
            lines = output.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Ask it to end, then kill what is left. Idempotent."""
        with suppress(OSError):
            self._lifeline.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self.is_running:
                    await asyncio.sleep(0.05)
        status = self._launcher.poll()
        if status is None or status < 0:  # a launcher that was killed has not ended its server, which holds the port
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        if status is None:
            self._launcher.kill()
            await asyncio.to_thread(self._launcher.wait)


def free_port() -> int:
    """Return a port of the loopback address on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

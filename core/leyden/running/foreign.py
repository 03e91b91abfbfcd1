"""Start a worker process with another interpreter, for an agent whose framework lives in an environment of its own.

`multiprocessing` cannot: it hands the child its parent's module path and main script. So the child is an ordinary
`python -m leyden.running.foreign`, which inherits one end of the pipe and hears the rest through it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from leyden.errors import ConfigurationError
from leyden.running.worker import FromWorker, WorkerSetup, encode, worker_main


class Greeting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first message to a foreign worker."""

    path: str
    """Where the trainer's script lies, for importing the agent."""
    setup: WorkerSetup


class ForeignProcess:
    """A worker with an interpreter of its own; speaks like a `multiprocessing` process."""

    def __init__(self, python: str, theirs: Connection) -> None:
        self._python = python
        self._theirs = theirs
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its greeting goes through the pipe."""
        inherited = self._theirs.fileno()
        self._process = subprocess.Popen(
            [self._python, "-m", __name__, str(inherited)],
            pass_fds=(inherited,),
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")},
        )

    @property
    def pid(self) -> int | None:
        """Its process id, once started."""
        return self._process.pid if self._process else None

    @property
    def exitcode(self) -> int | None:
        """How it ended; `None` while it runs."""
        return self._process.poll() if self._process else None

    def is_alive(self) -> bool:
        """Say whether it runs."""
        return self._process is not None and self._process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, at most `timeout` seconds."""
        if self._process is not None:
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                return

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()


def greeting(setup: WorkerSetup) -> bytes:
    """Return the message that a foreign worker waits for."""
    return encode(Greeting(path=sys.path[0] or os.getcwd(), setup=setup))


def interpreter(python: str | os.PathLike[str]) -> str:
    """Return the absolute path of an interpreter.

    Raises:
        ConfigurationError: there is none.
    """
    found = shutil.which(os.fspath(python))
    if found is None:
        raise ConfigurationError(f"python={os.fspath(python)!r} is no program; give an environment's bin/python")
    # Not resolved: the link is how an interpreter knows its environment.
    return str(Path(found).absolute())


def main() -> None:
    """Be the worker process."""
    pipe = Connection(int(sys.argv[1]))
    try:
        said = msgspec.msgpack.decode(pipe.recv_bytes(), type=Greeting)
    except msgspec.ValidationError as error:
        text = f"the Leyden of {sys.executable} is not the trainer's ({error}); install the same version in both"
        pipe.send_bytes(encode(FromWorker(fatal=text)))
        return
    if said.path not in sys.path:
        sys.path.insert(0, said.path)
    worker_main(pipe, said.setup)


if __name__ == "__main__":
    main()

"""Run a program for as long as our standard input stays open; then end it, with everything it has started.

    python leyden_launch.py PROGRAM ARGUMENT...

The one idea: a pipe is a lifeline. The engine holds its other end, and the system closes that end however the engine's
process dies, so no server outlives its trainer. (A death signal would not do: Linux sends it when the thread ends that
started the child, and engines are started on threads that come and go.)

The first line of output is the program's process id, which is its process group's too. Only the standard library is
used: this runs in the server's environment.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 15.0
"""How long the program may take to end by itself."""


def main() -> int:
    """Return the program's exit status."""
    # Its output goes to our standard error, which is the log: nobody reads our standard output beyond the first line.
    program = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
    print(program.pid, flush=True)
    threading.Thread(target=end_when_abandoned, args=(program,), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end(program))
    status = program.wait()
    # Whoever killed the program alone has left its children.
    signal_group(program, signal.SIGKILL)
    return status


def end_when_abandoned(program: "subprocess.Popen[bytes]") -> None:
    """Wait for the end of standard input, which carries nothing."""
    while os.read(0, 4096):
        pass
    end(program)
    os._exit(1)  # the main thread waits for the program, and may be in the way of a signal


def end(program: "subprocess.Popen[bytes]") -> None:
    """End the program and its group: first politely, then not."""
    signal_group(program, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while program.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_group(program, signal.SIGKILL)


def signal_group(program: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a signal to the program's process group, if anybody is left in it."""
    try:
        os.killpg(program.pid, number)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    sys.exit(main())

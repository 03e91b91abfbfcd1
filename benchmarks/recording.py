"""What `leyden.record` costs an app: processor time a call and a rollout, memory and disk, and waiting for the store.

One idea: the same calls, recorded and not, alternate in one process against one server in another, so what is compared
ran under the same load. Times of the app's own thread are its processor time; the storing thread's are the rest.

    python -m benchmarks.recording
"""

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import httpx

import leyden
from leyden.recording import writing

QUESTION = "Why is the sky blue, and the sea? " * 12
ANSWER = {"role": "assistant", "content": "Because of how light is scattered. " * 12}
CALLS = 3
"""Model calls a rollout."""


class Handler(BaseHTTPRequestHandler):
    """Answers every chat completion with the same words."""

    protocol_version = "HTTP/1.1"
    content = json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": ANSWER}],
        }
    ).encode()

    def do_POST(self) -> None:
        """Answer."""
        self.rfile.read(int(self.headers["content-length"]))
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(self.content)}\r\n\r\n"
        self.wfile.write(head.encode() + self.content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


def serve() -> None:
    """Run the server until it is ended."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


class App:
    """Makes calls one after the other."""

    def __init__(self, port: int) -> None:
        self.client = httpx.Client(trust_env=False)
        self.url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def rollout(self) -> None:
        """Do what one request of a customer takes."""
        for number in range(CALLS):
            body = {"model": "m", "messages": [{"role": "user", "content": f"{number}: {QUESTION}"}]}
            self.client.post(self.url, json=body).raise_for_status()

    def run(self, rollouts: int) -> None:
        """Serve customers, not recorded."""
        for _ in range(rollouts):
            self.rollout()

    def run_recorded(self, rollouts: int, recording: leyden.Recording, latencies: list[float] | None = None) -> None:
        """Serve customers, recorded."""
        for number in range(rollouts):
            began = time.perf_counter()
            with recording.rollout({"customer": number}) as rollout:
                self.rollout()
                rollout.output = ANSWER["content"]
            if latencies is not None:
                latencies.append(time.perf_counter() - began)


def costs(work: Callable[[], None]) -> tuple[float, float]:
    """Return seconds of this thread's processor time, and of the process's."""
    thread, process = time.thread_time(), time.process_time()
    work()
    return time.thread_time() - thread, time.process_time() - process


def overhead(app: App, folder: Path, *, rollouts: int, rounds: int) -> str:
    """Compare recorded with plain calls, in turns."""
    app.run(rollouts)
    own, all_of_it, stored = [], [], 0
    for _ in range(rounds):
        plain = costs(lambda: app.run(rollouts))
        recording = leyden.record(folder)

        def recorded(recording: leyden.Recording = recording) -> None:
            app.run_recorded(rollouts, recording)
            assert recording.flush()

        with_it = costs(recorded)
        recording.close()
        assert not recording.dropped, recording.dropped
        stored += recording.stored
        own.append((with_it[0] - plain[0]) / rollouts * 1e6)
        all_of_it.append((with_it[1] - plain[1]) / rollouts * 1e6)
    size = sum(path.stat().st_size for path in folder.glob("*.db*")) / stored
    return (
        f"a rollout of {CALLS} calls costs the app's thread {spread(own)} us, the process {spread(all_of_it)} us of "
        f"processor time (median, lowest to highest of {rounds} rounds of {rollouts}); {size / 1000:.1f} kB on disk"
    )


def empty_rollouts(folder: Path, count: int) -> str:
    """Measure rollouts without calls."""
    with leyden.record(folder, queue=10 * count) as recording:

        def many() -> None:
            for number in range(count):
                with recording.rollout(number):
                    pass

        took, _ = costs(many)
        recording.flush(60)
    return f"a rollout without calls costs the app's thread {took / count * 1e6:.0f} us"


def stalled(app: App, folder: Path, *, rollouts: int, seconds: float) -> str:
    """Compare latencies under a store that stands still with those under one that does not, and see what it holds."""
    opened = writing.open_store
    told = []
    for wait in (0.0, seconds):

        async def late(folder: Path, wait: float = wait) -> object:
            await asyncio.sleep(wait)
            return await opened(folder)

        latencies: list[float] = []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with mock.patch.object(writing, "open_store", late), leyden.record(folder / str(wait), queue=1000) as recording:
            app.run_recorded(rollouts, recording, latencies)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
            recording.flush(seconds + 10)
            dropped = dict(recording.dropped)
            assert recording.stored + sum(dropped.values()) == rollouts
        ordered = sorted(latencies)
        told.append(
            f"store still for {wait:g} s: median {statistics.median(ordered) * 1e3:.2f} ms, "
            f"99th percentile {ordered[int(0.99 * rollouts)] * 1e3:.2f} ms, highest {ordered[-1] * 1e3:.2f} ms, "
            f"peak memory grew {grown:.1f} MB, dropped {dropped or 'none'}"
        )
    return "\n".join(told)


def spread(values: list[float]) -> str:
    """Return the median, lowest and highest."""
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--still", type=float, default=5.0, help="seconds that the store stands still")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    command = [sys.executable, "-m", "benchmarks.recording", "--serve"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None
        try:
            app = App(int(server.stdout.readline()))
            print(overhead(app, Path(folder, "overhead"), rollouts=options.rollouts, rounds=options.rounds))
            print(empty_rollouts(Path(folder, "empty"), 2000))
            print(stalled(app, Path(folder, "stalled"), rollouts=2 * options.rollouts, seconds=options.still))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()

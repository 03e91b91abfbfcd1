"""Say where the demo's CPU time goes: by process, and by thread of the trainer.

Threads are told apart by name; Linux keeps each one's CPU time in /proc. The engine samples on its own thread, the
gateway and the trainer share the loop's thread, the learner works on threads named asyncio_*, and the endpoint that
serves the untrained role has a loop of its own. Imports count where they happen: the main thread and asyncio_*.

    python -m benchmarks.demo_profile --steps 10
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

from examples.text_to_sql import train

TICKS = os.sysconf("SC_CLK_TCK")


def thread_cpu_seconds() -> dict[str, float]:
    """Return thread name -> CPU seconds so far, for the threads alive now."""
    found: dict[str, float] = {}
    for thread in threading.enumerate():
        stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
        user, system = stat[stat.rindex(")") + 2 :].split()[11:13]
        name = thread.name.rstrip("0123456789_-")
        found[name] = found.get(name, 0.0) + (int(user) + int(system)) / TICKS
    return found


def main() -> None:
    """Train a few steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    with train.serving_engine(0) as engine, tempfile.TemporaryDirectory() as folder:
        trainer = train.trainer(engine, train.algorithm(0), seed=0, run=Path(folder) / "run")
        summary = trainer.fit(options.steps)
        threads = thread_cpu_seconds()
        own = time.process_time()
    total = float(str(summary["total_cpu_seconds"]))
    calls = int(str(summary["model_calls"]))
    rows = [("agent: worker processes, start-up included", total - float(own))]
    rows += [(f"trainer process: thread {name}", seconds) for name, seconds in threads.items()]
    rows += [("trainer process: threads that have ended", own - sum(threads.values()))]
    print(f"\n{summary['rollouts']} rollouts, {calls} model calls, {total:.1f} CPU seconds in all")
    for name, seconds in sorted(rows, key=lambda row: -row[1]):
        print(f"{name:55} {seconds:7.1f} s  {seconds / total:6.1%}  {1000 * seconds / calls:6.2f} ms a model call")


if __name__ == "__main__":
    main()

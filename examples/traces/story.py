"""The whole story, offline: a traced AutoGen app, its traces received, a small model trained on them, the app on it.

    python -m examples.traces.story --app-python APP_VENV/bin/python --seeds 0 1 2

`app.py` says what its interpreter needs; this one needs `leyden[train,otel]`. Each step is a command that you could
type; it is printed as such.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
LEYDEN = [*PYTHON, "leyden.cli"]
MODEL = ROOT / "examples" / "text_to_sql" / "model"
RECORDED = 300
HELD_OUT = 200


def say(command: list[str]) -> None:
    """Print a command as one types it."""
    print("$ " + shlex.join(command).replace(shlex.join(LEYDEN), "leyden"), flush=True)


@contextlib.contextmanager
def running(*command: str, end: signal.Signals = signal.SIGINT) -> Iterator[str]:
    """Run a server for the length of a block; yield the address that it prints."""
    say(list(command))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = re.search(r"http://[\w.:]+\S*", line)
                if found is not None:
                    yield found.group().rstrip(";,")
                    break
            else:
                raise RuntimeError(f"{shlex.join(command)} ended before it served")
        finally:
            process.send_signal(end)
            print(process.stdout.read(), end="")


def run(*command: str, **variables: str) -> str:
    """Run a command; return what it prints.

    Raises:
        CalledProcessError: it failed.
    """
    say(list(command))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True, env={**os.environ, **variables}
    )
    print(done.stdout, end="", flush=True)
    return done.stdout


def share(printed: str) -> float:
    """Return the share of questions that the app says it answered right."""
    found = re.search(r"served right: ([\d.]+)", printed)
    assert found is not None
    return float(found.group(1))


def served(app: list[str], folder: Path, teacher: str, held_out: int) -> float:
    """Return how the app does on held-out questions, its writer on the model in `folder`."""
    with running(*LEYDEN, "serve", str(folder), "--port", "0", "--model-name", "sql") as writer:
        printed = run(*app, "tuning", "--count", str(held_out), OPENAI_BASE_URL=teacher, WRITER_BASE_URL=writer)
    return share(printed)


def story(app: list[str], folder: Path, teacher: str, *, seed: int, count: int) -> Path:
    """Record other questions for every seed, train on the traces, and return the folder with the model."""
    traces, thumbs, tuned = folder / f"traces-{seed}", folder / f"thumbs-{seed}.csv", folder / f"tuned-{seed}"
    with running(*LEYDEN, "traces", "receive", str(traces), "--port", "0") as receiver:
        asked = ["train", "--first", str(seed * count), "--count", str(count), "--feedback", str(thumbs)]
        run(*app, *asked, OPENAI_BASE_URL=teacher, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=receiver)
    run(*LEYDEN, "rewards", "add", str(traces), str(thumbs))
    run(*PYTHON, "examples.traces.train", str(traces), str(tuned), "--seed", str(seed))
    return tuned


def main() -> None:
    """Parse the options, tell the story, print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--app-python", required=True, help="interpreter of an environment with what the app needs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=RECORDED, help="questions to be recorded")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="questions that nobody had asked")
    options = parser.parse_args()
    app = [options.app_python, "-m", "examples.traces.app"]
    with (
        tempfile.TemporaryDirectory() as folder,
        running(*PYTHON, "examples.production.closed_model", "0", end=signal.SIGTERM) as teacher,
    ):
        before = served(app, MODEL, teacher, options.held_out)
        after = []
        for seed in options.seeds:
            tuned = story(app, Path(folder), teacher, seed=seed, count=options.count)
            after.append(served(app, tuned, teacher, options.held_out))
    print(f"untrained: {before:.3f} of {options.held_out} held-out questions")
    spread = f" ± {statistics.stdev(after):.3f}" if len(after) > 1 else ""
    print(f"trained on traces: {statistics.mean(after):.3f}{spread} (seeds {options.seeds}: {after})")


if __name__ == "__main__":
    main()

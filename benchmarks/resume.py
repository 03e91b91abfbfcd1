"""Kill the demo with SIGKILL at random moments, resume it each time, and compare with an undisturbed run.

python -m benchmarks.resume --kills 3        # about 5 minutes on 2 cores
"""

import argparse
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from leyden.sqlite import SQLiteStore

ROOT = Path(__file__).parent.parent


def start(run: Path, options: argparse.Namespace, *, resume: bool) -> subprocess.Popen[bytes]:
    """Start the demo in a process group of its own."""
    command = [sys.executable, "-m", "examples.text_to_sql.train", "--run", str(run), "--steps", str(options.steps)]
    command += ["--seed", str(options.seed), *(["--resume"] if resume else [])]
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def accuracy(run: Path) -> float:
    """Return the run's held-out accuracy after training."""
    return float(json.loads((run / "summary.json").read_text())["accuracy_after"])


async def double_counted(run: Path) -> tuple[int, int, int]:
    """Return how many (policy, rollout) pairs the surviving ledger counts twice, its updates, and the voided ones."""
    async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
        updates = await store.updates(include_voided=True)
    surviving = [update for update in updates if not update.voided]
    counts = Counter((update.policy, rollout_id) for update in surviving for rollout_id in update.rollout_ids)
    return sum(count > 1 for count in counts.values()), len(surviving), len(updates) - len(surviving)


def main() -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="leyden-resume-"))
    moments = secrets.randbelow(2**31)
    rng = Random(moments)
    print(f"moments drawn with seed {moments}; runs in {folder}", flush=True)
    calm, killed = folder / "calm", folder / "killed"
    began = time.monotonic()
    if start(calm, options, resume=False).wait():
        sys.exit(f"the undisturbed run failed: {calm.with_suffix('.log')}")
    length = time.monotonic() - began
    for index in range(options.kills):
        process = start(killed, options, resume=index > 0)
        wait = rng.uniform(0.25, 0.75) * length
        try:
            process.wait(timeout=wait)
            print("the run ended before its next kill")
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"killed after {wait:.1f} s; checkpoints {sorted(p.name for p in killed.glob('checkpoints/*'))}")
    if start(killed, options, resume=True).wait():
        sys.exit(f"the resumed run failed: {killed.with_suffix('.log')}")
    twice, surviving, voided = asyncio.run(double_counted(killed))
    print(f"ledger: {surviving} updates survive, {voided} voided, {twice} rollouts counted twice")
    difference = accuracy(killed) - accuracy(calm)
    print(f"held-out accuracy: undisturbed {accuracy(calm):.3f}, killed {accuracy(killed):.3f}, {difference:+.3f}")


if __name__ == "__main__":
    main()

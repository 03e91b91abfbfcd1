"""Run the checks in stages and say how many minutes each took.

    python3 scripts/stages.py test                    # environments, lint and types, unit, integration
    python3 scripts/stages.py run NAME -- COMMAND...  # one more stage, added to the same record
    python3 scripts/stages.py report                  # the minutes of every stage; red above the limit

Only the standard library is used, because the first stage makes the environment. What the stages wrote down
lies in `build/stages.jsonl`, so that several commands make one report.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "build" / "stages.jsonl"
LIMIT_MINUTES = 30.0
ENVIRONMENTS = "environments"
PYTHON = ".venv/bin/python"
PYTEST = (PYTHON, "-m", "pytest")
TWO_AT_ONCE = ("-n", "2", "--dist")
"""Tests wait for one another, for disks and for timeouts: two of them keep two cores busy."""

VLLM_TESTS = "integration_tests/vllm"
"""Their smoke test has a stage of its own; `make test-vllm` runs them all."""

TEST_STAGES: dict[str, tuple[str, ...]] = {
    ENVIRONMENTS: (sys.executable, "scripts/setup.py"),
    "framework environments": (PYTHON, "scripts/environments.py", "--lanes"),
    "vLLM environment": (PYTHON, "scripts/environments.py", "--vllm"),
    "lint and types": ("make", "lint"),
    "unit": (*PYTEST, "tests", *TWO_AT_ONCE, "worksteal"),
    "vLLM": (*PYTEST, f"{VLLM_TESTS}/test_smoke.py"),
    "frameworks and integration": (*PYTEST, "integration_tests", f"--ignore={VLLM_TESTS}", *TWO_AT_ONCE, "loadfile"),
}
CLOSING_LINE = re.compile(r"=+ .*\b(passed|failed|errors?|skipped|no tests ran)\b.* in [\d.]+s.* =+")


@dataclass(frozen=True)
class Stage:
    """Hold how one stage ended."""

    name: str
    seconds: float
    status: int
    closing_line: str
    """The last line that pytest printed; empty where the stage runs no tests."""

    @property
    def minutes(self) -> float:
        """The time it took."""
        return self.seconds / 60


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the checks in stages and time them.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("test", help="run every stage of `make test`")
    run = commands.add_parser("run", help="run one command as a stage")
    run.add_argument("name")
    run.add_argument("argv", nargs="+", metavar="-- COMMAND")
    report = commands.add_parser("report", help="print the minutes of every recorded stage")
    report.add_argument("--limit-minutes", type=float, default=LIMIT_MINUTES)
    options = parser.parse_args(arguments)
    if options.command == "report":
        return print_report(read_record(RECORD), limit_minutes=options.limit_minutes)
    if options.command == "run":
        return append(RECORD, run_stage(options.name, tuple(options.argv))).status
    return run_tests()


def run_tests() -> int:
    """Start a new record and run every stage of `make test`, so that one run shows every failure."""
    RECORD.unlink(missing_ok=True)
    for name, argv in TEST_STAGES.items():
        stage = append(RECORD, run_stage(name, argv))
        if stage.name == ENVIRONMENTS and stage.status:
            break
    return print_report(read_record(RECORD), limit_minutes=LIMIT_MINUTES)


def run_stage(name: str, argv: tuple[str, ...]) -> Stage:
    """Run one command, showing its output as it comes."""
    print(f"\n--- {name}: {' '.join(argv)}", flush=True)
    started = time.monotonic()
    closing_line = ""
    process = subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None  # because of PIPE
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if CLOSING_LINE.fullmatch(line.strip()):
                closing_line = line.strip()
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    return Stage(name, time.monotonic() - started, status, closing_line)


def append(record: Path, stage: Stage) -> Stage:
    """Write a stage behind the others."""
    record.parent.mkdir(exist_ok=True)
    with record.open("a") as file:
        file.write(json.dumps(asdict(stage)) + "\n")
    return stage


def read_record(record: Path) -> list[Stage]:
    """Read the stages that have ended."""
    return [Stage(**json.loads(line)) for line in record.read_text().splitlines()] if record.exists() else []


def print_report(stages: list[Stage], *, limit_minutes: float) -> int:
    """Print the minutes of each stage, then pytest's own closing lines; return the exit status."""
    total_minutes = sum(stage.minutes for stage in stages)
    failed = [stage for stage in stages if stage.status]
    print("\nminutes")
    for stage in stages:
        print(f"{stage.minutes:7.1f}  {stage.name}{'  FAILED' if stage.status else ''}")
    print(f"{total_minutes:7.1f}  in all (limit {limit_minutes:g})")
    if total_minutes > limit_minutes:
        print(f"too slow: {total_minutes:.1f} minutes are above the limit of {limit_minutes:g}")
    for stage in stages:
        if stage.closing_line:
            print(stage.closing_line)
    sys.stdout.flush()
    return 1 if failed or not stages or total_minutes > limit_minutes else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the contract with every framework, in every lane and mode, measure what it costs, and write the table.

    make compatibility          # docs/compatibility.md and docs/compatibility.json

The exit status is 1 where anything was wrong; the table is written all the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from integration_tests.frameworks.contract_runs import (  # noqa: E402 - after the path
    FRAMEWORKS,
    run_contract,
    run_in,
    serving,
)
from scripts.environments import lane  # noqa: E402 - after the path

COLUMNS = (
    "framework",
    "version",
    "mode",
    "calls",
    "wrong_role",
    "wrong_rollout",
    "wrong_parent",
    "misrouted",
    "open_spans",
    "token_mismatches",
    "cpu_ms_per_call",
)
LARGE_TOKENS = 2000
LARGE_FRAMEWORK, LARGE_MODES = "openai", ("async", "async-stream")
"""What parsing large answers costs is the wire's part, so it is measured with no framework above it."""

OVERHEAD_SECONDS = 1200.0

HEAD = """\
# Compatibility

Made by `make compatibility`. Each row is one framework in one version and mode: 50 episodes at once (`threads`: on
five event loops) of a team of three roles with a handoff, parallel tools and a loop, against the real gateway and
engine. `worker` and `critic` are trained, `planner` keeps the user's endpoint. Who really spoke, and in which episode,
stands in the prompts; what was really sampled stands in the engine's own log.

- `calls`: model calls of all episodes. `wrong_role`, `wrong_rollout`, `wrong_parent`: calls, spans or completions
  under another name, episode or agent than the true one.
- `misrouted`: calls, or keys, at the wrong endpoint. `open_spans`: spans that never ended.
- `token_mismatches`: answers whose tokens or log-probabilities in the record are not the engine's, or which the agent
  did not get as they were made.
- `cpu_ms_per_call`: CPU time that Leyden adds to the framework's process for each model call, for answers of 50
  tokens: the median of paired differences with and without Leyden.

"""

LARGE_HEAD = f"""
## Large answers

CPU milliseconds a call of the plain `openai` client, for answers of {LARGE_TOKENS} tokens: without Leyden, and what is
added in a rollout, where each answer is read a second time for its span.

"""


def main() -> int:
    """Run everything that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the table of compatibility.")
    parser.add_argument("--frameworks", nargs="*", default=list(FRAMEWORKS), choices=list(FRAMEWORKS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the two files")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    large: list[dict[str, Any]] = []
    faults: list[str] = []
    with serving() as control:
        for framework in options.frameworks:
            for name in FRAMEWORKS[framework]:
                print(f"{framework} in {name}", flush=True)
                python = lane(name)
                found = rows_of(framework, python, control, faults)
                print("\n".join(f"    {json.dumps(row)}" for row in found), flush=True)
                rows += found
                if framework == LARGE_FRAMEWORK and found:
                    large += large_rows(python, control, found[0]["version"])
    (options.out / "compatibility.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "compatibility.md").write_text(document(rows, large))
    for fault in faults:
        print(fault)
    return int(bool(faults))


def rows_of(framework: str, python: Path, control: str, faults: list[str]) -> list[dict[str, Any]]:
    """Return the rows of one framework in one lane; what went wrong is added to `faults`."""
    try:
        verdicts = run_contract(framework, python, control)
        cost = overhead(framework, python, control)
    except RuntimeError as error:
        faults.append(str(error))
        return []
    for verdict in verdicts:
        faults += [f"{framework} {verdict.version} {verdict.mode}: {fault}" for fault in verdict.faults]
    return [verdict.row() | {"cpu_ms_per_call": round(cost[verdict.mode]["added_ms"], 2)} for verdict in verdicts]


def overhead(
    framework: str, python: Path, control: str, *, options: Sequence[str] = ()
) -> Mapping[str, Mapping[str, float]]:
    """Return what a framework's calls cost in each mode."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cost.json"
        command = [str(python), "-m", "integration_tests.frameworks.overhead", framework]
        command += ["--control", control, "--out", str(out), *options]
        run_in(command, timeout_seconds=OVERHEAD_SECONDS)
        found: Mapping[str, Mapping[str, float]] = json.loads(out.read_text())
        return found


def large_rows(python: Path, control: str, version: str) -> list[dict[str, Any]]:
    """Return what large answers cost the plain client."""
    cost = overhead(LARGE_FRAMEWORK, python, control, options=["--tokens", str(LARGE_TOKENS), "--modes", *LARGE_MODES])
    return [
        {"client": f"openai {version}", "mode": mode, "without": each["plain_ms"], "added": each["added_ms"]}
        for mode, each in cost.items()
    ]


def document(rows: Sequence[Mapping[str, Any]], large: Sequence[Mapping[str, Any]]) -> str:
    """Return the page."""
    page = HEAD + table(COLUMNS, rows)
    if large:
        page += LARGE_HEAD + table(("client", "mode", "without", "added"), large)
    return page


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table, numbers to the right."""
    numeric = [all(isinstance(row[column], int | float) for row in rows) for column in columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("--:" if right else "---" for right in numeric) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row[column]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """Return a value as a table shows it."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

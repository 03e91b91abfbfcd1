"""`leyden prompts RUN`: a search's candidates as a tree, and what the winner has changed."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec

from leyden.deploying.pages import prompt_diff
from leyden.errors import ConfigurationError
from leyden.show import printable
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import STORE
from leyden_plugins.algorithms.prompt.record import SEARCHES, Candidate, SearchRecord, note_of


def prompts_command(arguments: Sequence[str]) -> int:
    """Run `leyden prompts`; return the exit status.

    Raises:
        ConfigurationError: the folder holds no run, or one without a search.
    """
    parser = argparse.ArgumentParser(prog="leyden prompts", description="Show a run's searches for prompts.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--candidate", type=int, help="show this candidate's changes in place of the winner's")
    options = parser.parse_args(arguments)
    records = asyncio.run(read_searches(Path(options.run)))
    print("\n\n".join(printable(search_page(one, candidate=options.candidate)) for one in records))
    return 0


async def read_searches(run: Path) -> list[SearchRecord]:
    """Return the records of a run's searches, which may still be under way.

    Raises:
        ConfigurationError: there is no run, or it has not searched.
    """
    if not (run / STORE).is_file():
        raise ConfigurationError(f"{str(run)!r} holds no run: {STORE} is missing")
    async with await SQLiteStore.open(run / STORE, read_only=True) as store:
        steps = json.loads(await store.get_meta(f"note/{SEARCHES}") or "[]")
        notes = [await store.get_meta(f"note/{note_of(step)}") for step in steps]
    found = [msgspec.json.decode(note, type=SearchRecord) for note in notes if note]
    if not found:
        raise ConfigurationError(
            f"{str(run)!r} has not searched for prompts; that is what algorithms such as GEPA and BeamSearch do"
        )
    return found


def search_page(record: SearchRecord, *, candidate: int | None = None) -> str:
    """Return a search as text.

    Raises:
        ConfigurationError: there is no candidate of this number.
    """
    if candidate is not None and not 0 <= candidate < len(record.candidates):
        raise ConfigurationError(
            f"step {record.step} has no candidate {candidate!r}; it has 0 to {len(record.candidates) - 1}"
        )
    tokens = f" ({record.reflection_tokens:,} tokens)" if record.reflection_tokens else ""
    lines = [
        f"step {record.step}, {record.method}: {record.rollouts} of {record.budget} rollouts, "
        f"{record.reflection_calls} reflection calls{tokens}, {len(record.candidates)} candidates, "
        f"{record.rejected} proposals rejected",
        f"ended: {record.ended or 'not yet'}",
    ]
    if record.unrewarded:
        lines.append(f"{record.unrewarded} rollouts had no reward and count as 0")
    if record.reflection_errors:
        lines.append(f"{record.reflection_errors} reflection calls failed, the last: {record.last_error}")
    shown = record.best if candidate is None else record.candidates[candidate]
    lines += ["", f"score on {len(record.selection)} selection tasks", *tree_lines(record, shown.number), ""]
    lines += changes(record.candidates[0], shown) or [f"candidate {shown.number} is what the roles said before"]
    return "\n".join(lines)


def tree_lines(record: SearchRecord, marked: int) -> list[str]:
    """Return a line for each candidate, below its first parent."""
    children: dict[int, list[Candidate]] = {}
    for one in record.candidates[1:]:
        children.setdefault(one.parents[0], []).append(one)
    lines: list[str] = []
    waiting = [(record.candidates[0], 0)]
    while waiting:
        one, depth = waiting.pop()
        told = f"changes {', '.join(one.changed) or 'nothing'}" if one.parents else "as the roles spoke before"
        if len(one.parents) > 1:
            told += f", joined with {', '.join(map(str, one.parents[1:]))}"
        mark = "  <- best" if one.number == record.best.number else "  <- shown" if one.number == marked else ""
        lines.append(f"{'  ' * depth}{one.number}: {one.score:.3f}, {told}, after {one.rollouts} rollouts{mark}")
        waiting += [(child, depth + 1) for child in reversed(children.get(one.number, []))]
    return lines


def changes(before: Candidate, after: Candidate) -> list[str]:
    """Return the diffs of the prompts that differ."""
    return [
        prompt_diff(before.prompts[role], text, role=role)
        for role, text in after.prompts.items()
        if text != before.prompts[role]
    ]

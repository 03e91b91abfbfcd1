"""What the sinks for experiment trackers share: who a run is, what it is made of, and how it ended.

One idea: a run's name in a tracker lies in its run folder, so `fit(resume=True)` goes on in the same curve, and a new
run in a folder of the same name never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leyden.redaction import Redactor
from leyden.spans import new_id
from leyden.training.runfolder import RUN, note_path, read_json


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A run, as one tracker knows it."""

    name: str
    """The run folder's name and eight random digits."""
    is_new: bool
    """False after a resume."""


def identity(info: Mapping[str, object], tracker: str) -> Identity:
    """Return the run's name in `tracker`, from the run folder; made and written there for a new run."""
    folder = note_path(info)
    path = folder / f"{tracker}-run.txt"
    if path.exists():
        return Identity(name=path.read_text().strip(), is_new=False)
    name = f"{folder.resolve().name}-{new_id()[:8]}"
    path.write_text(name + "\n")
    return Identity(name=name, is_new=True)


def configuration(info: Mapping[str, object]) -> dict[str, object]:
    """Return what the run is made of: `run.json`, then what sinks are told; without keys and tokens."""
    path = note_path(info) / RUN
    found = {**(read_json(path) if path.exists() else {}), **info}
    cleaned = Redactor.from_environment().clean(found)
    return cleaned if isinstance(cleaned, dict) else {}


def totals(summary: Mapping[str, object]) -> dict[str, float]:
    """Return the summary's own numbers as `summary/<name>`; its tables and texts stay in `summary.json`."""
    return {
        f"summary/{name}": float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def held_out_ends(summary: Mapping[str, object]) -> dict[int, dict[str, float]]:
    """Return step -> held-out means of the evaluations before and after training, which belong to no step's metrics."""
    evaluations, steps = summary.get("evaluations"), summary.get("steps")
    found: dict[int, dict[str, float]] = {}
    if not isinstance(evaluations, Mapping) or not isinstance(steps, int):
        return found
    for when, step in (("before", 0), ("after", steps)):
        table = evaluations.get(when)
        if isinstance(table, Mapping) and table:
            found[step] = {f"evaluation/{name}": float(one["mean"]) for name, one in table.items()}
    return found

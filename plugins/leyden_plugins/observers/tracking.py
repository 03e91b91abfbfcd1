"""What the sinks for experiment trackers share: who a run is, what it is made of, and when what is told to whom.

One idea: a run's name in a tracker lies in its run folder, so `fit(resume=True)` goes on in the same curve, and a new
run in a folder of the same name never does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from leyden.redaction import Redactor
from leyden.spans import new_id
from leyden.training.runfolder import RUN, note_path, read_json


class TrackerSink(ABC):
    """Tells one tracker of a run; each says how that one begins, keeps values and texts, and ends."""

    def __init__(self) -> None:
        self._is_running = False
        self._step = 0
        """The last finished one."""
        self._early: list[str] = []
        """Notices from before the run started."""

    @abstractmethod
    def _begin(self, info: Mapping[str, object]) -> None:
        """Begin the run, or go on with it."""

    @abstractmethod
    def _log(self, values: Mapping[str, float], *, step: int) -> None:
        """Keep points of curves."""

    @abstractmethod
    def _note(self, text: str, *, step: int) -> None:
        """Keep a line."""

    @abstractmethod
    def _end(self, summary: Mapping[str, object]) -> None:
        """Keep the summary, and wait until all is written."""

    def run_started(self, info: Mapping[str, object]) -> None:
        """Begin the run, or go on with it."""
        self._begin(info)
        self._is_running = True
        for text in self._early:
            self._note(text, step=self._step)
        self._early.clear()

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep a step's metrics."""
        if self._is_running:
            self._step = step
            self._log(metrics, step=step)

    def progress(self, info: Mapping[str, object]) -> None:  # noqa: B027  # the same for all
        """Keep nothing: a step's metrics come when it is finished."""

    def notice(self, text: str) -> None:
        """Keep a line, at the last finished step."""
        if self._is_running:
            self._note(text, step=self._step)
        else:
            self._early.append(text)

    def run_finished(self, summary: Mapping[str, object]) -> None:
        """Keep both ends of the held-out curves and the summary."""
        if self._is_running:
            for step, values in held_out_ends(summary).items():
                self._log(values, step=step)
            self._end(summary)
            self._is_running = False


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

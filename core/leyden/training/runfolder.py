"""The run folder: where everything of a run lies.

store.db  run.json  metrics.jsonl  summary.json  report.html
checkpoints/step-000020/learner/            what `Learner.save` wrote
checkpoints/step-000020/policies/<name>/    a Hugging Face folder a policy
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from leyden.errors import ConfigurationError

STORE = "store.db"
RUN = "run.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
POLICIES = "policies"
"""The folder of Hugging Face folders, one a policy, in checkpoints and in exports."""

PARTIAL = ".partial"
"""Ends the name of what is still being written."""

RESUME_VARIABLE = "LEYDEN_RESUME"
"""`leyden resume` sets it to the run folder, so that a script's own `fit(steps=...)` goes on."""
RESUME_STEPS_VARIABLE = "LEYDEN_RESUME_STEPS"
"""The run's new total of steps, in place of the script's."""


def checkpoint_folder(step: int) -> str:
    """Return a step's checkpoint folder, relative to the run folder."""
    return f"{CHECKPOINTS}/step-{step:06d}"


def write_json(path: Path, value: object) -> None:
    """Write `value` whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, object]:
    """Read an object that `write_json` wrote.

    Raises:
        ConfigurationError: the file is missing or is not a JSON object.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} does not exist; is {str(path.parent)!r} a run folder?") from error
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"{path} is not what Leyden wrote: {error}") from error


def claim(folder: Path, *, resume: bool) -> None:
    """Make the run folder ready.

    Raises:
        ConfigurationError: it holds a run and `resume` is false, or holds none and `resume` is true.
    """
    exists = (folder / RUN).exists()  # written once the parts have started; before that there is nothing to keep
    if exists and not resume:
        raise ConfigurationError(
            f"{str(folder)!r} already holds a run; go on with fit(resume=True) or `leyden resume {folder}`, "
            "or name another folder with Trainer(run=...)"
        )
    if resume and not exists:
        raise ConfigurationError(f"{str(folder)!r} holds no run to resume")
    folder.mkdir(parents=True, exist_ok=True)


def drop_old_checkpoints(folder: Path, step: int, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, just committed, and what a killed run left behind."""
    root = folder / CHECKPOINTS
    newest = root / Path(checkpoint_folder(step)).name
    complete = sorted(path for path in root.glob("step-*") if path.suffix != PARTIAL and path <= newest)
    for path in root.glob("step-*"):
        if path not in complete[-keep:]:
            shutil.rmtree(path, ignore_errors=True)


def note_path(info: Mapping[str, object]) -> Path:
    """Return the run folder that a sink was told about."""
    return Path(str(info["run_folder"]))

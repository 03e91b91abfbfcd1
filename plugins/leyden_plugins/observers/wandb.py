"""Weights & Biases: a run's curves there, or offline with `WANDB_MODE=offline` and `wandb sync` later.

One idea: the x axis is the metric `step`, not the tracker's own counter, which may only grow: a resumed run does some
steps again. Both points stay; the later one is the one that counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from leyden.extras import extra
from leyden.training.runfolder import note_path
from leyden_plugins.observers.tracking import configuration, held_out_ends, identity, totals

with extra("wandb"):
    import wandb


class WandbSink:
    """Logs metrics every step, notices as text, and numbers of the summary."""

    def __init__(self, project: str | None = None, **options: object) -> None:
        """Choose where; `wandb`'s own environment variables (`WANDB_MODE`, `WANDB_ENTITY`, ...) count.

        Args:
            project: `None`: `WANDB_PROJECT`, or "leyden".
            options: for `wandb.init`, for example `entity`, `tags` or `group`.
        """
        self._project = project or os.environ.get("WANDB_PROJECT") or "leyden"
        self._options = options
        self._run: wandb.Run | None = None
        self._early: list[str] = []
        """Notices from before the run started."""
        self._step = 0

    def run_started(self, info: Mapping[str, object]) -> None:
        """Begin the run, or go on with it."""
        run = identity(info, "wandb")
        chosen: dict[str, object] = {
            "id": run.name,
            "name": run.name,
            "dir": os.environ.get("WANDB_DIR") or str(note_path(info)),
            # Its capture of the console would fight with the live bar.
            "settings": wandb.Settings(console="off"),
            **({} if run.is_new else {"resume": "allow"}),
        }
        self._run = wandb.init(project=self._project, config=configuration(info), **{**chosen, **self._options})
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for text in self._early:
            self.notice(text)
        self._early.clear()

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step's metrics; a process of `wandb`'s own writes or sends them."""
        self._step = step
        self._log(metrics, step=step)

    def progress(self, info: Mapping[str, object]) -> None:
        """Keep nothing: a step's metrics come when it is finished."""

    def notice(self, text: str) -> None:
        """Log a line as the text `notice`, at the last finished step."""
        if self._run is None:
            self._early.append(text)
        else:
            self._log({"notice": text}, step=self._step)

    def run_finished(self, summary: Mapping[str, object]) -> None:
        """Log both ends of the held-out curves and the summary's numbers; wait until all is written."""
        if self._run is None:
            return
        for step, values in held_out_ends(summary).items():
            self._log(values, step=step)
        self._run.summary.update(totals(summary))
        self._run.finish()
        self._run = None

    def _log(self, values: Mapping[str, object], *, step: int) -> None:
        if self._run is not None:
            self._run.log({**values, "step": step})

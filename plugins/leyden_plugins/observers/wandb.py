"""Weights & Biases: a run's curves there, or offline with `WANDB_MODE=offline` and `wandb sync` later.

One idea: the x axis is the metric `step`, not the tracker's own counter, which may only grow: a resumed run does some
steps again. Both points stay; the later one is the one that counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from leyden.extras import extra
from leyden.training.runfolder import note_path
from leyden_plugins.observers.tracking import TrackerSink, configuration, identity, totals

with extra("wandb"):
    import wandb


class WandbSink(TrackerSink):
    """Logs metrics every step, notices as text, and numbers of the summary."""

    def __init__(self, project: str | None = None, **options: object) -> None:
        """Choose where; `wandb`'s own environment variables (`WANDB_MODE`, `WANDB_ENTITY`, ...) count.

        Args:
            project: `None`: `WANDB_PROJECT`, or "leyden".
            options: for `wandb.init`, for example `entity`, `tags` or `group`.
        """
        super().__init__()
        self._project = project or os.environ.get("WANDB_PROJECT") or "leyden"
        self._options = options

    def _begin(self, info: Mapping[str, object]) -> None:
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

    def _log(self, values: Mapping[str, object], *, step: int) -> None:
        self._run.log({**values, "step": step})

    def _note(self, text: str, *, step: int) -> None:
        self._log({"notice": text}, step=step)

    def _end(self, summary: Mapping[str, object]) -> None:
        self._run.summary.update(totals(summary))
        self._run.finish()

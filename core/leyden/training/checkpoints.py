"""Write a checkpoint whole, then commit it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from leyden.interfaces import Learner
from leyden.roles import Policy
from leyden.spans import Checkpoint, new_id, now_ns
from leyden.training import prompts as prompt_files
from leyden.training.parts import Parts
from leyden.training.prompts import Prompt
from leyden.training.runfolder import PARTIAL, POLICIES, checkpoint_folder, drop_old_checkpoints


async def write(
    parts: Parts,
    folder: Path,
    *,
    step: int,
    policies: Sequence[Policy],
    versions: Mapping[str, int],
    prompts: Mapping[str, Prompt],
    keep: int,
) -> None:
    """Write weights, optimizer and RNG, then commit: a kill before the commit leaves the earlier one valid.

    Args:
        parts: their learner holds what is written.
        folder: the run's.
        step: that has just ended.
        policies: the run's; each trainable one is also exported to a folder of its own.
        versions: policy -> the version that samples now.
        prompts: role -> the prompt in force.
        keep: how many checkpoints stay.
    """
    relative = checkpoint_folder(step)
    final = folder / relative
    partial = final.with_name(final.name + PARTIAL)
    await asyncio.to_thread(_write, parts.learner, policies, prompts, partial, final)
    await parts.store.commit_checkpoint(
        Checkpoint(checkpoint_id=new_id(), step=step, folder=relative, versions=dict(versions), created_ns=now_ns())
    )
    drop_old_checkpoints(folder, step, keep=keep)


def _write(
    learner: Learner, policies: Sequence[Policy], prompts: Mapping[str, Prompt], partial: Path, final: Path
) -> None:
    for left in (partial, final):  # of a run that was killed before its commit
        if left.exists():
            shutil.rmtree(left)
    partial.mkdir(parents=True)
    learner.save(partial / "learner")
    (partial / POLICIES).mkdir()
    prompt_files.write(partial, prompts)
    for policy in policies:
        if policy.trainable:
            learner.export(policy.name, partial / POLICIES / policy.name)
    os.replace(partial, final)

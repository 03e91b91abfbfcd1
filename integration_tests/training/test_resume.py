"""kill -9 at random moments, then resume: nothing counts twice, and the restored weights are the checkpoint's."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from examples.text_to_sql import questions
from integration_tests.training.plain_agent import MODEL, ROOT
from leyden.roles import Policy
from leyden.spans import FINISHED, Mode, Update
from leyden.sqlite import SQLiteStore
from leyden.training.evaluation import Evaluation
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.learners.torch import TorchLearner

STEPS = 8
SCRIPT = """
import sys
import leyden
from examples.text_to_sql import questions
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.engines.transformers import TransformersEngine
import plain_app

if __name__ == "__main__":
    run, resume = sys.argv[1], sys.argv[2] == "resume"
    leyden.Trainer(
        plain_app.solve, tasks=[q.task for q in questions.load("train", count=64)], tasks_per_step=8,
        policies=[leyden.Policy("me", learning_rate=1e-3)], engine=TransformersEngine(MODEL), checkpoint_every=2,
        algorithm=GRPO(group_size=4), run=run, sinks=(), timeout_seconds=30,
    ).fit(STEPS, resume=resume)
"""


def start(script: Path, run: Path, mode: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": f"{script.parent}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script), str(run), mode], env=environment, start_new_session=True)


def wait_for_a_checkpoint(run: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while not list((run / "checkpoints").glob("step-??????")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


async def read(run: Path) -> tuple[list[Update], int, int]:
    store = await SQLiteStore.open(run / "store.db", read_only=True)
    try:
        updates = list(await store.updates(include_voided=True))
        rollouts = await store.rollouts(mode=Mode.TRAIN)
        return updates, len(rollouts), sum(rollout.state in FINISHED for rollout in rollouts)
    finally:
        await store.close()


def test_a_run_killed_at_random_moments_ends_with_every_rollout_counted_once(app, tmp_path):
    script, run = tmp_path / "killed.py", tmp_path / "killed"
    script.write_text(SCRIPT.replace("MODEL", repr(str(MODEL)), 1).replace("STEPS", str(STEPS)))
    rng = random.Random(os.urandom(8))
    mode = "fresh"
    for _ in range(2):
        process = start(script, run, mode)
        wait_for_a_checkpoint(run, process)
        time.sleep(rng.uniform(0.0, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        mode = "resume"
    assert start(script, run, mode).wait(timeout=180) == 0
    updates, rollouts, finished = asyncio.run(read(run))
    surviving = [update for update in updates if not update.voided]
    assert rollouts == finished == STEPS * 8 * 4
    counted = [rollout_id for update in surviving for rollout_id in update.rollout_ids]
    assert len(counted) == len(set(counted))
    assert [update.step for update in surviving] == sorted({update.step for update in surviving})
    versions = [update.version for update in updates]
    assert len(versions) == len(set(versions)), "a version number was used twice"


def test_restored_weights_are_bit_equal_to_the_checkpoint(app, make_trainer):
    trained, served, learner = TransformersEngine(MODEL), TransformersEngine(MODEL), TorchLearner()
    trainer = make_trainer(app.solve, checkpoint_every=1, engine=trained)
    folder = Path(str(trainer.fit(2)["checkpoint"]))
    again = make_trainer(app.solve, run=trainer.run_folder, engine=served, learner=learner)
    evaluation = again.evaluate([question.task for question in questions.load("tuning", count=1)])
    assert isinstance(evaluation, Evaluation)
    learner.open([Policy("me")], str(MODEL), seed=0)
    learner.load(folder / "learner")
    tensors = learner.weights("me").tensors
    exported = load_file(folder / "policies" / "me" / "model.safetensors")
    assert tensors is not None and tensors.keys() == exported.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, tensors[name]), name
    assert served.sha256("me") == trained.sha256("me")

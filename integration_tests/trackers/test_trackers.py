"""What TensorBoard, Trackio and wandb keep of a run that was killed and resumed, read back with their own means."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from scripts.environments import environment

SCRIPT = Path(__file__).with_name("log_and_read.py")
KEY = "a-key-that-nobody-may-see"
PARTS = ((0, 1), (0, 2), (0, 3), (1, 3), (1, 4))
"""(part, step) in the order in which they were logged: step 3 was done again after the resume."""

NOTICES = ["before part 0", "after part 0", "before part 1", "after part 1"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, object]]:
    """What each tracker kept; one process for all three, because their imports are slow."""
    python = environment(["tensorboard", "trackio", "wandb"])
    folder = tmp_path_factory.mktemp("trackers")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    told = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio")}
    env = {**own, **told, "SOME_API_KEY": KEY}
    done = subprocess.run(
        [str(python), str(SCRIPT), str(folder)], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def logged(part: int, step: int) -> dict[str, float]:
    """Return what a step was logged with."""
    return {
        "reward/mean": step / 10 + part,
        "reward/role/writer": 0.25,
        "sql/loss/entropy": 1.0 / step,
        "gradient_norm": math.inf,
    }


def chosen(rows: Sequence[Mapping[str, object]], name: str) -> list[Mapping[str, object]]:
    return [row for row in rows if name in row]


def test_tensorboard_shows_each_step_once_as_the_resumed_part_made_it(kept: Mapping[str, dict]) -> None:
    scalars = kept["tensorboard"]["scalars"]
    last = {step: logged(part, step) for part, step in PARTS}
    for name in logged(0, 1):
        assert scalars[name] == [[step, pytest.approx(values[name])] for step, values in last.items()], name
    assert scalars["evaluation/reward"] == [[0, 0.125], [4, 0.875]]
    assert scalars["summary/train_seconds"] == [[4, 1.5]]


def test_tensorboard_shows_configuration_notices_and_summary_as_text(kept: Mapping[str, dict]) -> None:
    texts = kept["tensorboard"]["texts"]
    assert '"algorithm": "GRPO(group_size=4)"' in texts["configuration"][-1]
    assert texts["notices"] == NOTICES
    assert '"checkpoint": "checkpoints/step-000004"' in texts["summary"][-1]


def test_trackio_keeps_every_point_in_one_run(kept: Mapping[str, dict]) -> None:
    found = kept["trackio"]
    rows = [{**row, "timestamp": None} for row in chosen(found["rows"], "reward/mean")]
    assert rows == [{**logged(part, step), "step": step, "timestamp": None} for part, step in PARTS]
    ends = chosen(found["rows"], "evaluation/reward")
    assert [(row["step"], row["evaluation/reward"]) for row in ends] == [(0, 0.125), (4, 0.875)]
    (totals,) = chosen(found["rows"], "summary/train_seconds")
    assert (totals["step"], totals["summary/train_seconds"], totals["summary/steps"]) == (4, 1.5, 4)
    assert found["config"]["algorithm"] == "GRPO(group_size=4)"
    assert [row["notice"]["_value"] for row in chosen(found["rows"], "notice")] == NOTICES


def test_wandb_keeps_every_point_under_one_id(kept: Mapping[str, dict]) -> None:
    found = kept["wandb"]
    names = [*logged(0, 1), "step"]
    rows = [{name: row[name] for name in names} for row in chosen(found["rows"], "reward/mean")]
    assert rows == [{**logged(part, step), "step": step} for part, step in PARTS]
    assert len(found["ids"]) == 2 and len(set(found["ids"])) == 1
    ends = chosen(found["rows"], "evaluation/reward")
    assert [(row["step"], row["evaluation/reward"]) for row in ends] == [(0, 0.125), (4, 0.875)]
    assert [row["notice"] for row in chosen(found["rows"], "notice")] == NOTICES
    assert any(update.get("summary/train_seconds") == 1.5 for update in found["summary"])
    assert (found["project"][0], found["tags"][0]) == ("leyden", ["mine"])
    assert json.loads(found["config"][0]["algorithm"]) == "GRPO(group_size=4)"


def test_no_tracker_is_told_a_key(kept: Mapping[str, dict]) -> None:
    texts = [json.dumps(one) for one in kept.values()]
    assert all("[redacted]" in text and KEY not in text for text in texts)

"""A real training changes the policy's weights and nothing of the base, and starts on the distribution it sampled."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

import leyden
from integration_tests.training.plain_agent import MODEL
from leyden_plugins.engines.transformers import TransformersEngine


def digest(folder: Path) -> str:
    """Return a SHA-256 over the tensors of a checkpoint, by name."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            sha256.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha256.hexdigest()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_bases_tensors_are_bit_equal_after_training_and_the_first_ratio_is_one(
    app: ModuleType, make_trainer: Callable[..., leyden.Trainer], tmp_path: Path, temperature: float
) -> None:
    files = {path.name: path.read_bytes() for path in MODEL.iterdir() if path.is_file()}
    fresh = TransformersEngine(MODEL)
    engine = TransformersEngine(MODEL, seed=0)
    policy = leyden.Policy("me", learning_rate=1e-3, sampling=leyden.Sampling(temperature=temperature))
    with make_trainer(app.solve, engine=engine, policies=[policy], tasks_per_step=16, sinks=("jsonl",)) as trainer:
        trainer.fit(3)
        asyncio.run(fresh.start([]))
        assert engine.sha256("base") == fresh.sha256("base") != engine.sha256("me")
        asyncio.run(fresh.stop())
    assert {path.name: path.read_bytes() for path in MODEL.iterdir() if path.is_file()} == files
    (trained,) = (tmp_path / "run" / "checkpoints").glob("*/policies/me")
    assert digest(trained) != digest(MODEL)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ratios = [value for step in steps for name, value in step.items() if name.endswith("loss/ratio_max")]
    assert len(ratios) == 3, "one a step, of rows that the engine sampled with the weights now trained"
    assert ratios == pytest.approx([1.0] * 3, abs=1e-3)

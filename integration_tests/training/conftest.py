"""Fixtures for training small agents for real."""

from collections.abc import Callable

import pytest

import leyden
from examples.text_to_sql import questions
from integration_tests.training.plain_agent import APP, MODEL, ROOT
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.engines.transformers import TransformersEngine


@pytest.fixture
def app(tmp_path, monkeypatch):
    """Return the module of the app, importable here and in worker processes."""
    import importlib
    import sys

    (tmp_path / "plain_app.py").write_text(APP)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("plain_app", None)
    yield importlib.import_module("plain_app")
    sys.modules.pop("plain_app", None)


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., leyden.Trainer]:
    """Return a builder of small, quiet trainers with keyword defaults."""

    def make(agent: object, **options: object) -> leyden.Trainer:
        defaults: dict[str, object] = {
            "tasks": [question.task for question in questions.load("train", count=64)],
            "tasks_per_step": 4,
            "policies": [leyden.Policy("me", learning_rate=1e-3)],
            "engine": TransformersEngine(MODEL, seed=0),
            "algorithm": GRPO(group_size=4),
            "run": tmp_path / "run",
            "sinks": (),
            "workers": 1,
        }
        return leyden.Trainer(agent, **{**defaults, **options})

    return make

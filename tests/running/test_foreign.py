"""Workers with an interpreter of their own: here the tests' own, which is another program all the same."""

import asyncio
import sys
from pathlib import Path

import pytest

import leyden
from leyden.errors import ConfigurationError
from leyden.interfaces import AttemptResult, RolloutSpec
from leyden.running import foreign
from leyden.running.workers import WorkerExecutor
from leyden.spans import Mode
from leyden_plugins.algorithms.rl import GRPO
from tests.running.small import CountingLearner, SmallEngine

AGENTS = """
import sys, leyden

def whose(task):
    is_foreign = "leyden.running.foreign" in sys.orig_argv
    return {"reward": 1.0, "is_foreign": float(is_foreign), "torch": float("torch" in sys.modules)}

class Counter:
    def __init__(self):
        self.calls = 0
    def __call__(self, task):
        self.calls += 1
        return self.calls

def tenth(task, output, rollout):
    return output / 10
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "foreign_agents.py").write_text(AGENTS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "foreign_agents"


def run(executor: WorkerExecutor, count: int = 1) -> list[AttemptResult]:
    async def sink(records: object) -> None: ...

    async def all_of_them() -> list[AttemptResult]:
        await executor.start(sink)
        try:
            return list(await asyncio.gather(*(executor.run(spec(index)) for index in range(count))))
        finally:
            await executor.stop()

    return asyncio.run(all_of_them())


def spec(index: int) -> RolloutSpec:
    return RolloutSpec(
        rollout_id=f"r{index}", attempt=1, task=index, mode=Mode.TRAIN, timeout_seconds=30.0, routing=None
    )


def test_the_agent_runs_under_the_other_interpreter_which_finds_it_beside_the_script(module: str) -> None:
    [result] = run(WorkerExecutor(f"{module}:whose", python=sys.executable))
    assert result.rewards == {"reward": 1.0, "is_foreign": 1.0, "torch": 0.0}


def test_a_class_named_by_a_string_is_built_anew_for_every_rollout(module: str) -> None:
    results = run(WorkerExecutor(f"{module}:Counter", reward=f"{module}:tenth", python=sys.executable), count=3)
    assert [result.rewards for result in results] == [{"reward": 0.1}] * 3


def test_an_interpreter_without_leyden_says_what_to_install(module: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text("#!/bin/sh\necho 'No module named leyden' >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(ConfigurationError, match=r"exit code 1 before it was ready.*bare-python -m pip install leyden"):
        run(WorkerExecutor(f"{module}:whose", python=bare))


def test_an_interpreter_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"python='envs/none/bin/python' is no program"):
        WorkerExecutor("a:b", python="envs/none/bin/python")


def test_a_worker_whose_leyden_speaks_otherwise_says_so(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.running.workers.greeting", lambda setup: foreign.encode({"path": "", "news": 1}))
    with pytest.raises(ConfigurationError, match=r"is not the trainer's .* install the same version in both"):
        run(WorkerExecutor(f"{module}:whose", python=sys.executable))


def trainer(agent: object, tmp_path: Path, **options: object) -> leyden.Trainer:
    return leyden.Trainer(
        agent,  # type: ignore[arg-type]  # some tests pass what is none
        tasks=[1, 2],
        policies=[leyden.Policy("p")],
        engine=SmallEngine(),
        learner=CountingLearner(),  # type: ignore[arg-type]  # a small part of one
        algorithm=GRPO(group_size=2),
        tasks_per_step=2,
        run=tmp_path / "run",
        sinks=[],
        **options,  # type: ignore[arg-type]
    )


def test_a_trainer_takes_an_agent_by_name_and_runs_it_elsewhere(module: str, tmp_path: Path) -> None:
    with trainer(f"{module}:whose", tmp_path, python=sys.executable) as running:
        evaluation = running.evaluate([1, 2])
    assert "foreign_agents" not in sys.modules
    assert evaluation.estimate().mean == 1.0


def test_another_interpreter_cannot_run_what_only_this_process_has(tmp_path: Path) -> None:
    with trainer(lambda task: 1.0, tmp_path, python=sys.executable) as running:
        with pytest.raises(ConfigurationError, match=r"python=.* runs the agent in worker processes, which import it"):
            running.evaluate([1])


@pytest.mark.parametrize("agent", ["nothing", ":function", "module:"])
def test_a_string_that_names_nothing_is_refused(agent: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"does not name an agent; write 'package.module:function'"):
        trainer(agent, tmp_path)


def test_a_class_whose_instances_cannot_be_called_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be called; give it a method __call__\(self, task\)"):
        trainer(int, tmp_path)


def test_what_is_no_agent_is_refused_with_a_list_of_what_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"an async function, a sync function, a class, .* got 7"):
        trainer(7, tmp_path)

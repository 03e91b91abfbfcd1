"""Worker processes: real ones, running agents imported by name."""

import asyncio
import os
import textwrap

import pytest

from leyden.agents import import_path
from leyden.errors import ConfigurationError
from leyden.interfaces import AttemptResult, RolloutSpec
from leyden.spans import Kind, Mode, Record, Span
from leyden.workers import WorkerExecutor

AGENTS = """
import asyncio, os, signal
import leyden

async def double(task):
    await asyncio.sleep(0.01)
    leyden.emit_event("thinking", about=task["x"])
    return task["x"] * 2

def pid(task):
    return os.getpid()

def die(task):
    os.kill(os.getpid(), signal.SIGKILL)

class Team:
    def __call__(self, task):
        return id(self) % 7

def score(task, output, rollout):
    return {"reward": output / 10, "attempt": rollout.attempt}
"""


@pytest.fixture
def agents(tmp_path, monkeypatch) -> str:
    (tmp_path / "worker_agents.py").write_text(textwrap.dedent(AGENTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "worker_agents"


def spec(index: int, x: float = 1.0) -> RolloutSpec:
    return RolloutSpec(
        rollout_id=f"r{index}", attempt=1, task={"x": x}, mode=Mode.TRAIN, timeout_seconds=30.0, routing=None
    )


def run_all(executor_options: dict[str, object], specs: list[RolloutSpec]) -> tuple[list[AttemptResult], list[Record]]:
    records: list[Record] = []

    async def sink(batch) -> None:
        records.extend(batch)

    async def main() -> list[AttemptResult]:
        executor = WorkerExecutor(**executor_options)
        await executor.start(sink)
        try:
            results = []
            for result in asyncio.as_completed([executor.run(one) for one in specs]):
                done = await result
                ours = [r for r in records if isinstance(r, Span) and r.rollout_id == done.rollout_id]
                if not done.infrastructure:
                    assert any(span.kind is Kind.ROLLOUT for span in ours), "records come before the result"
                results.append(done)
            assert all(usage.cpu_seconds > 0 for usage in executor.usages())
            return results
        finally:
            await executor.stop()

    return asyncio.run(main()), records


def test_attempts_run_in_other_processes_and_their_records_come_first(agents):
    results, records = run_all({"agent": f"{agents}:double", "workers": 2}, [spec(i, x=i) for i in range(20)])
    assert {r.rollout_id: r.rewards for r in results} == {f"r{i}": {"reward": 2.0 * i} for i in range(20)}
    events = [r for r in records if isinstance(r, Span) and r.kind is Kind.EVENT]
    assert sorted(event.attributes["about"] for event in events) == list(range(20))


def test_a_reward_function_runs_in_the_worker(agents):
    results, _ = run_all({"agent": f"{agents}:double", "reward": f"{agents}:score"}, [spec(1, x=3)])
    assert (results[0].rewards, results[0].output) == ({"reward": 0.6, "attempt": 1.0}, 6.0)


def test_sync_agents_and_factories_run_there_too(agents):
    results, _ = run_all({"agent": f"{agents}:pid"}, [spec(1)])
    assert results[0].rewards is not None and results[0].rewards["reward"] != os.getpid()
    results, _ = run_all({"agent": f"{agents}:Team", "is_factory": True}, [spec(1)])
    assert results[0].error is None and results[0].rewards is not None


def test_a_worker_that_dies_fails_its_attempt_as_infrastructure_and_is_replaced(agents):
    results, _ = run_all({"agent": f"{agents}:die"}, [spec(1)])
    assert results[0].infrastructure and "exit code -9" in str(results[0].error)


def test_an_agent_that_cannot_be_imported_stops_the_start_with_the_workers_traceback(agents):
    with pytest.raises(ConfigurationError, match="has no 'missing'"):
        run_all({"agent": f"{agents}:missing"}, [spec(1)])


def test_only_functions_of_modules_have_an_import_path(agents):
    module = __import__(agents)
    assert import_path(module.double) == f"{agents}:double"
    assert import_path(lambda task: 1) is None

    def closure(task):
        return agents

    assert import_path(closure) is None
    assert import_path(module.Team()) is None

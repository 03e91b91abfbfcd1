"""Worker processes: real ones, running agents imported by name."""

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from leyden.errors import ConfigurationError
from leyden.interfaces import AttemptResult, Owner, RolloutSpec
from leyden.ownership import boot_id, is_alive
from leyden.running.agents import import_path
from leyden.running.workers import WorkerExecutor
from leyden.spans import Kind, Mode, Record, Span

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

def dies_of_zero(task):
    return 1 / task["x"] if task["x"] else die(task)

class Team:
    def __call__(self, task):
        return id(self) % 7

def unsendable(task):
    loop = []
    loop.append(loop)
    leyden.emit_event("odd", thing=object(), big=2**70, text="\\ud800", loop=loop)
    raise LookupError("half a pair: \\ud83d")

async def exits(task):
    raise SystemExit(3)

def prints(task):
    print("seen by the agent", task["x"])
    return 1

async def slow(task):
    await asyncio.sleep(0.2)
    return 1

async def stubborn(task):
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

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


def test_records_that_no_pipe_can_carry_cost_neither_the_attempt_nor_the_run(agents):
    results, records = run_all({"agent": f"{agents}:unsendable"}, [spec(1), spec(2)])
    assert [result.error_type for result in results] == ["LookupError"] * 2
    [event, _] = [r for r in records if isinstance(r, Span) and r.kind is Kind.EVENT]
    assert "object object" in str(event.attributes["thing"])


def test_an_agent_that_exits_fails_alone_and_its_worker_goes_on(agents):
    results, _ = run_all({"agent": f"{agents}:exits"}, [spec(i) for i in range(6)])
    assert {result.error_type for result in results} == {"SystemExit"}


def test_what_an_agent_prints_is_seen_although_the_worker_ends_abruptly(agents, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    run_all({"agent": f"{agents}:prints"}, [spec(1, x=77)])
    assert "seen by the agent 77" in capfd.readouterr().out


def test_no_more_attempts_run_at_once_than_asked_for(agents):
    started = time.monotonic()
    run_all({"agent": f"{agents}:slow", "workers": 2, "concurrency": 2}, [spec(i) for i in range(12)])
    assert time.monotonic() - started > 0.2 * 12 / 4


def test_a_worker_whose_trainer_is_gone_ends_although_its_agent_refuses_to(agents, tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(
        textwrap.dedent("""
        import asyncio, os, signal
        from leyden.running.workers import WorkerExecutor
        from tests.running.test_workers import spec

        async def main():
            async def sink(batch): ...
            executor = WorkerExecutor("worker_agents:stubborn")
            await executor.start(sink)
            running = asyncio.ensure_future(executor.run(spec(1)))
            await asyncio.sleep(0.3)
            print(executor._workers[0].process.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        if __name__ == "__main__":
            asyncio.run(main())
        """)
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, timeout=60
    )
    worker = Owner(pid=int(done.stdout), process_start="", boot_id=boot_id())
    deadline = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


def test_what_a_dead_worker_used_stays_counted_in_its_place(agents):
    async def main() -> None:
        async def sink(batch) -> None: ...

        executor = WorkerExecutor(f"{agents}:dies_of_zero")
        await executor.start(sink)
        assert (await executor.run(spec(1, x=0))).infrastructure
        [before] = executor.usages()
        assert (await executor.run(spec(2, x=1))).rewards == {"reward": 1.0}
        [after] = executor.usages()
        await executor.stop()
        assert after.cpu_seconds > before.cpu_seconds * 1.5, "two processes have imported the agent"
        assert before.peak_memory_bytes <= after.peak_memory_bytes < 2 * before.peak_memory_bytes

    asyncio.run(main())


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

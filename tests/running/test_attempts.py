"""One attempt: what the agent does ends in a result, never in an exception."""

import asyncio
import contextvars
import threading
import time

import leyden
from leyden.context import current
from leyden.errors import DeadlineExceeded, EngineError, RolloutError
from leyden.interfaces import AttemptResult, RolloutSpec
from leyden.running.attempts import run_attempt
from leyden.spans import Kind, Mode, Record, Reward, Span, Status


def attempt(agent, *, reward=None, timeout=5.0, records=None) -> AttemptResult:
    spec = RolloutSpec(
        rollout_id="r1", attempt=1, task={"x": 3}, mode=Mode.TRAIN, timeout_seconds=timeout, routing=None
    )
    sink: list[Record] = [] if records is None else records
    return asyncio.run(run_attempt(spec, agent, sink=sink.append, reward=reward))


def test_async_sync_and_factory_agents_return_their_reward():
    async def asynchronous(task):
        return task["x"]

    class Team:
        def __call__(self, task):
            return {"reward": 0.5, "style": True}

    assert attempt(asynchronous).rewards == {"reward": 3.0}
    assert attempt(lambda task: task["x"] / 2).rewards == {"reward": 1.5}
    assert attempt(leyden.per_rollout(Team)).rewards == {"reward": 0.5, "style": 1.0}


def test_a_sync_agent_sees_its_rollout_in_its_thread():
    seen = []

    def agent(task):
        frame = current()
        assert frame is not None and frame.rollout is not None
        seen.append((frame.rollout.rollout_id, frame.role))
        return 1

    attempt(agent)
    assert seen == [("r1", "main")]


def test_a_reward_function_scores_what_the_agent_returned():
    result = attempt(lambda task: "answer", reward=lambda task, output, rollout: len(output) + task["x"])
    assert (result.rewards, result.output) == ({"reward": 9.0}, "answer")


def test_a_reward_function_that_raises_is_not_the_agents_failure():
    def broken(task, output, rollout):
        raise ZeroDivisionError("no rows")

    result = attempt(lambda task: "answer", reward=broken)
    assert result.error_type == "RewardError" and result.rewards is None
    assert "rollout 'r1': the reward function raised ZeroDivisionError: no rows" in str(result.error)


def test_a_reward_function_that_is_slow_is_not_the_agents_failure():
    async def slow(task, output, rollout):
        await asyncio.sleep(0.3)
        return 1.0

    assert attempt(lambda task: "answer", reward=slow, timeout=0.2).rewards == {"reward": 1.0}
    result = attempt(lambda task: "answer", reward=slow, timeout=0.1)
    assert (result.timed_out, result.error_type) == (False, "RewardError")
    assert "the reward function took longer" in str(result.error)


def test_an_agent_that_raises_is_a_failed_attempt_with_its_traceback_and_closed_spans():
    def agent(task):
        raise KeyError("no such table")

    records: list[Record] = []
    result = attempt(agent, records=records)
    assert (result.error_type, result.rewards, result.infrastructure) == ("KeyError", None, False)
    assert result.traceback is not None and "no such table" in result.traceback
    root = next(record for record in records if isinstance(record, Span) and record.kind is Kind.ROLLOUT)
    assert root.status is Status.ERROR


def test_an_agent_that_hangs_times_out():
    async def agent(task):
        await asyncio.sleep(60)

    started = time.monotonic()
    result = attempt(agent, timeout=0.2)
    assert result.timed_out and result.error_type == "TimeoutError"
    assert time.monotonic() - started < 3


def test_an_agent_that_swallows_cancellation_is_left_behind(monkeypatch):
    monkeypatch.setattr("leyden.running.attempts.CANCEL_GRACE_SECONDS", 0.1)

    async def agent(task):
        for _ in range(20):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
        return 1.0

    assert attempt(agent, timeout=0.2).timed_out


def test_nan_and_other_types_are_refused_with_the_rollout_named():
    for value in (float("nan"), float("inf"), "good", [1], {"reward": float("nan")}):
        result = attempt(lambda task, value=value: value)
        assert result.error_type == "RewardError" and "r1" in str(result.error), value


def test_no_return_is_no_reward_and_no_reward_is_on_purpose():
    forgotten = attempt(lambda task: None)
    assert forgotten.rewards is None and not forgotten.no_reward and forgotten.error is None
    dropped = attempt(lambda task: leyden.NO_REWARD)
    assert dropped.rewards is None and dropped.no_reward


def test_emitted_rewards_count_and_the_same_one_twice_is_an_error():
    def once(task):
        leyden.emit_reward(0.25, "style")
        leyden.emit_reward(1.0, "turn", role="writer", index=0)
        leyden.emit_reward(2.0, "turn", role="writer", index=1)
        return 1

    records: list[Record] = []
    assert attempt(once, records=records).rewards == {"style": 0.25, "turn": 0.0, "reward": 1.0}
    assert len([record for record in records if isinstance(record, Reward)]) == 4

    def twice(task):
        leyden.emit_reward(0.25, "style")
        leyden.emit_reward(0.25, "style")

    result = attempt(twice)
    assert result.error_type == "RewardError" and "twice" in str(result.error)


def test_our_own_failures_are_infrastructure():
    def agent(task):
        raise RolloutError("the gateway is gone")

    assert attempt(agent).infrastructure

    def wrapping(task):
        try:
            agent(task)
        except RolloutError as error:
            raise ValueError("connection error") from error

    result = attempt(wrapping)
    assert result.infrastructure and result.error_type == "RolloutError"


def test_an_agent_that_went_on_without_an_answer_we_owed_it_is_tried_again():
    def agent(task):
        frame = current()
        assert frame is not None and frame.rollout is not None
        frame.rollout.infrastructure_error = ConnectionError("the gateway is gone")
        return 1.0

    assert attempt(agent).infrastructure


def test_an_output_that_is_not_json_is_kept_as_its_repr():
    result = attempt(lambda task: object, reward=lambda task, output, rollout: 1)
    assert result.output == repr(object)


def test_an_agent_that_ends_its_program_is_a_failed_attempt_and_nothing_more():
    async def asynchronous(task):
        raise SystemExit(2)

    def synchronous(task):
        raise KeyboardInterrupt

    assert attempt(asynchronous).error_type == "SystemExit"
    assert attempt(synchronous).error_type == "KeyboardInterrupt"


def test_an_agent_that_waited_in_vain_for_our_answer_is_tried_again_rather_than_blamed():
    def wait(task):
        frame = current()
        assert frame is not None and frame.rollout is not None
        frame.rollout.infrastructure_error = EngineError("the engine is gone")
        raise DeadlineExceeded("no time left")

    async def hang(task):
        frame = current()
        assert frame is not None and frame.rollout is not None
        frame.rollout.infrastructure_error = EngineError("the engine is gone")
        await asyncio.sleep(60)

    for agent in (wait, hang):
        result = attempt(agent, timeout=0.2)
        assert (result.infrastructure, result.timed_out, result.error_type) == (True, False, "EngineError")


def test_what_an_agent_left_running_can_no_longer_change_its_rollout():
    records: list[Record] = []
    left: list[threading.Thread] = []
    is_over = threading.Event()

    def agent(task):
        def linger():
            is_over.wait(10)
            leyden.emit_reward(100.0, "late", role="writer")
            leyden.emit_event("late")

        left.append(threading.Thread(target=contextvars.copy_context().run, args=(linger,)))
        left[0].start()
        return 1.0

    attempt(agent, records=records)
    count = len(records)
    is_over.set()
    left[0].join()
    assert len(records) == count

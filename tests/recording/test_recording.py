"""Recording an app without a trainer: what is stored, what is dropped, and that the app never notices."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import leyden
from leyden import wire
from leyden.errors import ConfigurationError, StoreError
from leyden.instrumentation import is_instrumented
from leyden.recording import writing
from leyden.spans import Kind, Mode, RolloutState
from tests.capture.servers import FakeOpenAI, serving
from tests.recording.app import answer, recorded, say


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    with serving() as running:
        yield running


def test_a_rollout_is_stored_with_its_calls_roles_output_and_rewards(tmp_path: Path, server: FakeOpenAI) -> None:
    with leyden.record(tmp_path) as recording:
        with recording.rollout({"question": "why?"}) as rollout:
            rollout.output = answer(server.base_url, "why?")
            rollout.reward(0.5)
            rollout.reward(1.0, "polite", role="writer")
        assert recording.flush()
        assert (recording.stored, recording.dropped) == (1, {})
    [group] = recorded(tmp_path)
    [one] = group.rollouts
    assert (one.rollout.rollout_id, one.rollout.mode, one.rollout.task) == (
        rollout.rollout_id,
        Mode.RECORDED,
        {"question": "why?"},
    )
    assert (one.rollout.state, one.rollout.reward, one.rollout.output) == (
        RolloutState.SUCCEEDED,
        0.5,
        rollout.output,
    )
    calls = [span for span in one.spans if span.kind is Kind.MODEL_CALL]
    assert [span.role for span in calls] == ["writer", "critic"]
    assert calls[0].attributes["gen_ai.input.messages"] == [{"role": "user", "content": "why?"}]
    assert calls[0].attributes["gen_ai.output.messages"]
    assert {(each.name, each.target_role, each.value) for each in one.rewards} == {
        ("reward", None, 0.5),
        ("polite", "writer", 1.0),
    }


def test_rollouts_of_equal_tasks_form_a_group(tmp_path: Path) -> None:
    with leyden.record(tmp_path) as recording:
        for task in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2}):
            with recording.rollout(task):
                pass
        with recording.rollout("other", task_id="mine"):
            pass
    groups = recorded(tmp_path)
    assert [len(group.rollouts) for group in groups] == [2, 1, 1]
    assert groups[2].group_id == "mine"


def test_an_exception_of_the_app_is_recorded_and_goes_on(tmp_path: Path) -> None:
    with leyden.record(tmp_path) as recording, pytest.raises(KeyError, match="lost"):
        with recording.rollout("task"):
            raise KeyError("lost")
    [group] = recorded(tmp_path)
    rollout = group.rollouts[0].rollout
    assert (rollout.state, rollout.error_type, rollout.error) == (RolloutState.FAILED, "KeyError", "'lost'")


def test_functions_sync_and_async_are_wrapped(tmp_path: Path) -> None:
    with leyden.record(tmp_path) as recording:

        @recording.wrap
        def double(number: int) -> int:
            return 2 * number

        @recording.wrap
        async def join(left: str, right: str = "b") -> str:
            await asyncio.sleep(0)
            return left + right

        assert double(4) == 8
        assert asyncio.run(join("a", right="c")) == "ac"
        with pytest.raises(TypeError):
            double()  # type: ignore[call-arg]  # the app's own mistake stays the app's

    found = [group.rollouts[0].rollout for group in recorded(tmp_path)]
    assert [(one.task, one.output, one.state.value) for one in found] == [
        (4, 8, "succeeded"),
        ({"left": "a", "right": "c"}, "ac", "succeeded"),
        ([], None, "failed"),
    ]
    with pytest.raises(ConfigurationError, match="is a generator"):
        recording.wrap(lambda: (yield))


def test_side_by_side_rollouts_keep_their_calls_apart(tmp_path: Path, server: FakeOpenAI) -> None:
    with leyden.record(tmp_path) as recording:

        async def one(number: int) -> None:
            with recording.rollout(number):
                await asyncio.to_thread(say, server.base_url, f"role-{number}", f"question {number}")

        async def several() -> None:
            await asyncio.gather(*(one(number) for number in range(8)))

        asyncio.run(several())
    groups = recorded(tmp_path)
    assert len(groups) == 8
    for group in groups:
        [call] = [span for span in group.rollouts[0].spans if span.kind is Kind.MODEL_CALL]
        assert call.role == f"role-{group.task}"


def test_a_rollout_inside_another_belongs_to_the_outer_one(tmp_path: Path, server: FakeOpenAI) -> None:
    with leyden.record(tmp_path) as recording:
        with recording.rollout("outer"):
            with recording.rollout("inner") as inner:
                say(server.base_url, "writer", "hello")
    assert not inner.is_recorded
    [group] = recorded(tmp_path)
    assert group.task == "outer"
    assert [span.role for span in group.rollouts[0].spans if span.kind is Kind.MODEL_CALL] == ["writer"]


def test_work_that_goes_on_after_its_rollout_is_let_through(tmp_path: Path, server: FakeOpenAI) -> None:
    with leyden.record(tmp_path) as recording:

        async def app() -> str:
            with recording.rollout("task"):
                late = asyncio.create_task(asyncio.sleep(0.05))
                late_call = asyncio.create_task(after(late))
            return await late_call

        async def after(late: "asyncio.Task[None]") -> str:
            await late
            return await asyncio.to_thread(say, server.base_url, "writer", "late")

        assert asyncio.run(app())
    [group] = recorded(tmp_path)
    assert not [span for span in group.rollouts[0].spans if span.kind is Kind.MODEL_CALL]


def test_a_full_queue_drops_whole_rollouts_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    may_open = threading.Event()
    opened = writing.open_store

    async def waiting(folder: Path) -> object:
        await asyncio.to_thread(may_open.wait, 10)
        return await opened(folder)

    monkeypatch.setattr(writing, "open_store", waiting)
    with leyden.record(tmp_path, queue=10) as recording:  # a rollout without calls is two records
        began = time.perf_counter()
        for number in range(20):
            with recording.rollout(number):
                pass
        took = time.perf_counter() - began
        assert recording.dropped == {writing.FULL: 15}
        may_open.set()
        assert recording.flush()
        assert recording.stored == 5
    assert took < 1.0  # the store was shut all the while
    assert [group.task for group in recorded(tmp_path)] == [0, 1, 2, 3, 4]
    assert len([line for line in caplog.messages if "has dropped rollouts" in line]) == 1


def test_a_store_that_cannot_be_written_for_a_while_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "RETRY_SECONDS", (0.01,))
    tries = 0
    opened = writing.open_store

    async def failing(folder: Path) -> object:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise StoreError("the disk is full")
        return await opened(folder)

    monkeypatch.setattr(writing, "open_store", failing)
    with leyden.record(tmp_path) as recording:
        with recording.rollout("task"):
            pass
        assert recording.flush()
        assert (recording.stored, recording.dropped) == (1, {})


def test_a_store_that_never_can_be_written_costs_the_app_nothing_but_its_records(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    recording = leyden.record(tmp_path / "file" / "folder")
    with recording.rollout("task"):
        pass
    assert not recording.close(timeout=0.05)
    time.sleep(0.05)
    assert recording.dropped == {writing.UNWRITABLE: 1}
    with recording.rollout("late"):
        pass
    assert recording.dropped == {writing.UNWRITABLE: 1}  # it is closed, so it has not even begun


def test_a_rollout_that_cannot_be_stored_takes_no_other_with_it(tmp_path: Path) -> None:
    with leyden.record(tmp_path) as recording:
        with recording.rollout("good"):
            pass
        with recording.rollout("bad\ud800"):  # half a character: no store takes it
            pass
        with recording.rollout(object()):  # kept as its repr
            pass
        recording.flush()
        assert recording.stored + sum(recording.dropped.values()) == 3
    tasks = [str(group.task) for group in recorded(tmp_path)]
    assert "good" in tasks
    assert any("object object" in task for task in tasks)


def test_an_endless_rollout_is_dropped_and_holds_no_memory(tmp_path: Path) -> None:
    with leyden.record(tmp_path, most_records_a_rollout=10) as recording:
        with recording.rollout("endless"):
            for _ in range(50):
                with leyden.tool("look"):
                    pass
        with recording.rollout("short"):
            pass
    assert list(recording.dropped) == ["it had more records than most_records_a_rollout"]
    assert [group.task for group in recorded(tmp_path)] == ["short"]


def test_a_share_of_rollouts_is_recorded(tmp_path: Path, server: FakeOpenAI) -> None:
    with leyden.record(tmp_path, sample=0.0) as recording:
        with recording.rollout("task") as rollout:
            assert say(server.base_url, "writer", "hello")
        assert not rollout.is_recorded
    assert not list(tmp_path.iterdir())
    with leyden.record(tmp_path, sample=0.5) as recording:
        for _ in range(200):
            with recording.rollout("task"):
                pass
    assert 60 < recording.stored < 140
    with pytest.raises(ConfigurationError, match=r"sample=1\.5 must be a share"):
        leyden.record(tmp_path, sample=1.5)
    with pytest.raises(ConfigurationError, match="queue=0 must be at least 1"):
        leyden.record(tmp_path, queue=0)


def test_a_reward_that_is_no_number_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with leyden.record(tmp_path) as recording:
        with recording.rollout("task") as rollout:
            rollout.reward(float("nan"))
            rollout.reward(0.0)
            rollout.reward(1.0)  # a change of mind
        rollout.reward(0.5)
    [group] = recorded(tmp_path)
    assert group.rollouts[0].rollout.reward == 1.0
    assert any("it is left out" in line for line in caplog.messages)
    assert any("is over; use leyden.reward" in line for line in caplog.messages)


def test_processes_record_into_one_folder_side_by_side(tmp_path: Path) -> None:
    with leyden.record(tmp_path) as first:
        with first.rollout("here"):
            pass
        first.flush()
        context = multiprocessing.get_context("fork")
        child = context.Process(target=record_in_child, args=(first,))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        with first.rollout("here again"):
            pass
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["store-2.db", "store.db"]
    assert sorted(str(group.task) for group in recorded(tmp_path)) == ["child", "here", "here again"]


def record_in_child(recording: leyden.Recording) -> None:
    """Run in a forked worker of a web server that was set up before it forked."""
    with recording.rollout("child"):
        pass
    assert recording.stored <= 1
    assert recording.close()


def test_a_killed_app_has_lost_only_what_was_not_finished(tmp_path: Path) -> None:
    script = f"""
        import leyden, os, signal
        recording = leyden.record({str(tmp_path)!r})
        for number in range(50):
            with recording.rollout(number):
                pass
        recording.flush()
        with recording.rollout("under way"):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [group.task for group in recorded(tmp_path)] == list(range(50))
    with leyden.record(tmp_path) as recording:  # the next start goes on in the same store
        with recording.rollout("next"):
            pass
    assert [path.name for path in tmp_path.glob("*.db")] == ["store.db"]
    assert len(recorded(tmp_path)) == 51


def test_what_waits_is_stored_when_the_app_ends(tmp_path: Path) -> None:
    script = f"""
        import leyden
        recording = leyden.record({str(tmp_path)!r})
        for number in range(500):
            with recording.rollout(number):
                pass
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=True)
    assert len(recorded(tmp_path)) == 500


def test_closing_gives_the_process_back_as_it_was(tmp_path: Path) -> None:
    assert not is_instrumented()
    recording = leyden.record(tmp_path)
    assert is_instrumented()
    assert recording.close()
    assert recording.close()
    assert not is_instrumented()
    assert not wire.is_installed()


def test_no_secret_of_the_environment_is_stored(
    tmp_path: Path, server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-key-0123456789")
    with leyden.record(tmp_path) as recording, recording.rollout("task"):
        say(server.base_url, "writer", "my key is sk-very-secret-key-0123456789")
    recording.flush()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"very-secret" not in stored
    assert os.environ["OPENAI_API_KEY"] not in str(recorded(tmp_path))

"""Agents that are programs: what they are told, how their reward is read, how they end."""

import asyncio
import json
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import pytest

import leyden
from leyden.errors import CommandError, ConfigurationError, RewardError
from leyden.interfaces import AttemptResult, RolloutSpec
from leyden.running.attempts import run_attempt
from leyden.running.workers import WorkerExecutor
from leyden.spans import Kind, Mode, Record, Span, Status
from leyden_plugins.algorithms.rl import GRPO
from tests.capture.rollouts import routing_to
from tests.running.small import CountingLearner, Notes, SmallEngine

GATEWAY = "http://127.0.0.1:9/v1"


def program(tmp_path: Path, source: str) -> list[str]:
    """Write a program; return how it is started."""
    path = tmp_path / "agent.py"
    path.write_text(textwrap.dedent(source))
    return [sys.executable, str(path)]


def attempt(
    agent: leyden.Command, task: object = "a task", *, timeout_seconds: float = 30.0, role: str = "main"
) -> tuple[AttemptResult, list[Record]]:
    records: list[Record] = []
    spec = RolloutSpec(
        rollout_id="r1",
        attempt=1,
        task=task,
        mode=Mode.TRAIN,
        timeout_seconds=timeout_seconds,
        routing=routing_to(GATEWAY, role),
    )
    return asyncio.run(run_attempt(spec, agent, sink=records.append)), records


SHOW = """
import json, os
names = ["LEYDEN_TASK", "LEYDEN_ROLLOUT_ID", "OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL",
         "ANTHROPIC_API_KEY", "NO_PROXY", "LEYDEN_BASE_URL_THE_CRITIC", "LEYDEN_API_KEY_THE_CRITIC", "MORE", "HOME"]
seen = {name: os.environ.get(name) for name in names}
seen["file"] = json.load(open(os.environ["LEYDEN_TASK_FILE"]))
seen["folder"] = os.getcwd()
open(os.environ["SHOW"], "w").write(json.dumps(seen))
print("working")
print(1)
"""


def shown(tmp_path: Path, *, routed: str, **options: object) -> dict[str, object]:
    seen = tmp_path / "seen.json"
    environment = {"SHOW": str(seen), "MORE": "yes"}
    command = leyden.Command(program(tmp_path, SHOW), environment=environment, **options)  # type: ignore[arg-type]
    result, _ = attempt(command, {"question": "who?"}, role=routed)
    assert result.rewards == {"reward": 1.0}, result.error
    return dict(json.loads(seen.read_text()))


def test_a_program_finds_its_task_and_its_model_where_every_client_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")
    seen = shown(tmp_path, routed="main", folder=tmp_path)
    assert json.loads(str(seen["LEYDEN_TASK"])) == seen["file"] == {"question": "who?"}
    assert seen["LEYDEN_ROLLOUT_ID"] == "r1"
    assert seen["OPENAI_BASE_URL"] == "http://127.0.0.1:9/rollout/r1/role/main/v1"
    assert seen["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9/rollout/r1/role/main"
    assert re.fullmatch("gateway-token:main:[0-9a-f]{16}", str(seen["OPENAI_API_KEY"]))
    assert seen["ANTHROPIC_API_KEY"] == seen["OPENAI_API_KEY"]
    assert seen["NO_PROXY"] == "intranet,127.0.0.1"
    assert (seen["MORE"], seen["HOME"], seen["folder"]) == ("yes", os.environ.get("HOME"), str(tmp_path))


def test_more_roles_have_addresses_of_their_own_and_untrained_ones_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://theirs/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen = shown(tmp_path, routed="the critic", roles=["the critic", "silent"])
    assert seen["LEYDEN_BASE_URL_THE_CRITIC"] == "http://127.0.0.1:9/rollout/r1/role/the%20critic/v1"
    assert str(seen["LEYDEN_API_KEY_THE_CRITIC"]).startswith("gateway-token:the%20critic:")
    assert (seen["OPENAI_BASE_URL"], seen["OPENAI_API_KEY"]) == ("http://theirs/v1", None)


def test_a_task_too_long_for_a_variable_is_in_the_file(tmp_path: Path) -> None:
    agent = program(tmp_path, "import os; print(len(open(os.environ['LEYDEN_TASK_FILE']).read()))")
    result, _ = attempt(leyden.Command(agent), "x" * 300_000)
    assert result.rewards == {"reward": 300_002.0}


@pytest.mark.parametrize(
    ("reward", "source"),
    [
        ("stdout", "print('thinking'); print('{\"reward\": 0.5, \"brevity\": 1}'); print()"),
        ("file", "import os; open(os.environ['LEYDEN_REWARD_FILE'], 'w').write('{\"reward\": 0.5, \"brevity\": 1}')"),
        (
            "post",
            """
            import os, urllib.request
            for body in (b"0.5", b'{"brevity": true}'):
                urllib.request.urlopen(os.environ["LEYDEN_REWARD_URL"], data=body)
            """,
        ),
    ],
)
def test_a_reward_is_read_from_where_the_program_puts_it(tmp_path: Path, reward: str, source: str) -> None:
    result, _ = attempt(leyden.Command(program(tmp_path, source), reward=reward))  # type: ignore[arg-type]
    assert result.rewards == {"reward": 0.5, "brevity": 1.0}


@pytest.mark.parametrize(
    ("reward", "where"),
    [("stdout", "the last line of .* standard output"), ("file", "the reward file"), ("post", "LEYDEN_REWARD_URL")],
)
def test_a_program_without_a_reward_is_told_where_it_was_looked_for(tmp_path: Path, reward: str, where: str) -> None:
    command = leyden.Command(program(tmp_path, "print('done')"), reward=reward)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=rf"{where}.* holds no reward: .*; write a number such as 0.5"):
        asyncio.run(command("task"))  # type: ignore[arg-type]  # a coroutine function behind a call


def test_wrong_posts_are_answered_with_what_is_wrong(tmp_path: Path) -> None:
    source = """
    import json, os, urllib.error, urllib.request
    answers = []
    for body in (b"1", b"2", b'"high"', b"{}", b"nonsense", b"NaN", b"[" * 60000, b"9" * 400):
        try:
            urllib.request.urlopen(os.environ["LEYDEN_REWARD_URL"], data=body)
            answers.append("ok")
        except urllib.error.HTTPError as error:
            answers.append(json.load(error)["error"])
    open(os.environ["SHOW"], "w").write(json.dumps(answers))
    """
    seen = tmp_path / "answers.json"
    result, _ = attempt(leyden.Command(program(tmp_path, source), reward="post", environment={"SHOW": str(seen)}))
    assert result.rewards == {"reward": 1.0}
    assert json.loads(seen.read_text()) == [
        "ok",
        "the rewards ['reward'] were given before; each is given once",
        "reward 'reward' must be a finite number, got 'high'",
        "an empty object holds no reward",
        'the body must be JSON: a number such as 0.5, or an object such as {"reward": 0.5}',
        "reward 'reward' must be a finite number, got nan",
        'the body must be JSON: a number such as 0.5, or an object such as {"reward": 0.5}',
        f"reward 'reward' must be a finite number, got {'9' * 100}",
    ]


def test_without_a_reward_the_standard_output_is_the_agents_output(tmp_path: Path) -> None:
    command = leyden.Command(program(tmp_path, "print('SELECT 1')"), reward=None)
    assert asyncio.run(command("task")) == "SELECT 1\n"  # type: ignore[arg-type]


def test_a_program_that_fails_is_the_agents_failure_with_its_error_output(tmp_path: Path) -> None:
    result, records = attempt(leyden.Command(program(tmp_path, "raise SystemExit('no such table')")))
    assert result.error_type == "CommandError" and not result.infrastructure
    assert "ended with status 1; the end of its error output:\nno such table" in str(result.error)
    [span] = [record for record in records if isinstance(record, Span) and record.kind is Kind.AGENT]
    assert (span.status, span.attributes["process.exit.code"]) == (Status.ERROR, 1)


def test_a_program_that_is_not_there_says_so() -> None:
    with pytest.raises(CommandError, match=r"'no-such-program' cannot be started: .* is it installed"):
        asyncio.run(leyden.Command(["no-such-program"])("task"))  # type: ignore[arg-type]


def test_a_program_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    source = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(os.environ["SHOW"], "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(60)
    """
    seen = tmp_path / "pids"
    command = leyden.Command(program(tmp_path, source), environment={"SHOW": str(seen)})
    started = time.monotonic()
    result, _ = attempt(command, timeout_seconds=1.5)
    assert result.timed_out and time.monotonic() - started < 10
    for pid in seen.read_text().split():
        assert ended(int(pid)), f"process {pid} lives on"


def ended(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.environ["SHOW"], "w").write(str(os.getpid()))
time.sleep(60)
"""


def test_a_second_cancellation_leaves_no_program_behind(tmp_path: Path) -> None:
    seen = tmp_path / "pid"
    command = leyden.Command(program(tmp_path, STUBBORN), environment={"SHOW": str(seen)})

    async def cancelled_twice() -> None:
        job = asyncio.ensure_future(command("task"))
        while not seen.exists() or not seen.read_text():
            await asyncio.sleep(0.05)
        job.cancel()
        await asyncio.sleep(0.2)
        job.cancel()
        await asyncio.wait({job}, timeout=5)

    asyncio.run(cancelled_twice())
    assert ended(int(seen.read_text()))


def test_a_worker_that_stops_ends_the_programs_of_its_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = program(tmp_path, STUBBORN)
    (tmp_path / "command_agents.py").write_text(
        f"import leyden\ncommand = leyden.Command({argv!r})\nasync def agent(task):\n    return await command(task)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = tmp_path / "pid"
    monkeypatch.setenv("SHOW", str(seen))

    async def stop_midway() -> None:
        async def sink(records: object) -> None: ...

        executor = WorkerExecutor("command_agents:agent")
        await executor.start(sink)
        spec = RolloutSpec(
            rollout_id="r1", attempt=1, task=1, mode=Mode.TRAIN, timeout_seconds=60, routing=routing_to(GATEWAY, "main")
        )
        job = asyncio.ensure_future(executor.run(spec))
        while not seen.exists() or not seen.read_text():
            await asyncio.sleep(0.05)
        await executor.stop()
        job.cancel()

    asyncio.run(stop_midway())
    assert ended(int(seen.read_text()))


def test_children_that_a_program_leaves_behind_end_with_it(tmp_path: Path) -> None:
    source = """
    import os, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(os.environ["SHOW"], "w").write(str(child.pid))
    print(1)
    """
    seen = tmp_path / "pid"
    command = leyden.Command(program(tmp_path, source), environment={"SHOW": str(seen)})
    assert asyncio.run(command("task")) == 1  # type: ignore[arg-type]
    assert ended(int(seen.read_text()))


def test_the_arguments_may_be_made_of_the_task(tmp_path: Path) -> None:
    agent = program(tmp_path, "import sys; print(len(sys.argv[1]))")
    command = leyden.Command(lambda task: [*agent, str(task)])
    assert asyncio.run(command("four")) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("argv", [[], "node agent.mjs"])
def test_a_command_is_a_list(argv: object) -> None:
    with pytest.raises(ConfigurationError, match="takes a program and its arguments as a list"):
        leyden.Command(argv)  # type: ignore[arg-type]


def test_an_unknown_place_for_the_reward_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"reward must be one of \('stdout', 'file', 'post'\) or None"):
        leyden.Command(["true"], reward="mail")  # type: ignore[arg-type]


ASK = """
import json, os, urllib.request
body = {"model": "any", "messages": [{"role": "user", "content": os.environ["LEYDEN_TASK"]}]}
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    data=json.dumps(body).encode(),
    headers={"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"},
)
print(float(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]))
"""


def test_a_program_is_trained_by_its_calls_to_the_gateway(tmp_path: Path) -> None:
    learner, notes = CountingLearner(), Notes()
    trainer = leyden.Trainer(
        leyden.Command(program(tmp_path, ASK)),
        tasks=["one", "two"],
        policies=[leyden.Policy("p")],
        engine=SmallEngine(["0", "1"]),
        learner=learner,  # type: ignore[arg-type]  # a small part of one
        algorithm=GRPO(group_size=2),
        tasks_per_step=2,
        run=tmp_path / "run",
        sinks=[notes],
    )
    with trainer:
        trainer.fit(1)
    assert "roles seen (model calls): main 2" in notes.lines
    assert learner.steps == {"p": 1}
    assert sum(len(sample.token_ids) for _, sample in learner.samples) == 8, (
        "two tokens ('0' or '1', and the end) of four rollouts"
    )
    assert "agent.py" in json.loads((tmp_path / "run" / "run.json").read_text())["agent"]

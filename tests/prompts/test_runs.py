"""Searches in real runs: killed and resumed, exported and deployed, and between phases of training."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

import leyden
from examples.prompts import letters, model
from leyden import context
from leyden.deploying.export import export
from leyden.errors import ConfigurationError
from leyden.spans import FINISHED, Mode, Rollout
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import read_json
from leyden_plugins.algorithms.prompt import GEPA, SearchRecord
from leyden_plugins.algorithms.prompt.command import read_searches
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.gateway.serve import model_folders
from tests.capture.servers import FakeOpenAI
from tests.capture.servers import serving as serving_anything
from tests.prompts.app import trainer
from tests.prompts.desk import SEEDS
from tests.running.small import ask as ask_trained
from tests.running.small import small_trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base_url() -> Iterator[str]:
    with model.serving() as found:
        yield found


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    leyden.uninstrument()


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what the editor is asked."""
    found: Counter[str] = Counter()
    original = model.editor

    def editor(question: str) -> str:
        found[question] += 1
        return original(question)

    monkeypatch.setattr(model, "editor", editor)
    return found


def search_of(run: Path) -> SearchRecord:
    [record] = asyncio.run(read_searches(run))
    return record


def rollouts_of(run: Path, mode: Mode = Mode.SEARCH) -> dict[str, Rollout]:
    async def read() -> dict[str, Rollout]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            return {one.rollout_id: one for one in await store.rollouts(mode=mode)}

    return asyncio.run(read())


def finished(run: Path) -> dict[str, Rollout]:
    """Return the finished rollouts of a run, which another process may just be making."""
    if not (run / "store.db").exists():
        return {}
    return {name: one for name, one in rollouts_of(run).items() if one.state in FINISHED}


def test_a_search_killed_by_the_system_resumes_and_pays_nothing_twice(
    tmp_path: Path, base_url: str, questions: Counter[str]
) -> None:
    with trainer(base_url, tmp_path / "whole") as searching:
        searching.fit()
    asked_by_the_whole = questions.total()
    run = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "tests.prompts.app", base_url, str(run)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while questions.total() < asked_by_the_whole + 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = finished(run)
    whole = finished(tmp_path / "whole")
    assert 10 < len(before) < len(whole)
    with trainer(base_url, run) as searching:
        searching.fit(resume=True)
    after = finished(run)
    assert search_of(run) == search_of(tmp_path / "whole")
    assert after.keys() == whole.keys()
    assert {name: after[name] for name in before} == before, "with their times: none was run again"
    assert read_json(run / "checkpoints/step-000001/prompts.json") == read_json(
        tmp_path / "whole/checkpoints/step-000001/prompts.json"
    )
    assert questions.total() <= 2 * asked_by_the_whole + 1, "but for the one under way at the kill"


def test_rollouts_that_showed_the_prompts_are_the_first_of_the_search(tmp_path: Path, base_url: str) -> None:
    with trainer(base_url, tmp_path / "run", budget=30) as searching:
        searching.fit()
    record = search_of(tmp_path / "run")
    assert record.candidates[0].prompts == SEEDS
    assert len(rollouts_of(tmp_path / "run")) == record.rollouts <= 30


def test_held_out_tasks_are_run_under_the_winner_and_never_searched_on(tmp_path: Path, base_url: str) -> None:
    held_out = letters.draw(12, seed=99)
    with trainer(base_url, tmp_path / "run", budget=150, val_tasks=held_out) as searching:
        summary = searching.fit()
    assert float(str(summary["accuracy_after"])) > float(str(summary["accuracy_before"])) + 0.2
    tickets = {task["ticket"] for task in held_out}
    assert not tickets & {one.task["ticket"] for one in rollouts_of(tmp_path / "run").values()}  # type: ignore[index]


# ---- into the app --------------------------------------------------------------------------------------------------


def test_prompts_without_policies_are_exported_with_what_has_changed(tmp_path: Path, base_url: str) -> None:
    with trainer(base_url, tmp_path / "run", budget=150) as searching:
        searching.fit()
    best = search_of(tmp_path / "run").best
    changed = {role: text for role, text in best.prompts.items() if text != SEEDS[role]}
    assert changed
    out = export(tmp_path / "run", tmp_path / "out")
    assert json.loads((out / "leyden.json").read_text())["prompts"] == changed
    assert json.loads((out / "prompts.json").read_text()) == {
        role: {"version": 1, "text": text} for role, text in changed.items()
    }
    page = (out / "PROMPTS.md").read_text()
    for role, text in changed.items():
        added = text.removeprefix(SEEDS[role]).strip().splitlines()
        assert f"## {role}, version 1" in page and all(f"+{line}" in page for line in added)
        assert f" {SEEDS[role]}" in page, "the line that stayed"
    guide = (out / "SERVE.md").read_text()
    assert 'leyden.deploy("out")' in guide and "serve out" not in guide and "vllm" not in guide


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    description = {"schema": 1, "policies": {}, "prompts": {"writer": "role=better"}}
    (tmp_path / "leyden.json").write_text(json.dumps(description))
    return tmp_path


MESSAGES: list[dict[str, str]] = [
    {"role": "system", "content": "role=own"},
    {"role": "user", "content": "hello"},
]


def told(server: FakeOpenAI) -> list[str]:
    return [seen.body["messages"][0]["content"] for seen in server.seen]


def test_a_deployed_prompt_reaches_every_kind_of_call_of_a_real_client_and_goes_with_its_end(exported: Path) -> None:
    async def stream(base_url: str) -> str:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
            pieces = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)  # type: ignore[call-overload]
            return "".join([piece.choices[0].delta.content or "" async for piece in pieces if piece.choices])

    with serving_anything() as server, openai.OpenAI(base_url=server.base_url, api_key="none") as client:
        with leyden.deploy(exported):
            with leyden.role("writer"):
                plain = client.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
                assert asyncio.run(stream(server.base_url)).strip() == plain.choices[0].message.content
            with leyden.role("critic"):
                client.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
        with leyden.role("writer"):
            client.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
    assert told(server) == ["role=better", "role=better", "role=own", "role=own"]
    assert str(plain.choices[0].message.content).endswith("role=better")


def test_an_export_of_prompts_needs_no_address_and_takes_none(exported: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds prompts only"):
        leyden.deploy(exported, "http://127.0.0.1:1/v1")
    with pytest.raises(ConfigurationError, match="holds prompts only"):
        leyden.deploy(exported, fallback=True)
    with pytest.raises(ConfigurationError, match=r"nothing to serve; in the app: leyden\.deploy"):
        model_folders(exported)
    policy = {"model": "sql", "folder": "policies/sql", "version": 1, "roles": None, "sampling": {}}
    (exported / "leyden.json").write_text(json.dumps({"schema": 1, "policies": {"sql": policy}}))
    with pytest.raises(ConfigurationError, match=r"holds the policies \['sql'\]; say where they are served"):
        leyden.deploy(exported)


# ---- between phases ------------------------------------------------------------------------------------------------


def solve(task: object) -> float:
    """Fail tasks with `hard` in them unless the prompt that is in force says how."""
    frame = context.current()
    assert frame is not None and frame.rollout is not None and frame.rollout.routing is not None
    ask_trained(messages=[{"role": "system", "content": "Answer."}, {"role": "user", "content": str(task)}])
    return float("hard" not in str(task) or "Think." in frame.rollout.routing.prompts.get("main", ""))


def test_training_goes_on_under_prompts_found_for_the_tasks_that_it_could_not_solve(tmp_path: Path) -> None:
    tasks = ["easy 1", "hard 1", "easy 2", "hard 2", "hard 3", "hard 4"]
    chain = leyden.Chain(
        leyden.Phase(GRPO(group_size=2), steps=1),
        leyden.Phase(
            GEPA(reflection=lambda messages: "```\nAnswer. Think.\n```", budget=40, tasks_from="unsolved", minibatch=2)
        ),
        leyden.Phase(GRPO(group_size=2), steps=1),
    )
    with small_trainer(
        tmp_path / "run",
        agent=solve,
        algorithm=chain,
        tasks=tasks,
        tasks_per_step=6,
        prompts=["main"],
    ) as searching:
        searching.fit()
    searched = {str(one.task) for one in rollouts_of(tmp_path / "run").values()}
    assert {task for task in searched if "hard" in task} == {"hard 1", "hard 2", "hard 3", "hard 4"}
    trained = rollouts_of(tmp_path / "run", Mode.TRAIN).values()
    by_step = {step: {(str(one.task)[:4], one.reward) for one in trained if one.step == step} for step in (1, 3)}
    assert by_step == {1: {("easy", 1.0), ("hard", 0.0)}, 3: {("easy", 1.0), ("hard", 1.0)}}

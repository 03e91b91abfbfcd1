"""The training scripts of the README and the docs, run as they stand but for the model's name and their length."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.text_to_sql import questions
from examples.text_to_sql.agent import CHECKER_MODEL, WRITER_MODEL, client, graph
from examples.text_to_sql.databases import path
from leyden.interfaces import GenerationRequest
from leyden.spans import Kind, Mode, Rollout
from leyden.sqlite import SQLiteStore
from leyden.testing.fakes import Answer, FakeEngine
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.gateway import serve
from tests.capture.rollouts import rollout

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "text_to_sql" / "model"
OWN = ROOT / "docs" / "bring_your_own_agent.md"

README_NAMES = """
from examples.text_to_sql import questions
from examples.text_to_sql.agent import graph as app
from examples.text_to_sql.databases import path

def task_of(question):
    return {"question": question.task["question"], "rows": [["Alice"]]}

found = questions.load("train", count=20)
train, dev = [task_of(one) for one in found[:16]], [task_of(one) for one in found[16:]]
databases = {one.task["question"]: str(path(one.task["database"])) for one in found}

class graph:
    @staticmethod
    async def ainvoke(state):
        return await app.ainvoke({**state, "database": databases[state["question"]]})
"""

MY_APP = """
import functools, openai

@functools.cache
def client():
    return openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="their-own", max_retries=0)

def answer(question):
    messages = [{"role": "user", "content": question}]
    reply = client().chat.completions.create(model="theirs", messages=messages, temperature=0, max_tokens=8)
    return reply.choices[0].message.content

def is_right(task, text):
    return len(text) % 2 == 0
"""


def sample(page: Path, mark: str) -> str:
    """Return the Python block that holds `mark`."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if mark in block)
    return str(found)


def shortened(code: str) -> str:
    """Return a training script with the demo's model, one step and two rollouts a task."""
    changes = [
        (r'TransformersEngine\("[^"]*"\)', f"TransformersEngine({str(MODEL)!r})"),
        (r"steps=\d+", "steps=1"),
        (r"group_size=\d+", "group_size=2"),
    ]
    for pattern, replacement in changes:
        code, count = re.subn(pattern, replacement, code)
        assert count == 1, pattern
    return code


def run_script(folder: Path, code: str, **variables: str) -> tuple[str, list[Rollout], set[str]]:
    """Run a script in a folder of its own; return its output, the rollouts, and who made recorded calls."""
    (folder / "script.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "none", **variables}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()

    async def read() -> tuple[list[Rollout], set[str]]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            rollouts = list(await store.rollouts(mode=Mode.TRAIN))
            records = await store.records([rollout.rollout_id for rollout in rollouts])
        return rollouts, {one.role for record in records for one in record.completions}

    return done.stdout, *asyncio.run(read())


def test_the_readmes_script_trains_two_roles_and_leaves_the_third_alone(tmp_path: Path) -> None:
    code = README_NAMES + shortened(sample(ROOT / "README.md", "async def solve(task)"))
    with serve(TransformersEngine(MODEL), names=[CHECKER_MODEL], api_key="own") as endpoint:
        shown, rollouts, roles = run_script(
            tmp_path, code, OPENAI_BASE_URL=endpoint.base_url, OPENAI_API_KEY=endpoint.api_key
        )
    assert len(rollouts) == 32 and {rollout.state for rollout in rollouts} == {"succeeded"}
    assert {"writer"} <= roles <= {"writer", "rewriter"}
    assert "checker none: its own endpoint" in " ".join(shown.split())
    assert re.search(r"leyden show runs/\S+ e1-t\d", shown), "a rollout that exists is named"


def test_the_shortest_script_looks_and_then_trains(tmp_path: Path) -> None:
    (tmp_path / "my_app.py").write_text(MY_APP)
    shown, rollouts, roles = run_script(tmp_path, shortened(sample(OWN, "from my_app import")))
    assert "dev-0 · dev" in shown
    assert [rollout.state for rollout in rollouts] == ["succeeded"] * 2
    assert roles == {"main"}


def test_the_script_with_create_agent_trains_the_named_role(tmp_path: Path) -> None:
    _, rollouts, roles = run_script(tmp_path, shortened(sample(OWN, "create_agent(")))
    assert len(rollouts) == 4 and {rollout.state for rollout in rollouts} == {"succeeded"}
    assert roles == {"researcher"}


ASK_TWICE = """
import asyncio, sample_agent

async def both():
    task = {"question": "How many people live in Oslo?", "expected": "717000"}
    return [await sample_agent.solve(task), await sample_agent.solve({**task, "expected": "291000"})]

print(asyncio.run(both()))
"""


def test_the_agent_with_a_tool_looks_up_what_it_is_asked(tmp_path: Path) -> None:
    arguments = json.dumps({"city": "Oslo"})
    call = {"id": "c1", "type": "function", "function": {"name": "population", "arguments": arguments}}

    def script(request: GenerationRequest) -> Answer:
        last = request.messages[-1]
        return Answer(text=str(last["content"])) if last["role"] == "tool" else Answer(tool_calls=[call])

    (tmp_path / "sample_agent.py").write_text(sample(OWN, "create_agent("))
    with serve(FakeEngine(script), names=["gpt-4.1-mini"], api_key="own") as endpoint:
        env = {**os.environ, "OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": endpoint.api_key}
        command = [sys.executable, "-c", ASK_TWICE]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == "[1.0, 0.0]\n", done.stderr


def test_the_explicit_handler_of_the_docs_records_who_spoke() -> None:
    names: dict[str, dict[str, list[object]]] = {}
    exec(sample(OWN, "LeydenCallbackHandler()"), names)
    task = questions.load("tuning", count=1)[0].task
    client.cache_clear()
    with pytest.MonkeyPatch.context() as patch, serve(FakeEngine("OK"), names=[WRITER_MODEL, CHECKER_MODEL]) as served:
        patch.setenv("OPENAI_BASE_URL", served.base_url)
        patch.setenv("OPENAI_API_KEY", served.api_key)
        with rollout() as recorded:
            state = {"question": task["question"], "database": str(path(task["database"]))}
            asyncio.run(graph.ainvoke(state, config=names["config"]))
    client.cache_clear()
    assert [span.role for span in recorded.spans(Kind.MODEL_CALL)] == ["writer", "checker"]

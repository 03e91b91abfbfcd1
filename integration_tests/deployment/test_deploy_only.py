"""The demo's app in an environment that holds `leyden[langchain]` alone: no torch, no trainer, no web server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from examples.text_to_sql import questions
from examples.text_to_sql.agent import CHECKER_MODEL, REWRITER_MODEL, WRITER_MODEL
from leyden.deploying.exported import Export, ExportedPolicy
from leyden.interfaces import Generation, GenerationRequest
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.gateway import serve
from scripts.environments import environment

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "text_to_sql" / "model"
OWN_KEY, SERVED_KEY = "sk-the-apps-own-key", "sk-of-the-trained-server"
ABSENT = ("torch", "transformers", "numpy", "starlette", "uvicorn", "rich")

APP = """
import asyncio, json, sys
import leyden, openai
from leyden.wire import patience
from examples.text_to_sql.agent import graph
from examples.text_to_sql.databases import path

patience.CONNECT_PATIENCE_SECONDS = 0.2  # of a server that is down; nobody waits for it here
folder, base_url, fallback, tasks = json.load(sys.stdin)

async def main():
    for task in tasks:
        state = await graph.ainvoke({{"question": task["question"], "database": str(path(task["database"]))}})
        print(json.dumps({{"sql": state["sql"]}}))

with leyden.deploy(folder, base_url, fallback=fallback, api_key="{key}"):
    try:
        asyncio.run(main())
    except openai.APIConnectionError as error:
        print(json.dumps({{"error": "APIConnectionError"}}))
"""


class Server(TransformersEngine):
    """A model server that notes which of the agent's nodes asked it."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.asked_by: list[str] = []

    async def generate(self, request: GenerationRequest) -> Generation:
        self.asked_by.append(str(request.messages[0]["content"]).splitlines()[0])
        return await super().generate(request)


@dataclass
class Service:
    """Two servers, each with its own key, and an export whose policy one of them serves."""

    export: Path
    trained_url: str
    own_url: str
    trained: Server
    own: Server


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the small environment."""
    return environment(["langchain"])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    shutil.copytree(MODEL, tmp_path / "policies" / "sql")
    policy = ExportedPolicy(model="sql", folder="policies/sql", version=1, roles=["writer", "rewriter"])
    (tmp_path / "leyden.json").write_bytes(msgspec.json.encode(Export(policies={"sql": policy})))
    trained, own = Server(), Server()
    names = [WRITER_MODEL, CHECKER_MODEL, REWRITER_MODEL]
    with (
        serve(trained, names=["sql"], api_key=SERVED_KEY) as served,
        serve(own, names=names, api_key=OWN_KEY) as endpoint,
    ):
        yield Service(tmp_path, served.base_url, endpoint.base_url, trained, own)


def run_app(python: Path, service: Service, *, base_url: str, fallback: bool = False) -> list[dict[str, str]]:
    """Answer some questions with the app, which finds its own models where the environment says."""
    tasks = [question.task for question in questions.load("tuning", count=8)]
    told = json.dumps([str(service.export), base_url, fallback, tasks])
    env = {**os.environ, "OPENAI_BASE_URL": service.own_url, "OPENAI_API_KEY": OWN_KEY}
    command = [str(python), "-c", APP.format(key=SERVED_KEY)]
    done = subprocess.run(command, input=told, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def closed_port() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_the_environment_has_nothing_of_training_or_serving(python: Path) -> None:
    code = f"import importlib.util as u; print([name for name in {ABSENT!r} if u.find_spec(name)])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_apps_trained_roles_ask_the_served_model_and_the_checker_its_own(python: Path, service: Service) -> None:
    answers = run_app(python, service, base_url=service.trained_url)
    assert len(answers) == 8 and all(answer["sql"] for answer in answers)
    assert set(service.trained.asked_by) == {"writer", "rewriter"}
    assert service.trained.asked_by.count("writer") == 8
    assert service.own.asked_by == ["checker"] * 8


def test_a_server_that_is_down_is_the_apps_error(python: Path, service: Service) -> None:
    assert run_app(python, service, base_url=closed_port()) == [{"error": "APIConnectionError"}]
    assert service.own.asked_by == []


def test_with_fallback_the_apps_own_model_answers_for_a_server_that_is_down(python: Path, service: Service) -> None:
    answers = run_app(python, service, base_url=closed_port(), fallback=True)
    assert len(answers) == 8 and all(answer["sql"] for answer in answers)
    assert set(service.own.asked_by) == {"writer", "rewriter", "checker"}


def test_a_second_call_finds_the_environment_made(python: Path) -> None:
    def refuse(arguments: list[str]) -> None:
        raise AssertionError(f"something was run: {arguments}")

    assert environment(["langchain"], run=refuse) == python

"""Routed roles: no cached answers, prompts, deployment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

import leyden
from integration_tests.langchain.apps import State, graph_of, model, said
from integration_tests.langchain.conftest import Run
from tests.capture.rollouts import rollout, routing_to
from tests.capture.servers import FakeOpenAI

TASK: dict[str, Any] = {"task": "", "log": []}


async def invoke(llm: Any) -> None:
    await llm.ainvoke(said("node", "x"))


async def invoke_sync(llm: Any) -> None:
    llm.invoke(said("node", "x"))


def node_with(llm: Any, act: Any = invoke) -> Any:
    async def node(state: State) -> State:
        await act(llm)
        return {}

    return graph_of(node=node)


@pytest.fixture
def llm_cache() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.mark.parametrize("act", [invoke, invoke_sync])
@pytest.mark.usefixtures("instrumented", "llm_cache")
def test_a_response_cache_serves_untrained_roles_only(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI, act: Any
) -> None:
    app = node_with(model(user_server.base_url), act)

    async def twice(*roles: str) -> None:
        for _ in range(2):
            with rollout(routing_to(gateway.base_url, *roles)):
                await app.ainvoke(TASK)

    run(twice("node"))
    run(twice("somebody else"))
    assert (len(gateway.seen), len(user_server.seen)) == (2, 1)


@pytest.mark.usefixtures("instrumented")
def test_a_roles_prompt_replaces_its_system_message_and_leaves_the_state_alone(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    routing = routing_to(gateway.base_url, "nobody", prompts={"node": "role=node better"})

    async def episode() -> None:
        with rollout(routing):
            await node_with(model(user_server.base_url)).ainvoke(TASK)

    run(episode())
    (seen,) = user_server.seen
    assert [message["content"] for message in seen.body["messages"]] == ["role=node better", "x"]
    assert seen.headers["authorization"] == "Bearer user-key"


@pytest.mark.usefixtures("instrumented")
def test_a_deployed_export_serves_the_nodes_of_a_running_app(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI, tmp_path: Path
) -> None:
    policy = {
        "model": "served",
        "folder": "policies/p",
        "version": 3,
        "roles": ["trained"],
        "sampling": {},
        "base_sha256": None,
    }
    (tmp_path / "leyden.json").write_text(json.dumps({"schema": 1, "policies": {"p": policy}, "prompts": {}}))
    llm = model(user_server.base_url)

    async def trained(state: State) -> State:
        return {"log": [(await llm.ainvoke(said("trained", "x"))).text]}

    async def other(state: State) -> State:
        return {"log": [(await llm.ainvoke(said("other", "x"))).text]}

    app = graph_of(trained=trained, other=other)
    with leyden.deploy(tmp_path, gateway.base_url):
        run(app.ainvoke(TASK))
    run(app.ainvoke(TASK))
    assert [(seen.body["model"], seen.true_role) for seen in gateway.seen] == [("served", "trained")]
    assert [seen.true_role for seen in user_server.seen] == ["other", "trained", "other"]

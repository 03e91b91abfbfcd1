"""A trained role that is answered by a cache or by a model without HTTP: refused, never silently untrained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import LLM, BaseChatModel, FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.cache.memory import InMemoryCache as NodeCache
from langgraph.graph import START, StateGraph
from langgraph.types import CachePolicy

import leyden
from integration_tests.langchain.apps import State, graph_of, model, said
from integration_tests.langchain.conftest import Run
from leyden.errors import ConfigurationError
from leyden.spans import Status
from leyden_plugins.frameworks.langchain import LeydenCallbackHandler
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

TASK: dict[str, Any] = {"task": "", "log": []}
REFUSED = r"role 'node' is routed to 'sql', but its model '\w+' answered without a request that Leyden saw"


@pytest.fixture
def llm_cache() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.fixture
def explicit() -> Iterator[dict[str, Any]]:
    """The explicit form's config."""
    yield {"callbacks": [LeydenCallbackHandler()]}
    leyden.uninstrument()


def node_with(act: Any) -> Any:
    def node(state: State) -> State:
        act()
        return {}

    return graph_of(node=node)


def refused(recorded: Recorded) -> bool:
    error = recorded.context.infrastructure_error
    assert error is None or isinstance(error, ConfigurationError)
    statuses = {span.status for span in recorded.calls}
    assert statuses == ({Status.ERROR} if error else {Status.OK})
    return error is not None


@pytest.mark.usefixtures("llm_cache")
def test_the_explicit_form_refuses_what_a_cache_answers_for_a_trained_role(
    user_server: FakeOpenAI, gateway: FakeOpenAI, explicit: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    app = node_with(lambda: model(user_server.base_url).invoke(said("node", "x")))
    found = []
    for roles in (("node",), ("node",), ("somebody else",)):
        with rollout(routing_to(gateway.base_url, *roles)) as recorded:
            app.invoke(TASK, explicit)
        found.append(refused(recorded))
        if found[-1]:
            with pytest.raises(ConfigurationError, match=f"{REFUSED}.*cache=False.*OpenAI-compatible client"):
                raise recorded.context.infrastructure_error  # type: ignore[misc]  # checked by `refused`
    assert found == [False, True, False]
    assert "an LLM cache answered" in caplog.text, "an agent may swallow everything, so the log says it too"
    assert (len(gateway.seen), len(user_server.seen)) == (1, 0)


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke", "astream"])
@pytest.mark.usefixtures("instrumented")
def test_a_model_without_http_is_refused_for_a_trained_role_only(run: Run, gateway: FakeOpenAI, way: str) -> None:
    llm = FakeListChatModel(responses=["hello"])

    async def node(state: State) -> State:
        if way == "invoke":
            llm.invoke("x")
        elif way == "stream":
            list(llm.stream("x"))
        elif way == "ainvoke":
            await llm.ainvoke("x")
        else:
            async for _ in llm.astream("x"):
                pass
        return {}

    async def episode(role: str) -> Recorded:
        with rollout(routing_to(gateway.base_url, role)) as recorded:
            await graph_of(node=node).ainvoke(TASK)
        return recorded

    assert refused(run(episode("node")))
    assert not refused(run(episode("somebody else")))


class Around(BaseChatModel):
    """A user's model that is made of another, or calls the SDK itself."""

    inner: Any

    @property
    def _llm_type(self) -> str:
        return "around"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> ChatResult:
        if isinstance(self.inner, openai.OpenAI):
            answer = self.inner.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
            text = str(answer.choices[0].message.content)
        else:
            text = self.inner.invoke(messages).text
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])


@pytest.mark.usefixtures("instrumented")
def test_models_made_of_others_count_as_asked_when_those_asked(user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    client = openai.OpenAI(base_url=user_server.base_url, api_key="user-key")
    for inner in (model(user_server.base_url), client, Around(inner=Around(inner=client))):
        with rollout(routing_to(gateway.base_url, "node")) as recorded:
            node_with(lambda inner=inner: Around(inner=inner).invoke("x")).invoke(TASK)
        assert not refused(recorded)
    with rollout(routing_to(gateway.base_url, "node")) as recorded:
        node_with(lambda: Around(inner=FakeListChatModel(responses=["x"])).invoke("x")).invoke(TASK)
    assert refused(recorded)
    client.close()


def test_batches_are_not_refused_in_the_explicit_form(
    user_server: FakeOpenAI, gateway: FakeOpenAI, explicit: dict[str, Any]
) -> None:
    llm = model(user_server.base_url)

    def act() -> None:
        llm.batch([said("node", f"n={number}") for number in range(3)])
        llm.generate([said("node", f"n=generate{number}") for number in range(3)])

    with rollout(routing_to(gateway.base_url, "node")) as recorded:
        node_with(act).invoke(TASK, explicit)
    assert not refused(recorded)
    assert len(gateway.seen) == 6


class Completing(LLM):
    """A user's completion model."""

    base_url: str

    @property
    def _llm_type(self) -> str:
        return "completing"

    def _call(self, prompt: str, stop: Any = None, run_manager: Any = None, **options: Any) -> str:
        answer = httpx.post(f"{self.base_url}/completions", json={"model": "m", "prompt": prompt})
        return str(answer.json()["choices"][0]["text"])


@pytest.mark.parametrize("is_sync", [True, False], ids=["sync", "async"])
@pytest.mark.usefixtures("instrumented", "llm_cache")
def test_a_completion_model_of_a_trained_role_goes_around_the_cache(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI, is_sync: bool
) -> None:
    llm = Completing(base_url=user_server.base_url)

    async def node(state: State) -> State:
        _ = llm.invoke("x") if is_sync else await llm.ainvoke("x")
        return {}

    async def twice(role: str) -> None:
        for _ in range(2):
            with rollout(routing_to(gateway.base_url, role)) as recorded:
                await graph_of(node=node).ainvoke(TASK)
            assert recorded.context.infrastructure_error is None

    run(twice("node"))
    run(twice("somebody else"))
    assert (len(gateway.seen), len(user_server.seen)) == (2, 1)
    assert {seen.path for seen in gateway.seen} == {"/v1/completions"}


@pytest.mark.usefixtures("instrumented")
def test_a_node_cache_answers_outside_rollouts_only(user_server: FakeOpenAI) -> None:
    llm = model(user_server.base_url)

    def node(state: State) -> State:
        return {"log": [llm.invoke([HumanMessage("x")]).text]}

    graph = StateGraph(State)
    graph.add_node("node", node, cache_policy=CachePolicy())
    graph.add_edge(START, "node")
    app: Any = graph.compile(cache=NodeCache())
    for _ in range(2):
        app.invoke(TASK)
    assert len(user_server.seen) == 1, "the user's cache works where no rollout runs"
    for _ in range(2):
        with rollout() as recorded:
            app.invoke(TASK)
        assert [span.role for span in recorded.calls] == ["node"]
    assert app.cache is not None

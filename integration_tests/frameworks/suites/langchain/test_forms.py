"""The automatic and the explicit form: one record, whoever else listens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.llms import BaseLLM
from langchain_core.tracers import context as tracer_context
from langchain_core.tracers.langchain import LangChainTracer
from langchain_openai import ChatOpenAI
from langgraph.pregel import Pregel

import leyden
from integration_tests.langchain.apps import team
from integration_tests.langchain.conftest import Run
from leyden import wire
from leyden.errors import ConfigurationError
from leyden.spans import Span
from leyden_plugins.frameworks.langchain import LangChainAdapter, LeydenCallbackHandler
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

TASK = {"task": "rollout=r1", "log": []}


class LangSmith:
    """Stands for LangSmith's client; counts the runs that its tracer posts and ends."""

    def __init__(self) -> None:
        self.posted: list[str] = []
        self.ended: list[str] = []
        self.tracing_queue = None
        self.api_url = "http://127.0.0.1:9"

    def create_run(self, **run: Any) -> None:
        self.posted.append(run["name"])

    def update_run(self, run_id: Any, **run: Any) -> None:
        self.ended.append(str(run_id))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Mine(BaseCallbackHandler):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_chat_model_start(self, *args: Any, **options: Any) -> None:
        self.events.append("model start")

    def on_llm_end(self, *args: Any, **options: Any) -> None:
        self.events.append("model end")

    def on_chain_start(self, serialized: Any, inputs: Any, **options: Any) -> None:
        self.events.append(f"chain {options.get('name')}")


class MineAsync(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.events: list[str] = []

    async def on_chat_model_start(self, *args: Any, **options: Any) -> None:
        self.events.append("model start")


@pytest.fixture(autouse=True)
def cleaned() -> Iterator[None]:
    yield
    leyden.uninstrument()


def record(run: Run, base: str, gateway: str, *handlers: BaseCallbackHandler) -> tuple[list[str], dict[str, Any]]:
    """Run the team once; return its spans without ids and times, and what the others heard."""
    smith, mine, mine_async = LangSmith(), Mine(), MineAsync()
    tracer = LangChainTracer(client=smith)  # type: ignore[arg-type]  # a stand-in for LangSmith's client
    callbacks = [mine, mine_async, tracer, *handlers]

    async def episode() -> Recorded:
        with rollout(routing_to(gateway, "worker", "critic")) as recorded:
            await team(base).ainvoke(TASK, {"callbacks": callbacks})
        return recorded

    recorded = run(episode())
    heard = {"smith": sorted(smith.posted), "ended": len(smith.ended), "sync": mine.events, "async": mine_async.events}
    return sorted(map(str, map(plain(recorded), recorded.records))), heard


def plain(recorded: Recorded) -> Any:
    """Return a function that shows a span by its content and the names of the spans around it."""
    spans = {span.span_id: span for span in recorded.records if isinstance(span, Span)}

    def show(span: Span) -> object:
        path, each = [], span
        while each.parent_id is not None:
            each = spans[each.parent_id]
            path.append((each.name, each.role))
        return (span.kind, span.name, span.role, span.status, span.error, span.attributes, path)

    return show


def test_both_forms_record_the_same_once_each_and_others_hear_what_they_heard(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    urls = (user_server.base_url, gateway.base_url)
    explicit = record(run, *urls, LeydenCallbackHandler())
    leyden.uninstrument()
    wire.install()
    adapter = LangChainAdapter()
    adapter.attach()
    automatic = record(run, *urls)
    both = record(run, *urls, LeydenCallbackHandler())
    adapter.detach()
    leyden.uninstrument()
    nothing, heard_without = record(run, *urls)
    assert explicit[0] == automatic[0] == both[0]
    assert len(explicit[0]) == 18, "rollout, 2 graphs, 3 + 5 nodes, 4 calls, 3 tools"
    assert explicit[1] == automatic[1] == both[1] == heard_without
    assert heard_without["ended"] and len(heard_without["async"]) == 4
    assert len(nothing) == 1, "without Leyden only the rollout's own span is there"


def test_the_explicit_form_patches_no_class_of_the_framework_and_says_what_it_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    classes = (BaseChatModel, BaseLLM, ChatOpenAI, Pregel)
    before = [dict(vars(each)) for each in classes]
    with caplog.at_level(logging.INFO, "leyden_plugins"):
        LeydenCallbackHandler()
        LeydenCallbackHandler()
    assert [dict(vars(each)) for each in classes] == before
    assert wire.is_installed()
    assert caplog.text.count("installs Leyden's hook into the HTTP clients") == 1


def test_detach_restores_every_patched_function() -> None:
    classes = (BaseChatModel, BaseLLM, ChatOpenAI, Pregel)
    before = [dict(vars(each)) for each in classes]
    hooks = list(tracer_context._configure_hooks)
    adapter = LangChainAdapter()
    adapter.attach()
    adapter.attach()
    assert [dict(vars(each)) for each in classes] != before
    assert len(tracer_context._configure_hooks) == len(hooks) + 1
    adapter.detach()
    adapter.detach()
    assert [dict(vars(each)) for each in classes] == before
    assert tracer_context._configure_hooks == hooks


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (tracer_context, "_configure_hooks"),
        (BaseChatModel, "_agenerate_with_cache"),
        (BaseLLM, "generate"),
        (Pregel, "bulk_update_state"),
    ],
    ids=["configure hook", "chat models", "completion models", "graphs"],
)
def test_a_missing_hook_point_is_named_and_nothing_stays_attached(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.delattr(owner, name)
    classes = (BaseChatModel, BaseLLM, Pregel)
    before = [dict(vars(each)) for each in classes]
    hooks = list(getattr(tracer_context, "_configure_hooks", []))
    with pytest.raises(ConfigurationError, match=rf"{name}.* where Leyden attaches; versions known to work"):
        LangChainAdapter().attach()
    assert [dict(vars(each)) for each in classes] == before
    assert getattr(tracer_context, "_configure_hooks", []) == hooks

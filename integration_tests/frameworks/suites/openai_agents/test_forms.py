"""The automatic and the explicit form: one record, and the user's own tracing hears what it did."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import agents
import pytest
from agents import RunConfig
from agents.models import openai_responses
from agents.run import AgentRunner
from agents.tool_context import ToolContext
from agents.tracing import spans as sdk_spans

from integration_tests.frameworks.apps import openai_agents as contract
from integration_tests.frameworks.scripts.openai_agents import answer
from integration_tests.frameworks.suites.openai_agents.apps import TASK, agent, run, tree
from integration_tests.frameworks.suites.server import Endpoint
from leyden import context, wire
from leyden.errors import ConfigurationError
from leyden_plugins.frameworks.openai_agents import LeydenTraceProcessor, OpenAIAgentsAdapter, spans
from tests.capture.rollouts import Recorded, rollout, routing_to

PATCHED = [
    (sdk_spans.SpanImpl, "start"),
    (sdk_spans.SpanImpl, "finish"),
    (sdk_spans.SpanImpl, "set_error"),
    (sdk_spans.NoOpSpan, "start"),
    (sdk_spans.NoOpSpan, "finish"),
    (sdk_spans.NoOpSpan, "set_error"),
    (agents.ToolTimeoutError, "__init__"),
    (ToolContext, "from_agent_context"),
    (AgentRunner, "run"),
    (AgentRunner, "run_streamed"),
    (openai_responses.OpenAIResponsesWSModel, "_fetch_response"),
]


class Exporter(agents.TracingProcessor):
    """The user's own tracing: keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def on_trace_start(self, trace: Any) -> None:
        self.heard.append(("trace start", trace.name))

    def on_trace_end(self, trace: Any) -> None:
        self.heard.append(("trace end", trace.name))

    def on_span_start(self, span: Any) -> None:
        self.heard.append(("start", span.span_data.type))

    def on_span_end(self, span: Any) -> None:
        self.heard.append(("end", span.span_data.type))

    def shutdown(self) -> None: ...
    def force_flush(self) -> None: ...


@pytest.fixture(autouse=True)
def cleaned(endpoints: object) -> Iterator[None]:
    yield
    agents.set_trace_processors([])
    wire.uninstall()


def record(user: Endpoint, *, automatic: bool, explicit: bool) -> tuple[Recorded, list[tuple[str, str]]]:
    """Run the contract app once; return what was recorded, and what the user's exporter heard."""
    user.script = answer
    exporter, adapter = Exporter(), OpenAIAgentsAdapter()
    agents.set_trace_processors([exporter])
    if automatic:
        wire.install()
        adapter.attach()
    if explicit:
        agents.add_trace_processor(LeydenTraceProcessor())
    try:
        with rollout() as recorded:
            asyncio.run(contract.build(user.base_url, stream=False, sync=False)(TASK))  # type: ignore[arg-type]
    finally:
        adapter.detach()
    return recorded, exporter.heard


def test_both_forms_record_the_same_alone_and_together(user: Endpoint) -> None:
    automatic, heard = record(user, automatic=True, explicit=False)
    explicit, heard_explicit = record(user, automatic=False, explicit=True)
    both, heard_both = record(user, automatic=True, explicit=True)
    assert len(tree(automatic)) == 14
    assert tree(automatic) == tree(explicit) == tree(both)
    assert heard == heard_explicit == heard_both


def test_the_users_exporter_hears_what_it_heard_without_leyden(user: Endpoint) -> None:
    user.script = answer
    plain = Exporter()
    agents.set_trace_processors([plain])
    asyncio.run(contract.build(user.base_url, stream=False, sync=False)(TASK))  # type: ignore[arg-type]
    _, heard = record(user, automatic=True, explicit=False)
    assert ("end", "generation") in plain.heard
    assert heard == plain.heard


def test_the_explicit_form_patches_no_class_of_the_sdk_and_says_what_it_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = [vars(owner)[name] for owner, name in PATCHED]
    with caplog.at_level(logging.INFO):
        agents.add_trace_processor(LeydenTraceProcessor())
    assert [vars(owner)[name] for owner, name in PATCHED] == before
    assert wire.is_installed()
    assert "installs Leyden's hook into httpx" in caplog.text


def test_detach_restores_every_patched_function() -> None:
    before = [vars(owner)[name] for owner, name in PATCHED]
    adapter = OpenAIAgentsAdapter()
    adapter.attach()
    adapter.attach()
    during = [vars(owner)[name] for owner, name in PATCHED]
    adapter.detach()
    adapter.detach()
    assert not any(now is then for now, then in zip(during, before, strict=True))
    assert [vars(owner)[name] for owner, name in PATCHED] == before


@pytest.mark.parametrize(
    ("owner", "name"), [(sdk_spans.SpanImpl, "finish"), (openai_responses.OpenAIResponsesWSModel, "_fetch_response")]
)
def test_a_moved_hook_point_is_named_and_nothing_is_patched(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(ConfigurationError, match=rf"no {owner.__name__}\.{name} in .*known to work: openai-agents 0"):
        OpenAIAgentsAdapter().attach()
    assert not hasattr(AgentRunner.run, "__wrapped__")


@pytest.mark.usefixtures("instrumented")
def test_nothing_is_followed_when_no_rollout_runs(user: Endpoint) -> None:
    followed: list[int] = []
    worker = agent(user, "worker", output_guardrails=[agents.OutputGuardrail(noting(followed))])
    result = asyncio.run(run(worker))
    assert result.final_output == "worker speaks"
    assert followed == [0]


def noting(followed: list[int]) -> Any:
    async def guard(run_context: Any, guarded: Any, given: Any) -> Any:
        assert context.current() is None
        followed.append(len(spans.FOLLOWED))
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)

    return guard


@pytest.mark.usefixtures("instrumented")
@pytest.mark.parametrize("disabled", [False, True])
def test_a_deployed_app_routes_its_roles_without_a_rollout(user: Endpoint, gateway: Endpoint, disabled: bool) -> None:
    wire.set_default_routing(routing_to(gateway.base_url, "worker"))
    try:
        config = RunConfig(tracing_disabled=disabled)
        asyncio.run(run(agent(user, "worker"), run_config=config))
        asyncio.run(run(agent(user, "critic"), run_config=config))
    finally:
        wire.set_default_routing(None)
    assert (user.roles, gateway.roles) == (["critic"], ["worker"])


def test_the_agent_goes_on_when_recording_fails(
    user: Endpoint,
    instrumented: OpenAIAgentsAdapter,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(span: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setitem(spans.STARTS, "agent", broken)  # type: ignore[arg-type]  # a dict, typed as what is read
    with rollout(), caplog.at_level(logging.ERROR):
        result = asyncio.run(run(agent(user, "worker")))
    assert result.final_output == "worker speaks"
    assert "an event could not be recorded" in caplog.text


def test_importing_the_adapter_does_not_import_the_sdk() -> None:
    code = (
        "import sys, leyden_plugins.frameworks.openai_agents as adapter; adapter.OpenAIAgentsAdapter(); "
        "sys.exit('agents' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

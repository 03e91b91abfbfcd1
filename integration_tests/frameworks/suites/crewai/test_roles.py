"""Who speaks, and what hangs below what, in every way of running that CrewAI offers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from crewai import Agent, Crew, Flow, Process, Task
from crewai.flow.flow import listen, start
from crewai.tools import tool
from pydantic import BaseModel

import leyden
from integration_tests.frameworks.story import Say
from integration_tests.frameworks.suites.crewai.crews import (
    agent,
    crew,
    delegating,
    failing_search,
    llm,
    search,
    searching,
    task,
)
from integration_tests.frameworks.suites.crewai.server import Endpoint, Seen, speak
from leyden.spans import Kind, Span, Status
from tests.capture.rollouts import Recorded, rollout, routing_to

pytestmark = [pytest.mark.usefixtures("instrumented"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def roles(recorded: Recorded) -> list[str]:
    return [span.role for span in recorded.calls]


def check(recorded: Recorded, *endpoints: Endpoint) -> None:
    """Compare every call with the role its prompt names, and that nothing was left open."""
    assert sorted(roles(recorded)) == sorted(role for endpoint in endpoints for role in endpoint.roles)
    assert {record.status for record in recorded.records if isinstance(record, Span)} == {Status.OK}


def named(recorded: Recorded, kind: Kind, name: str) -> list[Span]:
    return [span for span in recorded.spans(kind) if span.name == name]


def run_sync(value: Crew) -> Any:
    return value.kickoff()


def run_async(value: Crew) -> Any:
    return asyncio.run(value.kickoff_async())


def run_native(value: Crew) -> Any:
    return asyncio.run(value.akickoff())


def run_each(value: Crew) -> Any:
    return value.kickoff_for_each([{}])[0]


def run_each_native(value: Crew) -> Any:
    outputs: Any = asyncio.run(value.akickoff_for_each([{}]))
    return outputs[0]


def run_stream(value: Crew) -> Any:
    value.stream = True
    output: Any = value.kickoff()
    for _ in output:
        pass
    return output.result


def run_native_stream(value: Crew) -> Any:
    async def run() -> Any:
        value.stream = True
        output: Any = await value.akickoff()
        async for _ in output:
            pass
        return output.result

    return asyncio.run(run())


RUNS = [run_sync, run_async, run_native, run_each, run_each_native, run_stream, run_native_stream]


@pytest.mark.parametrize("run", RUNS)
def test_each_agent_of_a_crew_speaks_under_its_role_without_line_breaks(
    user: Endpoint, gateway: Endpoint, run: Any
) -> None:
    user.script = gateway.script = searching
    model = llm(user.base_url)
    with rollout(routing_to(gateway.base_url, "worker")) as recorded:
        output = run(crew(agent("planner", model), agent("worker\n", model, tools=[search]), name="house"))
    assert output.raw.strip() == "worker speaks"
    assert roles(recorded) == ["planner", "worker", "worker"]
    assert (user.roles, gateway.roles) == (["planner"], ["worker", "worker"])
    assert recorded.context.declared_roles == {"planner", "worker"}
    check(recorded, user, gateway)
    (house,) = named(recorded, Kind.AGENT, "house")
    (worker,) = named(recorded, Kind.AGENT, "worker")
    assert worker.parent_id == house.span_id
    assert worker.attributes["gen_ai.agent.name"] == "worker"
    for span in recorded.calls:
        assert recorded.parent_of(span).name == span.role
    tools = recorded.spans(Kind.TOOL)
    assert [span.parent_id for span in tools] == [worker.span_id] * 2
    sent = gateway.seen[1].messages
    asked = {each["function"]["arguments"]: each["id"] for each in sent[-3]["tool_calls"]}
    for span in tools:
        given: Any = span.attributes["gen_ai.tool.call.arguments"]
        assert span.attributes["gen_ai.tool.call.result"] == f"found {given['query']}"
        assert span.attributes["gen_ai.tool.call.id"] == asked[json.dumps(given)]


def test_two_equal_tool_calls_keep_their_own_ids(user: Endpoint) -> None:
    twice = Say(tool_calls=(("search", {"query": "north"}), ("search", {"query": "north"})))
    user.script = lambda seen: speak(seen) if seen.results else twice
    with rollout() as recorded:
        crew(agent("worker", llm(user.base_url), tools=[search])).kickoff()
    ids = {span.attributes["gen_ai.tool.call.id"] for span in recorded.spans(Kind.TOOL)}
    assert len(ids) == 2
    assert None not in ids


@pytest.mark.parametrize("fails", [False, True])
def test_tools_of_a_model_that_calls_them_in_words_are_recorded(
    user: Endpoint, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    model = llm(user.base_url)
    monkeypatch.setattr(type(model), "supports_function_calling", lambda model: False)
    action = 'Thought: look\nAction: search\nAction Input: {"query": "north"}'
    user.script = lambda seen: Say(text="Final Answer: three" if len(user.seen) > 1 else action)
    with rollout() as recorded:
        crew(agent("worker", model, tools=[failing_search if fails else search])).kickoff()
    (worker,) = named(recorded, Kind.AGENT, "worker")
    tools = recorded.spans(Kind.TOOL)
    assert {(span.name, span.role, span.parent_id) for span in tools} == {("search", "worker", worker.span_id)}
    assert tools[0].attributes["gen_ai.tool.call.arguments"] == {"query": "north"}
    # CrewAI makes three attempts with a tool that fails; each is a span.
    assert [span.status for span in tools] == ([Status.ERROR] * 3 if fails else [Status.OK])


@pytest.mark.parametrize("tool_name", ["delegate_work_to_coworker", "ask_question_to_coworker"])
def test_a_coworker_works_below_the_tool_that_gave_it_the_work(user: Endpoint, tool_name: str) -> None:
    user.script = lambda seen: delegating(seen, tool_name)
    model = llm(user.base_url)
    planner, worker = agent("planner", model, allow_delegation=True), agent("worker\n", model)
    with rollout() as recorded:
        Crew(agents=[planner, worker], tasks=[task(planner)]).kickoff()
    assert roles(recorded) == ["planner", "worker", "planner"]
    check(recorded, user)
    (given,) = recorded.spans(Kind.TOOL)
    (inner,) = named(recorded, Kind.AGENT, "worker")
    assert (given.name, given.role, inner.parent_id) == (tool_name, "planner", given.span_id)
    (handoff,) = recorded.spans(Kind.HANDOFF)
    assert (handoff.role, handoff.attributes["leyden.handoff.to"]) == ("planner", "worker")
    assert handoff.parent_id == given.span_id


def test_work_for_a_coworker_who_does_not_exist_is_no_handoff(user: Endpoint) -> None:
    user.script = lambda seen: delegating(seen, coworker="nobody")
    model = llm(user.base_url)
    planner = agent("planner", model, allow_delegation=True)
    with rollout() as recorded:
        Crew(agents=[planner, agent("worker", model)], tasks=[task(planner)]).kickoff()
    assert roles(recorded) == ["planner", "planner"]
    assert recorded.spans(Kind.HANDOFF) == []


def test_a_hierarchical_crew_is_led_by_the_role_crew_manager(user: Endpoint) -> None:
    user.script = delegating
    model = llm(user.base_url)
    with rollout() as recorded:
        Crew(
            agents=[agent("worker", model)],
            tasks=[task(None)],
            process=Process.hierarchical,
            manager_llm=model,
        ).kickoff()
    assert roles(recorded) == ["Crew Manager", "worker", "Crew Manager"]
    assert recorded.context.declared_roles == {"Crew Manager", "worker"}
    (handoff,) = recorded.spans(Kind.HANDOFF)
    assert (handoff.role, handoff.attributes["leyden.handoff.to"]) == ("Crew Manager", "worker")


def test_a_flow_holds_its_agents_and_crews_and_its_own_calls_belong_to_main(user: Endpoint) -> None:
    model = llm(user.base_url)

    class House(Flow[Any]):
        @start()
        def plan(self) -> Any:
            return agent("planner", model).kickoff("Plan.")

        @listen(plan)
        def work(self) -> Any:
            return crew(agent("worker", model), name="rooms").kickoff().raw

        @listen(work)
        async def finish(self) -> Any:
            await agent("critic", model).kickoff_async("Judge.")
            return model.call("Is it so?")

    with rollout() as recorded:
        assert House().kickoff() == "main speaks"
    assert roles(recorded) == ["planner", "worker", "critic", "main"]
    check(recorded, user)
    (flow,) = named(recorded, Kind.AGENT, "House")
    inner = [each for name in ("planner", "rooms", "critic") for each in named(recorded, Kind.AGENT, name)]
    assert [span.parent_id for span in inner] == [flow.span_id] * 3
    assert recorded.calls[-1].parent_id == flow.span_id


@pytest.mark.parametrize("run", [run_sync, run_native])
def test_tasks_that_run_at_once_keep_their_roles(user: Endpoint, run: Any) -> None:
    model = llm(user.base_url)
    first, second, last = agent("first", model), agent("second", model), agent("last", model)
    tasks = [task(first, async_execution=True), task(second, async_execution=True), task(last)]
    with rollout() as recorded:
        run(Crew(agents=[first, second, last], tasks=tasks))
    assert sorted(roles(recorded)) == ["first", "last", "second"]
    for span in recorded.calls:
        assert recorded.parent_of(span).role == span.role
    check(recorded, user)


def test_a_guardrail_in_words_speaks_as_the_guardrail_agent(user: Endpoint) -> None:
    def script(seen: Seen) -> Say | int:
        return speak(seen) if seen.role == "worker" else Say(text='{"valid": true, "feedback": null}')

    user.script = script
    worker = agent("worker", llm(user.base_url))
    with rollout() as recorded:
        Crew(agents=[worker], tasks=[task(worker, guardrail="It is short.")]).kickoff()
    assert roles(recorded) == ["worker", "Guardrail Agent"]


def test_a_guardrail_that_sends_work_back_starts_the_agent_again(user: Endpoint) -> None:
    verdicts = iter([(False, "too short"), (True, "fine")])
    worker = agent("worker", llm(user.base_url))
    with rollout() as recorded:
        Crew(agents=[worker], tasks=[task(worker, guardrail=lambda output: next(verdicts))]).kickoff()
    assert roles(recorded) == ["worker", "worker"]
    assert len(named(recorded, Kind.AGENT, "worker")) == 2
    check(recorded, user)


def test_a_call_inside_a_tool_speaks_for_the_agent_or_for_whom_the_user_names(user: Endpoint) -> None:
    model = llm(user.base_url)

    @tool("search")
    def asking_search(query: str) -> str:
        """Search the archive."""
        with leyden.role("librarian"):
            model.call("Where is it?")
        return str(model.call("What is it?"))

    user.script = lambda seen: (
        Say(tool_calls=(("search", {"query": "north"}),)) if seen.role == "worker" and not seen.results else speak(seen)
    )
    with rollout() as recorded:
        crew(agent("worker", model, tools=[asking_search])).kickoff()
    assert roles(recorded) == ["worker", "librarian", "worker", "worker"]
    (searched,) = recorded.spans(Kind.TOOL)
    assert recorded.calls[2].parent_id == searched.span_id
    assert searched.attributes["gen_ai.tool.call.result"] == "main speaks"


def test_reasoning_before_a_delegated_task_belongs_to_the_coworker(user: Endpoint) -> None:
    user.script = delegating
    model = llm(user.base_url)
    planner = agent("planner", model, allow_delegation=True)
    worker = agent("worker", model, planning=True)
    with rollout() as recorded:
        Crew(agents=[planner, worker], tasks=[task(planner)]).kickoff()
    assert roles(recorded)[0] == roles(recorded)[-1] == "planner"
    assert set(roles(recorded)[1:-1]) == {"worker"}
    assert len(recorded.calls) > 3


class Answer(BaseModel):
    rooms: int


def test_calls_around_a_task_that_no_agent_makes_keep_the_role_around_the_crew(user: Endpoint) -> None:
    model = llm(user.base_url)

    def script(seen: Seen) -> Say | int:
        if seen.role == "worker":
            return speak(seen)
        return Say(text="three rooms" if "Is it so?" in seen.text else '{"rooms": 3}')

    user.script = script
    worker = agent("worker", model, tools=[search])
    judged = task(worker, output_pydantic=Answer, guardrail=lambda output: (True, model.call("Is it so?")))
    with rollout() as recorded:
        output: Any = Crew(agents=[worker], tasks=[judged]).kickoff()
    assert output.pydantic == Answer(rooms=3)
    assert roles(recorded) == user.roles == ["worker", "main", "main"]


@pytest.mark.parametrize("is_refused", [False, True])
def test_calls_that_shorten_a_conversation_can_be_told_apart(user: Endpoint, is_refused: bool) -> None:
    @tool("search")
    def long_search(query: str) -> str:
        """Search the archive."""
        return "word " * (1 if is_refused else 1300)

    def script(seen: Seen) -> Say | int:
        if seen.role == "main":
            return Say(text="<summary>rooms were counted</summary>")
        if len(user.seen) == 1:
            return Say(tool_calls=(("search", {"query": "north"}),))
        return 400 if is_refused and len(user.seen) == 2 else speak(seen)

    user.script = script
    worker = agent("worker", llm(user.base_url), tools=[long_search])
    with rollout() as recorded:
        Crew(agents=[worker], tasks=[task(worker, "word " * (10 if is_refused else 5500))]).kickoff()
    summaries = [span for span in recorded.calls if recorded.parent_of(span).name == "context summary"]
    assert 0 < len(summaries) == user.roles.count("main")
    assert set(roles(recorded)) == {"worker"}
    around = recorded.parent_of(summaries[0])
    assert around.attributes["crewai.purpose"] == "context_summary"
    assert recorded.parent_of(around).name == "worker"


def test_a_call_made_for_an_agent_outside_any_run_is_the_agent_s(user: Endpoint) -> None:
    model = llm(user.base_url)
    worker = agent("worker", model)
    with rollout() as recorded:
        model.call("Count.", from_agent=worker)
        model.call("Count.")
        with leyden.role("mine"):
            model.call("Count.", from_agent=worker)
    assert roles(recorded) == ["worker", "main", "mine"]


def test_agents_and_tasks_may_run_without_a_crew(user: Endpoint) -> None:
    worker: Agent = agent("worker", llm(user.base_url))
    alone: Task = task(worker)
    with rollout() as recorded:
        alone.execute_sync()
        worker.kickoff("Count.")
    assert roles(recorded) == ["worker", "worker"]
    check(recorded, user)

"""From a trace to a rollout: roles, tasks, ends, and traces that are not as they should be."""

import random
from collections.abc import Callable

import pytest

from leyden.errors import DatasetError
from leyden.interfaces import RolloutRecords
from leyden.spans import Kind, Mode, RolloutState, Span, Status
from leyden_plugins.traces.otel import Rules, assemble
from leyden_plugins.traces.otel.spans import RawEvent, RawSpan
from tests.traces.builders import TRACE, a_call, a_raw, an_evaluation, number

AGENT = {"gen_ai.operation.name": "invoke_agent"}


def records(*spans: RawSpan, rules: Rules | None = None) -> RolloutRecords:
    return assemble(list(spans), rules or Rules()).records


def roles(found: RolloutRecords) -> dict[str, str]:
    return {one.span_id: one.role for one in found.spans}


def test_the_nearest_agent_around_a_call_speaks() -> None:
    found = records(
        a_raw(1),
        a_call(2, 1),
        a_raw(3, 1, attributes={**AGENT, "gen_ai.agent.name": "writer"}),
        a_raw(4, 3),
        a_call(5, 4),
        a_raw(6, 4, name="invoke_agent checker", attributes=AGENT),
        a_call(7, 6),
    )
    assert roles(found)[number(2)] == "main"
    assert roles(found)[number(5)] == "writer"
    assert roles(found)[number(7)] == "checker"
    assert found.spans[0].kind is Kind.ROLLOUT


def test_roles_come_from_an_attribute_that_the_user_names() -> None:
    rules = Rules(role_from="app.node")
    found = records(a_raw(1, attributes={"app.node": "plan"}), a_call(2, 1), rules=rules)
    assert roles(found)[number(2)] == "plan"


def test_a_function_of_the_user_has_the_last_word_about_roles() -> None:
    rules = Rules(role=lambda span: "judge" if span.kind is Kind.MODEL_CALL else None)
    found = records(a_raw(1, attributes={**AGENT, "gen_ai.agent.name": "writer"}), a_call(2, 1), rules=rules)
    assert roles(found) == {number(1): "writer", number(2): "judge"}


@pytest.mark.parametrize("role", [lambda span: span.no_such, lambda span: 3])
def test_a_function_of_the_user_that_fails_is_named(role: Callable[[Span], str | None]) -> None:
    with pytest.raises(DatasetError, match="the function of --role-from"):
        records(a_call(1), rules=Rules(role=role))


def test_traces_of_one_task_are_a_group() -> None:
    other = "0af7651916cd43dd8448eb211c80319d"
    first, second = records(a_call(1)).rollout, records(a_call(1, trace=other)).rollout
    assert first.rollout_id != second.rollout_id
    assert first.group_id == second.group_id
    assert (first.task, first.mode, first.state) == ("How are you?", Mode.RECORDED, RolloutState.SUCCEEDED)


def test_the_task_comes_from_an_attribute_that_the_user_names() -> None:
    one = records(
        a_call(1, name="x"), a_raw(2, 1, attributes={"app.ticket": '{"id": 7}'}), rules=Rules(task_from="app.ticket")
    )
    assert one.rollout.task == {"id": 7}


def test_a_trace_without_that_attribute_is_a_task_of_its_own_and_is_counted() -> None:
    found = assemble([a_call(1)], Rules(task_from="app.ticket"))
    assert found.records.rollout.task == {"trace_id": TRACE}
    assert found.noticed == {"traces without the attribute 'app.ticket', each a task of its own": 1}


def test_a_root_that_failed_is_a_failed_rollout() -> None:
    boom = RawEvent(name="exception", time_ns=1, attributes={"exception.type": "ValueError", "exception.message": "no"})
    found = records(a_raw(1, is_error=True, events=[boom]), a_call(2, 1))
    assert (found.rollout.state, found.rollout.error, found.rollout.error_type) == (
        RolloutState.FAILED,
        "no",
        "ValueError",
    )
    assert found.spans[0].status is Status.ERROR


def test_a_call_that_failed_and_was_tried_again_does_not_fail_the_rollout() -> None:
    found = records(a_raw(1), a_call(2, 1, is_error=True, error="429"), a_call(3, 1))
    assert found.rollout.state is RolloutState.SUCCEEDED
    assert [one.status for one in found.spans] == [Status.OK, Status.ERROR, Status.OK]


def test_a_trace_without_its_root_counts_as_failed_unless_the_user_says_otherwise() -> None:
    found = assemble([a_call(2, 1)], Rules())
    assert (found.records.rollout.state, found.records.rollout.error_type) == (RolloutState.FAILED, "Incomplete")
    assert sum(found.noticed.values()) == 1
    assert records(a_call(2, 1), rules=Rules(without_root=True)).rollout.state is RolloutState.SUCCEEDED


def test_a_root_under_another_process_is_a_root() -> None:
    assert records(a_call(2, 1, has_remote_parent=True)).rollout.state is RolloutState.SUCCEEDED


def test_several_roots_are_one_rollout_that_fails_when_one_of_them_does() -> None:
    assert records(a_call(1), a_call(2)).rollout.state is RolloutState.SUCCEEDED
    assert records(a_call(1), a_call(2, is_error=True)).rollout.state is RolloutState.FAILED


def test_parents_in_a_circle_end_where_they_began() -> None:
    found = records(a_raw(1, 2), a_call(2, 1))
    assert roles(found) == {number(1): "main", number(2): "main"}
    assert found.rollout.state is RolloutState.FAILED


def test_the_order_in_which_spans_came_means_nothing() -> None:
    spans = [
        a_raw(1),
        a_raw(2, 1, attributes={**AGENT, "gen_ai.agent.name": "writer"}),
        a_call(3, 2),
        a_call(4, 3),
        a_raw(5, 2, attributes={"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "x"}),
    ]
    expected = records(*spans)
    for seed in range(5):
        assert records(*random.Random(seed).sample(spans, len(spans))) == expected


def test_of_a_call_recorded_twice_the_span_that_says_more_counts() -> None:
    silent = {"openinference.span.kind": "LLM"}
    found = {one.span_id: one.kind for one in records(a_call(1), a_raw(2, 1, attributes=silent)).spans}
    assert found == {number(1): Kind.MODEL_CALL, number(2): Kind.EVENT}
    found = {one.span_id: one.kind for one in records(a_call(1), a_call(2, 1)).spans}
    assert found == {number(1): Kind.ROLLOUT, number(2): Kind.MODEL_CALL}


def test_a_tool_that_calls_another_tool_stays_two_tools() -> None:
    tool = {"gen_ai.operation.name": "execute_tool"}
    found = records(
        a_call(1),
        a_raw(2, 1, attributes={**tool, "gen_ai.tool.name": "plan"}),
        a_raw(3, 2, attributes={**tool, "gen_ai.tool.name": "search"}),
    )
    assert [one.kind for one in found.spans[1:]] == [Kind.TOOL, Kind.TOOL]


def test_evaluations_are_rewards_of_the_call_or_of_the_rollout() -> None:
    found = records(
        a_raw(1, events=[an_evaluation(0.5), an_evaluation(0.7), an_evaluation("good"), an_evaluation(float("nan"))]),
        a_call(2, 1, events=[an_evaluation(1)]),
    )
    assert [(one.name, one.value, one.target_span, one.index) for one in found.rewards] == [
        ("helpful", 0.5, None, 0),
        ("helpful", 0.7, None, 1),
        ("helpful", 1.0, number(2), 0),
    ]


def test_a_span_that_never_ended_is_abandoned() -> None:
    span = records(a_call(1, end_ns=0)).spans[0]
    assert (span.status, span.end_ns) == (Status.ABANDONED, span.start_ns)


def test_what_our_spans_have_no_field_for_is_kept_beside() -> None:
    link = {"trace_id": TRACE, "span_id": number(9), "attributes": {}}
    event = RawEvent(name="retry", time_ns=5, attributes={"n": 1})
    spans = [
        a_raw(1, resource={"service.name": "shop"}, scope="lib", links=[link], events=[event]),
        a_call(2, 1, resource={"service.name": "shop"}, dropped=3),
    ]
    found = assemble(spans, Rules())
    told = found.records.spans[0].attributes
    assert told["otel.resource"] == {"service.name": "shop"}
    assert told["otel.links"] == [link]
    assert told["otel.events"] == [{"name": "retry", "time_ns": 5, "attributes": {"n": 1}}]
    assert "otel.resource" not in found.records.spans[1].attributes
    assert found.noticed == {"attributes and events that senders had cut off": 3}


def test_a_trace_that_says_nothing_of_its_task_is_one_of_its_own() -> None:
    found = assemble([a_raw(1, attributes={"openinference.span.kind": "LLM", "input.value": None})], Rules())
    assert found.records.rollout.task == {"trace_id": TRACE}

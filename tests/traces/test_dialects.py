"""What instrumentations say, read from what they really sent; `recorded/` names their versions.

The apps: two calls of the openai client with a tool; an AutoGen team of a forecaster with a tool and a critic.
"""

import json
from pathlib import Path

import pytest

from leyden.conversations import asked_messages, chat_messages, function_tools
from leyden.interfaces import RolloutRecords
from leyden.spans import Kind, Span
from leyden_plugins.traces.otel import Rules, assemble
from leyden_plugins.traces.otel.dialects import read
from leyden_plugins.traces.otel.files import read_file
from leyden_plugins.traces.otel.spans import RawEvent, RawSpan, read_request
from tests.traces.builders import a_raw

RECORDED = Path(__file__).parent / "recorded"
CLIENTS = ("openinference-openai-0.1.66", "genai-openai-1.3b0", "openllmetry-openai-0.62.4")
AUTOGEN = "openinference-autogen-agentchat-0.1.22"

QUESTION = [{"role": "system", "content": "You forecast."}, {"role": "user", "content": "How is it in Leiden?"}]


def traces(name: str) -> list[list[RawSpan]]:
    found: dict[str, list[RawSpan]] = {}
    for request in read_file(RECORDED / f"{name}.jsonl"):
        for span in read_request(request).spans:
            found.setdefault(span.trace_id, []).append(span)
    return list(found.values())


def autogen(rules: Rules | None = None) -> RolloutRecords:
    return assemble(max(traces(AUTOGEN), key=len), rules or Rules()).records


def calls(records: RolloutRecords) -> list[Span]:
    return [one for one in records.spans if one.kind is Kind.MODEL_CALL]


@pytest.mark.parametrize("name", CLIENTS)
def test_two_calls_of_the_openai_client_say_the_same_in_every_dialect(name: str) -> None:
    first, second = (assemble(one, Rules()).records for one in traces(name))
    (asks_tool,), (answers,) = calls(first), calls(second)

    assert asked_messages(asks_tool.attributes) == QUESTION
    (answer,) = chat_messages(asks_tool.attributes["gen_ai.output.messages"])
    (call,) = answer["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert call["function"]["arguments"].replace(" ", "") == '{"city":"Leiden"}'
    (tool,) = function_tools(asks_tool.attributes["gen_ai.tool.definitions"])
    assert tool["function"]["parameters"]["required"] == ["city"]

    asked = asked_messages(answers.attributes)
    assert asked[:2] == QUESTION
    assert asked[2]["tool_calls"][0]["function"]["name"] == "weather"
    assert (asked[3]["role"], asked[3]["content"], asked[3]["tool_call_id"]) == ("tool", "wind in Leiden", "call_1")
    assert answers.attributes["gen_ai.output.messages"] == [{"role": "assistant", "content": "it is windy"}]
    assert answers.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert answers.attributes["gen_ai.request.model"] == "gpt-4o-mini"
    assert answers.attributes["gen_ai.usage.input_tokens"] == 7
    assert first.rollout.task == "How is it in Leiden?"
    assert second.rollout.output == "it is windy"


def test_an_autogen_team_keeps_its_roles_its_tool_and_one_span_a_call() -> None:
    found = autogen()
    assert [one.role for one in calls(found)] == ["forecaster", "forecaster", "critic"]
    assert [one.attributes["gen_ai.output.messages"][0].get("content") for one in calls(found)] == [
        "",
        "it is windy",
        "fine TERMINATE",
    ]
    (tool,) = [one for one in found.spans if one.kind is Kind.TOOL]
    assert (tool.role, tool.attributes["gen_ai.tool.name"]) == ("forecaster", "weather")
    assert tool.attributes["gen_ai.tool.call.arguments"] == '{"city": "Leiden"}'
    assert tool.attributes["gen_ai.tool.call.result"] == "wind in Leiden"
    wrappers = [one for one in found.spans if "otel.wraps" in one.attributes]
    assert [one.kind for one in wrappers] == [Kind.EVENT] * 4, "three calls and a tool that two libraries recorded"


def test_the_task_of_an_autogen_team_is_what_it_was_given() -> None:
    found = autogen().rollout
    assert isinstance(found.task, dict)
    assert found.task["task"] == "How is it in Leiden?"
    assert found.group_id == found.task_id == autogen().rollout.group_id


def test_exact_tokens_come_from_a_raw_answer_that_has_them() -> None:
    completions = autogen().completions
    assert [one.prompt_token_ids for one in completions] == [[1, 2, 3, 4]] * 3
    assert [one.choices[0].token_ids for one in completions] == [[5, 6, 7]] * 3
    assert completions[0].choices[0].logprobs == [-0.1, -0.2, -0.3]
    assert [one.role for one in completions] == ["forecaster", "forecaster", "critic"]
    assert all(one.off_distribution and one.policy == "" for one in completions), "RL must not take them"


@pytest.mark.parametrize("damage", ["prompt", "answer", "second", "text"])
def test_a_raw_answer_without_all_its_tokens_makes_no_completion(damage: str) -> None:
    answer: dict[str, object] = {"prompt_token_ids": [1], "choices": [{"index": 0, "token_ids": [2]}]}
    damaged: dict[str, dict[str, object]] = {
        "prompt": {"prompt_token_ids": []},
        "answer": {"choices": [{}]},
        "second": {"choices": [{"token_ids": [2]}, {"token_ids": []}]},
        "text": {"prompt_token_ids": ["1"]},
    }
    raw = a_raw(1, attributes={"openinference.span.kind": "LLM", "output.value": json.dumps(answer | damaged[damage])})
    assert assemble([raw], Rules()).records.completions == []


def test_attributes_that_nobody_knows_survive_and_ids_are_those_of_the_trace() -> None:
    (spans, *_) = traces(CLIENTS[0])
    (raw,) = spans
    found = assemble(spans, Rules()).records
    (span,) = found.spans
    assert span.attributes["llm.invocation_parameters"] == raw.attributes["llm.invocation_parameters"]
    assert span.attributes["otel.resource"]["telemetry.sdk.language"] == "python"
    assert (span.span_id, span.rollout_id, found.rollout.rollout_id) == (raw.span_id, raw.trace_id, raw.trace_id)
    assert not [name for name in span.attributes if name.startswith("llm.input_messages")]


def test_older_genai_events_are_messages() -> None:
    events = [
        RawEvent(name="gen_ai.system.message", time_ns=1, attributes={"content": "You forecast."}),
        RawEvent(name="gen_ai.user.message", time_ns=2, attributes={"content": "How is it in Leiden?"}),
        RawEvent(
            name="gen_ai.choice", time_ns=3, attributes={"message": '{"content": "Wet."}', "finish_reason": "stop"}
        ),
    ]
    told = read(a_raw(1, attributes={"gen_ai.operation.name": "chat"}, events=events)).told
    assert told["gen_ai.input.messages"] == QUESTION
    assert told["gen_ai.output.messages"] == [{"role": "assistant", "content": "Wet."}]
    assert told["gen_ai.response.finish_reasons"] == ["stop"]


def test_genai_instructions_that_stand_apart_lead_the_messages() -> None:
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.system_instructions": '[{"type": "text", "content": "You forecast."}]',
        "gen_ai.input.messages": '[{"role":"user","parts":[{"type":"text","content":"How is it in Leiden?"}]}]',
    }
    reading = read(a_raw(1, attributes=attributes))
    assert reading.told["gen_ai.input.messages"] == QUESTION
    assert reading.consumed == {"gen_ai.system_instructions"}


def test_flattened_prompts_of_older_openllmetry_are_messages() -> None:
    attributes = {
        "llm.request.type": "chat",
        "gen_ai.prompt.0.role": "system",
        "gen_ai.prompt.0.content": "You forecast.",
        "gen_ai.prompt.1.role": "user",
        "gen_ai.prompt.1.content": "How is it in Leiden?",
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.finish_reason": "tool_calls",
        "gen_ai.completion.0.tool_calls.0.id": "call_1",
        "gen_ai.completion.0.tool_calls.0.name": "weather",
        "gen_ai.completion.0.tool_calls.0.arguments": "{}",
        "llm.request.functions.0.name": "weather",
        "llm.request.functions.0.parameters": '{"type": "object"}',
        "gen_ai.usage.prompt_tokens": 7,
    }
    reading = read(a_raw(1, attributes=attributes))
    assert reading.kind is Kind.MODEL_CALL
    assert reading.told["gen_ai.input.messages"] == QUESTION
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert reading.told["gen_ai.output.messages"] == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert function_tools(reading.told["gen_ai.tool.definitions"])[0]["function"]["parameters"] == {"type": "object"}
    assert reading.told["gen_ai.usage.input_tokens"] == 7


def test_langfuse_generations_are_model_calls() -> None:
    attributes = {
        "langfuse.observation.type": "generation",
        "langfuse.observation.input": '[{"role":"system","content":"You forecast."},'
        '{"role":"user","content":"How is it in Leiden?"}]',
        "langfuse.observation.output": '{"role":"assistant","content":"Wet."}',
        "langfuse.observation.model.name": "gpt-4o-mini",
        "langfuse.observation.usage_details": '{"input": 7, "output": 1}',
    }
    reading = read(a_raw(1, attributes=attributes))
    assert reading.kind is Kind.MODEL_CALL
    assert reading.told["gen_ai.input.messages"] == QUESTION
    assert reading.told["gen_ai.output.messages"] == [{"role": "assistant", "content": "Wet."}]
    assert reading.told["gen_ai.usage.output_tokens"] == 1


def test_images_stay_in_the_messages_so_that_readers_can_refuse_them() -> None:
    attributes = {
        "openinference.span.kind": "LLM",
        "llm.input_messages.0.message.role": "user",
        "llm.input_messages.0.message.contents.0.message_content.type": "text",
        "llm.input_messages.0.message.contents.0.message_content.text": "What is this?",
        "llm.input_messages.0.message.contents.1.message_content.type": "image",
        "llm.input_messages.0.message.contents.1.message_content.image.image.url": "https://example.com/x.png",
    }
    told = read(a_raw(1, attributes=attributes)).told
    assert [part["type"] for part in told["gen_ai.input.messages"][0]["content"]] == ["text", "image"]


@pytest.mark.parametrize("value", [None, 3, "[", "{}", '[{"role": 3}]', '[[["x"]]]', "null", '"text"', "[1, 2]"])
@pytest.mark.parametrize(
    "name",
    [
        "gen_ai.input.messages",
        "gen_ai.output.messages",
        "gen_ai.tool.definitions",
        "llm.input_messages.0.message",
        "llm.input_messages.0.message.tool_calls.0",
        "llm.tools.0",
        "output.value",
        "gen_ai.prompt.0.tool_calls",
        "langfuse.observation.input",
    ],
)
def test_what_no_instrumentation_should_send_breaks_nothing(name: str, value: object) -> None:
    beside = {
        "gen_ai.operation.name": "chat",
        "openinference.span.kind": "LLM",
        "langfuse.observation.type": "generation",
        "llm.request.type": "chat",
    }
    found = assemble([a_raw(1, attributes={**beside, name: value})], Rules()).records
    assert found.spans[0].kind is Kind.MODEL_CALL

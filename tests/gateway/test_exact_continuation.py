"""A request that extends an answered call goes on from exactly the tokens of that call."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest

from leyden.errors import ConfigurationError
from leyden.interfaces import ContinuesExactly
from leyden.roles import Policy
from leyden.spans import Completion, ForkCause
from leyden.testing.fakes import FakeEngine
from leyden.training.trainer import Trainer
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.gateway.conversations import Answered, Conversations, digested, message_key, speaker_of
from tests.gateway.builders import Running, access, ask, asynchronous, events, named, running
from tests.gateway.template_engine import (
    CHATML_TEMPLATE,
    REASONING_TEMPLATE,
    STRICT_TEMPLATE,
    TOOL,
    TOOL_TEMPLATE,
    Spelled,
    TemplateEngine,
)
from tests.gateway.test_forks import CALLS, THINKS, said, user
from tests.tiny import END

Messages = list[Mapping[str, object]]


def exactly(engine: TemplateEngine) -> Any:
    return running(engine, exact_continuation=True)


async def chat(here: Running, token: str, *, turns: int, stream: bool = False, **fields: Any) -> list[Completion]:
    """Talk for some turns, each with what the gateway answered before; return the records."""
    messages: list[Any] = [user("turn 0")]
    for turn in range(turns):
        response = await here.post(token, ask(messages=messages, stream=stream, **fields), named(f"s{turn}"))
        assert response.status_code == 200, response.text
        if stream:
            deltas = [one["choices"][0]["delta"] for one in events(response)[:-1]]
            answer = {"role": "assistant", "content": "".join(delta.get("content") or "" for delta in deltas)}
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        else:
            answer = response.json()["choices"][0]["message"]
            calls = answer.get("tool_calls", ())
        if calls:
            answer = {"role": "assistant", "content": answer["content"], "tool_calls": calls}
            messages += [answer, *({"role": "tool", "tool_call_id": one["id"], "content": "42"} for one in calls)]
        else:
            messages += [answer, user(f"turn {turn + 1}")]
    return await here.completions()


def assert_extends(before: Completion, after: Completion, choice: int = 0) -> None:
    known = before.prompt_token_ids + before.choices[choice].token_ids
    assert after.prompt_token_ids[: len(known)] == known
    assert after.spliced == len(known)
    assert after.fork is None


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_stays_where_the_template_would_drop_it(stream: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        engine = TemplateEngine(
            REASONING_TEMPLATE, lambda request: f"<think>\nso {len(request.messages)}\n</think>\n\ndone"
        )
        async with exactly(engine) as here:
            calls = await chat(here, here.gateway.admit(access()), turns=4, stream=stream)
        for before, after in pairwise(calls):
            assert_extends(before, after)
        assert engine.decode(calls[2].prompt_token_ids) == (
            "<|user|>turn 0<|end|>\n"
            "<|assistant|><think>\nso 1\n</think>\n\ndone<|end|>\n"
            "<|user|>turn 1<|end|>\n"
            "<|assistant|><think>\nso 3\n</think>\n\ndone<|end|>\n"
            "<|user|>turn 2<|end|>\n"
            "<|assistant|>"
        )

    scenario()


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_stays_as_it_was_sampled(stream: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        engine = TemplateEngine(TOOL_TEMPLATE, [f"I look.\n{CALLS}", f"{CALLS}\n{CALLS}", "42 it is"])
        async with exactly(engine) as here:
            calls = await chat(here, here.gateway.admit(access()), turns=3, stream=stream, tools=[TOOL])
        assert [one.choices[0].finish_reason for one in calls] == ["tool_calls", "tool_calls", "stop"]
        assert_extends(calls[0], calls[1])
        assert_extends(calls[1], calls[2])
        assert engine.decode(calls[2].prompt_token_ids).endswith(
            f"<|assistant|>I look.\n{CALLS}<|end|>\n<|tool|>42<|end|>\n<|assistant|>{CALLS}\n{CALLS}<|end|>\n"
            "<|tool|>42<|end|>\n<|tool|>42<|end|>\n<|assistant|>"
        )

    scenario()


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, STRICT_TEMPLATE, REASONING_TEMPLATE, TOOL_TEMPLATE])
def test_where_the_template_rewrites_nothing_the_prompts_are_those_of_rendering(template: str) -> None:
    @asynchronous
    async def scenario() -> None:
        prompts = {}
        for exact in (False, True):
            async with running(TemplateEngine(template, ["cab", "b a é", ""]), exact_continuation=exact) as here:
                calls = await chat(here, here.gateway.admit(access()), turns=5)
                prompts[exact] = [one.prompt_token_ids for one in calls]
                assert [one.fork for one in calls] == [None] * 5
                assert [one.spliced > 0 for one in calls] == [exact and turn > 0 for turn in range(5)]
        assert prompts[True] == prompts[False]

    scenario()


@asynchronous
async def test_tokens_that_the_tokenizer_would_not_choose_stay() -> None:
    engine = TemplateEngine(CHATML_TEMPLATE, [Spelled("cab", pieces=["c", "a", "b"]), "ok"])
    async with exactly(engine) as here:
        first, second = await chat(here, here.gateway.admit(access()), turns=2)
    assert_extends(first, second)
    assert (
        engine.decode(second.prompt_token_ids)
        == "<|user|>turn 0<|end|>\n<|assistant|>cab<|end|>\n<|user|>turn 1<|end|>\n<|assistant|>"
    )


@asynchronous
async def test_an_answer_that_was_cut_by_its_length_gets_the_end_of_its_turn() -> None:
    engine = TemplateEngine(CHATML_TEMPLATE, [Spelled("half", is_cut=True), "ok"])
    async with exactly(engine) as here:
        first, second = await chat(here, here.gateway.admit(access()), turns=2)
    assert first.choices[0].finish_reason == "length" and END not in first.choices[0].token_ids
    assert_extends(first, second)
    assert engine.decode(second.prompt_token_ids[second.spliced :]) == "<|end|>\n<|user|>turn 1<|end|>\n<|assistant|>"


@asynchronous
async def test_branches_each_go_on_from_their_own_answer() -> None:
    engine = TemplateEngine(REASONING_TEMPLATE, [f"<think>\n{name}\n</think>\n\nsame" for name in "abcd"])
    async with exactly(engine) as here:
        token = here.gateway.admit(access())
        root = [user("q")]
        await here.post(token, ask(messages=root), named("root"))
        left = [*root, said("<think>\na\n</think>\n\nsame"), user("left")]
        right = [*root, said("<think>\na\n</think>\n\nsame"), user("right")]
        await here.post(token, ask(messages=left), named("left"))
        await here.post(token, ask(messages=right), named("right"))
        deeper = [*left, said("<think>\nb\n</think>\n\nsame"), user("more")]
        await here.post(token, ask(messages=deeper), named("deeper"))
        calls = {one.span_id: one for one in await here.completions()}
    assert_extends(calls["root"], calls["left"])
    assert_extends(calls["root"], calls["right"])
    assert_extends(calls["left"], calls["deeper"])


@asynchronous
async def test_of_several_choices_the_one_that_comes_back_is_gone_on_from() -> None:
    choices = [Spelled("one"), Spelled("cab", pieces=["c", "a", "b"]), Spelled("three")]
    async with exactly(TemplateEngine(CHATML_TEMPLATE, [choices, "ok"])) as here:
        token = here.gateway.admit(access())
        await here.post(token, ask(messages=[user("q")], n=3), named("s0"))
        await here.post(token, ask(messages=[user("q"), said("cab"), user("more")]), named("s1"))
        first, second = await here.completions()
    assert_extends(first, second, choice=1)


@asynchronous
async def test_an_edited_answer_and_other_tools_are_rendered_and_recorded_as_edits() -> None:
    async with exactly(TemplateEngine(TOOL_TEMPLATE, ["alpha", "beta", "gamma"])) as here:
        token = here.gateway.admit(access())
        first: Messages = [user("q")]
        await here.post(token, ask(messages=first), named("s0"))
        await here.post(token, ask(messages=[*first, said("alpha!"), user("more")]), named("s1"))
        await here.post(token, ask(messages=[*first, said("alpha"), user("more")], tools=[TOOL]), named("s2"))
        calls = await here.completions()
    assert [one.spliced for one in calls] == [0, 0, 0]
    assert [one.fork and one.fork.cause for one in calls] == [None, ForkCause.EDIT, ForkCause.EDIT]


@asynchronous
async def test_roles_and_rollouts_go_on_from_their_own_calls_only() -> None:
    async with exactly(TemplateEngine(REASONING_TEMPLATE, [THINKS])) as here:
        token, other = here.gateway.admit(access()), here.gateway.admit(access("r2"))
        later = [user("q"), said(THINKS), user("Sure?")]
        await here.post(token, ask(messages=[user("q")]), named("s0"))
        await here.post(token, ask(messages=later), named("s1", role="rewriter"))
        await here.post(other, ask(messages=later), named("s2", rollout="r2"))
        await here.post(token, ask(messages=later), named("s3"))
        found = {one.span_id: one.spliced > 0 for one in [*await here.completions(), *await here.completions("r2")]}
    assert found == {"s0": False, "s1": False, "s2": False, "s3": True}


@asynchronous
async def test_anthropic_messages_go_on_exactly() -> None:
    engine = TemplateEngine(TOOL_TEMPLATE, [f"I look.\n{CALLS}", "42"])
    async with exactly(engine) as here:
        token = here.gateway.admit(access())
        tools = [{"name": "look", "input_schema": {"type": "object"}}]
        body: dict[str, Any] = {"model": "sql", "max_tokens": 200, "tools": tools, "messages": [user("q")]}
        answer = (await here.post(token, body, named("s0"), path="/v1/messages")).json()
        result = {"type": "tool_result", "tool_use_id": answer["content"][-1]["id"], "content": "42"}
        body["messages"] += [said(answer["content"]), {"role": "user", "content": [result]}]
        await here.post(token, body, named("s1"), path="/v1/messages")
        first, second = await here.completions()
    assert_extends(first, second)


@pytest.mark.parametrize("by_id", [True, False])
def test_responses_go_on_exactly_by_id_and_by_their_items(by_id: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        engine = TemplateEngine(TOOL_TEMPLATE, [f"I look.\n{CALLS}", "42"])
        async with exactly(engine) as here:
            token = here.gateway.admit(access())
            tools = [{"type": "function", "name": "look", "parameters": {"type": "object"}}]
            body: dict[str, Any] = {"model": "sql", "tools": tools, "input": [user("q")]}
            answer = (await here.post(token, body, named("s0"), path="/v1/responses")).json()
            result = {"type": "function_call_output", "call_id": answer["output"][-1]["call_id"], "output": "42"}
            history = [] if by_id else [user("q"), *answer["output"]]
            body |= {"input": [*history, result]} | ({"previous_response_id": answer["id"]} if by_id else {})
            response = await here.post(token, body, named("s1"), path="/v1/responses")
            assert response.status_code == 200, response.text
            first, second = await here.completions()
        assert_extends(first, second)

    scenario()


@asynchronous
async def test_raw_prompts_stay_as_they_are() -> None:
    async with exactly(TemplateEngine(CHATML_TEMPLATE, ["x"])) as here:
        token = here.gateway.admit(access())
        for _ in range(2):
            await here.post(token, {"model": "sql", "prompt": "q"}, path="/v1/completions")
        assert [(one.spliced, one.prompt_token_ids) for one in await here.completions()] == [
            (0, here.engine.encode("q"))
        ] * 2


@asynchronous
async def test_a_conversation_that_the_template_refuses_to_continue_is_rendered() -> None:
    """The template hides the words of a turn that calls no tool when a tool's result follows."""
    template = TOOL_TEMPLATE.replace(
        "{{ message.content or '' }}",
        "{% if message.content != 'leyden_probe_answer' %}{{ message.content or '' }}{% endif %}",
    )
    async with exactly(TemplateEngine(template, [CALLS, "42"])) as here:
        first, second = await chat(here, here.gateway.admit(access()), turns=2, tools=[TOOL])
    assert first.spliced == second.spliced == 0
    assert second.fork is not None and second.fork.cause is ForkCause.TEMPLATE


@asynchronous
async def test_an_engine_that_cannot_continue_is_refused_at_start() -> None:
    assert not isinstance(FakeEngine(), ContinuesExactly)
    with pytest.raises(ConfigurationError, match="'FakeEngine' has no method `continuation`"):
        async with running(FakeEngine(), exact_continuation=True):
            pass


def test_a_trainer_refuses_such_an_engine_before_anything_is_loaded() -> None:
    async def solve(task: object) -> float:
        return 0.0

    with pytest.raises(ConfigurationError, match="exact_continuation=True needs an engine"):
        Trainer(
            solve,
            tasks=["q"],
            tasks_per_step=1,
            policies=[Policy("sql")],
            engine=FakeEngine(),
            algorithm=GRPO(group_size=2),
            exact_continuation=True,
        )


@asynchronous
async def test_what_was_said_is_forgotten_with_the_rollout() -> None:
    async with exactly(TemplateEngine(REASONING_TEMPLATE, [THINKS])) as here:
        token = here.gateway.admit(access())
        await here.post(token, ask(messages=[user("q")]), named("s0"))
        await here.gateway.revoke("r1")
        again = here.gateway.admit(access(attempt=2))
        later = [user("q"), said(THINKS), user("Sure?")]
        await here.post(again, ask(messages=later), named("s1", attempt="2"))
        assert [one.spliced for one in await here.completions()] == [0, 0]


def test_a_memory_of_calls_is_bounded_and_forgets_the_oldest() -> None:
    conversations = Conversations(most_tokens=1000)
    speaker = speaker_of("main", "sql")
    asked = [digested([user(f"q{index}")], (), speaker) for index in range(10)]
    for index, one in enumerate(asked):
        conversations.remember(answered(f"s{index}", speaker, one.chain[0]))
    assert 0 < len(conversations) < 10
    longer = [digested([user(f"q{index}"), said("ok"), user("x")], (), speaker) for index in range(10)]
    kept = [conversations.extended(one) is not None for one in longer]
    assert kept == [index >= 10 - len(conversations) for index in range(10)]


def answered(span_id: str, speaker: bytes, chain: bytes) -> Answered:
    return Answered(
        span_id=span_id,
        speaker=speaker,
        chain=chain,
        last=b"",
        tools=b"",
        prompt_token_ids=array("i", range(50)),
        answers=[(message_key(said("ok")), array("i", [1, 2]))],
    )

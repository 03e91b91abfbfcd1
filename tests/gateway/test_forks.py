"""Where a prompt leaves the tokens it should begin with, the record says where and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from leyden.ownership import current_owner
from leyden.redaction import Redactor
from leyden.spans import Completion, Fork, ForkCause
from leyden.sqlite import SQLiteStore
from leyden.sqlite.codec import RecordCodec
from leyden.testing.records import a_completion, a_rollout
from tests.gateway.builders import Running, access, ask, asynchronous, named, running
from tests.gateway.template_engine import (
    CHATML_TEMPLATE,
    REASONING_TEMPLATE,
    TOOL,
    TOOL_TEMPLATE,
    Spelled,
    TemplateEngine,
)

Messages = list[Mapping[str, object]]

THINKS = "<think>\nfour cities\n</think>\n\nThere are 4."
CALLS = '<tool_call>\n{"name":"look","arguments":{"q":1}}\n</tool_call>'
"""Without the spaces that the template writes."""


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def said(text: str, **others: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **others}


async def converse(
    here: Running, conversations: Sequence[Messages], *, tools: Sequence[object] = (), **fields: Any
) -> list[Completion]:
    """Send each conversation; return what was recorded, in that order."""
    token = here.gateway.admit(access())
    for index, messages in enumerate(conversations):
        body = ask(messages=messages, **({"tools": list(tools)} if tools else {}), **fields)
        response = await here.post(token, body, named(f"s{index}"))
        assert response.status_code == 200, response.text
    return await here.completions()


async def forks(template: str, answers: Any, conversations: Sequence[Messages], **fields: Any) -> list[Fork | None]:
    async with running(TemplateEngine(template, answers)) as here:
        return [one.fork for one in await converse(here, conversations, **fields)]


@asynchronous
async def test_a_template_that_drops_reasoning_forks_where_the_reasoning_began() -> None:
    first = [user("How many?")]
    async with running(TemplateEngine(REASONING_TEMPLATE, [THINKS, "ok"])) as here:
        before, after = await converse(here, [first, [*first, said(THINKS), user("Sure?")]])
    assert before.fork is None
    assert after.fork == Fork(
        span_id="s0",
        position=len(before.prompt_token_ids),
        cause=ForkCause.TEMPLATE,
        before="<|user|>How many?<|end|>\n<|assistant|>"[-len(after.fork.before) :] if after.fork else "",
        expected="<think>\nfour cities\n</think>\n\nThere are 4.<|end|>"[:60],
        found="There are 4.<|end|>\n<|user|>Sure?<|end|>\n<|assistant|>"[:60],
    )
    assert after.fork is not None and after.fork.before.endswith("<|end|>\n<|assistant|>")


@asynchronous
async def test_a_template_that_spells_tool_calls_anew_forks_within_the_call() -> None:
    first = [user("look")]
    # The agent's framework has its own ids and its own spelling of the same arguments: no edit.
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{ "q":1 }'}}
    result = {"role": "tool", "tool_call_id": "c", "content": "42"}
    found = await forks(
        TOOL_TEMPLATE, [CALLS, "ok"], [first, [*first, said("", tool_calls=[call]), result]], tools=[TOOL]
    )
    assert found[0] is None and found[1] is not None
    assert found[1].cause is ForkCause.TEMPLATE
    assert found[1].before.endswith('{"name":')
    assert found[1].expected.startswith('"look","arguments":{"q":1}')
    assert found[1].found.startswith(' "look", "arguments": {"q": 1}')


@asynchronous
async def test_a_text_with_other_tokens_is_a_fork_of_tokenisation() -> None:
    first = [user("q")]
    answer = Spelled("cab", pieces=["c", "a", "b"])
    found = await forks(CHATML_TEMPLATE, [answer, "ok"], [first, [*first, said("cab"), user("more")]])
    assert found[1] is not None
    assert (found[1].cause, found[1].expected, found[1].found.split("|")[0]) == (
        ForkCause.TOKENISATION,
        "a|b|<|end|>",
        "ab",
    )
    assert found[1].before.endswith("<|assistant|>c")


@asynchronous
async def test_a_conversation_that_is_spelled_alike_does_not_fork() -> None:
    first = [user("q")]
    second = [*first, said("cab"), user("more")]
    assert await forks(CHATML_TEMPLATE, ["cab", "ok", "ok"], [first, second, [*second, said("ok"), user("x")]]) == [
        None,
        None,
        None,
    ]


SYSTEM = {"role": "system", "content": "be brief"}
FIRST = [SYSTEM, user("one")]
SECOND = [*FIRST, said("alpha"), user("two")]


@pytest.mark.parametrize(
    ("changed", "of", "expected", "found"),
    [
        ([*FIRST, said("alph!"), user("two")], "s0", "a<|end|>", "!<|end|>"),
        ([SYSTEM, user("two"), said("beta"), user("x")], "s1", "one<|end|>", "two<|end|>"),
        ([*FIRST, said("alpha"), user("[cut]"), said("beta"), user("x")], "s1", "two<|end|>", "[cut]<|end|>"),
        ([{"role": "system", "content": "be long"}, *SECOND[1:], said("beta"), user("x")], "s1", "brief", "long"),
    ],
    ids=["an answer in other words", "a window that slides", "an old result cut short", "a new system prompt"],
)
def test_a_history_that_the_agent_changed_is_an_edit(changed: Messages, of: str, expected: str, found: str) -> None:
    @asynchronous
    async def scenario() -> None:
        *_, fork = await forks(CHATML_TEMPLATE, ["alpha", "beta", "ok"], [FIRST, SECOND, changed])
        assert fork is not None
        assert (fork.cause, fork.span_id) == (ForkCause.EDIT, of)
        assert fork.expected.startswith(expected) and fork.found.startswith(found)

    scenario()


@asynchronous
async def test_other_tools_in_the_same_conversation_are_an_edit() -> None:
    async with running(TemplateEngine(TOOL_TEMPLATE, ["alpha", "beta"])) as here:
        token = here.gateway.admit(access())
        await here.post(token, ask(messages=FIRST))
        await here.post(token, ask(messages=SECOND, tools=[TOOL]))
        _, second = await here.completions()
    assert second.fork is not None and (second.fork.cause, second.fork.position) == (ForkCause.EDIT, 0)


@pytest.mark.parametrize(
    "other",
    [
        [SYSTEM, user("something else")],
        FIRST,
        [*FIRST, said("alpha"), user("another question")],
        [SYSTEM, user("example"), said("alpha"), user("three")],
        [*SECOND, said("beta"), user("three")],
    ],
    ids=["fresh, same system prompt", "a retry", "a branch", "its own example", "the next turn"],
)
def test_what_goes_on_from_nothing_or_goes_on_unchanged_is_no_fork(other: Messages) -> None:
    @asynchronous
    async def scenario() -> None:
        assert await forks(CHATML_TEMPLATE, ["alpha", "beta", "ok"], [FIRST, SECOND, other]) == [None] * 3

    scenario()


@asynchronous
async def test_an_example_that_every_prompt_holds_is_no_edit_when_its_words_were_also_an_answer() -> None:
    shown = [SYSTEM, user("example"), said("alpha")]
    conversations = [[*shown, user("one")], [*shown, user("two")]]
    assert await forks(CHATML_TEMPLATE, ["alpha", "beta"], conversations) == [None, None]


@pytest.mark.parametrize(
    ("answer", "comes_back"),
    [
        (THINKS, said("There are 4.", reasoning_content="four cities")),
        (THINKS.removeprefix("<think>\n"), said("There are 4.", reasoning_content="four cities")),
        ("x", {"content": [{"type": "text", "text": "x"}], "role": "assistant", "refusal": None}),
        ("x", said("x", tool_calls=[])),
        ("x", said("x", name="writer")),
    ],
)
def test_a_message_in_another_dress_is_the_same_message(answer: str, comes_back: dict[str, object]) -> None:
    """An edit would say that the agent changed it; what the template makes of the dress is the template's."""

    @asynchronous
    async def scenario() -> None:
        first = [user("q")]
        found = await forks(CHATML_TEMPLATE, [answer, "ok"], [first, [*first, comes_back, user("more")]])
        assert found[1] is None or found[1].cause is ForkCause.TEMPLATE

    scenario()


@asynchronous
async def test_another_role_another_rollout_or_a_raw_prompt_is_not_compared() -> None:
    async with running(TemplateEngine(REASONING_TEMPLATE, [THINKS])) as here:
        token, other = here.gateway.admit(access()), here.gateway.admit(access("r2"))
        first = [user("How many?")]
        later = [*first, said(THINKS), user("Sure?")]
        await here.post(token, ask(messages=first), named("s0"))
        await here.post(token, ask(messages=later), named("s1", role="rewriter"))
        await here.post(other, ask(messages=later))
        raw = {"model": "sql", "prompt": "How many?"}
        await here.post(token, raw, named("s2"), path="/v1/completions")
        found = [*await here.completions(), *await here.completions("r2")]
    assert [one.fork for one in found] == [None] * 4


@asynchronous
async def test_a_fork_outlives_the_store(tmp_path: Path) -> None:
    first = [user("How many?")]
    async with running(TemplateEngine(REASONING_TEMPLATE, [THINKS, "ok"])) as here:
        recorded = await converse(here, [first, [*first, said(THINKS), user("Sure?")]])
    async with await SQLiteStore.open(tmp_path / "store.db") as store:
        await store.add_rollouts([a_rollout("r1")])
        await store.start(["r1"], owner=current_owner(), lease_seconds=60, versions={})
        await store.add_records(recorded)
        (kept,) = await store.records(["r1"])
    assert [one.fork for one in kept.completions] == [one.fork for one in recorded]
    assert kept.completions[1].fork is not None


def test_a_completion_that_was_stored_before_forks_were_is_still_read() -> None:
    completion = msgspec.structs.replace(a_completion(), prompt_token_ids=[], choices=[])
    old = {key: value for key, value in msgspec.to_builtins(completion).items() if key not in ("fork", "spliced")}
    read = RecordCodec(Redactor()).decode_record(msgspec.msgpack.encode(old), 0)
    assert read == completion

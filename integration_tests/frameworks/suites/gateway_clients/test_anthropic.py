"""Anthropic's official client against a gateway in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from leyden.errors import EngineError
from leyden.interfaces import GenerationRequest
from leyden.testing.fakes import Answer, FakeEngine
from tests.gateway.builders import Running, access, asynchronous, own_sampling, running

SPELLED = '{"q":  1, "r": "é"}'
CALL = {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": SPELLED}}
OTHER = {"id": "toolu_2", "type": "function", "function": {"name": "look", "arguments": '{"q": 2}'}}
TOOL: Any = {
    "name": "look",
    "description": "Look something up.",
    "input_schema": {"type": "object", "properties": {"q": {"type": "integer"}}},
}
ASKED: dict[str, Any] = {"model": "claude", "max_tokens": 300, "system": "look it up", "tools": [TOOL]}


class Query(BaseModel):
    """What an agent wants back."""

    sql: str


def client(here: Running, key: str, path: str = "", **options: Any) -> anthropic.AsyncAnthropic:
    """Return a client as its users make one: the address has no `/v1`."""
    root = here.gateway.base_url.removesuffix("/v1")
    return anthropic.AsyncAnthropic(base_url=f"{root}{path}", api_key=key, **({"max_retries": 0} | options))


def agent(request: GenerationRequest) -> str | Answer:
    """Look twice in parallel, then say what was found."""
    results = [str(message["content"]) for message in request.messages if message["role"] == "tool"]
    return Answer(text="I look.", tool_calls=[CALL, OTHER]) if not results else f"found {' and '.join(results)}"


async def answered(own: anthropic.AsyncAnthropic, stream: bool, messages: Any) -> Any:
    """Ask in one of the two ways; return the final message."""
    if not stream:
        return await own.messages.create(messages=messages, **ASKED)
    async with own.messages.stream(messages=messages, **ASKED) as events:
        return await events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_with_parallel_tools_is_recorded_with_the_exact_tokens(stream: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running(FakeEngine(agent, tokens_per_delta=3)) as here:
            own = client(here, here.gateway.admit(access()), "/rollout/r1/role/writer")
            messages: list[Any] = [{"role": "user", "content": "q"}]
            first = await answered(own, stream, messages)
            assert first.stop_reason == "tool_use"
            assert [block.type for block in first.content] == ["text", "tool_use", "tool_use"]
            uses = [block for block in first.content if block.type == "tool_use"]
            assert [use.input for use in uses] == [{"q": 1, "r": "é"}, {"q": 2}]
            results = [
                {"type": "tool_result", "tool_use_id": use.id, "content": f"row {number}", "is_error": number == 1}
                for number, use in enumerate(uses)
            ]
            messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
            second = await answered(own, stream, messages)
            assert second.content[0].text == "found row 0 and Error: row 1"
            assert (second.stop_reason, second.usage.output_tokens) == (
                "end_turn",
                len(here.engine.log[1].token_ids[0]),
            )
            calls: Any = here.engine.log[1].request.messages[2]["tool_calls"]
            assert calls == [CALL, OTHER]  # spelled as they were sampled, not as the client parsed them
            for completion, sampled in zip(await here.completions(), here.engine.log, strict=True):
                assert completion.choices[0].token_ids == sampled.token_ids[0]
                assert completion.prompt_token_ids == list(sampled.prompt_token_ids)
                assert (completion.role, completion.policy, completion.delivered) == ("writer", "sql", True)
            said = [span.attributes["gen_ai.output.messages"] for span in here.spans()]
            assert said[0] == [{"role": "assistant", "content": "I look.", "tool_calls": [CALL, OTHER]}]

    scenario()


@asynchronous
async def test_a_stream_gives_text_as_it_comes_and_ends_as_anthropics_does() -> None:
    async with running(FakeEngine("SELECT 1; SELECT 2", tokens_per_delta=2)) as here:
        own = client(here, here.gateway.admit(access()))
        asked: Any = {"model": "claude", "max_tokens": 99, "messages": [{"role": "user", "content": "q"}]}
        async with own.messages.stream(stop_sequences=[";"], **asked) as stream:
            pieces = [piece async for piece in stream.text_stream]
            message = await stream.get_final_message()
        assert ("".join(pieces), len(pieces) > 1) == ("SELECT 1", True)
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ";")
        kinds = [event.type async for event in await own.messages.create(stream=True, **asked)]
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
        cut = await own.messages.create(**(asked | {"max_tokens": 3}))
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)


@pytest.mark.parametrize("how", ["x-api-key", "bearer", "key with role"])
def test_every_way_to_send_a_key_is_understood(how: str) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            key = f"{token}:writer" if how == "key with role" else token
            own = client(here, "placeholder" if how == "bearer" else key)
            if how == "bearer":
                own = client(here, None, auth_token=token)  # type: ignore[arg-type]
            answer = await own.messages.create(
                model="claude", max_tokens=9, messages=[{"role": "user", "content": "q"}]
            )
            assert (answer.model, answer.content[0].type) == ("claude", "text")
            (completion,) = await here.completions()
            assert completion.role == ("writer" if how == "key with role" else "main")

    scenario()


@asynchronous
async def test_a_form_is_asked_for_in_anthropics_words_and_parsed_by_its_client() -> None:
    class Constraining(FakeEngine):
        constrains_format = True

    async with running(Constraining('{"sql": "SELECT 1"}')) as here:
        own = client(here, here.gateway.admit(access(models=own_sampling())))
        messages: Any = [{"role": "user", "content": "q"}]
        parsed = await own.messages.parse(model="claude", max_tokens=99, messages=messages, output_format=Query)
        assert parsed.parsed_output == Query(sql="SELECT 1")
        form: Any = here.engine.log[0].request.response_format
        assert (form["type"], form["schema"]["required"]) == ("json_schema", ["sql"])


@asynchronous
async def test_prompts_are_counted_and_models_listed() -> None:
    async with running() as here:
        own = client(here, here.gateway.admit(access()))
        messages: Any = [{"role": "user", "content": "q"}]
        counted = await own.messages.count_tokens(model="claude", messages=messages, system="s", tools=[TOOL])
        await own.messages.create(model="claude", max_tokens=9, messages=messages, system="s", tools=[TOOL])
        assert [model.id async for model in own.models.list()] == ["sql"]
        (completion,) = await here.completions()
        assert counted.input_tokens == len(completion.prompt_token_ids)


@asynchronous
async def test_failures_are_the_clients_own_exceptions_before_and_within_a_stream() -> None:
    scripted = [Answer(text="partial", error=EngineError("lost"))]
    async with running(FakeEngine(scripted, tokens_per_delta=1, context_length=2000)) as here:
        own = client(here, here.gateway.admit(access(routes=())))
        asked: Any = {"model": "sql", "max_tokens": 99, "messages": [{"role": "user", "content": "q"}]}
        with pytest.raises(anthropic.AuthenticationError, match="API key is unknown"):
            await client(here, "wrong").messages.create(**asked)
        with pytest.raises(anthropic.NotFoundError, match="'claude' is not served"):
            await own.messages.create(**(asked | {"model": "claude"}))
        with pytest.raises(anthropic.BadRequestError, match="does not host"):
            await own.messages.create(**asked, tools=[{"type": "web_search_20250305", "name": "web_search"}])
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
            await own.messages.create(**(asked | {"messages": [{"role": "user", "content": "x" * 3000}]}))
        with pytest.raises(anthropic.APIStatusError, match="lost"):
            await own.messages.create(**asked)
        heard = ""
        with pytest.raises(anthropic.APIError, match="lost"):
            async for event in await own.messages.create(stream=True, **asked):
                if event.type == "content_block_delta" and event.delta.type == "text_delta":
                    heard += event.delta.text
        assert heard == "partial"


@asynchronous
async def test_the_client_retries_a_held_call_and_every_attempt_is_recorded() -> None:
    async with running(hold_seconds=0.05) as here:
        await here.gateway.hold()
        headers = {"x-leyden-rollout": "r1", "x-leyden-span": "s1"}
        own = client(here, here.gateway.admit(access()), max_retries=5, default_headers=headers)
        messages: Any = [{"role": "user", "content": "q"}]
        asking = asyncio.create_task(own.messages.create(model="claude", max_tokens=9, messages=messages))
        await asyncio.sleep(0.2)
        here.gateway.release()
        assert (await asking).content[0].text == "ok"  # type: ignore[union-attr]
        found = await here.completions()
        assert [one.delivered for one in found] == [False] * (len(found) - 1) + [True]
        assert len(found) > 1


@asynchronous
async def test_a_held_stream_reaches_the_client_whole() -> None:
    async with running(FakeEngine("hello"), keep_alive_seconds=0.02) as here:
        await here.gateway.hold()
        own = client(here, here.gateway.admit(access()))
        messages: Any = [{"role": "user", "content": "q"}]

        async def ask() -> Any:
            async with own.messages.stream(model="claude", max_tokens=9, messages=messages) as stream:
                return await stream.get_final_message()

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.2)
        here.gateway.release()
        assert (await asking).content[0].text == "hello"


@asynchronous
async def test_the_blocking_client_streams_too() -> None:
    async with running(FakeEngine(agent)) as here:
        root = here.gateway.base_url.removesuffix("/v1")
        own = anthropic.Anthropic(base_url=root, api_key=here.gateway.admit(access()), max_retries=0)

        def ask() -> Any:
            with own.messages.stream(messages=[{"role": "user", "content": "q"}], **ASKED) as stream:
                return stream.get_final_message()

        message = await asyncio.to_thread(ask)
        assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]

"""OpenAI's official client, in every protocol it speaks, against a gateway in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from leyden.errors import EngineError
from leyden.interfaces import GenerationRequest
from leyden.testing.fakes import END_TOKEN, Answer, FakeEngine
from tests.gateway.builders import Running, access, asynchronous, own_sampling, running

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"q":  1}'}}
OTHER = {"id": "call_2", "type": "function", "function": {"name": "look", "arguments": '{"q": 2}'}}
SCHEMA = {"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"], "additionalProperties": False}
FLAT_TOOL: Any = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}


class Query(BaseModel):
    """What an agent wants back."""

    sql: str
    rows: int


class Constraining(FakeEngine):
    """Says that it forces formats; the scripts here keep to them on their own."""

    constrains_format = True


def client(here: Running, key: str, path: str = "/v1", **options: Any) -> openai.AsyncOpenAI:
    root = here.gateway.base_url.removesuffix("/v1")
    return openai.AsyncOpenAI(base_url=f"{root}{path}", api_key=key, **({"max_retries": 0} | options))


def agent(request: GenerationRequest) -> str | Answer:
    """Look twice in parallel, then say what was found."""
    results = [str(message["content"]) for message in request.messages if message["role"] == "tool"]
    return Answer(text="I look.", tool_calls=[CALL, OTHER]) if not results else f"found {' and '.join(results)}"


@asynchronous
async def test_chat_choices_arrive_whole_and_apart() -> None:
    texts = ["one", "zwei", "três"]
    async with running(FakeEngine(texts, tokens_per_delta=1)) as here:
        chat = client(here, here.gateway.admit(access())).chat.completions
        asked: dict[str, Any] = {"model": "sql", "messages": [{"role": "user", "content": "q"}], "n": 3}
        plain = await chat.create(**asked)
        assert [choice.message.content for choice in plain.choices] == texts
        said = ["", "", ""]
        ends: list[str | None] = [None, None, None]
        async for chunk in await chat.create(stream=True, stream_options={"include_usage": True}, **asked):
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
                ends[choice.index] = choice.finish_reason or ends[choice.index]
            usage = chunk.usage
        assert (said, ends) == (texts, ["stop"] * 3)
        assert usage == plain.usage
        async with chat.stream(**asked) as stream:
            final = await stream.get_final_completion()
        assert [choice.message.content for choice in final.choices] == texts
        for completion, sampled in zip(await here.completions(), here.engine.log, strict=True):
            assert [choice.token_ids for choice in completion.choices] == sampled.token_ids


@asynchronous
async def test_chat_and_responses_parse_into_the_users_own_type() -> None:
    async with running(Constraining('{"sql": "SELECT 1", "rows": 1}')) as here:
        own = client(here, here.gateway.admit(access(models=own_sampling())))
        messages: Any = [{"role": "user", "content": "q"}]
        chat = await own.chat.completions.parse(model="sql", messages=messages, response_format=Query)
        assert chat.choices[0].message.parsed == Query(sql="SELECT 1", rows=1)
        response = await own.responses.parse(model="sql", input="q", text_format=Query)
        assert response.output_parsed == Query(sql="SELECT 1", rows=1)
        async with own.responses.stream(model="sql", input="q", text_format=Query) as stream:
            assert (await stream.get_final_response()).output_parsed == Query(sql="SELECT 1", rows=1)
        for sampled in here.engine.log:
            form: Any = sampled.request.response_format
            assert (form["type"], form["name"], form["schema"]["required"]) == ("json_schema", "Query", ["sql", "rows"])


@asynchronous
async def test_completions_speak_text_and_tokens_streamed_or_not() -> None:
    async with running(FakeEngine("upon a time")) as here:
        own = client(here, here.gateway.admit(access())).completions
        plain = await own.create(model="sql", prompt="once", logprobs=0, extra_body={"return_token_ids": True})
        (choice,) = plain.choices
        assert (choice.text, choice.finish_reason) == ("upon a time", "stop")
        assert choice.token_ids == [*b"upon a time", END_TOKEN]  # type: ignore[attr-defined]
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens) == "upon a time"
        pieces = [chunk async for chunk in await own.create(model="sql", prompt=list(b"once"), stream=True)]
        assert "".join(chunk.choices[0].text for chunk in pieces) == "upon a time"
        first, second = await here.completions()
        assert first.prompt_token_ids == second.prompt_token_ids == list(b"once")
        assert first.choices == second.choices
        with pytest.raises(openai.AuthenticationError, match="rollout that is over"):
            await own.create(model="sql", prompt="once")


@pytest.mark.parametrize("stream", [False, True])
def test_a_responses_agent_with_parallel_tools_goes_on_from_its_previous_answer(stream: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running(FakeEngine(agent, tokens_per_delta=3)) as here:
            own = client(here, here.gateway.admit(access()))
            first = await responded(own, stream, input="q", instructions="look it up")
            calls = [item for item in first.output if item.type == "function_call"]
            assert [(call.name, call.arguments) for call in calls] == [("look", '{"q":  1}'), ("look", '{"q": 2}')]
            results = [
                {"type": "function_call_output", "call_id": call.call_id, "output": f"row {number}"}
                for number, call in enumerate(calls)
            ]
            second = await responded(own, stream, input=results, previous_response_id=first.id)
            assert second.output_text == "found row 0 and row 1"
            again = await own.responses.retrieve(second.id)
            assert (again.output_text, again.previous_response_id) == (second.output_text, first.id)
            # The same conversation, sent whole by a client that keeps it itself.
            items = [{"role": "user", "content": "q"}, *(item.to_dict() for item in first.output), *results]
            await responded(own, stream, input=items, store=False)
            chained, whole = here.engine.log[-2:]
            assert chained.request.messages == whole.request.messages
            assert chained.prompt_token_ids == whole.prompt_token_ids

    scenario()


async def responded(own: openai.AsyncOpenAI, stream: bool, **asked: Any) -> Any:
    """Ask in one of the two ways; return the final response."""
    if not stream:
        return await own.responses.create(model="sql", tools=[FLAT_TOOL], **asked)
    async with own.responses.stream(model="sql", tools=[FLAT_TOOL], **asked) as events:
        async for _ in events:
            pass
        return await events.get_final_response()


@asynchronous
async def test_a_stream_of_responses_gives_text_and_arguments_as_they_come() -> None:
    async with running(FakeEngine(agent, tokens_per_delta=2)) as here:
        own = client(here, here.gateway.admit(access()))
        text, arguments, last = "", "", -1
        async for event in await own.responses.create(model="sql", input="q", tools=[FLAT_TOOL], stream=True):
            assert event.sequence_number == last + 1
            last = event.sequence_number
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.function_call_arguments.delta":
                arguments += event.delta
        assert (text, arguments) == ("I look.", '{"q":  1}{"q": 2}')
        assert event.type == "response.completed"
        assert event.response.usage is not None
        (completion,) = await here.completions()
        assert event.response.usage.output_tokens == len(completion.choices[0].token_ids)


@asynchronous
async def test_a_held_stream_of_responses_reaches_the_client_whole_and_a_failing_one_is_raised() -> None:
    async with running(FakeEngine("hello"), keep_alive_seconds=0.02) as here:
        own = client(here, here.gateway.admit(access()))

        async def ask() -> str:
            async with own.responses.stream(model="sql", input="q") as stream:
                return (await stream.get_final_response()).output_text

        for failure in (None, EngineError("lost")):
            await here.gateway.hold()
            asking = asyncio.create_task(ask())
            await asyncio.sleep(0.2)
            here.engine.failure = failure
            here.gateway.release()
            if failure is None:
                assert await asking == "hello"
            else:
                with pytest.raises(openai.APIError, match="lost"):
                    await asking


@asynchronous
async def test_prompts_are_counted_and_models_listed() -> None:
    async with running() as here:
        own = client(here, here.gateway.admit(access()))
        counted = await own.responses.input_tokens.count(model="sql", input="q", instructions="i")
        await own.responses.create(model="sql", input="q", instructions="i")
        assert [model.id async for model in own.models.list()] == ["sql"]
        (completion,) = await here.completions()
        assert counted.input_tokens == len(completion.prompt_token_ids)


@asynchronous
async def test_failures_are_the_clients_own_exceptions_before_and_within_a_stream() -> None:
    scripted = [Answer(text="partial", error=EngineError("lost"))]
    async with running(FakeEngine(scripted, tokens_per_delta=1)) as here:
        own = client(here, here.gateway.admit(access()))
        with pytest.raises(openai.NotFoundError, match="was not found"):
            await own.responses.retrieve("resp_1")
        with pytest.raises(openai.BadRequestError, match="was not found") as unknown:
            await own.responses.create(model="sql", input="q", previous_response_id="resp_1")
        assert unknown.value.code == "previous_response_not_found"
        with pytest.raises(openai.BadRequestError, match="does not host"):
            await own.responses.create(model="sql", input="q", tools=[{"type": "web_search"}])
        with pytest.raises(openai.InternalServerError, match="lost"):
            await own.responses.create(model="sql", input="q")
        heard = ""
        with pytest.raises(openai.APIError, match="lost"):
            async for event in await own.responses.create(model="sql", input="q", stream=True):
                heard += event.delta if event.type == "response.output_text.delta" else ""
        assert heard == "partial"


@asynchronous
async def test_the_blocking_client_with_only_an_address_or_only_a_key_speaks_for_its_role() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        root = here.gateway.base_url.removesuffix("/v1")
        by_address = openai.OpenAI(base_url=f"{root}/rollout/r1/role/writer/v1", api_key=token)
        by_key = openai.OpenAI(base_url=here.gateway.base_url, api_key=f"{token}:%C3%BCber%2Fx")

        def ask() -> None:
            for own in (by_address, by_key):
                assert own.responses.create(model="gpt-5", input="q").output_text == "ok"
                assert own.completions.create(model="gpt-5", prompt="q").choices[0].text == "ok"

        await asyncio.to_thread(ask)
        assert [one.role for one in await here.completions()] == ["writer", "writer", "über/x", "über/x"]
        assert len(here.spans()) == 4


@asynchronous
async def test_fifty_calls_in_four_ways_are_recorded_each_with_its_own_ids() -> None:
    def reply(request: GenerationRequest) -> str:
        asked = request.prompt_text or str(request.messages[-1]["content"])
        return f"answer to {asked}"

    async with running(FakeEngine(reply, tokens_per_delta=5)) as here:
        own = client(here, here.gateway.admit(access()))

        async def ask(number: int) -> None:
            options: Any = {"model": "sql", "extra_headers": {"x-leyden-span": f"s{number}", "x-leyden-rollout": "r1"}}
            text, wanted = f"marker {number}", f"answer to marker {number}"
            if number % 4 == 0:
                said: str | None = (await own.completions.create(prompt=text, max_tokens=99, **options)).choices[0].text
            elif number % 4 == 1:
                said = (await own.responses.create(input=text, **options)).output_text
            elif number % 4 == 2:
                async with own.responses.stream(input=text, **options) as stream:
                    said = (await stream.get_final_response()).output_text
            else:
                messages: Any = [{"role": "user", "content": text}]
                said = (await own.chat.completions.create(messages=messages, **options)).choices[0].message.content
            assert said == wanted

        await asyncio.gather(*(ask(number) for number in range(50)))
        found = await here.completions()
        assert sorted(one.span_id for one in found) == sorted(f"s{number}" for number in range(50))
        truth = {
            sampled.request.prompt_text or str(sampled.request.messages[-1]["content"]): sampled
            for sampled in here.engine.log
        }
        for completion in found:
            sampled = truth[f"marker {completion.span_id[1:]}"]
            assert completion.prompt_token_ids == list(sampled.prompt_token_ids)
            assert completion.choices[0].token_ids == sampled.token_ids[0]

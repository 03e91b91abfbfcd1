"""One completion an HTTP attempt, with what was really sampled, whatever becomes of it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest

from leyden.errors import ConfigurationError, ContextLengthError, EngineError, StoreError
from leyden.interfaces import Delta, Generation, GenerationRequest
from leyden.spans import Choice, Completion, Record, Status
from leyden.testing.fakes import END_TOKEN, Answer, FakeEngine, Sampled
from tests.gateway.builders import Running, access, ask, asynchronous, events, named, own_sampling, running

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}
TOOL = {"type": "function", "function": {"name": "look"}}


@asynchronous
async def test_a_completion_holds_exactly_what_the_engine_sampled() -> None:
    async with running(FakeEngine("SELECT é")) as here:
        token = here.gateway.admit(access())
        answer = (await here.post(token, ask(temperature=0, seed=7, max_tokens=50), named())).json()
        (completion,) = await here.completions()
        ids = [*"SELECT é".encode(), END_TOKEN]
        assert completion.choices == [
            Choice(
                index=0,
                token_ids=ids,
                logprobs=[FakeEngine.logprob(token) for token in ids],
                finish_reason="stop",
                text="SELECT é",
            )
        ]
        assert completion.prompt_token_ids == list(b"user: hello\nassistant: ")
        assert (completion.status, completion.delivered, completion.error) == (Status.OK, True, None)
        assert 0 < completion.start_ns <= completion.first_token_ns <= completion.end_ns
        assert answer["choices"][0]["message"]["content"] == "SELECT é"
        assert answer["usage"]["completion_tokens"] == len(ids)


@asynchronous
async def test_the_parameters_that_were_really_used_are_recorded() -> None:
    async with running() as here:
        training = here.gateway.admit(access("train"))
        evaluation = here.gateway.admit(access("eval", models=own_sampling()))
        body = ask(temperature=0, top_p=0.5, seed=7, stop="x", max_tokens=50)
        await here.post(training, body)
        await here.post(evaluation, body)
        (trained,), (evaluated,) = await here.completions("train"), await here.completions("eval")
        assert [trained.sampling[name] for name in ("temperature", "top_p", "seed", "max_tokens")] == [
            1.0,
            1.0,
            None,
            50,
        ]
        assert trained.sampling["stop"] == ("x",)
        assert not trained.off_distribution
        assert [evaluated.sampling[name] for name in ("temperature", "top_p", "seed")] == [0.0, 0.5, 7]
        assert evaluated.off_distribution
        assert [one.request.sampling.temperature for one in here.engine.log] == [1.0, 0.0]


@asynchronous
async def test_every_choice_of_a_call_is_recorded() -> None:
    async with running(FakeEngine(["one", "two"])) as here:
        token = here.gateway.admit(access())
        answer = (await here.post(token, ask(n=2))).json()
        (completion,) = await here.completions()
        assert [choice.text for choice in completion.choices] == ["one", "two"]
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["one", "two"]
        assert [choice.index for choice in completion.choices] == [0, 1]


@asynchronous
async def test_tool_calls_reach_the_client_and_their_tokens_the_record() -> None:
    for stream in (False, True):
        async with running(FakeEngine([Answer(text="look:", tool_calls=[CALL])])) as here:
            token = here.gateway.admit(access())
            response = await here.post(token, ask(tools=[TOOL], stream=stream), named())
            (completion,) = await here.completions()
            assert completion.choices[0].finish_reason == "tool_calls"
            assert completion.choices[0].token_ids == here.engine.log[0].token_ids[0]
            if stream:
                deltas = [chunk["choices"][0]["delta"] for chunk in events(response)[:-1]]
                assert [delta["tool_calls"] for delta in deltas if "tool_calls" in delta] == [[CALL | {"index": 0}]]
                assert "".join(delta.get("content", "") for delta in deltas) == "look:"
            else:
                assert response.json()["choices"][0]["message"]["tool_calls"] == [CALL]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_forced_tool_call_is_refused_where_the_engine_cannot_force(choice: object) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access(models=own_sampling()))
            response = await here.post(token, ask(tools=[TOOL], tool_choice=choice))
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "tool_choice"
            here.engine.forces_tools = True  # type: ignore[attr-defined]
        async with running(here.engine) as here:
            token = here.gateway.admit(access(models=own_sampling()))
            assert (await here.post(token, ask(tools=[TOOL], tool_choice=choice))).status_code == 200

    scenario()


@asynchronous
async def test_a_stream_is_recorded_like_a_json_answer() -> None:
    async with running(FakeEngine("wörd", tokens_per_delta=1)) as here:
        token = here.gateway.admit(access())
        await here.post(token, ask(), named(span="json"))
        response = await here.post(token, ask(stream=True), named(span="stream"))
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response)
        assert found[-1] == "[DONE]"
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found[:-1]) == "wörd"
        plain, streamed = await here.completions()
        assert (streamed.choices, streamed.status, streamed.delivered) == (plain.choices, Status.OK, True)


@pytest.mark.parametrize(
    ("failure", "status", "code", "retries"),
    [
        (ContextLengthError("9 tokens too many"), 400, "context_length_exceeded", None),
        (ConfigurationError("no such option"), 400, "unsupported_value", None),
        (EngineError("out of memory"), 503, "engine_unavailable", "1"),
        (ZeroDivisionError("oops"), 500, "engine_failed", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_raises_at_the_start_becomes_a_status_and_a_record(
    failure: Exception, status: int, code: str, retries: str | None, stream: bool
) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            here.engine.failure = failure
            response = await here.post(token, ask(stream=stream), named())
            assert response.status_code == status
            assert response.json()["error"]["code"] == code
            assert str(failure) in response.json()["error"]["message"]
            assert response.headers.get("retry-after") == retries
            (completion,) = await here.completions()
            assert (completion.status, completion.delivered) == (Status.ERROR, False)
            assert str(failure) in str(completion.error)
            assert (completion.policy, completion.choices) == ("sql", [])

    scenario()


@asynchronous
async def test_an_engine_that_fails_midway_leaves_its_partial_tokens() -> None:
    engine = FakeEngine([Answer(text="partial", error=EngineError("lost"))], tokens_per_delta=1)
    async with running(engine) as here:
        token = here.gateway.admit(access())
        plain = await here.post(token, ask(), named(span="json"))
        streamed = await here.post(token, ask(stream=True), named(span="stream"))
        assert plain.status_code == 503
        assert streamed.status_code == 200
        assert events(streamed)[-1]["error"]["code"] == "engine_unavailable"
        for completion in await here.completions():
            assert (completion.status, completion.delivered) == (Status.ERROR, False)
            assert completion.choices[0].token_ids == list(b"partial")
            assert completion.choices[0].finish_reason == "error"


@asynchronous
async def test_an_answer_that_ends_without_a_finish_reason_is_no_complete_sample() -> None:
    class Short(FakeEngine):
        async def generate(self, request: GenerationRequest) -> Generation:
            generation = await super().generate(request)

            async def cut() -> AsyncIterator[Delta]:
                async for delta in generation.deltas:
                    yield dataclasses.replace(delta, finish_reason=None)

            return dataclasses.replace(generation, deltas=cut())

    async with running(Short("SELECT")) as here:
        token = here.gateway.admit(access())
        assert (await here.post(token, ask(), named())).status_code == 503
        assert events(await here.post(token, ask(stream=True), named()))[-1]["error"]["code"] == "engine_unavailable"
        assert {(one.status, one.delivered) for one in await here.completions()} == {(Status.ERROR, False)}


@asynchronous
async def test_a_refused_request_is_recorded_too() -> None:
    async with running(body_bytes=2000) as here:
        token = here.gateway.admit(access())
        for number, body in enumerate([ask(functions=[1]), ask("x" * 3000), ask(model="none")]):
            await here.post(token, body, named(span=f"s{number}", role="silent"))
        found = await here.completions()
        assert [one.span_id for one in found] == ["s0", "s1", "s2"]
        assert {(one.status, one.delivered) for one in found} == {(Status.ERROR, False)}
        assert ["functions" in str(found[0].error), "2000 bytes" in str(found[1].error)] == [True, True]


@asynchronous
async def test_records_are_written_soon_without_anybody_asking() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        await here.post(token, ask(), named())
        async with asyncio.timeout(5):
            while not here.records:
                await asyncio.sleep(0.01)


@asynchronous
async def test_records_that_cannot_be_written_are_kept_and_the_end_of_the_rollout_says_so() -> None:
    kept: list[Record] = []
    full = True

    async def write(batch: Sequence[Record]) -> None:
        if full:
            raise StoreError("the disk is full")
        kept.extend(batch)

    async with running(record=write) as here:
        token = here.gateway.admit(access())
        await here.post(token, ask(), named())
        with pytest.raises(StoreError, match="disk is full"):
            await here.gateway.revoke("r1")
        full = False
        await here.gateway.revoke("r1")
        assert [type(one) for one in kept] == [Completion]


@asynchronous
async def test_no_key_of_a_request_stands_in_any_record() -> None:
    canary = "sk-canary-000000000000000000"
    async with running() as here:
        token = here.gateway.admit(access())
        await here.post(canary, ask(), named(span="wrong"))
        await here.post(token, ask(functions=[1]), named(span="bad"))
        await here.post(token, ask(), {"x-api-key": canary, "cookie": canary})
        here.engine.failure = EngineError("down")
        await here.post(token, ask(stream=True))
        await here.gateway.revoke("r1")
        written = msgspec.json.encode(here.records)
        assert len(here.records) == 5  # three completions, two of them with a span of the gateway's
        assert canary.encode() not in written
        assert token.encode() not in written


def test_no_token_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            tokens.append(token)
            here.engine.failure = ZeroDivisionError("oops")
            await here.post(token, ask(), named())
            await here.client.post("/v1/chat/completions", content=b"{", headers={"authorization": f"Bearer {token}"})

    tokens: list[str] = []
    caplog.set_level("DEBUG")
    scenario()
    ours = [one for one in caplog.records if one.name.startswith(("leyden", "uvicorn"))]
    assert any("oops" in str(one.exc_info) for one in ours)
    assert tokens[0] not in "".join(one.getMessage() + str(one.exc_info) for one in ours)


@asynchronous
async def test_fifty_concurrent_calls_are_recorded_with_their_own_exact_ids() -> None:
    chance = random.Random(0)

    def reply(request: GenerationRequest) -> str:
        return f"answer to {request.messages[-1]['content']} " + "é" * chance.randrange(1, 30)

    async with running(FakeEngine(reply, tokens_per_delta=3)) as here:
        tokens = [here.gateway.admit(access(f"r{number}")) for number in range(10)]

        async def call(number: int) -> None:
            await asyncio.sleep(chance.random() / 20)
            rollout = number % 10
            headers = named(span=f"s{number}", rollout=f"r{rollout}", role=f"role{number}")
            response = await here.post(tokens[rollout], ask(f"marker-{number}.", stream=number % 2 == 0), headers)
            assert f"answer to marker-{number}." in spoken_text(response.content, stream=number % 2 == 0)

        await asyncio.gather(*(call(number) for number in range(50)))
        for rollout in range(10):
            await here.gateway.revoke(f"r{rollout}")
        check_against_log(here, 50)


def spoken_text(content: bytes, *, stream: bool) -> str:
    """Return what a client hears."""
    if not stream:
        return str(msgspec.json.decode(content)["choices"][0]["message"]["content"])
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(content)[:-1])


def check_against_log(here: Running, calls: int) -> None:
    """Compare every completion with what the engine itself says it sampled for that marker."""
    truth: dict[str, Sampled] = {}
    for one in here.engine.log:
        truth[str(one.request.messages[-1]["content"])] = one
    completions = [one for one in here.records if isinstance(one, Completion)]
    assert len(completions) == len({one.span_id for one in completions}) == calls
    for completion in completions:
        number = int(completion.span_id[1:])
        sampled = truth[f"marker-{number}."]
        assert completion.prompt_token_ids == list(sampled.prompt_token_ids)
        assert completion.choices[0].token_ids == sampled.token_ids[0]
        assert bytes(completion.choices[0].token_ids[:-1]).decode() == completion.choices[0].text
        assert (completion.rollout_id, completion.role) == (f"r{number % 10}", f"role{number}")
        assert completion.delivered

"""The real `openai` client against the real gateway over HTTP, with the real engine and the demo's model behind it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import pytest

from leyden.interfaces import Access, Delta, Engine, Generation, GenerationRequest
from leyden.looping import LoopThread
from leyden.roles import AGENTS_OWN, Policy, Route
from leyden.spans import Completion, Record, Span, Status
from leyden.testing.fakes import Answer, FakeEngine
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.gateway import HttpGateway, Limits, serve
from leyden_plugins.gateway.serve import serve_folder

MODEL = Path(__file__).parents[2] / "examples" / "text_to_sql" / "model"

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@dataclass
class Heard:
    """What an engine said to one request, noted before anything else saw it."""

    prompt_token_ids: list[int]
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)


class Overheard(TransformersEngine):
    """The engine, with a note of everything it says, by the text of the request's last message."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.heard: dict[str, Heard] = {}

    async def generate(self, request: GenerationRequest) -> Generation:
        generation = await super().generate(request)
        note = self.heard[str(request.messages[-1]["content"])] = Heard(list(generation.prompt_token_ids))

        async def noted() -> AsyncIterator[Delta]:
            try:
                async for delta in generation.deltas:
                    note.token_ids.setdefault(delta.index, []).extend(delta.token_ids)
                    note.logprobs.setdefault(delta.index, []).extend(delta.logprobs)
                    yield delta
            finally:
                await generation.deltas.aclose()  # type: ignore[attr-defined]

        return replace(generation, deltas=noted())


@dataclass
class Gate:
    """A gateway on a loop of its own, seen from the thread of an agent."""

    gateway: HttpGateway
    thread: LoopThread
    records: list[Record]

    def admit(self, rollout_id: str = "r1", **changes: Any) -> str:
        """Let a rollout in on the gateway's loop."""
        values: dict[str, Any] = {"attempt": 1, "models": {"sql": AGENTS_OWN}, "routes": (Route(model="sql"),)}
        access = Access(rollout_id=rollout_id, **(values | changes))

        async def admit() -> str:
            return self.gateway.admit(access)

        return self.thread.submit(admit()).result()

    def completions(self, rollout_id: str = "r1") -> list[Completion]:
        """End the rollout; return its completions."""
        self.thread.submit(self.gateway.revoke(rollout_id)).result()
        return [one for one in self.records if isinstance(one, Completion) and one.rollout_id == rollout_id]


@contextlib.contextmanager
def gate(engine: Engine, **limits: Any) -> Iterator[Gate]:
    """Run a gateway with a policy named `sql`."""
    records: list[Record] = []

    async def keep(batch: Sequence[Record]) -> None:
        records.extend(batch)

    gateway = HttpGateway(limits=Limits(**limits))

    async def start() -> None:
        await engine.start([Policy("sql")])
        await gateway.start(engine, keep)

    thread = LoopThread("gateway-test")
    try:
        thread.submit(start()).result()
        yield Gate(gateway, thread, records)
        thread.submit(gateway.stop()).result()
        thread.submit(engine.stop()).result()
    finally:
        thread.close()


def messages(text: str = "how many users are there?") -> Any:
    return [{"role": "system", "content": "writer"}, {"role": "user", "content": text}]


def client(here: Gate, token: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=here.gateway.base_url, api_key=token, **options)


def test_the_sync_client_gets_an_answer_and_its_ids_are_recorded() -> None:
    with gate(TransformersEngine(MODEL)) as here:
        answer = client(here, here.admit()).chat.completions.create(
            model="sql", messages=messages(), max_tokens=12, seed=1, extra_body={"return_token_ids": True}
        )
        (completion,) = here.completions()
        said = answer.choices[0]
        assert said.token_ids == completion.choices[0].token_ids  # type: ignore[attr-defined]
        assert answer.prompt_token_ids == completion.prompt_token_ids  # type: ignore[attr-defined]
        assert said.message.content == completion.choices[0].text
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(completion.choices[0].token_ids) <= 12
        assert len(completion.choices[0].logprobs) == len(completion.choices[0].token_ids)
        assert all(logprob <= 0 for logprob in completion.choices[0].logprobs)


def test_a_stream_says_the_same_as_a_json_answer_of_the_same_seed() -> None:
    with gate(TransformersEngine(MODEL)) as here:
        chat = client(here, here.admit()).chat.completions
        options: dict[str, Any] = {"model": "sql", "messages": messages(), "max_tokens": 12, "seed": 1}
        plain = chat.create(**options)
        chunks = list(chat.create(stream=True, stream_options={"include_usage": True}, **options))
        spoken = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert spoken == plain.choices[0].message.content
        assert chunks[-1].usage == plain.usage
        first, second = here.completions()
        assert first.choices == second.choices
        assert [first.delivered, second.delivered] == [True, True]


def test_fifty_concurrent_calls_streamed_or_not_are_recorded_exactly() -> None:
    engine = Overheard(MODEL)
    with gate(engine) as here:
        tokens = [here.admit(f"r{number}") for number in range(5)]

        async def call(number: int) -> None:
            rollout = number % 5
            headers = {
                "x-leyden-rollout": f"r{rollout}",
                "x-leyden-span": f"s{number}",
                "x-leyden-role": f"role{number}",
            }
            own = openai.AsyncOpenAI(base_url=here.gateway.base_url, api_key=tokens[rollout], default_headers=headers)
            async with own:
                options: dict[str, Any] = {"model": "sql", "messages": messages(f"marker {number}"), "max_tokens": 10}
                if number % 2:
                    await own.chat.completions.create(**options)
                else:
                    async for _ in await own.chat.completions.create(stream=True, **options):
                        pass

        async def everything() -> None:
            await asyncio.gather(*(call(number) for number in range(50)))

        asyncio.run(everything())
        found = [completion for rollout in range(5) for completion in here.completions(f"r{rollout}")]
        assert sorted(one.span_id for one in found) == sorted(f"s{number}" for number in range(50))
        for completion in found:
            number = int(completion.span_id[1:])
            truth = engine.heard[f"marker {number}"]
            assert completion.prompt_token_ids == truth.prompt_token_ids
            assert completion.choices[0].token_ids == truth.token_ids[0]
            assert completion.choices[0].logprobs == truth.logprobs[0]
            assert (completion.rollout_id, completion.role) == (f"r{number % 5}", f"role{number}")
            assert (completion.status, completion.delivered) == (Status.OK, True)
        assert not any(isinstance(one, Span) for one in here.records)


def test_a_stream_that_the_client_closes_frees_the_engine() -> None:
    engine = TransformersEngine(MODEL, eos_token_ids=())
    with gate(engine) as here:
        stream = client(here, here.admit()).chat.completions.create(
            model="sql", messages=messages(), stream=True, max_tokens=900
        )
        for count, _ in enumerate(stream):
            if count == 5:
                break
        stream.close()

        async def idle() -> None:
            async with asyncio.timeout(10):
                while engine.running or not here.records:
                    await asyncio.sleep(0.01)

        here.thread.submit(idle()).result()
        (completion,) = here.completions()
        assert (completion.status, completion.delivered) == (Status.INTERRUPTED, False)
        assert 0 < len(completion.choices[0].token_ids) < 900


def test_errors_arrive_as_the_clients_own_exceptions() -> None:
    with gate(TransformersEngine(MODEL)) as here:
        token = here.admit()
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client(here, "wrong").chat.completions.create(model="sql", messages=messages())
        with pytest.raises(openai.BadRequestError, match="no room for an answer") as too_long:
            client(here, token).chat.completions.create(model="sql", messages=messages("users " * 5000))
        assert too_long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="'logit_bias' is not supported") as refused:
            client(here, token).chat.completions.create(model="sql", messages=messages(), logit_bias={"1": 5})
        assert refused.value.param == "logit_bias"


def test_the_client_retries_a_held_call_and_every_http_attempt_is_recorded() -> None:
    with gate(FakeEngine("hello"), hold_seconds=0.05) as here:
        here.thread.submit(here.gateway.hold()).result()
        headers = {"x-leyden-rollout": "r1", "x-leyden-span": "s1"}
        chat = client(here, here.admit(), default_headers=headers, max_retries=5).chat.completions

        async def release_soon() -> None:
            await asyncio.sleep(0.3)
            here.gateway.release()

        here.thread.submit(release_soon())
        assert chat.create(model="sql", messages=messages()).choices[0].message.content == "hello"
        found = here.completions()
        assert [one.http_attempt for one in found] == list(range(len(found)))
        assert len(found) > 1
        assert [one.delivered for one in found] == [False] * (len(found) - 1) + [True]


def test_a_held_stream_reaches_the_client_whole() -> None:
    with gate(FakeEngine("hello"), keep_alive_seconds=0.02) as here:
        here.thread.submit(here.gateway.hold()).result()

        async def release_soon() -> None:
            await asyncio.sleep(0.2)
            here.gateway.release()

        here.thread.submit(release_soon())
        chunks = client(here, here.admit()).chat.completions.create(model="sql", messages=messages(), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"


def test_tool_calls_arrive_whole_streamed_or_not() -> None:
    with gate(FakeEngine([Answer(text="I look.", tool_calls=[CALL])])) as here:
        chat = client(here, here.admit()).chat.completions
        options: dict[str, Any] = {"model": "sql", "messages": messages(), "tools": [TOOL]}
        message = chat.create(**options).choices[0].message
        with chat.stream(**options) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert message.tool_calls is not None and streamed.message.tool_calls is not None
        for said in (message.tool_calls[0], streamed.message.tool_calls[0]):
            assert (said.id, said.function.name, said.function.arguments) == ("c1", "look", '{"q": 1}')
        assert (message.content, streamed.message.content) == ("I look.", "I look.")
        assert streamed.finish_reason == "tool_calls"
        # What a client was given, it can send back.
        again = chat.create(
            model="sql", messages=[message.to_dict(), {"role": "tool", "tool_call_id": "c1", "content": "42"}]
        )
        assert again.choices[0].finish_reason == "tool_calls"


def test_log_probabilities_come_in_the_clients_own_types() -> None:
    with gate(FakeEngine("hi")) as here:
        chat = client(here, here.admit()).chat.completions
        plain = chat.create(model="sql", messages=messages(), logprobs=True).choices[0].logprobs
        with chat.stream(model="sql", messages=messages(), logprobs=True) as stream:
            streamed = stream.get_final_completion().choices[0].logprobs
        assert plain is not None and plain.content is not None
        assert streamed is not None and streamed.content is not None
        assert [one.token for one in plain.content] == ["h", "i", ""]
        assert [(one.token, one.logprob) for one in streamed.content] == [
            (one.token, one.logprob) for one in plain.content
        ]


def test_an_agent_with_only_a_url_is_recorded_with_its_role() -> None:
    with gate(TransformersEngine(MODEL)) as here:
        token = here.admit()
        base = here.gateway.base_url.removesuffix("/v1")
        own = openai.OpenAI(base_url=f"{base}/rollout/r1/role/writer/v1", api_key=token)
        own.chat.completions.create(model="gpt-4o", messages=messages(), max_tokens=4)
        (completion,) = here.completions()
        (span,) = [one for one in here.records if isinstance(one, Span)]
        assert (completion.role, completion.policy, span.role) == ("writer", "sql", "writer")
        assert span.span_id == completion.span_id


def test_one_engine_serves_its_base_while_a_gateway_on_another_loop_trains_on_it() -> None:
    engine = TransformersEngine(MODEL)
    with serve(engine, names=["sql-checker"]) as endpoint, gate(engine) as here:
        before = engine.sha256("base")
        token = here.admit()

        async def both() -> None:
            trained = openai.AsyncOpenAI(base_url=here.gateway.base_url, api_key=token)
            plain = openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key)
            async with trained, plain:
                options: dict[str, Any] = {"messages": messages(), "max_tokens": 6}
                await asyncio.gather(
                    *(trained.chat.completions.create(model="sql", **options) for _ in range(10)),
                    *(plain.chat.completions.create(model="sql-checker", **options) for _ in range(10)),
                )

        asyncio.run(both())
        assert len(here.completions()) == 10
        assert engine.sha256("base") == before


def test_a_checkpoint_folder_is_served_under_the_name_asked_for() -> None:
    with serve_folder(MODEL, model_name="sql") as endpoint:
        own = openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key)
        assert [model.id for model in own.models.list()] == ["sql"]
        assert own.chat.completions.create(model="sql", messages=messages(), max_tokens=3, temperature=0).choices


def test_serving_a_folder_says_where_and_ends_on_ctrl_c() -> None:
    code = (
        "from pathlib import Path\nfrom leyden_plugins.gateway import serve_checkpoint\n"
        f"serve_checkpoint(Path({str(MODEL)!r}), model_name='sql', port=0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving sql at http://127.0.0.1:")
        own = openai.OpenAI(base_url=line.split()[3], api_key="any")
        assert own.chat.completions.create(model="sql", messages=messages(), max_tokens=2).choices
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0

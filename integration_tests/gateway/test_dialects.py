"""Every protocol over HTTP with the real engine and the demo's model: what is recorded is what was sampled."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from integration_tests.gateway.test_openai_client import MODEL, Gate, client, gate, messages
from leyden.interfaces import Delta, Generation, GenerationRequest
from leyden.roles import Sampling
from leyden.spans import Status
from leyden_plugins.engines.transformers import TransformersEngine

QUESTION = "how many users are there?"


@dataclass
class Sampled:
    """What the engine said to one request, noted before anything else saw it."""

    request: GenerationRequest
    prompt_token_ids: list[int]
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)


class Noting(TransformersEngine):
    """The engine, with a log in the order of its requests."""

    def __init__(self) -> None:
        super().__init__(MODEL)
        self.log: list[Sampled] = []

    async def generate(self, request: GenerationRequest) -> Generation:
        generation = await super().generate(request)
        note = Sampled(request, list(generation.prompt_token_ids))
        self.log.append(note)

        async def noted() -> AsyncIterator[Delta]:
            async for delta in generation.deltas:
                note.token_ids.setdefault(delta.index, []).extend(delta.token_ids)
                note.logprobs.setdefault(delta.index, []).extend(delta.logprobs)
                yield delta

        return replace(generation, deltas=noted())


def anthropic(here: Gate, key: str, body: dict[str, Any]) -> Any:
    """Send an Anthropic request, whose client is not in this environment; return JSON or the stream's events."""
    headers = {"x-api-key": key, "content-type": "application/json", "anthropic-version": "2023-06-01"}
    request = urllib.request.Request(f"{here.gateway.base_url}/messages", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        content = response.read().decode()
    if not body.get("stream"):
        return json.loads(content)
    return [json.loads(line[6:]) for line in content.split("\n") if line.startswith("data: ")]


def ask_chat(here: Gate, key: str, stream: bool) -> str:
    chat = client(here, key).chat.completions
    if not stream:
        answer = chat.create(model="sql", messages=messages(), max_tokens=12)
        return str(answer.choices[0].message.content)
    chunks = chat.create(model="sql", messages=messages(), max_tokens=12, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def ask_completions(here: Gate, key: str, stream: bool) -> str:
    own = client(here, key).completions
    if not stream:
        return own.create(model="sql", prompt=QUESTION, max_tokens=12).choices[0].text
    chunks = own.create(model="sql", prompt=QUESTION, max_tokens=12, stream=True)
    return "".join(chunk.choices[0].text for chunk in chunks)


def ask_responses(here: Gate, key: str, stream: bool) -> str:
    own = client(here, key).responses
    asked: dict[str, Any] = {"model": "sql", "instructions": "writer", "input": QUESTION, "max_output_tokens": 12}
    if not stream:
        return own.create(**asked).output_text
    return "".join(
        event.delta for event in own.create(stream=True, **asked) if event.type == "response.output_text.delta"
    )


def ask_messages(here: Gate, key: str, stream: bool) -> str:
    turns = [{"role": "user", "content": QUESTION}]
    body = {"model": "sql", "system": "writer", "messages": turns, "max_tokens": 12, "stream": stream}
    found = anthropic(here, key, body)
    if not stream:
        return "".join(block["text"] for block in found["content"])
    return "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")


ASKING: dict[str, Callable[[Gate, str, bool], str]] = {
    "chat": ask_chat,
    "completions": ask_completions,
    "responses": ask_responses,
    "messages": ask_messages,
}


@pytest.mark.parametrize("dialect", ASKING)
def test_what_is_recorded_is_what_the_engine_sampled_and_the_client_heard(dialect: str) -> None:
    engine = Noting()
    with gate(engine) as here:
        key = here.admit()
        heard = [ASKING[dialect](here, key, stream) for stream in (False, True)]
        found = here.completions()
        assert len(found) == len(engine.log) == 2
        for completion, sampled, text in zip(found, engine.log, heard, strict=True):
            assert completion.prompt_token_ids == sampled.prompt_token_ids
            assert completion.choices[0].token_ids == sampled.token_ids[0]
            assert completion.choices[0].logprobs == sampled.logprobs[0]
            assert completion.choices[0].text == text
            assert (completion.status, completion.delivered) == (Status.OK, True)


def test_the_same_conversation_is_the_same_prompt_in_every_protocol() -> None:
    engine = Noting()
    with gate(engine) as here:
        key = here.admit()
        for dialect in ("chat", "responses", "messages"):
            ASKING[dialect](here, key, False)
        first, *others = [sampled.prompt_token_ids for sampled in engine.log]
        assert all(other == first for other in others)


def test_a_text_prompt_is_the_tokenizers_own_and_exact_tokens_are_taken_as_they_are() -> None:
    engine = Noting()
    with gate(engine) as here:
        own = client(here, here.admit()).completions
        as_text = own.create(model="sql", prompt=QUESTION, max_tokens=8, seed=3)
        prompt = engine.log[0].prompt_token_ids
        as_tokens = own.create(model="sql", prompt=prompt, max_tokens=8, seed=3)
        assert engine.decode(prompt) == QUESTION
        assert engine.log[1].prompt_token_ids == prompt
        assert as_tokens.choices[0].text == as_text.choices[0].text


def test_several_choices_are_sampled_apart_and_recorded_each() -> None:
    engine = Noting()
    with gate(engine) as here:
        chat = client(here, here.admit(models={"sql": Sampling()})).chat.completions
        plain = chat.create(model="sql", messages=messages(), max_tokens=10, n=4)
        texts = ["", "", "", ""]
        for chunk in chat.create(model="sql", messages=messages(), max_tokens=10, n=4, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        found = here.completions()
        assert [choice.text for choice in found[0].choices] == [one.message.content for one in plain.choices]
        assert [choice.text for choice in found[1].choices] == texts
        for completion, sampled in zip(found, engine.log, strict=True):
            assert [choice.token_ids for choice in completion.choices] == [
                sampled.token_ids[index] for index in range(4)
            ]
            assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]


def test_a_conversation_that_the_gateway_remembers_grows_by_what_was_said() -> None:
    engine = Noting()
    with gate(engine) as here:
        own = client(here, here.admit()).responses
        first = own.create(model="sql", input=QUESTION, max_output_tokens=8)
        own.create(model="sql", input="and orders?", previous_response_id=first.id, max_output_tokens=8)
        said = [message["content"] for message in engine.log[1].request.messages]
        assert said == [QUESTION, first.output_text, "and orders?"]


def test_counts_of_tokens_are_those_of_the_prompt_that_would_be_sent() -> None:
    engine = Noting()
    with gate(engine) as here:
        own = client(here, here.admit()).responses
        counted = own.input_tokens.count(model="sql", input=QUESTION, instructions="writer")
        own.create(model="sql", input=QUESTION, instructions="writer", max_output_tokens=2)
        assert counted.input_tokens == len(engine.log[0].prompt_token_ids)
        assert len(engine.log) == 1

"""A plain agent with OpenAI's client on a real vLLM server: what it samples is recorded exactly."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from integration_tests.vllm.checkpoints import ANSWER, FOUND, QUESTION, TOOL
from integration_tests.vllm.gates import Gate, compare, plain
from leyden.interfaces import Sample
from leyden.roles import Policy
from leyden.spans import Completion
from leyden_plugins.learners.torch import TorchLearner

MESSAGES: Any = [{"role": "system", "content": "count"}, {"role": "user", "content": "How many users are there?"}]


@pytest.fixture(scope="module")
def oracle(whole: Gate, speaking: Path) -> dict[str, torch.nn.Module]:
    """Serve the weights that can call a tool; return them in plain Transformers."""
    whole.push(speaking)
    return {"me": plain(speaking)}


def ask(client: openai.OpenAI, *, stream: bool, **options: Any) -> Any:
    """Ask for a whole message, or put one together from a stream."""
    if not stream:
        return client.chat.completions.create(model="me", **options).choices[0]
    with client.chat.completions.stream(model="me", **options) as streamed:
        streamed.until_done()
        return streamed.current_completion_snapshot.choices[0]


@pytest.mark.parametrize("stream", [False, True], ids=["JSON", "streamed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probabilities_are_the_learner_s(
    whole: Gate, oracle: dict[str, torch.nn.Module], speaking: Path, temperature: float, stream: bool
) -> None:
    with whole.agent() as (client, recorded):
        for seed in range(4):
            ask(client, stream=stream, messages=MESSAGES, max_tokens=64, temperature=temperature, seed=seed)
    assert [one.version for one in recorded] == [whole.version] * 4
    assert not any(one.off_distribution for one in recorded)
    assert len({tuple(one.choices[0].token_ids) for one in recorded}) > 1, "seeds differ, so answers do"
    learner = TorchLearner()
    learner.open([Policy("me")], str(speaking), seed=0)
    expected = learner.logprobs("me", [sample(one, temperature) for one in recorded])
    learner.close()
    kind = f"learner: {'streamed' if stream else 'JSON'} at T = {temperature:g}"
    for completion, logprobs in zip(recorded, expected, strict=True):
        whole.figures.compare(kind, completion.choices[0].logprobs, logprobs)
    compare(whole, "forward pass: JSON and streamed", recorded, oracle)


def sample(completion: Completion, temperature: float) -> Sample:
    """Return a recorded call as the learner sees it."""
    choice = completion.choices[0]
    ones = [1.0] * len(choice.token_ids)
    return Sample(
        prompt_token_ids=completion.prompt_token_ids,
        token_ids=choice.token_ids,
        weights=ones,
        advantages=ones,
        logprobs=choice.logprobs,
        temperature=temperature,
    )


@pytest.mark.parametrize("stream", [False, True], ids=["JSON", "streamed"])
def test_a_tool_is_called_and_its_result_answered(
    whole: Gate, oracle: dict[str, torch.nn.Module], stream: bool
) -> None:
    options: dict[str, Any] = {"tools": [TOOL], "max_tokens": 120, "temperature": 1.0}
    with whole.agent() as (client, recorded):
        called = ask(client, stream=stream, messages=[QUESTION], **options)
        (call,) = called.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"q": 1})
        assert called.finish_reason == "tool_calls"
        said = {
            "role": "assistant",
            "content": called.message.content or "",
            "tool_calls": [{**call.to_dict(), "function": {"name": "look", "arguments": call.function.arguments}}],
        }
        answered = ask(client, stream=stream, messages=[QUESTION, said, {**FOUND, "tool_call_id": call.id}], **options)
    assert (answered.message.content, answered.finish_reason) == (ANSWER, "stop")
    first, second = recorded
    sampled = first.prompt_token_ids + first.choices[0].token_ids
    assert second.prompt_token_ids[: len(sampled)] == sampled, "the second call goes on from the first one's tokens"
    compare(whole, f"forward pass: tool calls, {'streamed' if stream else 'JSON'}", recorded, oracle)


def test_a_tool_that_must_be_called_is_called_whatever_the_model_wants(
    whole: Gate, oracle: dict[str, torch.nn.Module]
) -> None:
    with whole.agent() as (client, recorded):
        said = ask(
            client,
            stream=False,
            messages=MESSAGES,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "look"}},
            max_tokens=200,
            temperature=1.0,
        )
    (call,) = said.message.tool_calls
    assert call.function.name == "look"
    assert isinstance(json.loads(call.function.arguments)["q"], int)
    assert recorded[0].off_distribution, "a mask chose with the model"


def test_several_choices_are_each_recorded(whole: Gate, oracle: dict[str, torch.nn.Module]) -> None:
    with whole.agent() as (client, recorded):
        answer = client.chat.completions.create(model="me", messages=MESSAGES, n=3, max_tokens=32, temperature=1.0)
        chunks = list(
            client.chat.completions.create(
                model="me", messages=MESSAGES, n=3, max_tokens=32, temperature=1.0, stream=True
            )
        )
    whole_answer, streamed = recorded
    assert [one.message.content for one in answer.choices] == [one.text for one in whole_answer.choices]
    spoken = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            spoken[choice.index] += choice.delta.content or ""
    assert spoken == [one.text for one in streamed.choices]
    assert len({tuple(one.token_ids) for one in [*whole_answer.choices, *streamed.choices]}) == 6
    compare(whole, "forward pass: n = 3", recorded, oracle)


@pytest.mark.parametrize("stream", [False, True], ids=["JSON", "streamed"])
def test_a_stop_string_ends_the_text_and_every_sampled_token_is_recorded(
    whole: Gate, oracle: dict[str, torch.nn.Module], stream: bool
) -> None:
    options: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 64, "temperature": 1.0, "seed": 5}
    with whole.agent() as (client, recorded):
        free = ask(client, stream=stream, **options).message.content
        stop = next(letter for letter in free[4:] if letter.isascii() and letter not in free[:4])
        said = ask(client, stream=stream, stop=[stop], **options)
    assert said.message.content == free[: free.index(stop)]
    assert said.finish_reason == "stop"
    freely, stopped = (one.choices[0].token_ids for one in recorded)
    assert stopped == freely[: len(stopped)]
    assert len(stopped) < len(freely)
    compare(whole, "forward pass: stop strings", recorded, oracle)


def test_fifty_calls_at_once_keep_their_own_tokens(whole: Gate, oracle: dict[str, torch.nn.Module]) -> None:
    with whole.agent() as (client, recorded):

        async def call(own: openai.AsyncOpenAI, number: int) -> None:
            options: dict[str, Any] = {"model": "me", "max_tokens": 24, "temperature": 1.0}
            messages: Any = [{"role": "user", "content": f"marker {number}"}]
            if number % 2:
                await own.chat.completions.create(messages=messages, **options)
            else:
                async for _ in await own.chat.completions.create(messages=messages, stream=True, **options):
                    pass

        async def everything() -> None:
            async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as own:
                await asyncio.gather(*(call(own, number) for number in range(50)))

        asyncio.run(everything())
    assert len({tuple(one.prompt_token_ids) for one in recorded}) == len(recorded) == 50
    compare(whole, "forward pass: fifty calls at once", recorded, oracle)


def test_what_is_cut_off_is_marked_as_off_distribution(whole: Gate, oracle: dict[str, torch.nn.Module]) -> None:
    with whole.agent() as (client, recorded):
        for cut in ({"top_p": 0.5}, {"temperature": 0.0}, {"presence_penalty": 1.0}):
            client.chat.completions.create(model="me", messages=MESSAGES, max_tokens=4, **({"temperature": 1.0} | cut))
    assert [one.off_distribution for one in recorded] == [True] * 3

"""Answers that keep to a format: JSON of a schema, calls of a tool that the caller insists on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
import torch

from leyden.errors import ConfigurationError
from leyden.interfaces import GenerationRequest, SamplingParameters
from leyden_plugins.engines.transformers.sampling import Sampled, Sampler
from tests.engines.asking import ask, assert_logprobs, collect, reference, running
from tests.tiny import END, HERMES_TEMPLATE, PLAIN_TEMPLATE, tiny_checkpoint

pytestmark = pytest.mark.anyio

SCHEMA = {
    "type": "object",
    "properties": {
        "score": {"type": "integer", "minimum": 0, "maximum": 9},
        "verdict": {"enum": ["good", "bad"]},
    },
    "required": ["score", "verdict"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "judge",
            "parameters": {
                "type": "object",
                "properties": {"verdict": {"enum": ["good", "bad"]}},
                "required": ["verdict"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "pass_on",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    },
]


def wanted(*, seed: int = 0, stream: bool = False, n: int = 1, **options: object) -> GenerationRequest:
    return GenerationRequest(
        model="base",
        messages=[{"role": "user", "content": "x"}],
        stream=stream,
        sampling=SamplingParameters(max_tokens=200, seed=seed, n=n),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_is_json_of_the_schema_with_the_models_own_logprobs(qwen: Path, stream: bool) -> None:
    schema = {"type": "json_schema", "name": "report", "schema": SCHEMA}
    async with running(qwen, eos=[END]) as engine:
        generation = await engine.generate(wanted(response_format=schema, n=8, stream=stream))
        answers = await collect(generation)
    for answer in answers:
        report = json.loads(answer.text)
        assert report.keys() == {"score", "verdict"} and 0 <= report["score"] <= 9, report
        assert answer.finish_reason == "stop"
        assert_logprobs(reference(qwen), generation.prompt_token_ids, answer, 1.0)
    assert len({answer.text for answer in answers}) > 1, "they are sampled"


async def test_any_object_will_do_where_no_schema_is_given(qwen: Path) -> None:
    async with running(qwen, eos=[END]) as engine:
        answers = await collect(await engine.generate(wanted(response_format={"type": "json_object"}, n=8)))
    finished = [answer for answer in answers if answer.finish_reason == "stop"]
    assert all(isinstance(json.loads(answer.text), dict) for answer in finished)
    assert all(answer.text.lstrip().startswith("{") for answer in answers)


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, HERMES_TEMPLATE], ids=["plain", "hermes"])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"judge", "pass_on"}), ({"type": "function", "function": {"name": "judge"}}, {"judge"})],
    ids=["required", "named"],
)
async def test_a_forced_tool_call_is_one_in_the_models_own_form(
    tmp_path: Path, template: str, choice: object, names: set[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", template=template, max_position_embeddings=1024)
    async with running(checkpoint, eos=[END]) as engine:
        answers = await collect(await engine.generate(wanted(tools=TOOLS, tool_choice=choice, n=24)))
    assert {answer.finish_reason for answer in answers} == {"tool_calls"}
    calls = [call["function"] for answer in answers for call in answer.tool_calls]
    assert {call["name"] for call in calls} == names
    for call in calls:
        arguments = json.loads(call["arguments"])
        assert arguments == {} if call["name"] == "pass_on" else arguments["verdict"] in ("good", "bad")


async def test_a_free_answer_beside_a_bound_one_is_what_it_is_alone(qwen: Path) -> None:
    async with running(qwen, eos=[END]) as engine:
        alone = await ask(engine, wanted(seed=3))
        bound = wanted(seed=4, response_format={"type": "json_object"})
        beside, _ = await asyncio.gather(ask(engine, wanted(seed=3)), ask(engine, bound))
    assert beside.token_ids == alone.token_ids


async def test_an_answer_that_is_complete_ends_also_where_no_token_ends_answers(qwen: Path) -> None:
    schema = {"type": "json_schema", "name": "report", "schema": SCHEMA}
    async with running(qwen, eos=[]) as engine:
        answer = await ask(engine, wanted(response_format=schema))
    assert (json.loads(answer.text).keys(), answer.finish_reason) == ({"score", "verdict"}, "stop")


async def test_a_schema_that_nothing_can_follow_is_refused(qwen: Path) -> None:
    schema = {"type": "json_schema", "name": "report", "schema": {"type": "nonsense"}}
    async with running(qwen) as engine:
        with pytest.raises(ConfigurationError, match=r"response_format cannot be followed: .*nonsense"):
            await engine.generate(wanted(response_format=schema))


async def test_a_forced_tool_that_is_not_there_is_refused(qwen: Path) -> None:
    choice = {"type": "function", "function": {"name": "judge"}}
    async with running(qwen) as engine:
        with pytest.raises(ConfigurationError, match="names no tool of this request"):
            await engine.generate(wanted(tools=TOOLS[1:], tool_choice=choice))


def test_tokens_that_are_almost_impossible_are_sampled_where_the_grammar_allows_no_other() -> None:
    class Only:
        is_complete = False
        taken: ClassVar[list[int]] = []

        def mask(self, logits_V: torch.Tensor) -> None:
            logits_V[torch.arange(len(logits_V)) != 3] = -torch.inf

        def take(self, token: int) -> None:
            self.taken.append(token)

    sampling = SamplingParameters(temperature=0.05)
    row = Sampled(sampling=sampling, random=Random(0), token_ids=[], constraint=Only())  # type: ignore[arg-type]
    logits = torch.zeros(1, 10)
    logits[0, 5] = 40.0
    chosen = Sampler([row], torch.device("cpu")).choose(logits)
    assert (int(chosen.tokens_B[0]), Only.taken) == (3, [3])
    assert float(chosen.logprobs_B[0]) == pytest.approx(-800, rel=1e-3)

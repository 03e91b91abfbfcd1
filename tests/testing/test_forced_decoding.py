"""A script decides what a real engine says; everything else stays the engine's own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leyden.errors import ConfigurationError, EngineError
from leyden.interfaces import GenerationRequest, SamplingParameters
from leyden.testing.fakes import Answer, FakeEngine
from leyden.testing.forced_decoding import ForcedEngine, hermes
from leyden_plugins.engines.transformers import TransformersEngine
from tests.engines.asking import Answered, ask, assert_logprobs, collect, reference, request, running
from tests.tiny import END, HERMES_TEMPLATE, VOCABULARY, tiny_checkpoint

pytestmark = pytest.mark.anyio

PROMPT = (7, 20, 33, 41)
GIVEN = (9, 100, 33, 8, 250, END)
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"query": "rooms"}'}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("forced"), template=HERMES_TEMPLATE, max_position_embeddings=1024)


def given(*, tokens: tuple[int, ...] = GIVEN, stream: bool = False, **sampling: Any) -> GenerationRequest:
    """A request whose answer is `tokens`."""
    return replace(request(PROMPT, stream=stream, **sampling), forced_token_ids=tokens)


def asked(*, tools: tuple[dict[str, object], ...] = (), stream: bool = True, n: int = 1) -> GenerationRequest:
    """A chat request."""
    messages = [{"role": "user", "content": "How many?"}]
    return GenerationRequest(
        model="base", messages=messages, tools=tools, stream=stream, sampling=SamplingParameters(n=n)
    )


@asynccontextmanager
async def scripted(model: Path, script: Callable[[GenerationRequest], str | Answer]) -> AsyncIterator[ForcedEngine]:
    """A started engine that follows `script`; the tiny tokenizer ends a turn with a token of its own."""
    engine = ForcedEngine(TransformersEngine(model), script, render=lambda answer: hermes(answer, end="<|end|>"))
    await engine.start([])
    yield engine
    await engine.stop()


async def answered(engine: ForcedEngine, wanted: GenerationRequest) -> list[Answered]:
    return await collect(await engine.generate(wanted))


# ---- a given answer in the engine ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_a_given_answer_is_scored_as_a_plain_forward_pass_scores_it(model: Path, temperature: float) -> None:
    async with running(model, eos=None) as engine:
        got = await ask(engine, given(temperature=temperature))
    assert got.token_ids == list(GIVEN)
    assert got.finish_reason == "stop"
    assert_logprobs(reference(model), PROMPT, got, temperature)


async def test_masks_and_penalties_do_not_change_a_given_answer(model: Path) -> None:
    async with running(model, eos=None) as engine:
        plain = await ask(engine, given())
        masked = await ask(engine, given(top_k=1, top_p=0.1, frequency_penalty=2.0))
    assert masked.token_ids == plain.token_ids
    assert masked.logprobs == pytest.approx(plain.logprobs)


async def test_given_and_sampled_answers_share_a_batch(model: Path) -> None:
    async with running(model, eos=()) as engine:
        alone = await ask(engine, request(PROMPT, seed=3))
        before = engine.tokens_sampled
        generations = [await engine.generate(wanted) for wanted in (given(), request(PROMPT, seed=3))]
        (forced,), (sampled,) = [await collect(generation) for generation in generations]
        assert engine.tokens_sampled - before == len(GIVEN) + len(alone.token_ids), "each costs a forward pass"
    assert forced.token_ids == list(GIVEN)
    assert sampled.token_ids == alone.token_ids


async def test_a_given_answer_without_an_end_is_cut_by_its_length(model: Path) -> None:
    async with running(model, eos=None) as engine:
        got = await ask(engine, given(tokens=GIVEN[:3]))
    assert (got.token_ids, got.finish_reason) == (list(GIVEN[:3]), "length")


async def test_limits_and_ends_hold_for_given_answers(model: Path) -> None:
    async with running(model, eos=None) as engine:
        short = await ask(engine, given(max_tokens=2))
        ended = await ask(engine, given(tokens=(9, END, 33, 8)))
        stopped = await ask(engine, given(tokens=tuple(engine.encode("one two three")), max_tokens=20, stop=("two",)))
    assert (short.token_ids, short.finish_reason) == (list(GIVEN[:2]), "length")
    assert (ended.token_ids, ended.finish_reason) == ([9, END], "stop")
    assert (stopped.text, stopped.finish_reason) == ("one ", "stop")


async def test_a_given_answer_streams_token_by_token(model: Path) -> None:
    async with running(model, eos=None) as engine:
        got = await ask(engine, given(stream=True))
    assert [len(delta.token_ids) for delta in got.deltas] == [1] * len(GIVEN)


async def test_a_given_answer_is_off_distribution() -> None:
    assert given().is_off_distribution
    assert not request(PROMPT).is_off_distribution


@pytest.mark.parametrize(
    ("tokens", "message"),
    [((), "forced_token_ids is empty"), ((1, VOCABULARY), f"forced token {VOCABULARY} is outside")],
)
async def test_an_impossible_answer_is_refused(model: Path, tokens: tuple[int, ...], message: str) -> None:
    async with running(model) as engine:
        with pytest.raises(ConfigurationError, match=message):
            await engine.generate(given(tokens=tokens))


async def test_text_becomes_tokens_with_the_special_ones_it_spells(model: Path) -> None:
    async with running(model) as engine:
        tokens = engine.encode("é<|end|>")
        assert (len(tokens), tokens[-1]) == (3, END)
        assert engine.decode(tokens) == "é<|end|>"
    with pytest.raises(EngineError, match="not running"):
        engine.encode("x")


# ---- the script around it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
async def test_the_script_s_text_is_what_the_engine_says_and_its_log_holds_the_tokens(
    model: Path, stream: bool
) -> None:
    async with scripted(model, lambda wanted: f"I heard {wanted.messages[0]['content']}") as engine:
        generation = await engine.generate(asked(stream=stream))
        (got,) = await collect(generation)
        assert engine.decode(got.token_ids) == "I heard How many?<|end|>"
    (made,) = engine.log
    assert got.text == "I heard How many?"
    assert generation.is_off_distribution
    assert (made.prompt_token_ids, made.token_ids) == (list(generation.prompt_token_ids), [got.token_ids])
    assert made.logprobs == [got.logprobs]
    assert not made.aborted
    assert_logprobs(reference(model), generation.prompt_token_ids, got, 1.0)


async def test_tool_calls_are_written_in_the_form_that_the_engine_reads(model: Path) -> None:
    async with scripted(model, lambda _: Answer(text="I search.", tool_calls=[CALL, CALL])) as engine:
        (got,) = await answered(engine, asked(tools=(SEARCH,), stream=False))
    assert (got.text, got.finish_reason) == ("I search.", "tool_calls")
    functions = [call["function"] for call in got.tool_calls]
    assert [(each["name"], json.loads(each["arguments"])) for each in functions] == [("search", {"query": "rooms"})] * 2


async def test_a_tool_that_must_be_called_needs_no_constraint(model: Path) -> None:
    async with scripted(model, lambda _: Answer(tool_calls=[CALL])) as engine:
        assert engine.forces_tools
        (got,) = await answered(engine, replace(asked(tools=(SEARCH,)), tool_choice="required"))
    assert got.finish_reason == "tool_calls"


async def test_every_choice_says_the_same(model: Path) -> None:
    async with scripted(model, lambda _: "yes") as engine:
        got = await answered(engine, asked(n=2))
    assert [choice.text for choice in got] == ["yes", "yes"]
    assert engine.log[0].token_ids == [choice.token_ids for choice in got]


async def test_a_scripted_failure_comes_after_the_text(model: Path) -> None:
    heard = ""
    async with scripted(model, lambda _: Answer(text="half", error=EngineError("gone"))) as engine:
        generation = await engine.generate(asked())
        with pytest.raises(EngineError, match="gone"):
            async for delta in generation.deltas:
                heard += delta.text
                assert delta.finish_reason is None
    assert heard == "half"


async def test_a_reader_that_leaves_aborts_what_the_engine_makes(model: Path) -> None:
    async with scripted(model, lambda _: "a long answer " * 10) as engine:
        generation = await engine.generate(asked())
        await anext(generation.deltas)
        await generation.deltas.aclose()  # type: ignore[attr-defined]  # an async generator
        assert engine.log[0].aborted
        assert await answered(engine, asked())


async def test_what_the_script_raises_reaches_the_caller(model: Path) -> None:
    def script(_: GenerationRequest) -> str:
        raise ValueError("no such role")

    async with scripted(model, script) as engine:
        with pytest.raises(ValueError, match="no such role"):
            await engine.generate(asked())
        assert engine.models() == ["base"], "everything else is the engine's inside"


def test_an_engine_that_cannot_be_told_what_to_say_is_refused() -> None:
    class Deaf(FakeEngine):
        encode = None  # type: ignore[assignment]  # as an engine without it

    with pytest.raises(ConfigurationError, match=r"'Deaf' has no encode"):
        ForcedEngine(Deaf(), lambda _: "x")

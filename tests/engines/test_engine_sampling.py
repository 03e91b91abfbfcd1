"""How tokens are chosen: seeds, restrictions, penalties, the parameters that are refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from leyden.errors import ConfigurationError
from leyden.interfaces import SamplingParameters
from leyden_plugins.engines.transformers.sampling import Sampled, Sampler, restrict
from tests.engines.asking import ask, collect, reference, request, running

PROMPT = (40, 41, 42, 43, 44)


def sampler(*asked: SamplingParameters, token_ids: tuple[int, ...] = ()) -> Sampler:
    rows = [
        Sampled(sampling=sampling, random=Random(number), token_ids=list(token_ids))
        for number, sampling in enumerate(asked)
    ]
    return Sampler(rows, torch.device("cpu"))


def drawn(logits: torch.Tensor, sampling: SamplingParameters, count: int = 4000) -> Counter[int]:
    chooser = sampler(*[sampling] * count)
    return Counter(chooser.choose(logits.expand(count, -1)).tokens_B.tolist())


@pytest.mark.anyio
async def test_a_seed_gives_the_same_answer_whatever_the_batch(qwen: Path) -> None:
    seeded = request(PROMPT, seed=7, max_tokens=30)
    async with running(qwen, max_batch_size=16) as engine:
        alone = await ask(engine, seeded)
        crowd = [request((50 + number, *PROMPT), max_tokens=5 + number) for number in range(20)]
        answers = await asyncio.gather(*(ask(engine, wanted) for wanted in [*crowd[:9], seeded, *crowd[9:]]))
        other = await ask(engine, request(PROMPT, seed=8, max_tokens=30))
    assert answers[9].token_ids == alone.token_ids
    assert other.token_ids != alone.token_ids


@pytest.mark.anyio
async def test_engines_of_one_seed_repeat_themselves_without_request_seeds(qwen: Path) -> None:
    runs = []
    for seed in (1, 1, 2):
        async with running(qwen, seed=seed) as engine:
            runs.append([(await ask(engine, request(PROMPT, max_tokens=20))).token_ids for _ in range(2)])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1], "the samples of a group differ"


@pytest.mark.anyio
async def test_n_choices_are_separate_samples_of_one_prompt(qwen: Path) -> None:
    async with running(qwen, max_batch_size=4) as engine:
        choices = await collect(await engine.generate(request(PROMPT, n=6, seed=3, max_tokens=12)))
        again = await collect(await engine.generate(request(PROMPT, n=6, seed=3, max_tokens=12)))
    assert len({tuple(choice.token_ids) for choice in choices}) == 6
    assert [choice.token_ids for choice in choices] == [choice.token_ids for choice in again]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    counts = drawn(probabilities.log(), SamplingParameters())
    for token, probability in enumerate(probabilities.tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)
    assert counts[1] == 0


def test_temperature_scales_before_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0])
    counts = drawn(logits, SamplingParameters(temperature=0.5))
    assert counts[1] / 4000 == pytest.approx(torch.softmax(logits / 0.5, -1)[1].item(), abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (SamplingParameters(top_k=2), {0, 2}),
        (SamplingParameters(top_p=0.5), {0, 2}),
        (SamplingParameters(top_p=0.4), {0}),
        (SamplingParameters(top_p=0.71), {0, 2, 3}),
        (SamplingParameters(min_p=0.6), {0, 2}),
        (SamplingParameters(top_k=3, top_p=0.75), {0, 2}),
    ],
)
def test_restrictions_keep_exactly_their_support(sampling: SamplingParameters, support: set[int]) -> None:
    probabilities = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert set(drawn(probabilities.log(), sampling)) == support
    kept = restrict(probabilities, sampling)
    assert {token for token in range(4) if kept[token] > 0} == support
    assert torch.equal(kept[kept > 0], probabilities[kept > 0])


def test_logprobs_are_those_before_masks_and_penalties() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    for sampling in (
        SamplingParameters(top_k=1),
        SamplingParameters(temperature=0.7, top_p=0.3),
        SamplingParameters(temperature=0.7, frequency_penalty=1.5, presence_penalty=0.5),
        SamplingParameters(temperature=0.0),
    ):
        chosen = sampler(sampling, token_ids=(0, 0, 1)).choose(logits)
        wanted = torch.log_softmax(logits / (sampling.temperature or 1.0), -1)[0, chosen.tokens_B]
        torch.testing.assert_close(chosen.logprobs_B, wanted)


def test_penalties_lower_what_was_said() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    greedy = SamplingParameters(temperature=0.0)
    said = (0, 0, 2)
    assert sampler(greedy, token_ids=said).choose(logits).tokens_B.item() == 0
    for penalised in (replace(greedy, presence_penalty=0.2), replace(greedy, frequency_penalty=0.06)):
        assert sampler(penalised, token_ids=said).choose(logits).tokens_B.item() == 1
    assert sampler(replace(greedy, frequency_penalty=0.04), token_ids=said).choose(logits).tokens_B.item() == 0


def test_rows_of_one_batch_keep_their_own_parameters() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).expand(3, -1)
    chooser = sampler(
        SamplingParameters(temperature=0.0),
        SamplingParameters(temperature=100.0),
        SamplingParameters(temperature=5.0, top_k=1),
    )
    draws = [chooser.choose(logits).tokens_B.tolist() for _ in range(300)]
    seen = [Counter(draw[row] for draw in draws) for row in range(3)]
    assert set(seen[0]) == {1} == set(seen[2])
    assert min(seen[1].values()) > 60


@pytest.mark.anyio
async def test_top_k_one_samples_the_greedy_answer(qwen: Path) -> None:
    async with running(qwen) as engine:
        greedy = await ask(engine, request(PROMPT, temperature=0.0))
        restricted = await ask(engine, request(PROMPT, top_k=1))
    assert restricted.token_ids == greedy.token_ids


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be at least 0, got -1.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or more, got -1"),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\], got 2.0"),
        ({"n": 0}, r"n must be at least 1, got 0"),
        ({"max_tokens": 0}, r"max_tokens must be at least 1, got 0"),
        ({"stop": ("",)}, r"stop must be strings that are not empty"),
    ],
)
async def test_impossible_sampling_is_refused_by_name(qwen: Path, wrong: dict[str, object], message: str) -> None:
    async with running(qwen) as engine:
        with pytest.raises(ConfigurationError, match=message):
            await engine.generate(request(PROMPT, **wrong))


@pytest.mark.anyio
async def test_the_token_that_ends_the_answer_is_part_of_it(qwen: Path) -> None:
    greedy = request(PROMPT, temperature=0.0, max_tokens=10)
    async with running(qwen) as engine:
        free = await ask(engine, greedy)
    ending = free.token_ids[4]
    assert ending not in free.token_ids[:4]
    async with running(qwen, eos=(ending,)) as engine:
        ended = await ask(engine, greedy)
    assert ended.token_ids == free.token_ids[:5]
    assert (ended.finish_reason, free.finish_reason) == ("stop", "length")


def test_the_reference_model_is_far_from_uniform(qwen: Path) -> None:
    with torch.no_grad():
        logits = reference(qwen)(torch.tensor([PROMPT])).logits[0, -1]
    assert logits.std() > 1, "on uniform logits these tests would show little"

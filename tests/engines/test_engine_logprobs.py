"""What the engine records equals a plain forward pass, on every path and in every batch."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch

from leyden.interfaces import Weights
from tests.engines.asking import ask, assert_logprobs, plain_logprobs, reference, request, running
from tests.tiny import VOCABULARY

pytestmark = pytest.mark.anyio


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


async def test_every_family_takes_its_path_and_records_the_logprobs_of_a_plain_forward_pass(
    family: tuple[Path, str],
) -> None:
    folder, path = family
    model = reference(folder)
    temperatures = (1.0, 0.7)
    asked = [
        (prompt, temperature)
        for prompt in prompts(1, 2, 17, 40, 40, 70)
        for temperature in (*temperatures, temperatures[0])
    ]
    async with running(folder, max_batch_size=7) as engine:
        assert engine.network == path
        answers = await asyncio.gather(
            *(ask(engine, request(p, temperature=t, max_tokens=3 + len(p) % 9)) for p, t in asked)
        )
    for (prompt, temperature), answer in zip(asked, answers, strict=True):
        assert len(answer.token_ids) == 3 + len(prompt) % 9
        assert_logprobs(model, prompt, answer, temperature)


async def test_greedy_answers_equal_generate(family: tuple[Path, str]) -> None:
    folder, _ = family
    model = reference(folder)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    asked = prompts(5, 9, 30)
    async with running(folder) as engine:
        answers = await asyncio.gather(
            *(ask(engine, request(prompt, temperature=0.0, max_tokens=12)) for prompt in asked)
        )
    for prompt, answer in zip(asked, answers, strict=True):
        tokens = torch.tensor([prompt])
        wanted = model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12
        )
        assert answer.token_ids == wanted[0, len(prompt) :].tolist()
        assert_logprobs(model, prompt, answer, 1.0)


@pytest.mark.parametrize("prefix_cache_tokens", [0, 200, 10_000])
async def test_reused_prefixes_change_no_logprob(qwen: Path, prefix_cache_tokens: int) -> None:
    model = reference(qwen)
    (start,) = prompts(50)
    asked = [start, start, start[:33] + prompts(20, seed=1)[0], start + prompts(30, seed=2)[0], start[:20]]
    async with running(qwen, prefix_cache_tokens=prefix_cache_tokens) as engine:
        for prompt in asked:
            assert_logprobs(model, prompt, await ask(engine, request(prompt)), 1.0)
        together = await asyncio.gather(*(ask(engine, request(prompt)) for prompt in asked * 3))
    for prompt, answer in zip(asked * 3, together, strict=True):
        assert_logprobs(model, prompt, answer, 1.0)


async def test_rows_that_join_and_leave_at_any_step_keep_their_logprobs(qwen: Path) -> None:
    model = reference(qwen)
    rng = random.Random(3)
    asked = [(prompt, rng.randrange(1, 120)) for prompt in prompts(*(rng.randrange(1, 90) for _ in range(60)))]

    async def later(number: int, prompt: list[int], length: int) -> None:
        await asyncio.sleep(0.002 * (number % 23))
        answer = await ask(engine, request(prompt, max_tokens=length))
        assert len(answer.token_ids) == length
        assert_logprobs(model, prompt, answer, 1.0)

    async with running(qwen, max_batch_size=12) as engine:
        await asyncio.gather(*(later(number, *item) for number, item in enumerate(asked)))
        assert engine.running == 0


async def test_identical_prompts_are_prefilled_once(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leyden_plugins.torch_models import FusedNetwork

    computed: list[int] = []
    prefill = FusedNetwork.prefill

    def counted(self: FusedNetwork, weights, tokens, *rest):  # type: ignore[no-untyped-def]
        computed.append(tokens.numel())
        prefill(self, weights, tokens, *rest)

    (prompt,) = prompts(41)
    async with running(qwen) as engine:
        monkeypatch.setattr(FusedNetwork, "prefill", counted)
        await asyncio.gather(*(ask(engine, request(prompt)) for _ in range(8)))
        assert computed == [40]
        await ask(engine, request(prompt, n=3))
        assert computed == [40], "the cache answers a prompt that comes later"
        await ask(engine, request([*prompt, 1, 2, 3]))
        assert computed == [40, 11], "a longer prompt computes what is new beyond whole blocks"
        await ask(engine, request([*prompt[:20], 9, 9]))
        assert computed[2:] == [5], "a prompt that shares a beginning reuses it"


async def test_a_published_version_is_served_and_the_base_stays_as_it_was(family: tuple[Path, str]) -> None:
    folder, _ = family
    model, changed = reference(folder), reference(folder)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.05 * torch.randn_like(parameter, generator=None)
    (prompt,) = prompts(30)
    async with running(folder, "sql") as engine:
        before = engine.sha256("base")
        assert engine.sha256("sql") == before
        await engine.publish("sql", 1, Weights(tensors=changed.state_dict()))
        asked = [request(prompt, model=name) for name in ("base", "sql", "base", "sql")]
        generations = [await engine.generate(wanted) for wanted in asked]
        assert [generation.version for generation in generations] == [0, 1, 0, 1]
        answers = await asyncio.gather(*(ask(engine, wanted) for wanted in asked))
        assert engine.sha256("base") == before
        assert engine.sha256("sql") != before
    for wanted, answer in zip(asked, answers, strict=True):
        assert_logprobs(model if wanted.model == "base" else changed, prompt, answer, 1.0)


async def test_published_tensors_are_copied(qwen: Path) -> None:
    changed = reference(qwen)
    tensors = changed.state_dict()
    async with running(qwen, "sql") as engine:
        await engine.publish("sql", 1, Weights(tensors=tensors))
        before = engine.sha256("sql")
        for tensor in tensors.values():
            tensor.zero_()
        assert engine.sha256("sql") == before


async def test_a_folder_is_published_like_tensors(qwen: Path, tmp_path: Path) -> None:
    changed = reference(qwen)
    with torch.no_grad():
        next(changed.parameters()).add_(0.1)
    changed.save_pretrained(tmp_path)  # type: ignore[operator]
    async with running(qwen, "a", "b") as engine:
        await engine.publish("a", 1, Weights(folder=tmp_path))
        await engine.publish("b", 1, Weights(tensors=changed.state_dict()))
        assert engine.sha256("a") == engine.sha256("b") != engine.sha256("base")


async def test_a_request_keeps_the_version_it_began_with(qwen: Path) -> None:
    model, changed = reference(qwen), reference(qwen)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.3)
    (prompt,) = prompts(20)
    async with running(qwen, "sql") as engine:
        old = await engine.generate(request(prompt, model="sql", stream=True, max_tokens=150))
        first = await anext(old.deltas)
        await engine.publish("sql", 1, Weights(tensors=changed.state_dict()))
        new = await engine.generate(request(prompt, model="sql", stream=True, max_tokens=20))
        rest = [delta async for delta in old.deltas]
        later = [delta async for delta in new.deltas]
        assert (old.version, new.version) == (0, 1)
    ids = [token for delta in (first, *rest) for token in delta.token_ids]
    logprobs = [value for delta in (first, *rest) for value in delta.logprobs]
    torch.testing.assert_close(torch.tensor(logprobs), plain_logprobs(model, prompt, ids), atol=1e-4, rtol=0)
    new_ids = [token for delta in later for token in delta.token_ids]
    new_logprobs = [value for delta in later for value in delta.logprobs]
    torch.testing.assert_close(torch.tensor(new_logprobs), plain_logprobs(changed, prompt, new_ids), atol=1e-4, rtol=0)

"""Compare the in-process engine with Hugging Face `generate`: tokens per CPU-second.

One idea: both sides get the same distinct prompts of one length, sample exactly the same number of tokens at
temperature 1 on one thread, and take turns, so that a noisy machine disturbs both. CPU time of the whole process
is what counts; wall time is not looked at.

    python benchmarks/engine.py [--model DIR] [--repetitions 5]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers.modeling_utils import PreTrainedModel

from leyden.interfaces import GenerationRequest, SamplingParameters
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.torch_models import load_model, vocabulary_of

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 20
PROMPT_TOKENS = 64
GOALS = {1: 1.2, 8: 1.0, 32: 1.2, 64: 1.2}
LEAST_CPU_SECONDS = 0.4
"""Each measurement repeats its batch until it took this long: the clock ticks in 10 ms on some machines."""


def prompts_for(batch: int, vocabulary: int, rng: random.Random) -> list[list[int]]:
    """Return distinct random prompts: nothing of them can come from a prefix cache."""
    return [[rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]


async def answer_all(engine: TransformersEngine, prompts: Sequence[Sequence[int]]) -> int:
    """Sample one answer a prompt, all together; return the number of tokens."""

    async def one(prompt: Sequence[int]) -> int:
        generation = await engine.generate(
            GenerationRequest(
                model="base",
                messages=(),
                prompt_token_ids=prompt,
                sampling=SamplingParameters(max_tokens=NEW_TOKENS),
                stream=False,
            )
        )
        return sum([len(delta.token_ids) async for delta in generation.deltas])

    return sum(await asyncio.gather(*map(one, prompts)))


def generate_all(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> int:
    """Do the same with `generate`; return the number of tokens."""
    tokens = torch.tensor(prompts)
    with torch.inference_mode():
        answer = model.generate(  # type: ignore[operator]  # a mixin adds it, unseen by PreTrainedModel
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
    return int(answer.numel() - tokens.numel())


async def rates(
    engine: TransformersEngine, model: PreTrainedModel, batch: int, vocabulary: int, rng: random.Random
) -> tuple[float, float]:
    """Return tokens per CPU-second of the engine and of `generate`, measured one after the other."""
    sampled, began = 0, time.process_time()
    while (spent := time.process_time() - began) < LEAST_CPU_SECONDS:
        sampled += await answer_all(engine, prompts_for(batch, vocabulary, rng))
    ours = sampled / spent
    sampled, began = 0, time.process_time()
    while (spent := time.process_time() - began) < LEAST_CPU_SECONDS:
        sampled += generate_all(model, prompts_for(batch, vocabulary, rng))
    return ours, sampled / spent


async def main() -> int:
    """Print the table; return 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description="Tokens per CPU-second: the engine against generate.")
    parser.add_argument("--model", default=str(ROOT / "examples" / "text_to_sql" / "model"))
    parser.add_argument("--repetitions", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    model = load_model(asked.model)
    engine = TransformersEngine(asked.model, max_batch_size=max(GOALS), eos_token_ids=())
    await engine.start([])
    vocabulary = vocabulary_of(model)
    print(f"{asked.model}: {sum(p.numel() for p in model.parameters()):,} parameters, network {engine.network}")
    print(f"{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new ones, {asked.repetitions} alternated repetitions")
    print("batch  engine tok/cpu-s  generate tok/cpu-s  ratio: median (range)   goal")
    reached = True
    for batch, goal in GOALS.items():
        await rates(engine, model, batch, vocabulary, rng)  # warm-up
        pairs = [await rates(engine, model, batch, vocabulary, rng) for _ in range(asked.repetitions)]
        ratios = [ours / theirs for ours, theirs in pairs]
        median = statistics.median(ratios)
        reached = reached and median >= goal
        print(
            f"{batch:5d}  {statistics.median(ours for ours, _ in pairs):16.0f}"
            f"  {statistics.median(theirs for _, theirs in pairs):18.0f}"
            f"  {median:5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f"     {goal:.1f} {'reached' if median >= goal else 'MISSED'}"
        )
    await engine.stop()
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))

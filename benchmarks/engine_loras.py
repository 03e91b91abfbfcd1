"""Several LoRAs in one batch: tokens per CPU-second against the base alone and against one lane an adapter.

One idea: the same requests, spread over 1, 2 and 4 names, are answered three ways in turn: by the base under all names
(no LoRA anywhere), by LoRAs of rank 16 on every linear layer in one shared lane, and by full copies with the LoRAs
merged in, each in a lane of its own. The ways take turns, so that a noisy machine disturbs all. CPU time of the whole
process is what counts.

    python benchmarks/engine_loras.py [--model DIR] [--repetitions 5] [--rows 64] [--tokens 40]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from leyden.interfaces import GenerationRequest, SamplingParameters, Weights
from leyden.roles import LoRA, Policy
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.torch_models import load_model, merged_weights, read_adapter

ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS = 64
COUNTS = (1, 2, 4)
RANK = 16
LEAST_VOCABULARY = 256
"""Prompts are of tokens that every model has."""
LEAST_CPU_SECONDS = 0.8
"""Each measurement repeats its batch until it took this long: the clock ticks in 10 ms on some machines."""


def weights_of(folder: str, lora: LoRA, seed: int) -> tuple[Weights, Weights]:
    """Return a random adapter, and the whole weights with it merged in."""
    model = load_model(folder)
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in lora.targets:
            outputs, inputs = module.get_parameter("weight").shape
            prefix = f"base_model.model.{name}.lora_"
            factors[f"{prefix}A.weight"] = 0.02 * torch.randn(lora.rank, inputs, generator=generator)
            factors[f"{prefix}B.weight"] = 0.02 * torch.randn(outputs, lora.rank, generator=generator)
    adapter = read_adapter(model, lora=lora, tensors=factors, folder=None)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Weights(lora=lora, tensors=factors), Weights(tensors=tensors | merged_weights(model, tensors, adapter))


async def rate(engine: TransformersEngine, names: Sequence[str], rows: int, tokens: int, rng: random.Random) -> float:
    """Return tokens per CPU-second of `rows` requests, taken by the names in turn."""
    sampled, spent = 0, 0.0

    async def one(place: int, prompt: Sequence[int]) -> int:
        generation = await engine.generate(
            GenerationRequest(
                model=names[place % len(names)],
                messages=(),
                prompt_token_ids=prompt,
                sampling=SamplingParameters(max_tokens=tokens),
                stream=False,
            )
        )
        return sum([len(delta.token_ids) async for delta in generation.deltas])

    while spent < LEAST_CPU_SECONDS:
        prompts = [[rng.randrange(LEAST_VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(rows)]
        began = time.process_time()
        sampled += sum(await asyncio.gather(*(one(place, prompt) for place, prompt in enumerate(prompts))))
        spent += time.process_time() - began
    return sampled / spent


async def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Tokens per CPU-second of several LoRAs in one batch.")
    parser.add_argument("--model", default=str(ROOT / "examples" / "text_to_sql" / "model"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=40)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    engine = TransformersEngine(asked.model, max_batch_size=asked.rows, eos_token_ids=(), prefix_cache_tokens=0)
    most = range(max(COUNTS))
    await engine.start([Policy(f"{kind}{number}") for kind in ("lora", "full") for number in most])
    lora = LoRA(rank=RANK, alpha=2.0 * RANK)
    for number in most:
        adapter, whole = weights_of(asked.model, lora, number)
        await engine.publish(f"lora{number}", 1, adapter)
        await engine.publish(f"full{number}", 1, whole)
    print(f"{asked.model}: network {engine.network}")
    print(f"{asked.rows} rows, {PROMPT_TOKENS} prompt and {asked.tokens} new tokens")
    print(
        f"rank {RANK} on {len(lora.targets)} layers of each block; median of {asked.repetitions} alternated repetitions"
    )
    print(
        "adapters  base tok/cpu-s  LoRAs together  full copies in lanes  together/base (range)  together/lanes (range)"
    )
    for count in COUNTS:
        ways: dict[str, Callable[[int], str]] = {
            "base": lambda number: "base",
            "lora": lambda number: f"lora{number}",
            "full": lambda number: f"full{number}",
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for repetition in range(asked.repetitions + 1):
            for way, name in ways.items():
                names = [name(number) for number in range(count)]
                rates[way].append(await rate(engine, names, asked.rows, asked.tokens, random.Random(repetition)))
        measured = {way: values[1:] for way, values in rates.items()}  # the first is warm-up
        print(f"{count:8d}  " + row(measured))
    await engine.stop()


def row(measured: dict[str, list[float]]) -> str:
    """Format one line: medians, then ratios of what was measured in the same repetition."""
    base, together, lanes = (statistics.median(measured[way]) for way in ("base", "lora", "full"))
    ratios = []
    for other in ("base", "full"):
        found = [ours / theirs for ours, theirs in zip(measured["lora"], measured[other], strict=True)]
        ratios.append(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return f"{base:14.0f}  {together:14.0f}  {lanes:20.0f}  {ratios[0]:>21}  {ratios[1]:>22}"


if __name__ == "__main__":
    asyncio.run(main())

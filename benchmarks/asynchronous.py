"""Compare synchronous with asynchronous training where rollouts wait: throughput, staleness, and what is learnt.

One idea: an agent's waits (tools, people, other models) are heavy-tailed, so a step that waits for its slowest rollout
leaves engine and learner idle. Here a rollout speaks and waits for a log-normal while (median 0.5 s, 99th percentile
ten times that) for its reward; 128 may be under way. Calls take the whole path: wire, gateway, engine, store.
The task is small enough for a random model: answer in the letters of the half of the alphabet that was asked for.

    python -m benchmarks.asynchronous [--steps 15] [--bounds 0 1 2 4] [--seeds 1]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import string
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import httpx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import leyden
from leyden.sqlite import SQLiteStore
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.learners.torch import TorchLearner

MEDIAN_SECONDS = 0.5
TAIL = 10.0
"""The 99th percentile of the waits over their median."""
SIGMA = math.log(TAIL) / 2.3263478740408408
"""Of the waits' logarithm; the divisor is the standard normal's 99th percentile."""
TASKS_PER_STEP = 16
GROUP_SIZE = 8
LETTERS = string.ascii_lowercase
SPECIALS = ["<pad>", "<user>", "<assistant>", "<end>", "<low>", "<high>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASKS = [f"<{half}>{first}{second}" for half in ("low", "high") for first in LETTERS[:13] for second in LETTERS[13:]]
"""A half, and two letters that do not matter."""

client = httpx.AsyncClient(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=None))


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a random model with one token a letter; return the folder."""
    torch.manual_seed(seed)
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", extra_special_tokens=SPECIALS[1:]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=vocabulary["<end>"],
        pad_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def waiting_seconds(rng: random.Random) -> float:
    """Draw one wait."""
    return rng.lognormvariate(math.log(MEDIAN_SECONDS), SIGMA)


async def say(prompt: str) -> str:
    """Call the model as an app does."""
    body = {"model": "any", "messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
    reply = await client.post("http://127.0.0.1:9/v1/chat/completions", json=body)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


def score(task: str, answer: str) -> float:
    """Return the share of an answer's letters that are in the half asked for."""
    wanted = LETTERS[:13] if task.startswith("<low>") else LETTERS[13:]
    letters = [letter for letter in answer if letter in LETTERS]
    return sum(letter in wanted for letter in letters) / len(letters) if letters else 0.0


async def agent(task: dict[str, object]) -> float:
    """Answer, then wait as for a tool that works on the answer: the longer, the staler the answer when trained."""
    prompt = str(task["prompt"])
    answer = await say(prompt)
    if task["waits"]:
        await asyncio.sleep(waiting_seconds(random.Random()))  # seeded by the machine: no two rollouts wait alike
    return score(prompt, answer)


class Steps:
    """A sink that keeps every step's metrics."""

    def __init__(self) -> None:
        self.metrics: list[Mapping[str, float]] = []

    def run_started(self, info: Mapping[str, object]) -> None: ...

    def notice(self, text: str) -> None: ...

    def progress(self, info: Mapping[str, object]) -> None: ...

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append(metrics)

    def run_finished(self, summary: Mapping[str, object]) -> None: ...


async def staleness_of(run: Path) -> Counter[int]:
    """Count the trained calls by the updates between sampling and training, from the ledger alone."""
    async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
        updates = await store.updates()
        step_of = {update.version: update.step for update in updates}
        ages: Counter[int] = Counter()
        for update in updates:
            for one in await store.records(update.rollout_ids):
                ages.update(update.step - 1 - step_of.get(call.version, 0) for call in one.completions)
    return ages


def run(
    seed: int,
    max_staleness: int,
    *,
    steps: int = 15,
    waits: bool = True,
    learning_rate: float = 3e-3,
    algorithm: object = None,
) -> dict[str, object]:
    """Train once; return throughput, staleness and what was learnt.

    Args:
        seed: of the model, the tasks' order and the learner.
        max_staleness: 0 is synchronous.
        steps: of 16 tasks with 8 rollouts each.
        waits: false leaves the waits out, to compare learning alone.
        learning_rate: the policy's.
        algorithm: another one than `GRPO(group_size=8)`.
    """
    order = random.Random(0).sample(TASKS, len(TASKS))
    held_out, train = order[:64], order[64:]
    with tempfile.TemporaryDirectory(prefix="leyden-asynchronous-") as temporary:
        folder = Path(temporary)
        sink = Steps()
        with leyden.Trainer(
            agent,
            tasks=[{"prompt": prompt, "waits": waits} for prompt in train],
            val_tasks=[{"prompt": prompt, "waits": False} for prompt in held_out],
            tasks_per_step=TASKS_PER_STEP,
            max_staleness=max_staleness,
            policies=[leyden.Policy("p", learning_rate=learning_rate, eval_sampling=leyden.Sampling())],
            engine=TransformersEngine(make_model(folder / "model", seed=seed), max_batch_size=128, seed=seed),
            algorithm=algorithm or GRPO(group_size=GROUP_SIZE),  # type: ignore[arg-type]  # the caller's
            learner=TorchLearner(),
            run=folder / "run",
            workers=0,
            concurrency=TASKS_PER_STEP * GROUP_SIZE,
            checkpoint_every=steps,
            sinks=[sink],
            seed=seed,
        ) as trainer:
            summary = trainer.fit(steps)
        ages = asyncio.run(staleness_of(folder / "run"))
    seconds = float(str(summary["train_seconds"]))
    return {
        "seed": seed,
        "max_staleness": max_staleness,
        "steps": steps,
        "rollouts_per_second": steps * TASKS_PER_STEP * GROUP_SIZE / seconds,
        "train_seconds": seconds,
        "train_cpu_seconds": summary["train_cpu_seconds"],
        "staleness": {str(age): ages[age] for age in sorted(ages)},
        "reward": [metrics["reward/mean"] for metrics in sink.metrics],
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
    }


def main() -> None:
    """Run every bound with every seed, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--bounds", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    found = [run(seed, bound, steps=options.steps) for seed in range(options.seeds) for bound in options.bounds]
    for one in found:
        base = next((other for other in found if other["seed"] == one["seed"] and other["max_staleness"] == 0), one)
        ratio = float(str(one["rollouts_per_second"])) / float(str(base["rollouts_per_second"]))
        print(
            f"seed {one['seed']}  max_staleness {one['max_staleness']}: {one['rollouts_per_second']:.1f} rollouts/s, "
            f"{ratio:.2f} times; trained calls by staleness {one['staleness']}; accuracy {one['accuracy_before']:.3f} "
            f"-> {one['accuracy_after']:.3f}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

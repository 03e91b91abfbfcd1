"""Measure the layouts of a batch: tokens through the trainer, padding, and the time of a step on this CPU.

Tokens are counted without a model, for batches of the shapes that agents make; `nodes` is what no layout can go below,
each distinct token after the same tokens once. Steps (forward and backward pass, no optimizer) are timed through
`TorchLearner` with small random models; CPU seconds of one thread, the better of two.

    python benchmarks/layouts.py            # writes benchmarks/results/layouts.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from leyden.interfaces import Loss, Objective, Sample
from leyden.layouts import Attention, Layout, lay_out
from leyden.roles import Policy
from leyden.tokentree import TokenTree
from leyden.training.summary import package_versions
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.learners.torch.batching import MASK_BYTES, attention_of
from leyden_plugins.torch_models.loading import quiet

RESULTS = Path(__file__).parent / "results" / "layouts.json"
VOCABULARY = 1024
SEED = 0
BUDGET = 8192
"""The learner's `micro_batch_tokens` unless told otherwise."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
LARGE = Attention(pair_cost=2 * 1536 * 28 / 1.31e9, mask_entries=MASK_BYTES // 4)
"""Of Qwen2.5-1.5B: 28 layers of width 1536, 1.31e9 parameters behind the embedding."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Groups of rollouts; those of a group share the prompt, and each turn's prompt extends the turn before."""

    prompt: int
    answer: int
    observation: int = 0
    turns: int = 1
    group: int = 8
    groups: int = 1
    spread: float = 0.0
    """How far an answer's length may be from `answer`, as a share of it."""

    def __str__(self) -> str:
        size = f"prompt {self.prompt}, {self.turns} x answer {self.answer}"
        if self.spread:
            size += f" +- {self.spread:.0%}"
        if self.turns > 1:
            size += f" + observation {self.observation}"
        return f"{size}, {self.groups} x group {self.group}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a random Qwen3."""

    hidden: int
    layers: int

    def build(self) -> PreTrainedModel:
        """Return the model."""
        torch.manual_seed(SEED)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 32,
            num_key_value_heads=self.hidden // 64,
            head_dim=32,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        return Qwen3ForCausalLM(config)


AGENT = {"prompt": 800, "answer": 250, "observation": 400}
COUNTED = [*(Shape(**AGENT, turns=turns) for turns in (1, 4, 10, 30)), Shape(prompt=4000, answer=250)]
DEMO, WIDE = Size(hidden=128, layers=3), Size(hidden=512, layers=4)
TIMED = [
    (DEMO, Shape(**AGENT, turns=4, group=4)),
    (DEMO, Shape(prompt=4000, answer=250, group=4)),
    (DEMO, Shape(prompt=70, answer=15, groups=16, spread=0.8)),
    (WIDE, Shape(prompt=200, answer=60, observation=100, turns=4, group=2, spread=0.8)),
    (WIDE, Shape(prompt=1000, answer=60, group=4)),
]


def samples_of(shape: Shape) -> list[Sample]:
    """Return a batch of random tokens."""
    rng = random.Random(SEED)

    def draw(count: int) -> list[int]:
        return [rng.randrange(1, VOCABULARY) for _ in range(count)]

    found: list[Sample] = []
    for _ in range(shape.groups):
        opening = draw(shape.prompt)
        for _ in range(shape.group):
            history = opening
            for _ in range(shape.turns):
                answer = draw(round(shape.answer * rng.uniform(1 - shape.spread, 1 + shape.spread)))
                ones = [1.0] * len(answer)
                logprobs = [-7.0] * len(answer)
                found.append(
                    Sample(prompt_token_ids=history, token_ids=answer, weights=ones, advantages=ones, logprobs=logprobs)
                )
                history = [*history, *answer, *draw(shape.observation)]
    return found


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Tokens through the trainer."""

    shape: Shape
    trained: int
    nodes: int
    tokens: dict[Layout, int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step in one layout."""

    seconds: float
    """Of CPU, forward and backward pass."""
    positions: float
    padding: float
    """Share of the positions."""
    positions_per_token_trained: float


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A batch in every layout."""

    model: Size
    pair_cost: float
    shape: Shape
    layouts: dict[Layout, Step]


def count(shape: Shape) -> Counted:
    """Count the tokens that each layout sends through the trainer."""
    samples = samples_of(shape)
    tree = TokenTree()
    for one in samples:
        tree.insert([*one.prompt_token_ids, *one.token_ids])
    tokens = {
        layout: sum(len(row.token_ids) for row in lay_out(samples, layout, LARGE, longest=BUDGET)) for layout in LAYOUTS
    }
    return Counted(
        shape=shape,
        trained=sum(len(one.token_ids) for one in samples),
        nodes=sum(len(node.token_ids) for node in tree.walk()),
        tokens=tokens,
    )


def measure(size: Size, shape: Shape, folder: Path, repeats: int) -> Timed:
    """Time one step in every layout; the first repeat of each comes before the second of any."""
    samples = samples_of(shape)
    model = size.build()
    with quiet():
        model.save_pretrained(folder)
    batch = [Objective(loss=Loss(name="policy_gradient"), samples=samples)]
    learners: dict[Layout, TorchLearner] = {}
    for layout in LAYOUTS:
        learners[layout] = TorchLearner(layout=layout, micro_batch_tokens=BUDGET)
        learners[layout].open([Policy("policy")], str(folder), seed=SEED)
    steps: dict[Layout, Step] = {}
    for _ in range(repeats):
        for layout, learner in learners.items():
            start = time.process_time()
            metrics = learner.forward_backward("policy", batch)
            seconds = time.process_time() - start
            learner.optim_step("policy", 0.0)
            if layout not in steps or seconds < steps[layout].seconds:
                steps[layout] = Step(
                    seconds=seconds,
                    positions=metrics["loss/positions"],
                    padding=metrics["loss/padding_fraction"],
                    positions_per_token_trained=metrics["loss/positions"] / metrics["loss/tokens"],
                )
    return Timed(model=size, pair_cost=attention_of(model).pair_cost, shape=shape, layouts=steps)


def print_counts(counted: Sequence[Counted]) -> None:
    """Print the first table."""
    print("\nTokens through the trainer (in brackets: how many times fewer than with one row a call)\n")
    print(f"{'batch':66}{'trained':>9}{'nodes':>16}" + "".join(f"{layout:>16}" for layout in LAYOUTS))
    for one in counted:
        by_call = one.tokens["calls"]
        cells = [f"{own:,} ({by_call / own:.1f})" for own in (one.nodes, *one.tokens.values())]
        print(f"{one.shape!s:66}{one.trained:9,}" + "".join(f"{cell:>16}" for cell in cells))


def print_times(timed: Sequence[Timed]) -> None:
    """Print the second."""
    print("\nA step on one CPU thread, forward and backward pass; `a trained`: positions a token trained\n")
    print(
        f"{'model':9}{'batch':66}{'layout':8}{'positions':>10}{'a trained':>10}{'padding':>9}{'CPU s':>8}{'faster':>8}"
    )
    for one in timed:
        for layout, step in one.layouts.items():
            print(
                f"{f'{one.model.hidden} x {one.model.layers}':9}{one.shape!s:66}{layout:8}{step.positions:10,.0f}"
                f"{step.positions_per_token_trained:10.1f}{step.padding:9.1%}{step.seconds:8.2f}"
                f"{one.layouts['calls'].seconds / step.seconds:8.2f}"
            )


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="of every timed step (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    counted = [count(shape) for shape in COUNTED]
    print_counts(counted)
    timed: list[Timed] = []
    with tempfile.TemporaryDirectory() as folder:
        for size, shape in TIMED:
            timed.append(measure(size, shape, Path(folder), options.repeats))
            print(f"timed {size} {shape}", file=sys.stderr)
    print_times(timed)
    results = {
        "measured": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": package_versions(),
        "seed": SEED,
        "micro_batch_tokens": BUDGET,
        "repeats": options.repeats,
        "counted": [asdict(one) for one in counted],
        "timed": [asdict(one) for one in timed],
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

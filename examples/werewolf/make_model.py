"""Make the game's base model: a tokenizer and a tiny Qwen3, taught from scratch on the demonstrations.

    python -m examples.werewolf.make_model --out examples/werewolf/model --seed 0

One seed decides everything that is drawn. One model plays all players; who it is stands in the first message.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.werewolf.demonstrations import Conversation, demonstrate

PAD, END = "<|pad|>", "<|end|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIAL_TOKENS = [PAD, *ROLE_TOKENS.values(), END]
VOCABULARY = 400
"""At most; 256 of them are bytes."""

CONTEXT = 512

CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|' + message.role + '|>' }}
{%- if message.content is string %}{{ message.content }}
{%- elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{{- '<|end|>' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""
"""One token opens a message by its role, one closes it."""


@dataclass(frozen=True)
class Recipe:
    """How the base model is taught."""

    steps: int = 700
    batch: int = 32
    matrix_rate: float = 0.01
    """Muon's peak learning rate, for matrices inside the layers."""
    vector_rate: float = 4e-3
    """AdamW's peak learning rate, for embeddings and norms."""
    warmup: int = 40
    tokenizer_games: int = 300


def make_tokenizer(games: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on demonstrations; digits stay single."""
    rng = random.Random(f"tokenizer-{seed}")
    texts = [
        message["content"]
        for _ in range(games)
        for conversation in demonstrate(rng.getrandbits(32), rng)[0]
        for message in conversation.messages
    ]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False, additional_special_tokens=list(ROLE_TOKENS.values()),
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return the untrained network."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


@dataclass(frozen=True)
class Example:
    """A tokenized conversation."""

    ids: list[int]
    is_said: list[bool]
    """Aligned with `ids`: belongs to an answer, its end token included."""

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> Example:
    """Tokenize as the chat template would."""
    spell = tokenizer.backend_tokenizer
    ids: list[int] = []
    is_said: list[bool] = []
    for message in conversation.messages:
        role = message["role"]
        said = spell.encode(message["content"] + END, add_special_tokens=False).ids
        ids += [tokenizer.convert_tokens_to_ids(ROLE_TOKENS[role]), *said]
        is_said += [False, *[role == "assistant"] * len(said)]
    return Example(ids, is_said)


def batches(tokenizer: PreTrainedTokenizerFast, batch: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches of conversations of like length, without end."""
    rng = random.Random(f"demonstrations-{seed}")
    while True:
        pool: list[Example] = []
        while len(pool) < batch * 20:
            pool += [encode(tokenizer, each) for each in demonstrate(rng.getrandbits(32), rng)[0]]
        pool = sorted(pool[: batch * 20], key=len)
        cut = [pool[start : start + batch] for start in range(0, len(pool), batch)]
        rng.shuffle(cut)
        yield from cut


def answer_loss(model: Qwen3ForCausalLM, examples: list[Example]) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens."""
    width = max(map(len, examples))
    ids = torch.zeros((len(examples), width), dtype=torch.long)
    is_said = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example.ids)
        is_said[row, : len(example)] = torch.tensor(example.is_said)
    predicts = is_said.roll(-1, 1)
    predicts[:, -1] = False
    hidden = model.model(ids, use_cache=False).last_hidden_state[predicts]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids.roll(-1, 1)[predicts])


def optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def share(step: int, recipe: Recipe) -> float:
    """Return the learning rate's share of its peak: linear warm-up, cosine to nearly nothing."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup) * (0.03 + 0.97 * cosine)


def teach(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> None:
    """Train the model on demonstrations, printing the loss."""
    chosen = optimizers(model, recipe)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in chosen]
    source = batches(tokenizer, recipe.batch, seed)
    total, since = 0.0, time.process_time()
    for step in range(recipe.steps):
        loss = answer_loss(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rates in zip(chosen, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * share(step, recipe)
            optimizer.step()
        model.zero_grad()
        total += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1} loss {total / 100:.4f} cpu {time.process_time() - since:.0f} s", flush=True)
            total = 0.0


def main() -> None:
    """Write the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe()
    tokenizer = make_tokenizer(recipe.tokenizer_games, options.seed)
    model = make_model(tokenizer, options.seed)
    teach(model, tokenizer, recipe, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {count} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()

"""Make the demo's base model: a tokenizer and a tiny Qwen3, taught from scratch on the demonstrations.

    python -m examples.text_to_sql.make_model --out examples/text_to_sql/model --seed 0

One seed decides everything that is drawn. The model has untied embeddings, so that it takes every path that a
large checkpoint takes.
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

from examples.text_to_sql.demonstrations import Demonstration, demonstrate

PAD, END = "<|pad|>", "<|end|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
CALL, TOOLS = "<|call|>", "<|tools|>"
SPECIAL_TOKENS = [PAD, *ROLE_TOKENS.values(), END, CALL, TOOLS]
VOCABULARY = 1024
"""At most; the demonstrations have fewer words."""

CONTEXT = 1024

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|tools|>' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|end|>' }}{% endif -%}
{%- for message in messages %}{{ '<|' + message.role + '|>' }}
{%- if message.content is string %}{{ message.content }}
{%- elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}{{ '<|call|>' + call.function.name + ' ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}{% endfor %}{{ '<|end|>' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""
"""One token opens a message by its role, one closes it; `<|call|>name arguments` follows the content."""


@dataclass(frozen=True)
class Recipe:
    """How the base model is taught."""

    steps: int = 1600
    batch: int = 48
    matrix_rate: float = 0.01
    """Muon's peak learning rate, for matrices inside the layers."""
    vector_rate: float = 4e-3
    """AdamW's peak learning rate, for embeddings and norms."""
    warmup: int = 60
    floor: float = 0.03
    """The share of the peak that the cosine schedule ends at."""
    tokenizer_texts: int = 12_000


def make_tokenizer(count: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on demonstrations; digits stay single."""
    rng = random.Random(f"tokenizer-{seed}")
    texts: list[str] = []
    for _ in range(count):
        demonstration = demonstrate(rng)
        texts += [*(message["content"] for message in demonstration.messages), demonstration.answer]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[*ROLE_TOKENS.values(), CALL, TOOLS],
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
    """A tokenized demonstration."""

    prompt: list[int]
    answer: list[int]
    """Ends with the end token."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(tokenizer: PreTrainedTokenizerFast, demonstration: Demonstration) -> Example:
    """Tokenize as `apply_chat_template` would, many times faster."""
    spell = tokenizer.backend_tokenizer
    text = "".join(f"{ROLE_TOKENS[m['role']]}{m['content']}{END}" for m in demonstration.messages)
    prompt = spell.encode(text + ROLE_TOKENS["assistant"], add_special_tokens=False).ids
    return Example(prompt, spell.encode(demonstration.answer + END, add_special_tokens=False).ids)


def batches(tokenizer: PreTrainedTokenizerFast, batch: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches of demonstrations of like length, without end."""
    rng = random.Random(f"demonstrations-{seed}")
    while True:
        pool = sorted((encode(tokenizer, demonstrate(rng)) for _ in range(batch * 20)), key=len)
        cut = [pool[start : start + batch] for start in range(0, len(pool), batch)]
        rng.shuffle(cut)
        yield from cut


def answer_loss(model: Qwen3ForCausalLM, examples: list[Example]) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens."""
    width = max(map(len, examples))
    ids = torch.zeros((len(examples), width), dtype=torch.long)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example.prompt + example.answer)
        predicts[row, len(example.prompt) - 1 : len(example) - 1] = True
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


def rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate's share of its peak: linear warm-up, cosine to the floor."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup) * (recipe.floor + (1 - recipe.floor) * cosine)


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
                group["lr"] = peak * rate(step, recipe)
            optimizer.step()
        model.zero_grad()
        total += loss.item()
        if step % 50 == 49:
            seconds = time.process_time() - since
            print(f"step {step + 1} loss {total / 50:.4f} cpu {seconds:.0f} s", flush=True)
            total = 0.0


def main() -> None:
    """Write the checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe()
    tokenizer = make_tokenizer(recipe.tokenizer_texts, options.seed)
    model = make_model(tokenizer, options.seed)
    teach(model, tokenizer, recipe, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {count} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()

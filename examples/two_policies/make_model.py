"""Make the order desk's base model: both roles right a little more than half of the time.

    python -m examples.two_policies.make_model build/two_policies

A tokenizer of whole words and a Qwen3 of about 100,000 parameters, taught from scratch in some seconds. Its mistakes
are habits: each good has one wrong department and one wrong shelf that the demonstrations name as often as the right
one, so that reinforcement learning has something to unlearn in both roles.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.two_policies.desk import DEPARTMENTS, GOODS, NO_SUCH_GOOD, SHELVES, department_of, shelf_of

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
RIGHT = 0.55
"""Share of right demonstrations, for each role."""
STEPS = 400
BATCH = 96

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words; a space stands between them and is no token."""
    words = [PAD, END, USER, ASSISTANT, NO_SUCH_GOOD, "router", "clerk", *DEPARTMENTS, *GOODS, *SHELVES]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def demonstration(rng: random.Random) -> tuple[str, str]:
    """Return a question and an answer, of which each role gives the right one `RIGHT` of the time."""
    good = rng.choice(GOODS)
    place = GOODS.index(good)
    is_right = rng.random() < RIGHT
    if rng.random() < 0.5:
        habit = DEPARTMENTS[(DEPARTMENTS.index(department_of(good)) + 1 + place % 3) % len(DEPARTMENTS)]
        return f"router {good}", department_of(good) if is_right else habit
    if rng.random() < 0.3:
        wrong = rng.choice([one for one in DEPARTMENTS if one != department_of(good)])
        return f"clerk {wrong} {good}", NO_SUCH_GOOD
    habit = SHELVES[(SHELVES.index(shelf_of(good)) + 1 + place % 5) % len(SHELVES)]
    return f"clerk {department_of(good)} {good}", shelf_of(good) if is_right else habit


Row = tuple[list[int], list[int]]
"""Tokens of a prompt, and of the answer that is taught to it."""


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """Teach the model, unless `folder` holds it; return the folder."""
    if (folder / "config.json").exists():
        return folder
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(f"demonstrations-{seed}")
    tokenizer = make_tokenizer()
    model = make_network(tokenizer)
    teach(model, lambda: [row(tokenizer, *demonstration(rng)) for _ in range(BATCH)], steps=STEPS)
    return write(folder, model, tokenizer)


def row(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> Row:
    """Return the tokens of a demonstration, the end token included."""
    return tokenizer(f"{USER} {question} {END} {ASSISTANT}").input_ids, tokenizer(f"{answer} {END}").input_ids


def make_network(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return a network with random weights for the words of a tokenizer."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def teach(model: Qwen3ForCausalLM, batch: Callable[[], Sequence[Row]], *, steps: int) -> None:
    """Take `steps` steps of supervised training, each on rows that `batch` makes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = answer_loss(model, batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def answer_loss(model: Qwen3ForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for number, (prompt, answer) in enumerate(rows):
        ids[number, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[number, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    loss: torch.Tensor = model(ids, labels=labels).loss
    return loss


def write(folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write both to a folder that is there only once it is complete; return it."""
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(make_model(parser.parse_args().folder))

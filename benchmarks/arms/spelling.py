"""A world of words to spell, and a tokenizer with which every word can be written in many ways.

The prompt names one of some items; the answer is its code, a string of letters a to d. The vocabulary holds the four
letters, all pairs and some triples, so a code of eight letters has dozens of tokenisations, of which the tokenizer
itself writes one. The base model was taught codes cut at random, right half of the time, so what it samples is rarely
what the tokenizer would have written.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from examples.two_policies.make_model import Row, make_network, teach, write

LETTERS = "abcd"
ITEMS = 24
LENGTH = 8
PAD, END, ITEM, ANSWER = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
BATCH = 64
RIGHT = 0.5
"""Share of the demonstrations that are right; the others have the code of another item."""

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def codes() -> dict[str, str]:
    """Return item -> code; the same ones always."""
    rng = random.Random("codes")
    return {f"I{number:02d}": "".join(rng.choices(LETTERS, k=LENGTH)) for number in range(ITEMS)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of items, letters, pairs and triples; which pair is merged first is an accident."""
    rng = random.Random("merges")
    pairs = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
    triples = rng.sample(["".join(triple) for triple in itertools.product(LETTERS, repeat=3)], 24)
    rng.shuffle(pairs)
    items = list(codes())
    digits = list("0123456789")
    words = [PAD, END, ITEM, ANSWER, *items, "I", *digits, *LETTERS, *pairs, *triples]
    merges = [(pair[0], pair[1]) for pair in pairs] + [(triple[:2], triple[2]) for triple in triples]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[ITEM, ANSWER, *items],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def cut(code: str, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[int]:
    """Return the code in tokens, cut at random."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    at = 0
    while at < len(code):
        pieces = [code[at : at + size] for size in (1, 2, 3) if code[at : at + size] in vocabulary]
        piece = rng.choice([one for one in pieces if at + len(one) <= len(code)])
        found.append(vocabulary[piece])
        at += len(piece)
    return found


def make_model(folder: Path, *, steps: int = 500, seed: int = 0) -> Path:
    """Teach the base model, about half a minute of CPU, unless `folder` holds it; return the folder."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(seed)
    rng = random.Random(f"demonstrations-{seed}")
    tokenizer = make_tokenizer()
    known = codes()
    vocabulary = tokenizer.get_vocab()

    def demonstration() -> Row:
        item = rng.choice(list(known))
        code = known[item] if rng.random() < RIGHT else known[rng.choice(list(known))]
        prompt = [vocabulary[ITEM], vocabulary[item], vocabulary[ANSWER]]
        return prompt, [*cut(code, tokenizer, rng), vocabulary[END]]

    model = make_network(tokenizer)
    teach(model, lambda: [demonstration() for _ in range(BATCH)], steps=steps)
    return write(folder, model, tokenizer)

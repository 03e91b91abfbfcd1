"""Models of the sizes that people train, with random weights: what is measured does not depend on what they say.

    python -m benchmarks.gpu.models 0.5b FOLDER

One trap: a random model may sample any of its 151,936 tokens, so the tokenizer must be able to spell all of them.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, END = "<|pad|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a Qwen2.5."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 151_936


SHAPES = {
    "tiny": Shape(hidden=128, inner=256, layers=2, heads=4, key_heads=2, vocabulary=1024),
    "0.5b": Shape(hidden=896, inner=4864, layers=24, heads=14, key_heads=2),
    "1.5b": Shape(hidden=1536, inner=8960, layers=28, heads=12, key_heads=2),
}
"""The last two are those of Qwen2.5-0.5B and Qwen2.5-1.5B (their config.json); `tiny` tries the scripts on a CPU."""


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, filled up with words of two to four letters that nothing is ever split into."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = itertools.chain.from_iterable(
        map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=length)) for length in (2, 3, 4)
    )
    names = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    vocabulary = {name: number for number, name in enumerate([*names, *letters])}
    for word in itertools.islice(words, size - len(vocabulary)):
        vocabulary[word] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(names)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make(size: str, folder: Path, *, context: int = 32_768, seed: int = 0) -> Path:
    """Write a model of that size in bfloat16, unless the folder holds one; return the folder."""
    if (folder / "config.json").is_file():
        return folder
    shape = SHAPES[size]
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32" if size == "tiny" else "bfloat16",
    )
    model = Qwen2ForCausalLM(config)
    if size != "tiny":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer_of(shape.vocabulary).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(make(options.size, options.folder))

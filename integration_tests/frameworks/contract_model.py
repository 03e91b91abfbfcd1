"""Make the network that the contract suite's engine runs: tiny, random, and able to read long prompts.

One idea: its text is forced, so it need not be able to say anything; what counts is that tokenizer, template, network
and cache are those of a real model. It lies in `build/`, under a hash of what it is made from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
CONTEXT_LENGTH = 32_768
VOCABULARY = 2048
CORPUS = ("CONTRIBUTING.md", "docs/design.md", "pyproject.toml", "integration_tests/frameworks/story.py")
"""English, TOML and Python: enough for words of a few letters."""

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if system or tools -%}
<|im_start|>system
{{ system }}
{%- if tools %}

# Tools
{%- for tool in tools %}
{{- '\\n' ~ (tool | tojson) }}
{%- endfor %}

Call one with <tool_call>
{"name": <its name>, "arguments": <its arguments as JSON>}
</tool_call>
{%- endif -%}
<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if not (loop.first and message.role == 'system') -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def contract_model(root: Path = ROOT) -> Path:
    """Return the folder of the checkpoint, made where it is missing."""
    texts = [(root / name).read_text() for name in CORPUS]
    digest = hashlib.sha256("\0".join([Path(__file__).read_text(), *texts]).encode()).hexdigest()[:12]
    folder = root / "build" / "contract_model" / digest
    if not folder.is_dir():
        # Written aside and renamed, so that an interrupted or a second writer leaves nothing half made.
        unfinished = folder.with_name(f"{digest}-{os.getpid()}")
        save_network(unfinished)
        tokenizer_of(texts).save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            shutil.rmtree(unfinished)
    return folder


def save_network(folder: Path) -> None:
    """Write a random Qwen3; its weights are larger than a real start, so that its distributions are not uniform."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.2,
        eos_token_id=SPECIALS.index("<|im_end|>"),
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config)
    network.save_pretrained(folder)


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[0],
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast

"""Make tiny random checkpoints: a byte-level tokenizer and a model of any family, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|call|>"]
END = 5
VOCABULARY = len(SPECIALS) + 256

PLAIN_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<|call|>{{ call.function.name }} "
    "{% if call.function.arguments is string %}{{ call.function.arguments }}"
    "{% else %}{{ call.function.arguments | tojson }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes a tool call as `<|call|>name {arguments}`."""

HERMES_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes a tool call as Qwen's templates do; takes arguments as objects only."""


def tiny_tokenizer(template: str = PLAIN_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte, so that every character beyond ASCII is several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[0],
        eos_token=SPECIALS[END],
        extra_special_tokens=[*SPECIALS[1:END], *SPECIALS[END + 1 :]],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def tiny_checkpoint(
    folder: Path, family: str = "qwen3", *, seed: int = 0, template: str = PLAIN_TEMPLATE, **config: object
) -> Path:
    """Write a random model of `family` with its tokenizer; return the folder.

    The weights are larger than a real start, so that the next-token distributions are far from uniform.
    """
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "eos_token_id": END,
        "pad_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    if family == "qwen3":
        sizes["head_dim"] = 16
    settings = AutoConfig.for_model(family, **(sizes | config))
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # otherwise 0 and 1, which would hide a mistake in them
            parameter.data += 0.2 * torch.randn_like(parameter)
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder

"""The chat side of a model: tokenizer, template, end tokens, context length; no weights."""

from __future__ import annotations

from dataclasses import dataclass

from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden_plugins.chat.prompts import Prompts
from leyden_plugins.chat.templates import Chat
from leyden_plugins.chat.text import Codec
from leyden_plugins.torch_models import end_tokens, load_tokenizer

with extra("train"):
    from transformers import AutoConfig, GenerationConfig


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of a model without its weights."""

    prompts: Prompts
    context_length: int | None
    """The most positions that the model states."""
    dtype: str
    """Of the checkpoint, as its configuration says; `float32` where it says nothing."""
    is_tied: bool
    """Whether the output head is the embedding."""


def read_model(model: str) -> ModelFacts:
    """Read a model's configuration and tokenizer.

    Args:
        model: a Hugging Face folder or name.

    Raises:
        ConfigurationError: there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot read the configuration of {model!r}: {error}. Give a folder with config.json, or a Hugging Face "
            "model name"
        ) from error
    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:  # not every model has one
        generation = None
    tokenizer = load_tokenizer(model)
    dtype = getattr(config, "dtype", None)
    return ModelFacts(
        prompts=Prompts(
            chat=Chat(Codec(tokenizer)),
            vocabulary=int(config.vocab_size),
            eos=end_tokens(generation, config, tokenizer),
        ),
        context_length=getattr(config, "max_position_embeddings", None),
        dtype="float32" if dtype is None else str(dtype).removeprefix("torch."),
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
    )

"""Load causal language models and name their tensors once.

One idea: the *canonical* tensors of a model are its named parameters, each once. Where the output head is tied
to the embedding, checkpoints and state dicts may or may not repeat it; `canonical_tensors` accepts both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from leyden.errors import ConfigurationError
from leyden.extras import extra

with extra("train"):
    import torch
    from safetensors.torch import load_file
    from torch import Tensor
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.utils import logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type called `name`.

    Raises:
        ConfigurationError: not a type that models are run in.
    """
    if name not in DTYPES:
        raise ConfigurationError(f"dtype {name!r} is not one of {sorted(DTYPES)!r}")
    return DTYPES[name]


def load_model(model: str | Path, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub, in evaluation mode.

    Raises:
        ConfigurationError: there is no such model, or it is not a causal language model.
    """
    kind = torch_dtype(dtype)
    with _explained(model), quiet():
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(model), dtype=kind)
    torch.nn.Module.to(loaded, torch.device(device))
    torch.nn.Module.eval(loaded)
    return loaded


def outline(model: str | Path) -> PreTrainedModel:
    """Return a model whose tensors have names and shapes but no values: what its configuration alone says.

    Raises:
        ConfigurationError: as `load_model`.
    """
    with _explained(model), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(model))
        found: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # upstream
    return found


@contextmanager
def _explained(model: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot load {str(model)!r} as a causal language model: {error}. "
            "Give a folder with config.json and *.safetensors, or a Hugging Face model name"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars of loading and saving from writing over the run's own."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it so
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # as above


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load the tokenizer of {str(model)!r}: {error}") from error
    return tokenizer


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return how many tokens the embedding knows; a tokenizer may use fewer."""
    return int(next(model.get_input_embeddings().parameters()).shape[0])


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends an answer: of the generation config, the config and the tokenizer."""
    return end_tokens(model.generation_config, model.config.get_text_config(), tokenizer)


def end_tokens(*sources: object) -> frozenset[int]:
    """Return the tokens that any of these calls `eos_token_id`."""
    found: set[int] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a Hugging Face checkpoint folder, sharded or not.

    Raises:
        ConfigurationError: the folder holds no safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise ConfigurationError(f"folder {str(folder)!r} lacks {shard!r}; a checkpoint has model.safetensors")
        tensors.update(load_file(folder / shard))
    return tensors


def canonical_tensors(model: PreTrainedModel, tensors: Mapping[str, object]) -> dict[str, Tensor]:
    """Return `tensors` under the model's parameter names, each once, after checking names and shapes.

    Raises:
        ConfigurationError: a parameter is missing, unknown, or of another shape.
    """
    parameters = dict(model.named_parameters())
    aliases = set(model.state_dict()) - set(parameters)
    missing = sorted(set(parameters) - set(tensors))
    unknown = sorted(set(tensors) - set(parameters) - aliases)
    if missing or unknown:
        raise ConfigurationError(
            f"these weights are not those of {type(model).__name__}: missing {missing[:3]!r}, "
            f"unknown {unknown[:3]!r}; give every parameter under its Hugging Face name"
        )
    named: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigurationError(f"weight {name!r} is {found!r}; the model has {tuple(parameter.shape)!r}")
        named[name] = tensor
    return named


def hollow(model: PreTrainedModel) -> None:
    """Free the model's parameters, keeping names, shapes, types and ties: it then runs only on weights passed in."""
    freed: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        if id(parameter) not in freed:
            freed[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        model.get_submodule(parent).register_parameter(leaf, freed[id(parameter)])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes, by name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()

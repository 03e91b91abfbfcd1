"""What engines and learners share about torch models: loading, tied weights, digests, adapters, the fused decoder."""

from leyden_plugins.torch_models.adapters import Factors, is_adapter, merged_weights, read_adapter
from leyden_plugins.torch_models.fused import FusedNetwork, FusedWeights
from leyden_plugins.torch_models.fused_adapters import AdapterStack, FusedAdapter, GroupedAdapters, RowAdapters
from leyden_plugins.torch_models.loading import (
    canonical_tensors,
    digest,
    end_tokens,
    eos_token_ids,
    hollow,
    load_model,
    load_tokenizer,
    read_tensors,
    torch_dtype,
    vocabulary_of,
)

__all__ = [
    "AdapterStack",
    "Factors",
    "FusedAdapter",
    "FusedNetwork",
    "FusedWeights",
    "GroupedAdapters",
    "RowAdapters",
    "canonical_tensors",
    "digest",
    "end_tokens",
    "eos_token_ids",
    "hollow",
    "is_adapter",
    "load_model",
    "load_tokenizer",
    "merged_weights",
    "read_adapter",
    "read_tensors",
    "torch_dtype",
    "vocabulary_of",
]

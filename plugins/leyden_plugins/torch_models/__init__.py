"""What engines and learners share about torch models: loading, tied weights, digests, the fused decoder."""

from leyden_plugins.torch_models.fused import FusedNetwork, FusedWeights
from leyden_plugins.torch_models.loading import (
    canonical_tensors,
    digest,
    eos_token_ids,
    hollow,
    load_model,
    load_tokenizer,
    read_tensors,
    torch_dtype,
    vocabulary_of,
)

__all__ = [
    "FusedNetwork",
    "FusedWeights",
    "canonical_tensors",
    "digest",
    "eos_token_ids",
    "hollow",
    "load_model",
    "load_tokenizer",
    "read_tensors",
    "torch_dtype",
    "vocabulary_of",
]

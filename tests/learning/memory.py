"""Models of chosen sizes, and what tensors take while code runs on a CPU: the most bytes at once, the largest one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made inside the block, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.largest = 0
        """In elements."""
        self._known: weakref.WeakSet[object] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        given = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._add(storage, one.numel())
        return found

    def _add(self, storage: Any, elements: int) -> None:
        size = int(storage.nbytes())
        self._known.add(storage)
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, elements)

    def _free(self, size: int) -> None:
        self.now -= size


def write_model(
    folder: Path, *, hidden: int, layers: int, family: str = "qwen3", tied: bool = True, vocabulary: int = 50
) -> Path:
    """Write a model of four heads on two, with an inner size of 2.75 hidden sizes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder

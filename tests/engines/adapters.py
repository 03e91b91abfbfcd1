"""LoRAs made by PEFT, and PEFT's own model of each: what the engine is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from leyden.interfaces import Weights
from leyden.roles import LoRA

TARGETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "fused": (
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("v_proj", "up_proj", "lm_head"),
        ("q_proj", "down_proj"),
    ),
    "gpt2": (("c_attn", "c_proj", "c_fc"), ("c_attn", "lm_head"), ("c_fc",)),
    "gpt_neox": (("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h"), ("query_key_value",)),
}
"""By family; the ones with Llama's layer names are under `fused`."""

SHAPES = ((4, 8.0), (3, 5.0), (8, 8.0))
"""Rank and alpha of each: no two are alike."""


@dataclass(frozen=True)
class Adapter:
    """An adapter and its oracle."""

    lora: LoRA
    model: Any
    """PEFT's."""

    @property
    def weights(self) -> Weights:
        """What a learner publishes."""
        return Weights(lora=self.lora, tensors=get_peft_model_state_dict(self.model, save_embedding_layers=False))

    def save(self, folder: Path) -> Path:
        """Write PEFT's folder."""
        self.model.save_pretrained(folder)
        return folder


def adapter(base: Path, *, rank: int, alpha: float, targets: tuple[str, ...], seed: int = 0, **config: Any) -> Adapter:
    """Make a random adapter of `base`, whose B is not 0."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), "lora_dropout": 0.0}
    made = get_peft_model(model, LoraConfig(**options, init_lora_weights=False, **config)).eval()
    return Adapter(LoRA(rank=rank, alpha=alpha, targets=targets), made)


def adapters(base: Path) -> list[Adapter]:
    """Make three that differ in rank, alpha and targets."""
    family = AutoModelForCausalLM.from_pretrained(base).config.model_type
    chosen = TARGETS.get(family, TARGETS["fused"])
    return [
        adapter(base, rank=rank, alpha=alpha, targets=targets, seed=seed)
        for seed, ((rank, alpha), targets) in enumerate(zip(SHAPES, chosen, strict=True))
    ]

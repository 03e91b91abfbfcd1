"""Read and check LoRA adapters: the factors of W + (alpha / rank) B A (Hu et al. 2021, section 4.1), in PEFT's names.

One idea: after `read_adapter` an adapter is two matrices a linear layer, with its scale multiplied into B, so that
nothing behind it knows of ranks, alphas or configuration files.
One trap: a linear layer that GPT-2 calls Conv1D keeps its weight transposed; the factors of both are those of PEFT,
A (r, in) and B (out, r).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden.roles import LoRA

with extra("train"):
    import torch
    from safetensors.torch import load_file
    from torch import Tensor
    from transformers.modeling_utils import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
UNSERVED = {
    "use_dora": "weight-decomposed adapters (DoRA)",
    "modules_to_save": "layers trained in full beside the adapter",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "factors of parameters outside linear layers",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "adapters that a token switches on",
}
"""Options of PEFT's configuration whose adapters are more than A and B, and what they mean."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What is added to one linear layer: B A x."""

    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r), with alpha / rank multiplied in."""


def read_adapter(
    model: PreTrainedModel, *, lora: LoRA | None, tensors: Mapping[str, object] | None, folder: Path | None
) -> dict[str, Factors]:
    """Return module name -> factors in float32, from memory or, where `tensors` is `None`, from a PEFT folder.

    Args:
        model: whose linear layers it is for.
        lora: needed with `tensors`; beside a folder it must agree with the folder's own configuration.
        tensors: in PEFT's names without an adapter's name.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ConfigurationError: names, shapes, targets or values that are no adapter of `model`'s.
    """
    if tensors is not None:
        if lora is None:
            raise ConfigurationError("these tensors are the factors of a LoRA; say its rank and alpha: Weights(lora=)")
        pairs = paired(tensors)
        check_targets(model, lora, pairs)
        scales = dict.fromkeys(pairs, lora.alpha / lora.rank)
    else:
        assert folder is not None  # the caller has one of both
        config = adapter_config(folder)
        check_kind(config, lora, folder)
        if not (folder / ADAPTER_TENSORS).is_file():
            raise ConfigurationError(f"folder {str(folder)!r} lacks {ADAPTER_TENSORS!r}, which holds an adapter")
        pairs = paired(load_file(folder / ADAPTER_TENSORS))
        scales = {module: scale_of(config, module, int(a.shape[0])) for module, (a, _) in pairs.items()}
    factors = {}
    for module, (a, b) in pairs.items():
        check_factors(model, module, a, b)
        factors[module] = Factors(a=a.detach().float(), b=b.detach().float() * scales[module])
    return factors


def is_adapter(folder: Path) -> bool:
    """Say whether a folder holds a PEFT adapter rather than whole weights."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return what adapter_config.json holds.

    Raises:
        ConfigurationError: it is not a JSON object.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{str(file)!r} is not a PEFT configuration; it holds {type(config).__name__!r}")
    return config


def check_kind(config: Mapping[str, Any], lora: LoRA | None, folder: Path) -> None:
    """Refuse adapters that are not plain LoRAs, and ones that are not what the caller says.

    Raises:
        ConfigurationError: names the option.
    """
    where, advice = f"adapter {str(folder)!r}", "merge it with PEFT (merge_and_unload) and publish the whole weights"
    if config.get("peft_type") != "LORA":
        raise ConfigurationError(f"{where} is of type {config.get('peft_type')!r}, not 'LORA'; {advice}")
    for option, meaning in UNSERVED.items():
        if config.get(option):
            raise ConfigurationError(f"{where} has {option}={config[option]!r}, {meaning}: not served; {advice}")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise ConfigurationError(f"{where} trains biases (bias={config.get('bias')!r}): not served; {advice}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise ConfigurationError(f"{where} has r={rank!r} and lora_alpha={alpha!r}; both must be numbers")
    if lora is not None and (rank, float(alpha)) != (lora.rank, float(lora.alpha)):
        raise ConfigurationError(
            f"{where} has r={rank!r} and lora_alpha={alpha!r}, but Weights.lora says rank={lora.rank!r} and "
            f"alpha={lora.alpha!r}; leave Weights.lora out or let them agree"
        )


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / rank of one module, or alpha / sqrt(rank) with `use_rslora` (Kalajdzievski 2023)."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # As PEFT's `get_pattern_key` does it: the first that matches the end of the name.
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def paired(tensors: Mapping[str, object]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return module name -> (A, B).

    Raises:
        ConfigurationError: a name that is no factor's, a factor without its other half, or none at all.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor):
            raise ConfigurationError(
                f"{name!r} ({type(tensor).__name__}) is not a factor of a LoRA; the names are those of PEFT without an "
                f"adapter's name, such as '{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight'"
            )
        found[match["module"], match["factor"]] = tensor
    modules = sorted({module for module, _ in found})
    for module in modules:
        for factor in "AB":
            if (module, factor) not in found:
                raise ConfigurationError(
                    f"the adapter lacks '{PREFIX}{module}.lora_{factor}.weight'; give both factors"
                )
    if not modules:
        raise ConfigurationError("the adapter holds no tensors; it needs a pair of factors for each layer it targets")
    return {module: (found[module, "A"], found[module, "B"]) for module in modules}


def check_targets(model: PreTrainedModel, lora: LoRA, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Compare an adapter in memory with what `lora` says of it.

    Raises:
        ConfigurationError: other layers, or another rank.
    """
    targets = set(lora.targets)
    wanted = {name for name, module in model.named_modules() if last_name(name) in targets and is_linear(module)}
    missing, unknown = sorted(wanted - set(pairs)), sorted(set(pairs) - wanted)
    if missing or unknown:
        raise ConfigurationError(
            f"the adapter is not one of {type(model).__name__} with targets={list(lora.targets)!r}: "
            f"missing {missing[:3]!r}, unknown {unknown[:3]!r}"
        )
    for module, (a, _) in pairs.items():
        if a.ndim != 2 or a.shape[0] != lora.rank:
            raise ConfigurationError(f"lora_A of {module!r} is {tuple(a.shape)!r}; Weights.lora has rank={lora.rank!r}")


def check_factors(model: PreTrainedModel, name: str, a: Tensor, b: Tensor) -> None:
    """Compare a pair with the layer it is for.

    Raises:
        ConfigurationError: no such linear layer, another shape, or values that are not numbers.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ConfigurationError(f"the adapter is for {name!r}, which {type(model).__name__} does not have") from None
    if not is_linear(module):
        raise ConfigurationError(
            f"the adapter is for {name!r}, a {type(module).__name__}; this engine adds LoRAs to linear layers only. "
            "Merge it with PEFT (merge_and_unload) and publish the whole weights"
        )
    inputs, outputs = sizes(module)
    rank = a.shape[0] if a.ndim == 2 else 0
    if rank < 1 or tuple(a.shape) != (rank, inputs) or tuple(b.shape) != (outputs, rank):
        raise ConfigurationError(
            f"the factors of {name!r} are A {tuple(a.shape)!r} and B {tuple(b.shape)!r}; the layer takes {inputs!r} "
            f"values to {outputs!r}, so they must be (rank, {inputs}) and ({outputs}, rank)"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigurationError(f"the factors of {name!r} hold NaN or infinity, so nothing could be sampled with them")


def is_linear(module: torch.nn.Module) -> bool:
    """Say whether a module is a linear layer with a weight matrix of its own."""
    return isinstance(module, (torch.nn.Linear, Conv1D))


def sizes(module: torch.nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer."""
    weight = module.get_parameter("weight")
    first, second = (int(size) for size in weight.shape)
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def last_name(name: str) -> str:
    """Return what follows the last dot."""
    return name.rpartition(".")[2]


def merged_weights(
    model: PreTrainedModel, weights: Mapping[str, Tensor], adapter: Mapping[str, Factors]
) -> dict[str, Tensor]:
    """Return the weights, by name, of the layers that an adapter changes: W + B A, rounded once."""
    changed = {}
    for module, factors in adapter.items():
        name = f"{module}.weight"
        product = factors.b.to(weights[name].device) @ factors.a.to(weights[name].device)
        if isinstance(model.get_submodule(module), Conv1D):
            product = product.T
        changed[name] = (weights[name].float() + product).to(weights[name].dtype)
    return changed


def adapter_names(factors: Iterable[tuple[str, Factors]]) -> dict[str, Tensor]:
    """Return factors under PEFT's names, for digests."""
    named: dict[str, Tensor] = {}
    for module, pair in factors:
        named[f"{PREFIX}{module}.lora_A.weight"] = pair.a
        named[f"{PREFIX}{module}.lora_B.weight"] = pair.b
    return named

"""Low-rank adapters with PEFT: every policy with one trains on a single copy of the base weights.

One idea: the base is frozen and loaded once; a policy is the factors A and B of its own adapter. They are kept and
published in float32, and computed with in the base's type: otherwise PEFT would keep a float32 copy of every layer's
input, which is more than all other activations together.
One trap: PEFT's layers compute with whichever adapter was made active last, so run a policy only inside `speaking`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden.interfaces import Weights
from leyden.layouts import Layout
from leyden.roles import LoRA, Policy

with extra("train"):
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file, save_file
    from torch import Tensor, nn
    from transformers.modeling_utils import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    from leyden_plugins.learners.torch.trainee import Trainee

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT's saved names begin with."""


class SharedBase:
    """One frozen model, and the adapters on it."""

    def __init__(self, model: PreTrainedModel, source: str) -> None:
        self.model = model
        self._source = source
        self._adapters = 0
        self._layers: list[BaseTunerLayer] = []
        self._linear = {
            name.rpartition(".")[2]: isinstance(module, Conv1D)
            for name, module in model.base_model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        """Last name of each linear layer but the output head -> whether its weight is kept transposed."""

    def add(self, policy: Policy, lora: LoRA, *, seed: int, layout: Layout) -> LoRATrainee:
        """Add a policy's adapter; its factors depend on the seed and the policy's name, not on who came before.

        Raises:
            ConfigurationError: a target that is no linear layer of the model.
        """
        unknown = [name for name in lora.targets if name not in self._linear]
        if unknown:
            raise ConfigurationError(
                f"policy {policy.name!r}: LoRA targets {unknown!r} are no linear layers of "
                f"{type(self.model).__name__}; it has {sorted(self._linear)!r}"
            )
        adapter = f"policy{self._adapters}"
        self._adapters += 1
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=cast(int, int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha),
            target_modules=list(lora.targets),
            lora_dropout=0.0,
            fan_in_fan_out=any(self._linear[name] for name in lora.targets),
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=self._source,
        )
        state = hashlib.sha256(f"{seed}:{policy.name}".encode()).digest()
        with torch.random.fork_rng(devices=[]):  # PEFT draws the factors on the CPU, then moves them
            torch.manual_seed(int.from_bytes(state[:8]))
            inject_adapter_in_model(config, self.model, adapter)
        del self.model.peft_config  # PEFT takes what it finds there for a mistake when the next adapter comes
        nn.Module.eval(self.model)
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        return LoRATrainee(policy, lora, base=self, adapter=adapter, config=config, layout=layout)

    @contextmanager
    def speaking_as(self, adapter: str | None) -> Iterator[None]:
        """Make the model compute with an adapter, or with none, inside the block."""
        for layer in self._layers:
            if adapter is None:
                layer.enable_adapters(False)
            else:
                layer.set_adapter(adapter)
        try:
            yield
        finally:
            if adapter is None:
                for layer in self._layers:
                    layer.enable_adapters(True)


class LoRATrainee(Trainee):
    """A policy that trains an adapter."""

    def __init__(
        self, policy: Policy, lora: LoRA, *, base: SharedBase, adapter: str, config: LoraConfig, layout: Layout
    ) -> None:
        self._lora = lora
        self._base = base
        self._adapter = adapter
        self._config = config
        computed = {
            PREFIX + name.replace(f".{adapter}.", "."): parameter
            for name, parameter in base.model.named_parameters()
            if f".{adapter}." in name
        }
        exact = {name: parameter.detach().float() for name, parameter in computed.items()}
        for parameter in computed.values():
            parameter.data = parameter.data.to(base.model.dtype)
        super().__init__(policy, base.model, computed=computed, exact=exact, layout=layout)

    def speaking(self) -> AbstractContextManager[object]:
        return self._base.speaking_as(self._adapter)

    @contextmanager
    def nudged(self) -> Iterator[None]:
        """Make B other than 0 inside the block, so that a new adapter is felt."""
        factors = [parameter for name, parameter in self.computed.items() if ".lora_B." in name]
        before = [one.detach().clone() for one in factors]
        with torch.no_grad():
            for one in factors:
                one.fill_(0.1)
            try:
                yield
            finally:
                for one, old in zip(factors, before, strict=True):
                    one.copy_(old)

    def weights(self) -> Weights:
        """Return the factors in float32; they are few, and an engine may multiply them before it rounds."""
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return Weights(tensors=tensors, lora=self.policy.lora)

    def write(self, folder: Path, *, exact: bool = False) -> None:
        """Write a folder in PEFT's format, in float32 always."""
        self._config.save_pretrained(str(folder))
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})

    def read(self, folder: Path) -> Mapping[str, Tensor]:
        if not (folder / TENSORS_FILE).is_file():
            raise ConfigurationError(
                f"folder {str(folder)!r} lacks {TENSORS_FILE!r}; policy {self.policy.name!r} was not an adapter when "
                "it was saved. Resume with the policies the run began with"
            )
        saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        found = (saved["r"], saved["lora_alpha"], sorted(saved["target_modules"]))
        own = (self._lora.rank, self._lora.alpha, sorted(set(self._lora.targets)))
        if found != own:
            raise ConfigurationError(
                f"the adapter in {str(folder)!r} has (rank, alpha, targets) {found!r}, policy "
                f"{self.policy.name!r} has {own!r}; resume with the policies the run began with"
            )
        tensors: dict[str, Tensor] = load_file(folder / TENSORS_FILE)
        if {name: one.shape for name, one in tensors.items()} != {n: p.shape for n, p in self.parameters.items()}:
            raise ConfigurationError(
                f"the factors in {str(folder)!r} are not those of policy {self.policy.name!r} on {self._source()!r}"
            )
        return tensors

    def _source(self) -> str:
        return str(self._config.base_model_name_or_path)

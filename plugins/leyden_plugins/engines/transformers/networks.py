"""Forward passes over a shared key-value window, for the fused path and for any Hugging Face model.

One idea: the lanes need two operations, `prefill` and `decode`, over a window (L, 2, B, K, W, D). A model that
passes its own check against a plain forward pass gets them; one that does not (sliding windows, recurrent
states, positions taken from the mask) is run row by row with the cache it brings itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Protocol, TypeVar

from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden_plugins.torch_models import (
    Factors,
    FusedNetwork,
    GroupedAdapters,
    RowAdapters,
    merged_weights,
    vocabulary_of,
)

with extra("train"):
    import torch
    from torch import Tensor
    from torch.func import functional_call
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
    from transformers.modeling_utils import PreTrainedModel

W = TypeVar("W")

CHECKED_TOKENS = 24
"""How long the rows are on which a network is compared with its model."""


class Network(Protocol[W]):
    """Forward passes for any number of weights; `FusedNetwork` states the arguments."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def prepare(self, tensors: Mapping[str, Tensor]) -> W: ...

    def named(self, weights: W) -> Mapping[str, Tensor]: ...

    def prefill(
        self,
        weights: W,
        tokens: Tensor,
        positions: Tensor,
        window: Tensor,
        mask: Tensor | None,
        adapters: GroupedAdapters | None = None,
    ) -> None: ...

    def decode(
        self,
        weights: W,
        tokens: Tensor,
        positions: Tensor,
        window: Tensor,
        mask: Tensor | None,
        adapters: RowAdapters | None = None,
    ) -> Tensor: ...


class WindowLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__ has no types
    """One layer's view of the window: new keys and values go into its last columns."""

    def __init__(self, keys: Tensor, values: Tensor, new: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it so
        self.stored = (keys, values)
        self.new = new
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the window exists."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the new columns; return all."""
        keys, values = self.stored
        keys[:, :, -self.new :] = key_states
        values[:, :, -self.new :] = value_states
        return self.stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns and the first one."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """Return the number of columns before the new ones."""
        return self.get_max_length() - self.new

    def get_max_length(self) -> int:
        """Return the number of columns."""
        return int(self.stored[0].shape[2])


class ModuleNetwork:
    """The Hugging Face forward pass with weights passed in, so that versions share one module.

    It knows no layer by name, so a LoRA is merged into weights of its own here and never comes as `adapters`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        parameter = next(model.parameters())
        canonical = {id(tensor): name for name, tensor in model.named_parameters()}
        self.tied = {
            name: canonical[id(tensor)]
            for name, tensor in model.named_parameters(remove_duplicate=False)
            if canonical[id(tensor)] != name
        }
        """Further names of tied tensors: a LoRA of the output head changes it and not the embedding."""
        self.dtype, self.device = parameter.dtype, parameter.device
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.zeros(1, 2, dtype=torch.long, device=self.device), past_key_values=cache, use_cache=True)
        shapes = {shape_of(layer) for layer in cache.layers}
        shape = shapes.pop() if len(shapes) == 1 else None
        self.layers = len(cache.layers)
        self.is_uniform = shape is not None
        """Every layer keeps plain keys and values of one shape."""
        self.kv_heads, self.head_dim = shape or (0, 0)

    def prepare(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy canonical tensors."""
        kinds = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        return {
            name: tensor.detach().to(device=self.device, dtype=kinds[name], copy=True).contiguous()
            for name, tensor in tensors.items()
        }

    def merge(self, weights: dict[str, Tensor], adapter: Mapping[str, Factors]) -> dict[str, Tensor]:
        """Return `weights` plus a LoRA; the layers that it leaves alone are shared, not copied."""
        return weights | merged_weights(self.model, self.untied(weights), adapter)

    def untied(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with a tensor for every name."""
        return {name: weights[canonical] for name, canonical in self.tied.items()} | weights if self.tied else weights

    def named(self, weights: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the served tensors."""
        return weights

    def prefill(
        self,
        weights: dict[str, Tensor],
        tokens: Tensor,
        positions: Tensor,
        window: Tensor,
        mask: Tensor | None,
        adapters: GroupedAdapters | None = None,
    ) -> None:
        """Write keys and values; see `FusedNetwork.prefill`."""
        assert adapters is None
        if mask is None:
            new = tokens.shape[1]
            mask = torch.full((new, new), -torch.inf, dtype=self.dtype, device=self.device).triu(1)
            mask = mask.expand(tokens.shape[0], 1, new, new)
        self.forward(weights, tokens, positions, window, mask)

    def decode(
        self,
        weights: dict[str, Tensor],
        tokens: Tensor,
        positions: Tensor,
        window: Tensor,
        mask: Tensor | None,
        adapters: RowAdapters | None = None,
    ) -> Tensor:
        """Return the logits after one token a row; see `FusedNetwork.decode`."""
        assert adapters is None
        if mask is None:
            mask = torch.zeros(tokens.shape[0], 1, 1, window.shape[4], dtype=self.dtype, device=self.device)
        return self.forward(weights, tokens[:, None], positions[:, None], window, mask)

    def forward(
        self, weights: dict[str, Tensor], tokens: Tensor, positions: Tensor, window: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the logits at the last of `tokens` (B, S)."""
        cache = Cache([WindowLayer(layer[0], layer[1], tokens.shape[1]) for layer in window])
        output = functional_call(
            self.model,
            self.untied(weights),
            (tokens,),
            {
                "attention_mask": mask,
                "position_ids": positions,
                "past_key_values": cache,
                "use_cache": True,
                "logits_to_keep": 1,
            },
            tie_weights=False,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def extend(self, weights: dict[str, Tensor], tokens: Tensor, cache: Cache) -> Tensor:
        """Run one row, tokens (1, S), with the model's own cache; return the logits (1, V) at the end."""
        options = {"past_key_values": cache, "use_cache": True}
        output = functional_call(self.model, self.untied(weights), (tokens,), options, tie_weights=False)
        logits: Tensor = output.logits[:, -1]
        return logits


def shape_of(layer: object) -> tuple[int, int] | None:
    """Return (K, D) of a layer that keeps plain keys and values of one shape."""
    if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
        return None
    keys, values = layer.keys, layer.values
    return (int(keys.shape[1]), int(keys.shape[3])) if keys.shape == values.shape else None


def choose_network(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], context_length: int
) -> FusedNetwork | ModuleNetwork | None:
    """Return the fastest network that agrees with the model's own forward pass; `None`: only row by row does."""
    if FusedNetwork.supports(model):
        fused = FusedNetwork(model, max(context_length, CHECKED_TOKENS))
        if agrees(fused, fused.prepare(tensors), model):
            return fused
    generic = ModuleNetwork(model)
    if generic.is_uniform and accepts_positions(model) and agrees(generic, dict(tensors), model):
        return generic
    return None


def row_network(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> ModuleNetwork:
    """Return the network that runs one row at a time, after comparing it with the model's own forward pass.

    Raises:
        ConfigurationError: the model does not go on from the cache it is given.
    """
    network = ModuleNetwork(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary_of(model), (1, CHECKED_TOKENS), generator=generator).to(network.device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        wanted = model(tokens).logits[:, -1]
        network.extend(dict(tensors), tokens[:, :-1], cache)
        got = network.extend(dict(tensors), tokens[:, -1:], cache)
    if not is_close(got, wanted):
        raise ConfigurationError(
            f"{type(model).__name__} does not continue from `past_key_values`, so this engine cannot serve it; "
            "serve it with vLLM or another server that returns token ids"
        )
    return network


def is_close(got: Tensor, wanted: Tensor) -> bool:
    """Compare logits: 1e-4 of the largest in float32, 5 % where the type itself is coarse."""
    tolerance = 1e-4 if wanted.dtype == torch.float32 else 0.05
    return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1.0))


def accepts_positions(model: PreTrainedModel) -> bool:
    """Say whether the forward pass takes the place of each token, which rows of unequal length need."""
    forward = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    return "position_ids" in forward and "logits_to_keep" in forward


def agrees(network: Network[W], weights: W, model: PreTrainedModel) -> bool:
    """Compare two unequal rows, prefilled in two pieces and decoded, with the model's own forward pass."""
    longest = CHECKED_TOKENS
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_of(model)
    tokens = torch.randint(0, vocabulary, (2, longest), generator=generator).to(network.device)
    lengths = (longest, longest - 5)
    with torch.inference_mode():
        wanted = torch.stack(
            [model(tokens[row : row + 1, :length]).logits[0, -1] for row, length in enumerate(lengths)]
        )
        shape = (network.layers, 2, 2, network.kv_heads, longest, network.head_dim)
        window = torch.zeros(shape, dtype=network.dtype, device=network.device)
        starts = torch.tensor([longest - length for length in lengths], device=network.device)
        aligned = torch.stack([tokens[row].roll(longest - length) for row, length in enumerate(lengths)])
        columns = torch.arange(longest, device=network.device)
        positions = (columns - starts[:, None]).clamp(min=0)
        visible = (columns >= starts[:, None, None]) & (columns <= columns[:, None])
        visible |= columns == columns[:, None]  # padding sees itself: a row without any column would be NaN
        mask = torch.zeros(2, 1, longest, longest, dtype=network.dtype, device=network.device)
        mask = mask.masked_fill(~visible[:, None], -torch.inf)
        for first, end in ((0, 10), (10, longest - 1)):
            part = slice(first, end)
            network.prefill(weights, aligned[:, part], positions[:, part], window[..., :end, :], mask[:, :, part, :end])
        got = network.decode(weights, aligned[:, -1], positions[:, -1], window, mask[:, :, -1:])
    return is_close(got, wanted)

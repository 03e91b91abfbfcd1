"""Run small dense models of the Llama family with few kernel launches.

One idea: a decode step of a small model costs mostly dispatch, so queries, keys and values come from one product,
gate and up from another, and the residual is added inside the product that makes it. The cache holds rotated
keys, so where a row's tokens lie in it does not matter, and all rows write one common column.
One trap: `prefill` computes no logits and stops at the last layer's keys and values. The last prompt token is
left to the first `decode`.

Axes: B rows, S new tokens a row, W cache columns, L layers, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leyden.extras import extra
from leyden_plugins.torch_models.adapters import Factors
from leyden_plugins.torch_models.fused_adapters import FusedAdapter, GroupedAdapters, RowAdapters, fuse_adapter

with extra("train"):
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from transformers.modeling_utils import PreTrainedModel

FAMILIES = frozenset({"llama", "qwen2", "qwen3"})
FIXED_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary forms whose angles depend on the position alone, not on the length of the sequence."""


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """The weights of one layer, copied."""

    index: int
    """Its place in the model, from 0: what adapters are looked up by."""
    input_norm: Tensor
    qkv: Tensor
    """Rows: queries, keys, values."""
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """(heads + K, D): the query norm a head, then the key norm a head; `None` where the family has none."""
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, kw_only=True)
class FusedWeights:
    """One version of a model's weights, copied."""

    embedding: Tensor
    layers: tuple[FusedLayer, ...]
    norm: Tensor
    head: Tensor
    """The embedding itself where the two are tied."""


class FusedNetwork:
    """Forward passes of one architecture, for any number of weights."""

    def __init__(self, model: PreTrainedModel, context_length: int) -> None:
        config = model.config
        self.heads = int(config.num_attention_heads)
        self.layers = int(config.num_hidden_layers)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.hidden = int(config.hidden_size)
        self.intermediate = int(config.intermediate_size)
        self.eps = float(config.rms_norm_eps)
        self.has_qk_norm = config.model_type == "qwen3"
        names = {name for name, _ in model.named_parameters()}
        self.has_qkv_bias = "model.layers.0.self_attn.q_proj.bias" in names
        self.is_tied = "lm_head.weight" not in names
        example = model.get_parameter("model.embed_tokens.weight")
        self.dtype, self.device = example.dtype, example.device
        positions = torch.arange(context_length, device=self.device)[None]
        with torch.no_grad():
            cos, sin = model.get_submodule("model.rotary_emb")(torch.zeros(1, dtype=torch.float32), positions)
        half = self.head_dim // 2
        # x * cos + roll(x, D/2) * sin equals the usual rotation once the sign stands in the table.
        self.cos = cos[0].to(self.dtype, copy=True)
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1).to(self.dtype)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Say whether this architecture is one that the fused passes compute."""
        config = model.config
        if getattr(config, "model_type", None) not in FAMILIES:
            return False
        rope = getattr(config, "rope_parameters", None) or {}
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        names = {name for name, _ in model.named_parameters()}
        return (
            config.hidden_act == "silu"
            and rope.get("rope_type", "default") in FIXED_ROPES
            and float(rope.get("partial_rotary_factor", 1.0)) == 1.0
            and head_dim % 2 == 0
            and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
            and not any(name.endswith(("o_proj.bias", "down_proj.bias", "lm_head.bias")) for name in names)
        )

    def prepare(self, tensors: Mapping[str, Tensor]) -> FusedWeights:
        """Copy canonical tensors into fused form; nothing is shared with `tensors` afterwards."""

        def copy(*names: str) -> Tensor:
            parts = [tensors[name].detach().to(device=self.device, dtype=self.dtype) for name in names]
            return torch.cat(parts)

        layers = []
        for index in range(self.layers):
            prefix = f"model.layers.{index}."
            attention, mlp = prefix + "self_attn.", prefix + "mlp."
            qkv = [f"{attention}{part}_proj." for part in "qkv"]
            qk_norm = None
            if self.has_qk_norm:
                query, key = copy(attention + "q_norm.weight"), copy(attention + "k_norm.weight")
                qk_norm = torch.cat([query.expand(self.heads, -1), key.expand(self.kv_heads, -1)])
            layers.append(
                FusedLayer(
                    index=index,
                    input_norm=copy(prefix + "input_layernorm.weight"),
                    qkv=copy(*(part + "weight" for part in qkv)),
                    qkv_bias=copy(*(part + "bias" for part in qkv)) if self.has_qkv_bias else None,
                    qk_norm=qk_norm,
                    out=copy(attention + "o_proj.weight"),
                    mlp_norm=copy(prefix + "post_attention_layernorm.weight"),
                    gate_up=copy(mlp + "gate_proj.weight", mlp + "up_proj.weight"),
                    down=copy(mlp + "down_proj.weight"),
                )
            )
        embedding = copy("model.embed_tokens.weight")
        head = embedding if self.is_tied else copy("lm_head.weight")
        return FusedWeights(embedding=embedding, layers=tuple(layers), norm=copy("model.norm.weight"), head=head)

    def named(self, weights: FusedWeights) -> dict[str, Tensor]:
        """Return the canonical names of the served tensors: views, for digests."""
        named = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
        if not self.is_tied:
            named["lm_head.weight"] = weights.head
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        for index, layer in enumerate(weights.layers):
            prefix = f"model.layers.{index}."
            attention, mlp = prefix + "self_attn.", prefix + "mlp."
            for part, tensor in zip("qkv", torch.split(layer.qkv, sizes), strict=True):
                named[f"{attention}{part}_proj.weight"] = tensor
            if layer.qkv_bias is not None:
                for part, tensor in zip("qkv", torch.split(layer.qkv_bias, sizes), strict=True):
                    named[f"{attention}{part}_proj.bias"] = tensor
            if layer.qk_norm is not None:
                named[attention + "q_norm.weight"] = layer.qk_norm[0]
                named[attention + "k_norm.weight"] = layer.qk_norm[-1]
            gate, up = layer.gate_up.chunk(2)
            named |= {mlp + "gate_proj.weight": gate, mlp + "up_proj.weight": up}
            named |= {mlp + "down_proj.weight": layer.down, attention + "o_proj.weight": layer.out}
            named[prefix + "input_layernorm.weight"] = layer.input_norm
            named[prefix + "post_attention_layernorm.weight"] = layer.mlp_norm
        return named

    def fuse(self, adapter: Mapping[str, Factors]) -> FusedAdapter:
        """Copy a LoRA into the form that is added to the fused products."""
        keys = self.kv_heads * self.head_dim
        outputs = {
            "qkv": (self.heads * self.head_dim, keys, keys),
            "out": (self.hidden,),
            "gate_up": (self.intermediate, self.intermediate),
            "down": (self.hidden,),
        }
        return fuse_adapter(adapter, layers=self.layers, outputs=outputs, dtype=self.dtype, device=self.device)

    def prefill(
        self,
        weights: FusedWeights,
        tokens: Tensor,
        positions: Tensor,
        window: Tensor,
        mask: Tensor | None,
        adapters: GroupedAdapters | None = None,
    ) -> None:
        """Write the keys and values of `tokens` (B, S) into the last S columns of `window` (L, 2, B, K, W, D).

        Args:
            weights: the version to compute with.
            tokens: may be padded on the right; what is written for padding is finite and meaningless.
            positions: (B, S) place of each token in its own sequence.
            window: the columns before the last S hold what each row may look back at.
            mask: (B, 1, S, W), added to the scores; `None` is causal, for W = S.
            adapters: which LoRA each row adds to the weights; `None` where no row has any.
        """
        x = F.embedding(tokens, weights.embedding).flatten(0, 1)
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        last = len(weights.layers) - 1
        for layer in weights.layers:
            cache = window[layer.index]
            query = self.write(layer, x, cos, sin, cache, adapters, keys_only=layer.index == last)
            if layer.index == last:
                return
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                cache[0],
                cache[1],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.heads != self.kv_heads,
            )
            x = self.leave(layer, x, attended.transpose(1, 2).reshape(x.shape[0], -1), adapters)

    def decode(
        self,
        weights: FusedWeights,
        tokens: Tensor,
        positions: Tensor,
        window: Tensor,
        mask: Tensor | None,
        adapters: RowAdapters | None = None,
    ) -> Tensor:
        """Return the logits (B, V) after one token a row, whose keys and values go into the last column.

        Args:
            weights: the version to compute with.
            tokens: (B,).
            positions: (B,).
            window: (L, 2, B, K, W, D).
            mask: (B, 1, 1, W), added to the scores; `None`: every row sees every column.
            adapters: which LoRA each row adds to the weights; `None` where no row has any.
        """
        rows = tokens.shape[0]
        x = F.embedding(tokens, weights.embedding)
        cos, sin = self.cos[positions].view(rows, 1, 1, -1), self.sin[positions].view(rows, 1, 1, -1)
        for layer in weights.layers:
            cache = window[layer.index]
            query = self.write(layer, x, cos, sin, cache, adapters)
            # The heads that share a key-value head stand where queries of one head would: no copies of keys.
            grouped = query.view(rows, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
            attended = F.scaled_dot_product_attention(grouped, cache[0], cache[1], attn_mask=mask)
            x = self.leave(layer, x, attended.reshape(rows, -1), adapters)
        normed = F.rms_norm(x, (self.hidden,), weights.norm, self.eps)
        logits = F.linear(normed, weights.head)
        return logits if adapters is None else adapters.add(-1, "head", normed, logits)

    def write(
        self,
        layer: FusedLayer,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        adapters: RowAdapters | GroupedAdapters | None,
        *,
        keys_only: bool = False,
    ) -> Tensor:
        """Store this layer's new keys and values; return the rotated queries (B, S, heads or, `keys_only`, 0, D)."""
        rows, new = cache.shape[1], x.shape[0] // cache.shape[1]
        skipped = self.heads if keys_only else 0
        weight = layer.qkv[skipped * self.head_dim :]
        bias = None if layer.qkv_bias is None else layer.qkv_bias[skipped * self.head_dim :]
        normed = F.rms_norm(x, (self.hidden,), layer.input_norm, self.eps)
        joined = F.linear(normed, weight, bias)
        if adapters is not None:
            joined = adapters.add(layer.index, "qkv", normed, joined, skipped * self.head_dim)
        joined = joined.view(rows, new, -1, self.head_dim)
        first_value = self.heads + self.kv_heads - skipped
        rotated = joined[:, :, :first_value]
        if layer.qk_norm is not None:
            rotated = F.rms_norm(rotated, (self.head_dim,), None, self.eps) * layer.qk_norm[skipped:]
        rotated = torch.addcmul(rotated * cos, torch.roll(rotated, self.head_dim // 2, -1), sin)
        first_key = self.heads - skipped
        cache[0, :, :, -new:] = rotated[:, :, first_key:].transpose(1, 2)
        cache[1, :, :, -new:] = joined[:, :, first_value:].transpose(1, 2)
        return rotated[:, :, :first_key]

    def leave(
        self, layer: FusedLayer, x: Tensor, attended: Tensor, adapters: RowAdapters | GroupedAdapters | None
    ) -> Tensor:
        """Return the layer's output from its input and what its heads attended to."""
        x = torch.addmm(x, attended, layer.out.t())
        if adapters is not None:
            x = adapters.add(layer.index, "out", attended, x)
        normed = F.rms_norm(x, (self.hidden,), layer.mlp_norm, self.eps)
        both = F.linear(normed, layer.gate_up)
        if adapters is not None:
            both = adapters.add(layer.index, "gate_up", normed, both)
        gate, up = both.chunk(2, -1)
        inner = F.silu(gate).mul_(up)
        x = torch.addmm(x, inner, layer.down.t())
        return x if adapters is None else adapters.add(layer.index, "down", inner, x)

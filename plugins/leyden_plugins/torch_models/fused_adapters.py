"""Add several LoRA adapters to the fused passes at once, each to its own rows.

One idea: for a decode step all A stand in one matrix and all B in another. The rows' x times all A gives every
adapter's inner values; those of other rows' adapters are set to 0, and one product with all B adds what is left. So a
linear layer costs three operations more, whatever the number of adapters. Where the fused passes join layers (queries,
keys and values; gate and up) the joined A stand below each other and the joined B on a block diagonal. A prefill has
many tokens a row, and there the waste would cost more than the operations saved: its rows come in groups of one
adapter instead.
One trap: 0 times infinity is not 0. Inner values of other rows are filled, not multiplied, with 0, so an adapter that
overflows spoils only its own rows.

Axes: B rows, R columns (the ranks of all adapters), in and out a layer's sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from leyden.extras import extra
from leyden_plugins.torch_models.adapters import Factors, adapter_names

with extra("train"):
    import torch
    import torch.nn.functional as F
    from torch import Tensor

SLOTS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The products of a fused layer, and the linear layers that each joins, in the order of its rows."""


@dataclass(frozen=True, eq=False)
class FusedAdapter:
    """One adapter: the factors of every product it changes, by (layer, slot); the head is (-1, "head")."""

    slots: Mapping[tuple[int, str], Factors]
    named: Mapping[str, Tensor]
    """The factors before they were joined, in PEFT's names."""


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """The factors that several adapters have for one product."""

    a: Tensor
    """(R, in)."""
    b: Tensor
    """(out, R)."""
    widths: tuple[int, ...]
    """How many of the columns belong to each adapter, in order; 0 where it leaves this product alone."""


class AdapterStack:
    """Adapters that may stand in one batch."""

    def __init__(self, adapters: Sequence[FusedAdapter]) -> None:
        self.adapters = tuple(adapters)
        self.places = {id(adapter): place for place, adapter in enumerate(self.adapters)}
        self.slots: dict[tuple[int, str], Stacked] = {}
        for key in {key for adapter in self.adapters for key in adapter.slots}:
            found = [adapter.slots.get(key) for adapter in self.adapters]
            there = [factors for factors in found if factors is not None]
            self.slots[key] = Stacked(
                a=there[0].a if len(there) == 1 else torch.cat([factors.a for factors in there]),
                b=there[0].b if len(there) == 1 else torch.cat([factors.b for factors in there], 1),
                widths=tuple(0 if factors is None else factors.a.shape[0] for factors in found),
            )

    def holds(self, adapter: FusedAdapter) -> bool:
        """Say whether rows of this adapter can use the stack."""
        return id(adapter) in self.places


@dataclass(frozen=True, kw_only=True, eq=False)
class RowAdapters:
    """Which adapter each row of a decode step adds."""

    stack: AdapterStack
    places: Tensor
    """(B,) of the stack's adapters; -1 is a row of the base."""
    is_shared: bool
    """Every row adds the only adapter there is: nothing needs to be set to 0."""
    foreign: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Widths -> (B, R): True where a column is not of the row's adapter. Filled when needed."""

    @classmethod
    def of(cls, stack: AdapterStack, adapters: Sequence[FusedAdapter | None], device: torch.device) -> RowAdapters:
        """Take one adapter of `stack` a row; `None` is a row of the base."""
        places = [-1 if adapter is None else stack.places[id(adapter)] for adapter in adapters]
        is_shared = len(stack.adapters) == 1 and min(places) == 0
        return cls(stack=stack, places=torch.tensor(places, dtype=torch.long, device=device), is_shared=is_shared)

    def add(self, layer: int, slot: str, x: Tensor, y: Tensor, skipped: int = 0) -> Tensor:
        """Return `y` (B, out) + B A x for `x` (B, in), the first `skipped` outputs left out of `y`."""
        stacked = self.stack.slots.get((layer, slot))
        if stacked is None:
            return y
        inner = F.linear(x, stacked.a)
        if not self.is_shared:
            inner.masked_fill_(self._of_others(stacked.widths), 0.0)
        return torch.addmm(y, inner, stacked.b[skipped:].t())

    def _of_others(self, widths: tuple[int, ...]) -> Tensor:
        """Return the entry of `foreign`."""
        if widths not in self.foreign:
            owners = [place for place, width in enumerate(widths) for _ in range(width)]
            columns = torch.tensor(owners, dtype=torch.long, device=self.places.device)
            self.foreign[widths] = self.places[:, None] != columns
        return self.foreign[widths]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedAdapters:
    """Which adapter each row of a prefill adds, where rows of one adapter follow each other."""

    groups: Sequence[tuple[FusedAdapter, slice]]
    """An adapter and its tokens; those in no slice are the base's."""

    @classmethod
    def of(cls, adapters: Sequence[FusedAdapter | None], tokens: int) -> GroupedAdapters:
        """Take one adapter a row of `tokens` tokens; `None` is a row of the base."""
        groups: list[tuple[FusedAdapter, slice]] = []
        first = 0
        for adapter, rows in itertools.groupby(adapters):
            end = first + len(list(rows))
            if adapter is not None:
                groups.append((adapter, slice(first * tokens, end * tokens)))
            first = end
        return cls(groups=groups)

    def add(self, layer: int, slot: str, x: Tensor, y: Tensor, skipped: int = 0) -> Tensor:
        """Add B A x to `y` (B * S, out) in place and return it; see `RowAdapters.add`."""
        for adapter, rows in self.groups:
            factors = adapter.slots.get((layer, slot))
            if factors is not None:
                y[rows].addmm_(F.linear(x[rows], factors.a), factors.b[skipped:].t())
        return y


def fuse_adapter(
    adapter: Mapping[str, Factors],
    *,
    layers: int,
    outputs: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> FusedAdapter:
    """Copy an adapter and join its factors as the fused passes join their layers.

    Args:
        adapter: module name -> factors.
        layers: how many the model has.
        outputs: slot -> how many outputs each of its parts has.
        dtype: of the base.
        device: of the base.
    """
    own = {
        name: Factors(a=pair.a.to(device, dtype, copy=True), b=pair.b.to(device, dtype, copy=True))
        for name, pair in adapter.items()
    }
    slots: dict[tuple[int, str], Factors] = {}
    for index in range(layers):
        for slot, parts in SLOTS.items():
            found = [own.get(f"model.layers.{index}.{part}") for part in parts]
            joined = joined_factors(found, outputs[slot])
            if joined is not None:
                slots[index, slot] = joined
    if "lm_head" in own:
        slots[-1, "head"] = own["lm_head"]
    return FusedAdapter(slots, adapter_names(own.items()))


def joined_factors(parts: Sequence[Factors | None], outputs: Sequence[int]) -> Factors | None:
    """Join the factors of layers whose outputs stand below each other; `None` where none has any."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    if len(parts) == 1:
        return there[0]
    a = torch.cat([part.a for part in there])
    b = a.new_zeros(sum(outputs), a.shape[0])
    row = column = 0
    for part, size in zip(parts, outputs, strict=True):
        if part is not None:
            rank = part.a.shape[0]
            b[row : row + size, column : column + rank] = part.b
            column += rank
        row += size
    return Factors(a=a, b=b)

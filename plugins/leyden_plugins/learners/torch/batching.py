"""Micro-batches: rows packed on shared prefixes, sorted by length, cut by a budget of positions.

One idea: rows with one prompt (a group's samples) share its positions, so the prompt is computed once; each token
sees exactly the tokens before it in its own row, so the gradient is that of the rows one by one.
One trap: a packed sequence needs an explicit attention mask and positions; rows that share nothing need neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leyden.errors import ConfigurationError
from leyden.interfaces import TrainingRow
from leyden.tokentree import Node, TokenTree, common_prefix, path

LONGEST_SHARED = 512
"""A pack of several rows holds at most this many positions: attention costs their square."""

STRETCH = 1.25
"""The longest pack of a batch is at most this many times its shortest: the rest would be padding."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """B packs padded to T positions, and the N tokens trained in them."""

    input_ids_B_T: Tensor
    position_ids_B_T: Tensor | None
    visible_B_1_T_T: Tensor | None
    """True where a query may look at a key; `None`: causal, nothing is shared."""
    source_N: Tensor
    """Where in the flattened batch each trained token is predicted: at the token before it."""
    token_ids_N: Tensor
    temperature_N: Tensor
    sampled_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    row_N: Tensor
    """Which of the rows given each trained token is of; a row's tokens stay in order."""
    padding: int
    """Positions that hold no token."""


def micro_batches(
    rows: Sequence[TrainingRow],
    *,
    budget: int,
    share_prefixes: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Iterator[MicroBatch]:
    """Yield micro-batches of at most `budget` positions, padding included; a longer pack goes alone.

    Raises:
        ConfigurationError: a row trains its first token, which nothing predicts, or has a temperature of 0.
    """
    for row in rows:
        if row.temperature <= 0 or row.mask[0]:
            raise ConfigurationError(
                f"a row with temperature {row.temperature!r} and mask[0]={row.mask[0]!r} has no log-probabilities: "
                "the temperature must be above 0, and the first token of a row is never trained"
            )
    trained = [index for index, row in enumerate(rows) if any(row.mask)]
    packs = _shared(rows, trained) if share_prefixes else [[index] for index in trained]
    sized = sorted((_Pack(rows, members) for members in packs), key=lambda pack: pack.length)
    batch: list[_Pack] = []
    for pack in sized:
        if batch and (pack.length * (len(batch) + 1) > budget or pack.length > STRETCH * batch[0].length):
            yield _collate(rows, batch, dtype, device)
            batch = []
        batch.append(pack)
    if batch:
        yield _collate(rows, batch, dtype, device)


def _shared(rows: Sequence[TrainingRow], members: Sequence[int]) -> list[list[int]]:
    """Gather rows that share at least half of their tokens with a neighbour in sorted order."""
    order = sorted(members, key=lambda index: list(rows[index].token_ids))
    packs: list[list[int]] = []
    length = 0
    for index in order:
        row = rows[index].token_ids
        if packs:
            shared = common_prefix(rows[packs[-1][-1]].token_ids, row)
            if 2 * shared >= len(row) and length + len(row) - shared <= LONGEST_SHARED:
                packs[-1].append(index)
                length += len(row) - shared
                continue
        packs.append([index])
        length = len(row)
    return packs


class _Pack:
    """Some rows as one sequence: the nodes of their token tree, parents first."""

    def __init__(self, rows: Sequence[TrainingRow], members: Sequence[int]) -> None:
        self.members = members
        tree = TokenTree()
        ends = [tree.insert(rows[index].token_ids) for index in members]
        self.offsets: dict[int, int] = {}
        self.nodes: list[Node] = []
        self.length = 0
        for node in tree.walk():
            self.offsets[id(node)] = self.length
            self.nodes.append(node)
            self.length += len(node.token_ids)
        self.places = [self._places(end) for end in ends]

    def _places(self, end: Node) -> list[int]:
        """Return where each token of the row that ends at `end` lies."""
        found: list[int] = []
        for node in path(end):
            offset = self.offsets[id(node)]
            found += range(offset, offset + len(node.token_ids))
        return found

    def fill(self, input_ids_T: Tensor, position_ids_T: Tensor, visible_T_T: Tensor | None) -> None:
        """Write tokens, depths and who sees whom."""
        for node in self.nodes:
            first = self.offsets[id(node)]
            own = slice(first, first + len(node.token_ids))
            input_ids_T[own] = torch.tensor(node.token_ids)
            position_ids_T[own] = torch.arange(node.start, node.end)
            if visible_T_T is not None:
                parent = node.parent
                if parent is not None and parent.token_ids:
                    visible_T_T[own] = visible_T_T[self.offsets[id(parent)] + len(parent.token_ids) - 1].clone()
                size = len(node.token_ids)
                visible_T_T[own, own] = torch.ones(size, size, dtype=torch.bool).tril()


def _collate(rows: Sequence[TrainingRow], packs: Sequence[_Pack], dtype: torch.dtype, device: str) -> MicroBatch:
    """Pad the packs on the right and gather their trained tokens."""
    length = max(pack.length for pack in packs)
    shares = any(len(pack.nodes) > 1 for pack in packs)
    input_ids = torch.zeros(len(packs), length, dtype=torch.long)
    position_ids = torch.zeros(len(packs), length, dtype=torch.long)
    # Padding looks at itself: a query with nothing to look at is NaN, which spreads backwards.
    visible = torch.eye(length, dtype=torch.bool).repeat(len(packs), 1, 1) if shares else None
    source: list[int] = []
    token_ids: list[int] = []
    values: list[tuple[float, float, float, float]] = []
    row_of: list[int] = []
    for number, pack in enumerate(packs):
        pack.fill(input_ids[number], position_ids[number], None if visible is None else visible[number])
        for index, places in zip(pack.members, pack.places, strict=True):
            row = rows[index]
            trained = [t for t, is_trained in enumerate(row.mask) if is_trained]
            source += [number * length + places[t - 1] for t in trained]
            token_ids += [row.token_ids[t] for t in trained]
            values += [(row.temperature, row.logprobs[t], row.advantages[t], row.weights[t]) for t in trained]
            row_of += [index] * len(trained)
    temperature, logprobs, advantages, weights = torch.tensor(values, dtype=dtype).reshape(-1, 4).T.to(device)
    return MicroBatch(
        input_ids_B_T=input_ids.to(device),
        position_ids_B_T=position_ids.to(device) if shares else None,
        visible_B_1_T_T=None if visible is None else visible.unsqueeze(1).to(device),
        source_N=torch.tensor(source, dtype=torch.long, device=device),
        token_ids_N=torch.tensor(token_ids, dtype=torch.long, device=device),
        temperature_N=temperature,
        sampled_logprobs_N=logprobs,
        advantages_N=advantages,
        weights_N=weights,
        row_N=torch.tensor(row_of, dtype=torch.long),
        padding=input_ids.numel() - sum(pack.length for pack in packs),
    )

"""Choose the next token of every row at once.

One idea: each row owns a random generator and spends exactly one uniform number a token on the inverse of its
cumulative distribution, so what it samples does not depend on its batch mates.
One trap: the log-probability is that of log-softmax(logits / temperature) before penalties, top-k, top-p and
min-p: what the learner recomputes. Greedy rows report it at temperature 1.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leyden.interfaces import SamplingParameters

if TYPE_CHECKING:
    from leyden_plugins.engines.transformers.constraint import Constraint


@dataclass(eq=False, kw_only=True)
class Sampled:
    """What sampling needs to know of a row, and the tokens it has so far."""

    sampling: SamplingParameters
    random: Random
    token_ids: list[int]
    forced: Sequence[int] | None = None
    """The tokens to take, whatever would be sampled; at least as many as the row may have."""
    constraint: Constraint | None = None
    """The grammar that its answer keeps to."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The next token of every row."""

    tokens_B: Tensor
    logprobs_B: Tensor


class Sampler:
    """Samples for one set of rows; made anew when the set changes."""

    def __init__(self, rows: Sequence[Sampled], device: torch.device) -> None:
        self.rows = rows
        self.device = device
        parameters = [row.sampling for row in rows]
        temperatures = [asked.temperature or 1.0 for asked in parameters]
        self.temperature_B1: Tensor | None = None
        if any(temperature != 1.0 for temperature in temperatures):
            self.temperature_B1 = torch.tensor(temperatures, device=device)[:, None]
        greedy = [asked.temperature == 0 for asked in parameters]
        self.all_greedy = all(greedy)
        self.greedy_B: Tensor | None = None
        if any(greedy):
            self.greedy_B = torch.tensor(greedy, device=device)
        self.penalised = [
            index
            for index, asked in enumerate(parameters)
            if asked.frequency_penalty != 0 or asked.presence_penalty != 0
        ]
        self.restricted = [
            index
            for index, asked in enumerate(parameters)
            if asked.temperature != 0 and (asked.top_k > 0 or asked.top_p < 1 or asked.min_p > 0)
        ]
        self.constrained = [(index, row.constraint) for index, row in enumerate(rows) if row.constraint is not None]
        self.forced = [index for index, row in enumerate(rows) if row.forced is not None]

    def choose(self, logits_B_V: Tensor) -> Chosen:
        """Return the next token of each row with its log-probability."""
        scaled = logits_B_V.float()
        if self.temperature_B1 is not None:
            scaled = scaled / self.temperature_B1
        logprobs = torch.log_softmax(scaled, -1)
        target = self.penalise(logits_B_V.float()) if self.penalised else logprobs
        if self.constrained:
            target = self.constrain(target)
        if self.all_greedy:
            tokens = target.argmax(-1)
        else:
            tokens = self.draw(target)
            if self.greedy_B is not None:
                tokens = torch.where(self.greedy_B, target.argmax(-1), tokens)
        if self.forced:
            # Sampled all the same, so that a given answer costs what a sampled one does.
            tokens[self.forced] = torch.tensor(self.given(), device=self.device)
        for index, constraint in self.constrained:
            constraint.take(int(tokens[index]))
        return Chosen(tokens_B=tokens, logprobs_B=logprobs.gather(1, tokens[:, None])[:, 0])

    def constrain(self, logprobs_B_V: Tensor) -> Tensor:
        """Return the log-probabilities without the tokens that would leave a row's grammar."""
        masked = logprobs_B_V.clone()
        for index, constraint in self.constrained:
            constraint.mask(masked[index])
        # Normalised again: what is left may be so unlikely that its exponential is 0.
        return torch.log_softmax(masked, -1)

    def given(self) -> list[int]:
        """Return the next token of each row whose answer is given."""
        rows = [self.rows[index] for index in self.forced]
        return [row.forced[len(row.token_ids)] for row in rows if row.forced is not None]

    def draw(self, logprobs_B_V: Tensor) -> Tensor:
        """Invert the cumulative distribution at one uniform number a row."""
        probabilities = logprobs_B_V.exp()
        for index in self.restricted:
            probabilities[index] = restrict(probabilities[index], self.rows[index].sampling)
        # In float64 the sum of many small terms keeps the order of the last token's share.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        uniform = torch.tensor([row.random.random() for row in self.rows], dtype=torch.float64, device=self.device)
        # `right` skips tokens of probability 0, whose cumulative value equals that of the token before.
        found = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
        return found.clamp_(max=logprobs_B_V.shape[1] - 1)

    def penalise(self, logits_B_V: Tensor) -> Tensor:
        """Return log-softmax after OpenAI's penalties: logit - frequency * count - presence * (count > 0)."""
        changed = logits_B_V.clone()
        for index in self.penalised:
            row = self.rows[index]
            counts = Counter(row.token_ids)
            seen = torch.tensor(list(counts), dtype=torch.long, device=self.device)
            count = torch.tensor(list(counts.values()), dtype=torch.float32, device=self.device)
            changed[index, seen] -= row.sampling.frequency_penalty * count + row.sampling.presence_penalty
        if self.temperature_B1 is not None:
            changed = changed / self.temperature_B1
        return torch.log_softmax(changed, -1)


def restrict(probabilities_V: Tensor, sampling: SamplingParameters) -> Tensor:
    """Return `probabilities_V` with tokens outside top-k, top-p and min-p set to 0, not normalised again.

    top-p is the smallest set of the most probable tokens whose sum reaches it (Holtzman et al. 2020, section 3.1);
    min-p keeps tokens of at least that share of the most probable one (Nguyen et al. 2024, section 3).
    """
    ranked, order = probabilities_V.sort(descending=True)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.top_k > 0:
        kept[sampling.top_k :] = False
    if sampling.min_p > 0:
        kept &= ranked >= sampling.min_p * ranked[0]
    if sampling.top_p < 1:
        considered = ranked * kept
        before = considered.cumsum(0) - considered
        kept &= before < sampling.top_p * considered.sum()
    return torch.zeros_like(probabilities_V).scatter(0, order, ranked * kept)

"""Exact tokens against tokens made anew from the text, everything else equal.

Without token ids a trainer can only tokenise an answer's text again and ask the learner how likely those tokens are.
Where the tokenizer would have written the text in other tokens than the model did, it trains what nobody sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.arms import spelling
from benchmarks.in_process import Episode, Run, trained, with_choice
from leyden import mdp
from leyden.interfaces import Group, RolloutRecords, Transition
from leyden.roles import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TITLE = "Exact tokens against re-tokenised text"
VARIANTS = ("exact", "re-tokenised")
STEPS = 20
FINAL_SAMPLES = 20
"""Samples an item, at temperature 1, for the final figure."""


async def spell(task: object, episode: Episode) -> float:
    """Answer with an item's code."""
    said = await episode.ask("speller", [{"role": "user", "content": task}], max_tokens=spelling.LENGTH + 1)
    return float(said.text == spelling.codes()[str(task)])


@dataclass(kw_only=True)
class Retokenised(Run):
    """A run that sees only the text of its answers."""

    tokenizer: PreTrainedTokenizerFast
    changed: int = 0
    answers: int = 0

    def transitions(self, groups: Sequence[Group], policy: Policy) -> Sequence[Transition]:
        """Return the transitions with tokens made from the text, and the learner's log-probabilities of them."""
        anew = [replace(group, rollouts=[self._from_text(records) for records in group.rollouts]) for group in groups]
        found = super().transitions(anew, policy)
        logprobs = self.learner.logprobs(policy.name, mdp.samples(found))
        return [replace(one, logprobs=own) for one, own in zip(found, logprobs, strict=True)]

    def _from_text(self, records: RolloutRecords) -> RolloutRecords:
        completions = []
        for completion in records.completions:
            (choice,) = completion.choices
            end = [token for token in choice.token_ids[-1:] if token == self.tokenizer.eos_token_id]
            token_ids = [*self.tokenizer(choice.text, add_special_tokens=False).input_ids, *end]
            self.answers += 1
            self.changed += token_ids != choice.token_ids
            completions.append(with_choice(completion, token_ids=token_ids, logprobs=[0.0] * len(token_ids)))
        return replace(records, completions=completions)


def prepare(models: Path) -> None:
    """Make the base model."""
    spelling.make_model(models / "spelling")


async def run(variant: str, seed: int, models: Path) -> dict[str, object]:
    """Train one variant; return its curve and final figures."""
    from leyden_plugins.algorithms.rl import GRPO

    options: dict[str, object] = {
        "agent": spell,
        "tasks": sorted(spelling.codes()),
        "policies": [Policy("speller", learning_rate=1e-3)],
        "model": spelling.make_model(models / "spelling"),
        "total_steps": STEPS,
        "seed": seed,
    }
    session = (
        Run(**options)  # type: ignore[arg-type]  # as above
        if variant == "exact"
        else Retokenised(**options, tokenizer=spelling.make_tokenizer())  # type: ignore[arg-type]  # as above
    )
    found = await trained(session, GRPO(group_size=8), samples=FINAL_SAMPLES)
    if isinstance(session, Retokenised):
        found["mismatch_rate"] = session.changed / session.answers
    return found

"""Which versions of each policy were published, and how stale a sample is.

One idea: a version is dated by the step that made it, so that the distance between two versions is a number of updates
also where their numbers are not consecutive.
One trap: after a resume, stored samples of versions that were voided are used again. Their step was made anew from
the same groups, so they are as old as the version that stands there now.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from leyden.interfaces import Learner, Sample, Weights
from leyden.spans import Update
from leyden.training.parts import Parts


class Versions:
    """The published versions of every policy, voided ones included."""

    def __init__(self, updates: Iterable[Update] = ()) -> None:
        self._step_of: dict[tuple[str, int], int] = {}
        self._steps: dict[str, list[int]] = defaultdict(list)
        """Policy -> the steps whose updates stand, ascending."""
        for update in updates:
            self.add(update)

    def add(self, update: Update) -> None:
        """Enter an update; those that stand come in the order of their steps."""
        self._step_of[update.policy, update.version] = update.step
        if not update.voided:
            self._steps[update.policy].append(update.step)

    def count(self, policy: str) -> int:
        """Return how many updates of the policy stand."""
        return len(self._steps[policy])

    def staleness(self, policy: str, version: int) -> int:
        """Return how many updates of the policy came after its `version`; 0 is the version it began with."""
        steps = self._steps[policy]
        return len(steps) - bisect.bisect_right(steps, self._step_of.get((policy, version), 0))


async def serve(parts: Parts, policy: str, version: int) -> None:
    """Let the engine sample from the learner's weights as they are now."""
    weights = checkable_weights(parts.learner, policy)
    if parts.engine.keeps_versions:
        await parts.engine.publish(policy, version, weights)
        return
    await parts.gateway.hold()
    try:
        await parts.engine.publish(policy, version, weights)
    finally:
        parts.gateway.release()


def checkable_weights(learner: Learner, policy: str) -> Weights:
    """Return a policy's weights with what an engine needs to check that it serves them."""

    def logprobs(prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> Sequence[float]:
        nothing = [0.0] * len(token_ids)
        sample = Sample(
            prompt_token_ids=prompt_token_ids,
            token_ids=token_ids,
            weights=nothing,
            advantages=nothing,
            logprobs=nothing,
        )
        return learner.logprobs(policy, [sample])[0]

    return replace(learner.weights(policy), logprobs=logprobs)

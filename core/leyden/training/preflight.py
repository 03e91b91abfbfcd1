"""Look before the first step: one group of rollouts tells what would otherwise go wrong silently for hours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from leyden import mdp
from leyden.errors import EngineError
from leyden.interfaces import Group, Learner, Transition
from leyden.roles import Policy, check_roles, matches
from leyden.running.rollouts import Tally, refuse_rewardless

MAX_LOGPROB_DIFFERENCE = 0.05
"""Nats a token, on average; above this engine and learner do not compute the same model. In bfloat16 single tokens
differ by more, as each side rounds in its own way."""


def preflight(
    group: Group,
    *,
    policies: Sequence[Policy],
    transitions: Sequence[Transition],
    learner: Learner,
    tally: Tally,
    agent: str,
    seconds: float,
    rollouts_to_come: int,
) -> list[str]:
    """Check the first group; return lines for the user.

    Args:
        group: finished rollouts of one task.
        policies: the run's.
        transitions: the group's, of all trainable policies.
        learner: holds the weights that sampled them.
        tally: what the rollouts so far did.
        agent: its name, for messages.
        seconds: how long the group took.
        rollouts_to_come: in the whole run, at the same speed an upper bound of its time.

    Raises:
        ConfigurationError: no rollout has a reward.
        RoleError: a policy's role does not exist.
        EngineError: engine and learner disagree on log-probabilities.
    """
    rollouts = [one.rollout for one in group.rollouts]
    refuse_rewardless(rollouts, agent)
    warnings = check_roles(policies, tally.spoken, tally.declared) if tally.spoken else []
    lines = [f"roles seen (model calls): {_counts(tally.spoken)}"] if tally.spoken else []
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    lines.append(f"rewards of the first group: {', '.join(f'{reward:g}' for reward in rewards) or 'none'}")
    if len(set(rewards)) < 2:
        lines.append("note: no spread in this group, so it teaches nothing; fine now and then, not in every group")
    for policy in policies:
        own = [one for one in transitions if one.policy == policy.name and not one.off_distribution]
        if policy.trainable and own:
            lines.append(_ratio_line(policy, own, learner))
    lines += sampling_lines(policies)
    for role, calls in sorted(tally.spoken.items()):
        if not any(matches(policy.roles, role) for policy in policies):
            expected = calls * rollouts_to_come // max(1, tally.rollouts)
            lines.append(f"role {role!r} is in no policy: about {expected:,} calls to its own endpoint in this run")
    if tally.rollouts >= len(rollouts):  # otherwise a killed run left some of them in the store, ready at once
        longest = rollouts_to_come * seconds / max(1, len(rollouts))
        lines.append(
            f"{rollouts_to_come:,} training rollouts to come: at most {_duration(longest)} at this group's pace"
        )
    if tally.failures:
        lines.append(f"failures so far: {_counts(tally.failures)}")
    return lines + [f"note: {warning}" for warning in warnings]


def sampling_lines(policies: Sequence[Policy]) -> list[str]:
    """Say what replaces the agent's own sampling in training rollouts."""
    own = "the agent's own values"
    return [
        f"policy {p.name!r} samples with temperature={p.sampling.temperature}, top_p={p.sampling.top_p}, "
        f"top_k={p.sampling.top_k} in training; evaluation uses "
        f"{own if p.eval_sampling.temperature is None else p.eval_sampling}"
        + ("" if p.sampling.keep_format else "; formats and tool calls that the agent insists on are not forced on it")
        for p in policies
    ]


def _ratio_line(policy: Policy, transitions: Sequence[Transition], learner: Learner) -> str:
    """Compare recorded with recomputed log-probabilities: before any update the ratio is 1."""
    computed = learner.logprobs(policy.name, mdp.samples(transitions))
    differences = [
        abs(recorded - recomputed)
        for transition, ours in zip(transitions, computed, strict=True)
        for recorded, recomputed in zip(transition.logprobs, ours, strict=True)
    ]
    worst = max(differences, default=0.0)
    mean = sum(differences) / max(1, len(differences))
    if not mean <= MAX_LOGPROB_DIFFERENCE:  # also when it is NaN
        raise EngineError(
            f"policy {policy.name!r}: the engine's log-probabilities differ from the learner's by {mean:.3g} nats a "
            f"token on average and by up to {worst:.3g}; they must serve the same weights at the same precision"
        )
    told = f"policy {policy.name!r}: engine and learner give the sampled tokens"
    if worst == 0:
        return f"{told} exactly the same probabilities"
    average, most = 100 * math.expm1(mean), 100 * math.expm1(worst)
    return f"{told} probabilities that differ by {average:.2g} % on average, by {most:.2g} % at most"


def _duration(seconds: float) -> str:
    """Return a duration in a unit that fits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

"""The MDP builder: from a rollout's records to transitions, and from transitions to what a learner trains.

records -> `admitted` (which samples count) -> `transitions` (state, action, return) -> the algorithm's advantages
-> `cut` (optimizer batches, by whole groups) -> `weigh` (each token's share of the loss) -> `samples`.

One idea: every normalisation stands in the tokens' weights *before* the learner lays out rows, so that every layout
gives the same gradient.
One trap: a choice of a call with `n > 1` counts only when the agent went on with it, or a reward targets it.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from leyden.credit import Credit, broadcast, turns, weighted
from leyden.errors import ConfigurationError, EngineError, RewardError
from leyden.interfaces import Group, RolloutRecords, Sample, Transition
from leyden.roles import Policy
from leyden.spans import FINISHED, Choice, Completion, Span, Status

Normalisation = Literal["per_rollout", "per_call", "token_mean", "dr_grpo"]

COMPLETE = frozenset({"stop", "length", "tool_calls"})
"""Finish reasons of a complete sample; `interrupted` and `error` are not."""


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """One sample that is trained."""

    completion: Completion
    choice: Choice
    span: Span | None
    """The adapter's or gateway's span of the call; `None` when it never ended."""
    turn: int
    """This role's how-manieth call in the rollout, from 0, by start time."""


def admitted(records: RolloutRecords, policies: Iterable[Policy], *, mask_overlong: bool = False) -> list[Admitted]:
    """Return the samples of trainable policies that count, by start time.

    A call counts when its rollout is finished and has a reward, and the engine completed the last answer that
    was delivered for it.
    """
    rollout = records.rollout
    if rollout.state not in FINISHED or rollout.reward is None:
        return []
    calls: dict[str, list[Completion]] = defaultdict(list)
    for completion in records.completions:
        if completion.attempt == rollout.attempt:
            calls[completion.span_id].append(completion)
    trainable = {policy.name for policy in policies if policy.trainable}
    spans = {span.span_id: span for span in records.spans}
    samples: list[Admitted] = []
    for span_id, turn in turns(records).items():
        attempts = sorted(calls[span_id], key=lambda completion: completion.http_attempt)
        delivered = [completion for completion in attempts if completion.delivered]
        if not delivered:
            continue
        last = delivered[-1]
        if last.policy not in trainable or last.status is not Status.OK:
            continue
        for choice in sorted(_used_choices(last, records), key=lambda one: one.index):
            overlong = mask_overlong and choice.finish_reason == "length"
            if choice.token_ids and choice.finish_reason in COMPLETE and not overlong:
                samples.append(Admitted(completion=last, choice=choice, span=spans.get(span_id), turn=turn.number))
    return samples


def _used_choices(completion: Completion, records: RolloutRecords) -> list[Choice]:
    """Return the only choice, or of several those that a later prompt extends or a reward targets."""
    if len(completion.choices) == 1:
        return completion.choices
    targets = {reward.index for reward in records.rewards if reward.target_span == completion.span_id}
    later = [
        other.prompt_token_ids
        for other in records.completions
        if other.attempt == completion.attempt and other.start_ns > completion.start_ns
    ]

    def extended(choice: Choice) -> bool:
        stem = [*completion.prompt_token_ids, *choice.token_ids]
        return any(list(prompt[: len(stem)]) == stem for prompt in later)

    return [choice for choice in completion.choices if choice.index in targets or extended(choice)]


def transitions(
    records: RolloutRecords,
    policies: Iterable[Policy],
    *,
    credit: Credit = broadcast,
    mask_overlong: bool = False,
    reward_weights: Mapping[str, float] | None = None,
) -> list[Transition]:
    """Return a rollout's admitted samples with their returns, by start time.

    Args:
        records: of the rollout.
        policies: those that may be trained.
        credit: shares the rewards out to the calls.
        mask_overlong: leave out samples that ended for length.
        reward_weights: what rewards are multiplied with before `credit` sees them, by name (`credit.weighted`); `None`
            takes them as recorded. The rollout's total is weighted already.

    Raises:
        EngineError: an engine recorded fewer or more log-probabilities than tokens.
        RewardError: the credit function returned another number of values than it was given transitions, or one that
            is not finite.
    """
    found = [_transition(sample, records) for sample in admitted(records, policies, mask_overlong=mask_overlong)]
    values = credit(records if reward_weights is None else weighted(records, reward_weights), found)
    if len(values) != len(found):
        raise RewardError(
            f"credit function {credit!r} returned {len(values)} values for the {len(found)} calls of rollout "
            f"{records.rollout.rollout_id!r}; return one a call, in order"
        )
    if not all(math.isfinite(value) for value in values):
        raise RewardError(
            f"credit function {credit!r} returned {list(values)!r:.200} for rollout {records.rollout.rollout_id!r}; "
            "returns must be finite numbers"
        )
    return [replace(one, value=float(value)) for one, value in zip(found, values, strict=True)]


def _transition(sample: Admitted, records: RolloutRecords) -> Transition:
    completion, choice = sample.completion, sample.choice
    if len(choice.logprobs) != len(choice.token_ids):
        raise EngineError(
            f"call {completion.span_id!r} of role {completion.role!r} has {len(choice.token_ids)} tokens and "
            f"{len(choice.logprobs)} log-probabilities; use an engine that returns one log-probability a token"
        )
    temperature = completion.sampling.get("temperature")
    return Transition(
        rollout_id=records.rollout.rollout_id,
        group_id=records.rollout.group_id,
        role=completion.role,
        policy=completion.policy,
        version=completion.version,
        span_id=completion.span_id,
        choice_index=choice.index,
        prompt_token_ids=completion.prompt_token_ids,
        token_ids=choice.token_ids,
        logprobs=choice.logprobs,
        temperature=1.0 if temperature is None else float(cast(float, temperature)),
        off_distribution=completion.off_distribution,
        finish_reason=choice.finish_reason,
        turn=sample.turn,
        value=0.0,
    )


def cut(transitions: Sequence[Transition], batches: int, *, seed: str) -> list[list[Transition]]:
    """Cut transitions into at most `batches` optimizer batches of whole groups, in an order drawn from `seed`."""
    by_group: dict[str, list[Transition]] = defaultdict(list)
    for transition in transitions:
        by_group[transition.group_id].append(transition)
    names = sorted(by_group)
    random.Random(seed).shuffle(names)
    count = min(batches, len(names))
    return [
        [one for name in names[i * len(names) // count : (i + 1) * len(names) // count] for one in by_group[name]]
        for i in range(count)
    ]


def weigh(
    transitions: Sequence[Transition], normalisation: Normalisation, *, rollout_tokens: int | None = None
) -> list[Transition]:
    """Give every token of one policy's optimizer batch its share of the loss, 1 / (Z * N).

    N: rollouts in the batch. Z for `per_rollout`: the rollout's tokens (GRPO, DeepSeekMath equation 3, with the
    rollout as its output o_i); `per_call`: the rollout's calls times the call's tokens, so calls weigh equally;
    `dr_grpo`: the constant `rollout_tokens`, so that long answers are not held cheaper (Liu et al. 2025).
    `token_mean`: 1 / all tokens of the batch (DAPO, equation 8).

    Raises:
        ConfigurationError: an unknown normalisation, or `rollout_tokens` is not given exactly for `dr_grpo`.
    """
    if normalisation not in get_args(Normalisation):
        raise ConfigurationError(f"normalisation={normalisation!r} is unknown; use one of {get_args(Normalisation)!r}")
    if (rollout_tokens is not None and rollout_tokens >= 1) != (normalisation == "dr_grpo"):
        raise ConfigurationError(
            f"normalisation={normalisation!r} with rollout_tokens={rollout_tokens!r}: 'dr_grpo' divides by this "
            "constant, at least 1, and no other normalisation has it"
        )
    tokens: Counter[str] = Counter()
    for one in transitions:
        tokens[one.rollout_id] += len(one.token_ids)
    calls = Counter(one.rollout_id for one in transitions)
    rollouts, total = len(tokens), tokens.total()

    def divisor(one: Transition) -> int:
        if normalisation == "token_mean":
            return total
        if normalisation == "per_call":
            return calls[one.rollout_id] * len(one.token_ids) * rollouts
        return (rollout_tokens or tokens[one.rollout_id]) * rollouts

    return [replace(one, weight=1 / divisor(one)) for one in transitions]


def samples(transitions: Sequence[Transition]) -> list[Sample]:
    """Return what a learner trains: one sample a call, in order, with each token's advantage and share of the loss."""
    return [
        Sample(
            prompt_token_ids=one.prompt_token_ids,
            token_ids=one.token_ids,
            weights=[one.weight * correction for correction in one.corrections or [1.0] * len(one.token_ids)],
            advantages=one.token_advantages or [one.advantage] * len(one.token_ids),
            logprobs=one.logprobs,
            old_logprobs=one.old_logprobs,
            reference_logprobs=one.reference_logprobs,
            returns=one.returns,
            values=one.values,
            temperature=one.temperature,
        )
        for one in transitions
    ]


def sampling_of(groups: Sequence[Group], transition: Transition) -> Mapping[str, object]:
    """Return the sampling parameters that a transition's call really used."""
    for group in groups:
        for records in group.rollouts:
            for completion in records.completions:
                if completion.span_id == transition.span_id:
                    return completion.sampling
    return {}

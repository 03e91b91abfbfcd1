"""The MDP builder: from a rollout's records to transitions, and from transitions to rows.

records -> `admitted` (which samples count) -> `transitions` (state, action, return) -> the algorithm's advantages
-> `cut` (optimizer batches, by whole groups) -> `weigh` (each token's share of the loss) -> `rows` (layout).

One idea: every normalisation stands in the tokens' weights *before* rows are laid out, so one row a call and
merged rows give the same gradient.
One trap: a choice of a call with `n > 1` counts only when the agent went on with it, or a reward targets it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Literal, cast

from leyden.credit import Credit, broadcast
from leyden.errors import ConfigurationError, EngineError, RewardError
from leyden.interfaces import Group, RolloutRecords, TrainingRow, Transition
from leyden.roles import Policy
from leyden.spans import FINISHED, Choice, Completion, Span, Status
from leyden.tokentree import TokenTree, path, spell

Normalisation = Literal["per_rollout", "per_call", "token_mean"]
Layout = Literal["calls", "merged"]

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
    turns: Counter[str] = Counter()
    samples: list[Admitted] = []
    for span_id in sorted(calls, key=lambda one: (min(each.start_ns for each in calls[one]), one)):
        attempts = sorted(calls[span_id], key=lambda completion: completion.http_attempt)
        role = attempts[-1].role
        turn, turns[role] = turns[role], turns[role] + 1
        delivered = [completion for completion in attempts if completion.delivered]
        if not delivered:
            continue
        last = delivered[-1]
        if last.policy not in trainable or last.status is not Status.OK:
            continue
        for choice in sorted(_used_choices(last, records), key=lambda one: one.index):
            overlong = mask_overlong and choice.finish_reason == "length"
            if choice.token_ids and choice.finish_reason in COMPLETE and not overlong:
                samples.append(Admitted(completion=last, choice=choice, span=spans.get(span_id), turn=turn))
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
) -> list[Transition]:
    """Return a rollout's admitted samples with their returns, by start time.

    Raises:
        EngineError: an engine recorded fewer or more log-probabilities than tokens.
        RewardError: the credit function returned another number of values than it was given transitions.
    """
    found = [_transition(sample, records) for sample in admitted(records, policies, mask_overlong=mask_overlong)]
    values = credit(records, found)
    if len(values) != len(found):
        raise RewardError(
            f"credit function {credit!r} returned {len(values)} values for the {len(found)} calls of rollout "
            f"{records.rollout.rollout_id!r}; return one a call, in order"
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


def weigh(transitions: Sequence[Transition], normalisation: Normalisation) -> list[Transition]:
    """Give every token of one policy's optimizer batch its share of the loss, 1 / (Z * N).

    N: rollouts in the batch. Z for `per_rollout`: the rollout's tokens (GRPO, DeepSeekMath equation 3, with the
    rollout as its output o_i); `per_call`: the rollout's calls times the call's tokens, so calls weigh equally.
    `token_mean`: 1 / all tokens of the batch (DAPO, equation 8).

    Raises:
        ConfigurationError: an unknown normalisation.
    """
    tokens: Counter[str] = Counter()
    for one in transitions:
        tokens[one.rollout_id] += len(one.token_ids)
    calls = Counter(one.rollout_id for one in transitions)
    rollouts, total = len(tokens), tokens.total()
    if normalisation == "per_rollout":
        return [replace(one, weight=1 / (tokens[one.rollout_id] * rollouts)) for one in transitions]
    if normalisation == "per_call":
        return [replace(one, weight=1 / (calls[one.rollout_id] * len(one.token_ids) * rollouts)) for one in transitions]
    if normalisation == "token_mean":
        return [replace(one, weight=1 / total) for one in transitions]
    raise ConfigurationError(
        f"normalisation={normalisation!r} is unknown; use 'per_rollout', 'per_call' or 'token_mean'"
    )


def rows(transitions: Sequence[Transition], layout: Layout = "merged") -> list[TrainingRow]:
    """Lay transitions out as rows: one a call, or one a root-to-leaf path of each rollout's token tree.

    Each transition's tokens are trained in exactly one row; both layouts give the same gradient.

    Raises:
        ConfigurationError: an unknown layout.
    """
    if layout == "calls":
        return [_row([*one.prompt_token_ids, *one.token_ids], [one]) for one in transitions]
    if layout != "merged":
        raise ConfigurationError(f"layout={layout!r} is unknown; use 'calls' or 'merged'")
    trees: dict[tuple[str, str], list[Transition]] = defaultdict(list)
    for one in transitions:
        trees[one.rollout_id, one.policy].append(one)
    return [row for calls in trees.values() for row in _merged(calls)]


def _merged(calls: Sequence[Transition]) -> list[TrainingRow]:
    """Lay one token tree out; each call goes with the first leaf below it."""
    tree = TokenTree()
    ending: dict[int, list[Transition]] = defaultdict(list)
    for call in sorted(calls, key=lambda one: (len(one.prompt_token_ids), one.span_id, one.choice_index)):
        ending[id(tree.insert([*call.prompt_token_ids, *call.token_ids]))].append(call)
    laid_out: list[TrainingRow] = []
    for leaf in tree.leaves():
        on_path = [call for node in path(leaf) for call in ending.pop(id(node), ())]
        token_ids = spell(leaf)
        for row in _apart(on_path):
            laid_out.append(_row(token_ids[: _end(row[-1])], row))
    return laid_out


def _apart(calls: Sequence[Transition]) -> list[list[Transition]]:
    """Spread a path's calls over as few rows as their overlaps and temperatures ask for.

    Calls overlap when a retry sampled the same tokens again, or when a prompt ends inside another call's answer.
    """
    spread: list[list[Transition]] = []
    for call in sorted(calls, key=lambda one: len(one.prompt_token_ids)):
        for row in spread:
            if _end(row[-1]) <= len(call.prompt_token_ids) and row[-1].temperature == call.temperature:
                row.append(call)
                break
        else:
            spread.append([call])
    return spread


def _end(call: Transition) -> int:
    return len(call.prompt_token_ids) + len(call.token_ids)


def _row(token_ids: list[int], calls: Sequence[Transition]) -> TrainingRow:
    """Write a row; calls are in order and do not overlap."""
    mask: list[bool] = []
    weights: list[float] = []
    advantages: list[float] = []
    logprobs: list[float] = []
    for call in calls:
        gap, length = len(call.prompt_token_ids) - len(mask), len(call.token_ids)
        mask += [False] * gap + [True] * length
        weights += [0.0] * gap + [call.weight] * length
        advantages += [0.0] * gap + [call.advantage] * length
        logprobs += [0.0] * gap + list(call.logprobs)
    return TrainingRow(
        token_ids=token_ids,
        mask=mask,
        weights=weights,
        advantages=advantages,
        logprobs=logprobs,
        temperature=calls[0].temperature,
    )


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Describe a step's rewards: `reward/mean`, `reward/std`, `groups/total`, `groups/without_signal`."""
    rewards = [[one.rollout.reward for one in group.rollouts if one.rollout.reward is not None] for group in groups]
    every = [reward for group in rewards for reward in group]
    return {
        "reward/mean": fmean(every) if every else 0.0,
        "reward/std": pstdev(every) if every else 0.0,
        "groups/total": float(len(groups)),
        "groups/without_signal": float(sum(len(set(group)) < 2 for group in rewards)),
    }


def sample_metrics(transitions: Sequence[Transition]) -> dict[str, float]:
    """Describe a policy's samples of a step.

    `transitions/admitted`; `samples/identical_groups`, groups whose rollouts all sampled the same tokens (a sign
    of temperature 0 or a cache); `mdp/merge_ratio`, tokens in merged rows over tokens in one row a call.
    """
    sampled: dict[str, dict[str, list[Sequence[int]]]] = defaultdict(lambda: defaultdict(list))
    for one in transitions:
        sampled[one.group_id][one.rollout_id].append(tuple(one.token_ids))
    identical = [
        len(rollouts) > 1 and len({tuple(calls) for calls in rollouts.values()}) == 1 for rollouts in sampled.values()
    ]
    by_call = sum(_end(one) for one in transitions)
    merged = sum(len(row.token_ids) for row in rows(transitions, "merged"))
    return {
        "transitions/admitted": float(len(transitions)),
        "samples/identical_groups": float(sum(identical)),
        "mdp/merge_ratio": merged / by_call if by_call else 1.0,
    }


def sampling_of(groups: Sequence[Group], transition: Transition) -> Mapping[str, object]:
    """Return the sampling parameters that a transition's call really used."""
    for group in groups:
        for records in group.rollouts:
            for completion in records.completions:
                if completion.span_id == transition.span_id:
                    return completion.sampling
    return {}

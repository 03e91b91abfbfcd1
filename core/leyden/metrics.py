"""What a step's rollouts, calls and advantages say about a run, as plain numbers.

One idea: each number is taken from the records that know it: rewards, failures and lengths here, from records and
transitions; ratios, entropy and clipping in the learner, from log-probabilities. What each name means, and its unit,
stands once, in `leyden_plugins.observers.metrics`.
One trap: admission and `mask_overlong` leave calls out of the transitions, so lengths and the overlong share are taken
from the completions: of what was sampled, not only of what is trained.
"""

from __future__ import annotations

import math
import operator
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from leyden.interfaces import Group, RolloutRecords, Transition
from leyden.spans import Completion, ForkCause, Kind, RolloutState, Status

START_STEPS = 3
"""How many first values make up a metric's start."""
COLLAPSED = 0.25
"""Below this share of its start, a watched metric has collapsed."""
STEPS_IN_A_ROW = 5
"""For so many steps, before it is said."""
WATCHED = {
    "samples/entropy": "the entropy of the samples",
    "diversity/distinct_answers": "the share of distinct answers",
}
"""What falls when a policy stops trying different answers."""


# ---- of a step's groups, whatever the policy --------------------------------------------------------------------


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Describe a step's rewards.

    `reward/mean`, `reward/std`: of the rollouts' totals; rollouts without a reward are left out, here and below.
    `reward/name/<name>`: mean of a named reward over the rollouts that have it.
    `reward/role/<role>`: mean total of the rollouts in which the role spoke.
    `reward/role/<role>/<name>`: mean of what the role, or its calls, were given by that name.
    `groups/total`, `groups/without_signal`, `groups/without_signal_share`: groups whose totals are all equal.
    """
    rewards_G = [[one.rollout.reward for one in group.rollouts if one.rollout.reward is not None] for group in groups]
    every = [reward for group in rewards_G for reward in group]
    silent = sum(len(set(group)) < 2 for group in rewards_G)
    found = {
        "reward/mean": fmean(every) if every else 0.0,
        "reward/std": pstdev(every) if every else 0.0,
        "groups/total": float(len(groups)),
        "groups/without_signal": float(silent),
        "groups/without_signal_share": silent / len(groups) if groups else 0.0,
    }
    parts: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        for records in group.rollouts:
            if records.rollout.reward is not None:
                for name, value in _rewards_of(records, records.rollout.reward).items():
                    parts[name].append(value)
    return found | {name: fmean(parts[name]) for name in sorted(parts)}


def _rewards_of(records: RolloutRecords, total: float) -> dict[str, float]:
    """Return a rollout's rewards by metric name; those of one name and target add up."""
    roles = {span.span_id: span.role for span in records.spans if span.kind is Kind.MODEL_CALL}
    roles |= {completion.span_id: completion.role for completion in records.completions}
    found = {f"reward/role/{role}": total for role in roles.values()}
    for reward in records.rewards:
        role = reward.target_role if reward.target_span is None else roles.get(reward.target_span)
        if role is not None:
            name = f"reward/role/{role}/{reward.name}"
        elif reward.target_span is None:
            name = f"reward/name/{reward.name}"
        else:
            continue  # it targets a call that left no record
        found[name] = found.get(name, 0.0) + reward.value
    return found


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Describe a step's rollouts: `rollouts/failed_share`, `rollouts/unrewarded_share`, `rollouts/calls_mean`, `_max`.

    A rollout without a reward was dropped on purpose, or a judge failed. Calls are those of all roles, trained or
    not; a call that was tried again counts once.
    """
    rollouts = [records for group in groups for records in group.rollouts]
    if not rollouts:
        return {}
    calls = [float(len(_calls(records))) for records in rollouts]
    failed = sum(records.rollout.state is not RolloutState.SUCCEEDED for records in rollouts)
    return {
        "rollouts/failed_share": failed / len(rollouts),
        "rollouts/unrewarded_share": sum(records.rollout.reward is None for records in rollouts) / len(rollouts),
        "rollouts/calls_mean": fmean(calls),
        "rollouts/calls_max": max(calls),
    }


def _calls(records: RolloutRecords) -> set[str]:
    return {span.span_id for span in records.spans if span.kind is Kind.MODEL_CALL} | {
        completion.span_id for completion in records.completions
    }


# ---- of one policy's calls --------------------------------------------------------------------------------------


def call_metrics(groups: Sequence[Group], policy: str, *, tokens_trained: float) -> dict[str, float]:
    """Describe all calls that a policy answered in a step, trained or not; nothing for a policy that was silent.

    `lengths/prompt_*`, `lengths/answer_*`: mean, 95th percentile and maximum, in tokens.
    `lengths/overlong_share`: answers cut off at their limit.
    `forks/<cause>`: prompts that do not begin with the tokens of the call they go on from (`leyden show` tells where).
    `forks/spliced_share`: of the prompt tokens, those that exact continuation took from the record.
    `tokens/trained_per_sampled`: `tokens_trained` over all tokens that the policy sampled for these rollouts.
    """
    answered: list[Completion] = []
    sampled = 0
    for group in groups:
        for records in group.rollouts:
            for completion in records.completions:
                if completion.policy == policy:
                    sampled += sum(len(choice.token_ids) for choice in completion.choices)
                    if completion.status is Status.OK:
                        answered.append(completion)
    choices = [choice for completion in answered for choice in completion.choices]
    if not choices:
        return {}
    prompts = [len(completion.prompt_token_ids) for completion in answered]
    causes = Counter(completion.fork.cause for completion in answered if completion.fork is not None)
    return {
        **_spread("lengths/prompt", prompts),
        **_spread("lengths/answer", [len(choice.token_ids) for choice in choices]),
        "lengths/overlong_share": fmean(choice.finish_reason == "length" for choice in choices),
        **{f"forks/{cause}": float(causes[cause]) for cause in ForkCause},
        "forks/spliced_share": sum(completion.spliced for completion in answered) / max(1, sum(prompts)),
        "tokens/trained_per_sampled": tokens_trained / max(1, sampled),
    }


def _spread(name: str, values: Sequence[int]) -> dict[str, float]:
    """Return mean, maximum and 95th percentile (the nearest rank)."""
    ordered = sorted(values)
    return {
        f"{name}_mean": fmean(ordered),
        f"{name}_p95": float(ordered[math.ceil(0.95 * len(ordered)) - 1]),
        f"{name}_max": float(ordered[-1]),
    }


def sample_metrics(transitions: Sequence[Transition]) -> dict[str, float]:
    """Describe a policy's admitted samples of a step.

    `transitions/admitted`; `turns/mean` and `turns/max`, the calls of a role in a rollout; `mdp/merge_ratio`, tokens
    where calls of a rollout that extend each other share a row, over tokens with one row a call; `samples/entropy`,
    mean -log p as recorded, of groups with and without signal alike; `samples/identical_groups` and
    `diversity/distinct_answers`, see `_diversity`.
    """
    turns: dict[tuple[str, str], int] = {}
    for one in transitions:
        key = one.rollout_id, one.role
        turns[key] = max(one.turn + 1, turns.get(key, 0))
    by_call = sum(len(one.prompt_token_ids) + len(one.token_ids) for one in transitions)
    in_rows = _merged_tokens(transitions)
    found = {
        "transitions/admitted": float(len(transitions)),
        "mdp/merge_ratio": in_rows / by_call if by_call else 1.0,
        **_diversity(transitions),
    }
    if transitions:
        tokens = sum(len(one.token_ids) for one in transitions)
        found |= {
            "turns/mean": fmean(turns.values()),
            "turns/max": float(max(turns.values())),
            "samples/entropy": -sum(sum(one.logprobs) for one in transitions) / tokens,
        }
    return found


def _merged_tokens(transitions: Sequence[Transition]) -> int:
    """Count the tokens of rows that the calls of a rollout share where they extend each other.

    These are the rows of `layouts.merged`, which takes five times as long.
    """
    tails: dict[str, list[Transition]] = defaultdict(list)
    total = 0
    for one in sorted(transitions, key=lambda each: len(each.prompt_token_ids) + len(each.token_ids)):
        rows = tails[one.rollout_id]
        for index, last in enumerate(rows):
            if _begins_with(one, last):
                total -= len(last.prompt_token_ids) + len(last.token_ids)
                rows[index] = one
                break
        else:
            rows.append(one)
        total += len(one.prompt_token_ids) + len(one.token_ids)
    return total


def _begins_with(one: Transition, other: Transition) -> bool:
    """Say whether a call's prompt and answer begin with another's."""
    prompt, head = one.prompt_token_ids, len(other.prompt_token_ids)
    end = head + len(other.token_ids)
    if len(prompt) < end:
        return [*prompt, *one.token_ids][:end] == [*other.prompt_token_ids, *other.token_ids]
    # The answer first: it is short, and it is where rows differ.
    return prompt[head:end] == other.token_ids and prompt[:head] == other.prompt_token_ids


def _diversity(transitions: Sequence[Transition]) -> dict[str, float]:
    """Count how often the rollouts of a group say the same.

    `samples/identical_groups`: groups whose rollouts all sampled the same tokens in every call (a sign of temperature
    0 or a cache). `diversity/distinct_answers`: over groups and roles, the mean of (distinct - 1) / (answers - 1) of
    the role's first answers: 0 when all are equal, 1 when all differ. Exact, so that it depends on no length, as the
    share of distinct n-grams (Li et al. 2016, distinct-n) does; of long answers, entropy says more.
    """
    every: dict[str, dict[str, list[tuple[int, ...]]]] = defaultdict(lambda: defaultdict(list))
    first: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for one in transitions:
        answer = tuple(one.token_ids)
        every[one.group_id][one.rollout_id].append(answer)
        if one.turn == 0:
            first[one.group_id, one.role].append(answer)
    identical = [
        len(rollouts) > 1 and len({tuple(calls) for calls in rollouts.values()}) == 1 for rollouts in every.values()
    ]
    shares = [(len(set(answers)) - 1) / (len(answers) - 1) for answers in first.values() if len(answers) > 1]
    found = {"samples/identical_groups": float(sum(identical))}
    return found | {"diversity/distinct_answers": fmean(shares)} if shares else found


def advantage_metrics(transitions: Sequence[Transition]) -> dict[str, float]:
    """Describe the advantages of a policy's calls; a call whose tokens differ counts with their mean.

    `advantage/mean`, `advantage/std`, `advantage/max` (of the absolute values), `advantage/zero_share` (calls that
    add nothing to the gradient).
    """
    if not transitions:
        return {"advantage/mean": 0.0, "advantage/std": 0.0, "advantage/max": 0.0, "advantage/zero_share": 0.0}
    advantages = [fmean(one.token_advantages) if one.token_advantages else one.advantage for one in transitions]
    return {
        "advantage/mean": fmean(advantages),
        "advantage/std": pstdev(advantages),
        "advantage/max": max(map(abs, advantages)),
        "advantage/zero_share": advantages.count(0.0) / len(advantages),
    }


def mismatch_metrics(transitions: Sequence[Transition]) -> dict[str, float]:
    """Compare recorded log-probabilities with those the learner computed when the update began.

    `mismatch/mean`, `mismatch/max`: |difference| a token, over the calls with `old_logprobs`; nothing where the
    algorithm asked for none, and the learner's own figure from the first optimizer batch stands.
    """
    differences: list[float] = []
    for one in transitions:
        if one.old_logprobs is not None:
            differences.extend(map(abs, map(operator.sub, one.logprobs, one.old_logprobs)))
    if not differences:
        return {}
    return {"mismatch/mean": sum(differences) / len(differences), "mismatch/max": max(differences)}


def over_batches(batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine what a learner measured in a step's optimizer batches, in order.

    A mean over the batches that have a metric; the largest for names that end in `max`. Of `mismatch/*` the first
    batch alone counts: in it the learner's weights are still those that the step began with, so that what differs from
    the recorded log-probabilities is engine against learner (and, of stale samples, the updates since).
    """
    found: dict[str, list[float]] = defaultdict(list)
    for index, measured in enumerate(batches):
        for name, value in measured.items():
            if index == 0 or not name.startswith("mismatch/"):
                found[name].append(value)
    return {name: max(values) if name.endswith("max") else fmean(values) for name, values in found.items()}


# ---- warnings ---------------------------------------------------------------------------------------------------


class CollapseWatch:
    """Says, once a metric, when a policy has stopped trying different answers.

    A watched metric has collapsed when `STEPS_IN_A_ROW` values lie below `COLLAPSED` times the mean of its first
    `START_STEPS`. After a resume the start is that of the resumed part.
    """

    def __init__(self) -> None:
        self._starts: dict[str, list[float]] = defaultdict(list)
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=STEPS_IN_A_ROW))
        self._said: set[str] = set()

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take a step's metrics; return what the user should read, usually nothing."""
        notices: list[str] = []
        for name, value in metrics.items():
            what = next((text for base, text in WATCHED.items() if name == base or name.endswith("/" + base)), None)
            if what is None or not math.isfinite(value):
                continue
            start = self._starts[name]
            if len(start) < START_STEPS:
                start.append(value)
                continue
            recent = self._recent[name]
            recent.append(value)
            limit = COLLAPSED * fmean(start)
            if name not in self._said and len(recent) == STEPS_IN_A_ROW and max(recent) < limit:
                self._said.add(name)
                notices.append(
                    f"step {step}: {what} has collapsed ({name}: {value:.3g}, {fmean(start):.3g} at the start): the "
                    "policy gives nearly the same answer every time, and groups of equal answers teach nothing. If "
                    "held-out reward is as high as you need, stop here; otherwise start again from an earlier "
                    "checkpoint with a lower learning rate, or with an entropy bonus"
                )
        return notices

"""Credit assignment: which return each call of a rollout gets.

One idea: a credit function takes a rollout's records and its transitions and returns one value a transition, in
order; anyone may write another. This is the first of LightningRL's two levels (Luo et al. 2025, arXiv 2508.03680,
section 3.2.2): the rollout's return is shared out to calls here; an estimator then treats each call as an episode of
its own and shares its return out to tokens.
One trap: a reward with a target is added here, once; it is not part of `Rollout.reward`, so it never credits
anything but its target and, where turns are counted, the calls that led to it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from leyden.errors import ConfigurationError
from leyden.interfaces import RolloutRecords, Transition

Credit = Callable[[RolloutRecords, Sequence[Transition]], Sequence[float]]
"""(records, transitions of the rollout) -> one value a transition, aligned.

The records' rewards are weighted by name already, as their total is.
"""


@dataclass(frozen=True)
class Turn:
    """Where a model call stands in its rollout."""

    role: str
    number: int
    """This role's how-manieth call, from 0, by start time."""
    position: int
    """The rollout's how-manieth call of all roles that the engine answered, likewise."""


def turns(records: RolloutRecords) -> dict[str, Turn]:
    """Return span id -> its turn, by start time, for every call of the latest attempt that the engine saw."""
    started: dict[str, int] = {}
    role: dict[str, tuple[int, str]] = {}
    for one in records.completions:
        if one.attempt == records.rollout.attempt:
            started[one.span_id] = min(one.start_ns, started.get(one.span_id, one.start_ns))
            role[one.span_id] = max((one.http_attempt, one.role), role.get(one.span_id, (-1, "")))
    spoken: Counter[str] = Counter()
    found: dict[str, Turn] = {}
    for position, span_id in enumerate(sorted(started, key=lambda one: (started[one], one))):
        speaker = role[span_id][1]
        found[span_id] = Turn(speaker, spoken[speaker], position)
        spoken[speaker] += 1
    return found


def weighted(records: RolloutRecords, weights: Mapping[str, float]) -> RolloutRecords:
    """Return the records with every reward multiplied by its name's weight, those of weight 0 left out.

    A name that `weights` does not know has weight 1 where it has a target, and 0 where it has none: it is then no
    part of the total either.
    """
    found = []
    for reward in records.rewards:
        has_target = reward.target_role is not None or reward.target_span is not None
        weight = weights.get(reward.name, 1.0 if has_target else 0.0)
        if weight != 0:
            found.append(msgspec.structs.replace(reward, value=weight * reward.value))
    return replace(records, rewards=found)


def broadcast(records: RolloutRecords, transitions: Sequence[Transition]) -> list[float]:
    """Give every call the rollout's reward, plus what its role or the call itself was rewarded with.

    What LightningRL does by default: identical credit. R_k = total + role rewards + own rewards.
    """
    total, of_role = records.rollout.reward or 0.0, _of_roles(records)
    return [total + of_role.get(one.role, 0.0) + _of_call(records, one) for one in transitions]


def discounted(gamma: float) -> Credit:
    """Return a credit function that discounts the rewards of rollout and role by turn.

    A role's call at turn k of its K calls gets gamma^(K - 1 - k) times the reward (Sutton and Barto 2018,
    equation 3.8, with a reward at the end only). Turns are counted within a role, so that what other roles do
    meanwhile, or in parallel, discounts nothing. A reward that targets one call credits that call alone, and is
    not discounted.

    Raises:
        ConfigurationError: gamma outside [0, 1].
    """
    _check(gamma)

    def credit(records: RolloutRecords, transitions: Sequence[Transition]) -> list[float]:
        total, of_role = records.rollout.reward or 0.0, _of_roles(records)
        last = _last_turns((turn.role, turn.number) for turn in turns(records).values())
        return [
            gamma ** (last[one.role] - one.turn) * (total + of_role.get(one.role, 0.0)) + _of_call(records, one)
            for one in transitions
        ]

    return credit


def per_turn(gamma: float = 1.0, *, across_roles: bool = False) -> Credit:
    """Return a credit function of rewards to go: a call is credited with its own reward and those that followed.

    The call at turn k of K gets the sum over j = k .. K - 1 of gamma^(j - k) r_j, plus gamma^(K - 1 - k) times the
    rewards of rollout and role, which come at the end (Sutton and Barto 2018, equations 3.8 and 3.9). r_j is what
    targets call j, also when that call itself is not trained.

    Args:
        gamma: 1 discounts nothing.
        across_roles: count the turns of all roles together, in the order the calls started, so that a call is also
            credited with the turn rewards of the roles that spoke after it. By default only with its own role's.

    Raises:
        ConfigurationError: gamma outside [0, 1].
    """
    _check(gamma)

    def place(turn: Turn) -> tuple[str, int]:
        return ("", turn.position) if across_roles else (turn.role, turn.number)

    def credit(records: RolloutRecords, transitions: Sequence[Transition]) -> list[float]:
        total, of_role, where = records.rollout.reward or 0.0, _of_roles(records), turns(records)
        last = _last_turns(place(turn) for turn in where.values())
        later: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for reward in records.rewards:
            if reward.target_span in where:
                line, turn = place(where[reward.target_span])
                later[line].append((turn, reward.value))

        def to_go(one: Transition) -> float:
            line, turn = place(where[one.span_id])
            end = gamma ** (last[line] - turn) * (total + of_role.get(one.role, 0.0))
            return end + _of_call(records, one) + sum(gamma ** (j - turn) * r for j, r in later[line] if j > turn)

        return [to_go(one) for one in transitions]

    return credit


def per_role(records: RolloutRecords, transitions: Sequence[Transition]) -> list[float]:
    """Give a role's calls that role's rewards in place of the rollout's, plus what each call itself was rewarded with.

    A role without a reward of its own (one with `role=`) gets the total. Reward a role in every rollout or in none:
    a group in which some rollouts have its reward and others the total compares what cannot be compared.
    """
    total, of_role = records.rollout.reward or 0.0, _of_roles(records)
    return [of_role.get(one.role, total) + _of_call(records, one) for one in transitions]


def check(credit: object) -> Credit:
    """Return an assignment of credit.

    Raises:
        ConfigurationError: it is no function, or one that makes assignments and was not called.
    """
    if credit in (discounted, per_turn):
        name = getattr(credit, "__name__", "")
        raise ConfigurationError(f"credit={name} makes an assignment: call it, as in credit={name}(0.9)")
    if not callable(credit):
        raise ConfigurationError(f"credit={credit!r} is no function of (records, transitions), nor the name of one")
    return credit


def _check(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ConfigurationError(f"gamma must be in [0, 1], got {gamma!r}")


def _last_turns(places: Iterable[tuple[str, int]]) -> dict[str, int]:
    last: dict[str, int] = {}
    for line, turn in places:
        last[line] = max(turn, last.get(line, 0))
    return last


def _of_roles(records: RolloutRecords) -> dict[str, float]:
    """Sum the rewards that target a role."""
    found: dict[str, float] = {}
    for reward in records.rewards:
        if reward.target_role is not None and reward.target_span is None:
            found[reward.target_role] = found.get(reward.target_role, 0.0) + reward.value
    return found


def _of_call(records: RolloutRecords, transition: Transition) -> float:
    """Sum the rewards that target this call; where it has several choices, `index` says which one."""
    aimed = [reward for reward in records.rewards if reward.target_span == transition.span_id]
    if not aimed:
        return 0.0
    several = any(
        completion.span_id == transition.span_id and len(completion.choices) > 1 for completion in records.completions
    )
    return sum(reward.value for reward in aimed if not several or reward.index == transition.choice_index)


reward_to_go: Credit = per_turn()
"""What the name `per-turn` stands for: `per_turn()` without a discount."""

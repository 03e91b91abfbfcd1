"""`leyden rewards add | judge | show`: rewards for rollouts that are over.

One idea: whatever they come from, they are appended to the folder's file of later rewards, which training joins.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from leyden import feedback
from leyden.errors import ConfigurationError, DatasetError
from leyden.feedback import Feedback
from leyden.interfaces import Group, RolloutRecords
from leyden.rewards import DEFAULT_REWARD
from leyden.show import printable
from leyden.spans import RolloutState, now_ns
from leyden.training.stored import groups_of
from leyden_plugins.rewards.judge import Judge
from leyden_plugins.rewards.showing import final_output, trajectory

SHOWS = {"output": final_output, "trajectory": trajectory}


def rewards_command(arguments: Sequence[str]) -> int:
    """Run `leyden rewards`; return the exit status.

    Raises:
        ConfigurationError: there is no such folder, or the judge cannot be asked.
        DatasetError: a table cannot be used; nothing of it is added then.
    """
    options = parser().parse_args(arguments)
    if options.action == "add":
        return add(options)
    return judge(options) if options.action == "judge" else show(options)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    found = argparse.ArgumentParser(prog="leyden rewards", description="Attach rewards to rollouts that are over.")
    actions = found.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = actions.add_parser("add", help="from a CSV file: rollout_id, value, and perhaps name, role, span")
    one.add_argument("run", help="folder that was recorded into, or of a run")
    one.add_argument("table", type=Path)
    one = actions.add_parser("judge", help="ask a model how good each rollout was")
    one.add_argument("run", help="folder that was recorded into, or of a run")
    one.add_argument("--model", required=True)
    one.add_argument("--base-url", default="https://api.openai.com/v1", help="of any OpenAI-compatible server")
    one.add_argument("--api-key-env", default="OPENAI_API_KEY", help="variable with the key; '' sends none")
    one.add_argument("--mode", choices=["score", "rank"], default="score", help="rank compares the rollouts of a task")
    one.add_argument("--rubric", type=Path, help="text file that says what is good")
    one.add_argument("--shows", choices=sorted(SHOWS), default="output", help="what the judge sees of a rollout")
    one.add_argument("--name", default=DEFAULT_REWARD, help="of the reward")
    one.add_argument("--again", action="store_true", help="also rollouts that have this reward")
    one = actions.add_parser("show", help="count what there is")
    one.add_argument("run", help="folder that was recorded into, or of a run")
    return found


def add(options: argparse.Namespace) -> int:
    """Add a table's rewards, all or none."""
    lines = feedback.read_table(options.table)
    if not lines:
        raise DatasetError(f"{str(options.table)!r} holds no rows")
    known = {one.rollout.rollout_id for group in stored(options.run) for one in group.rollouts}
    feedback.add(options.run, lines)
    unknown = [line.rollout_id for line in lines if line.rollout_id not in known]
    print(f"added {len(lines)} rewards for {len({line.rollout_id for line in lines})} rollouts")
    if unknown:
        print(f"{len(unknown)} of them are for rollouts that are not stored here (yet), such as {unknown[0]!r}")
    return 0


def judge(options: argparse.Namespace) -> int:
    """Let a model judge rollouts, group by group; what is judged when it stops stays."""
    asked = Judge(
        options.model,
        base_url=options.base_url,
        api_key_env=options.api_key_env or None,
        mode=options.mode,
        rubric=None if options.rubric is None else options.rubric.read_text(encoding="utf-8"),
        shows=SHOWS[options.shows],
        name=options.name,
    )
    groups = stored(options.run)
    wanted = [(group, to_judge(group, options)) for group in groups]
    count = asyncio.run(judge_all(asked, [(group, found) for group, found in wanted if found], options.run))
    total = sum(len(found) for _, found in wanted)
    print(f"judged {count} of {total} rollouts; {asked.spent.calls} calls")
    return 0 if count == total else 1


def to_judge(group: Group, options: argparse.Namespace) -> list[RolloutRecords]:
    """Return a group's rollouts that have no such reward; for ranking all of them, where one has none."""
    succeeded = [one for one in group.rollouts if one.rollout.state is RolloutState.SUCCEEDED]
    if options.again:
        return succeeded
    new = [one for one in succeeded if options.name not in {each.name for each in one.rewards}]
    return succeeded if new and options.mode == "rank" else new


async def judge_all(asked: Judge, wanted: Sequence[tuple[Group, Sequence[RolloutRecords]]], run: str) -> int:
    """Judge, and append each group's rewards as they come; return how many rollouts got one."""

    async def one_group(group: Group, rollouts: Sequence[RolloutRecords]) -> int:
        scores = await asked(group.task, rollouts)
        assert isinstance(scores, list)
        lines = [
            Feedback(rollout_id=one.rollout.rollout_id, value=value, name=name, time_ns=now_ns())
            for one, score in zip(rollouts, scores, strict=True)
            for name, value in (score or {}).items()
        ]
        feedback.add(run, lines)
        return len(lines)

    return sum(await asyncio.gather(*(one_group(group, rollouts) for group, rollouts in wanted)))


def show(options: argparse.Namespace) -> int:
    """Print how many rollouts there are, and which rewards they have."""
    rollouts = [one for group in stored(options.run) for one in group.rollouts]
    later = feedback.read(options.run)
    known = {one.rollout.rollout_id for one in rollouts}
    values: dict[str, list[float]] = {}
    for one in rollouts:
        for reward in one.rewards:
            target = f" of {reward.target_role}" if reward.target_role else " of a call" if reward.target_span else ""
            values.setdefault(reward.name + target, []).append(reward.value)
    states = Counter(one.rollout.state.value for one in rollouts)
    print(f"{len(rollouts)} rollouts: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    for name, found in sorted(values.items()):
        print(f"  {printable(name)}: {len(found)} rewards, mean {sum(found) / len(found):.3f}")
    print(f"{len(later)} rewards came afterwards")
    unknown = {line.rollout_id for line in later} - known
    if unknown:
        print(f"{len(unknown)} rollouts with later rewards are not stored here, such as {printable(min(unknown))!r}")
    return 0


def stored(run: str) -> list[Group]:
    """Return what a folder holds."""
    if not Path(run).exists():
        raise ConfigurationError(f"{run!r} does not exist; name the folder that was recorded into, or a run's")
    return asyncio.run(groups_of(run, reward_weights={DEFAULT_REWARD: 1.0}))

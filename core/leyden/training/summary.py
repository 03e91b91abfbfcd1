"""The summary of a run: `summary.json`, and what sinks and the report show at the end."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from leyden.interfaces import RolloutRecords
from leyden.roles import RESERVED_MODEL, Policy, matches
from leyden.running.agents import describe
from leyden.spans import FINISHED, Checkpoint, Kind, Mode, Rollout, Update
from leyden.training.evaluation import Evaluation
from leyden.training.parts import Blueprint

EXAMPLES = 3


def evaluation_table(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return reward name -> mean, low, high, n."""
    return {
        name: {"mean": e.mean, "low": e.low, "high": e.high, "n": e.n} for name, e in evaluation.estimates().items()
    }


def gain_table(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """Return reward name -> paired mean difference with its interval."""
    found = {name: after.gain_over(before, name) for name in after.values}
    return {name: {"mean": e.mean, "low": e.low, "high": e.high, "n": e.n} for name, e in found.items()}


def role_table(records: Sequence[RolloutRecords], policies: Sequence[Policy]) -> dict[str, dict[str, object]]:
    """Return role -> policy, calls, calls a rollout, mean reward of the rollouts in which it spoke."""
    calls: dict[str, int] = {}
    rewards: dict[str, list[float]] = {}
    for one in records:
        spoke = [span.role for span in one.spans if span.kind is Kind.MODEL_CALL]
        for role in spoke:
            calls[role] = calls.get(role, 0) + 1
        for role in set(spoke):
            rewards.setdefault(role, []).append(one.rollout.reward or 0.0)
    return {
        role: {
            "policy": next((p.name for p in policies if matches(p.roles, role)), None),
            "calls": count,
            "calls_per_rollout": count / max(1, len(records)),
            "reward_when_spoken": sum(rewards[role]) / len(rewards[role]),
        }
        for role, count in sorted(calls.items())
    }


def example_table(before: Sequence[RolloutRecords], after: Sequence[RolloutRecords]) -> list[dict[str, object]]:
    """Return up to three held-out tasks, those first whose reward changed most."""
    old = {one.rollout.task_id: one.rollout for one in before}
    pairs = [(old[one.rollout.task_id], one.rollout) for one in after if one.rollout.task_id in old]
    pairs.sort(key=lambda pair: -((pair[1].reward or 0.0) - (pair[0].reward or 0.0)))
    return [
        {
            "task": b.task,
            "before": {"rollout": b.rollout_id, "output": b.output, "reward": b.reward},
            "after": {"rollout": a.rollout_id, "output": a.output, "reward": a.reward},
        }
        for b, a in pairs[:EXAMPLES]
    ]


def package_versions() -> dict[str, str]:
    """Return the versions that decide what a run computes."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in (
        "leyden",
        "torch",
        "transformers",
        "langgraph",
        "langchain-openai",
        "langchain-core",
        "openai",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def accuracy_fields(evaluations: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, object]:
    """Return the flat fields that scripts read: `accuracy_before`, `accuracy_after` and their intervals."""
    fields: dict[str, object] = {}
    for when in ("before", "after"):
        found = evaluations.get(when, {}).get("reward")
        fields[f"accuracy_{when}"] = None if found is None else found["mean"]
        fields[f"accuracy_{when}_interval"] = None if found is None else [found["low"], found["high"]]
    return fields


def rollout_counts(rollouts: Sequence[Rollout]) -> dict[str, object]:
    """Count finished rollouts: `rollouts` are those of training and of evaluation together."""
    finished = [rollout for rollout in rollouts if rollout.state in FINISHED]
    modes = Counter(rollout.mode for rollout in finished)
    return {
        "rollouts": len(finished),
        "train_rollouts": modes[Mode.TRAIN],
        "evaluation_rollouts": modes[Mode.EVALUATE],
        "failures": dict(Counter(rollout.error_type for rollout in finished if rollout.error_type is not None)),
        "retries": sum(max(0, rollout.attempt - 1) for rollout in rollouts),
    }


def policy_fields(policy: Policy, updates: Sequence[Update]) -> dict[str, object]:
    """Return what training made of a policy."""
    own = [update for update in updates if update.policy == policy.name]
    return {
        "trainable": policy.trainable,
        "lora": policy.lora,
        "freeze_after": policy.freeze_after,
        "updates": len(own),
        "version": own[-1].version if own else 0,
    }


def run_summary(
    *,
    folder: Path,
    checkpoint: Checkpoint | None,
    step: int,
    total_steps: int,
    resumed_after: int | None,
    seed: int,
    policies: Sequence[Policy],
    evaluations: Mapping[int, Evaluation],
    before: Sequence[RolloutRecords],
    after: Sequence[RolloutRecords],
    rollouts: Sequence[Rollout],
    updates: Sequence[Update],
) -> dict[str, object]:
    """Return what a run came to. Calls, tokens, times and memory are added by the trainer, since its last start.

    Args:
        folder: the run's.
        checkpoint: the latest.
        step: the last finished one.
        total_steps: asked for; more than `step` when the run was stopped.
        resumed_after: the step after which it was resumed; `None` for a run in one go.
        seed: the run's.
        policies: the run's.
        evaluations: by step; 0 is before training.
        before: evaluation rollouts of step 0.
        after: evaluation rollouts of the last step.
        rollouts: all of the run's store, also those from before a resume.
        updates: those that stand.
    """
    tables: dict[str, dict[str, dict[str, float]]] = {}
    if 0 in evaluations and step in evaluations:
        tables = {
            "before": evaluation_table(evaluations[0]),
            "after": evaluation_table(evaluations[step]),
            "gain": gain_table(evaluations[0], evaluations[step]),
        }
    return {
        "run_folder": str(folder),
        "checkpoint": None if checkpoint is None else str(folder / checkpoint.folder),
        "steps": step,
        "total_steps": total_steps,
        "resumed_after": resumed_after,
        "seed": seed,
        **accuracy_fields(tables),
        "evaluations": tables,
        "evaluation_failures": {str(at): found.failures for at, found in sorted(evaluations.items())},
        "policies": {policy.name: policy_fields(policy, updates) for policy in policies},
        "roles": role_table(after, policies),
        "examples": example_table(before, after),
        **rollout_counts(rollouts),
        "versions": package_versions(),
    }


def run_record(blueprint: Blueprint, *, algorithm: object) -> dict[str, object]:
    """Return what a run is made of, for `run.json`."""
    return {
        "agent": _readable(describe(blueprint.agent)),
        "base_model": str(blueprint.engine.model),
        "base_sha256": blueprint.engine.sha256(RESERVED_MODEL),
        "prompts": dict(blueprint.prompts),
        "policies": {
            policy.name: {
                "roles": None if policy.roles is None else list(policy.roles),
                "trainable": policy.trainable,
                "lora": policy.lora,
                "freeze_after": policy.freeze_after,
                "learning_rate": policy.learning_rate,
                "sampling": policy.sampling,
                "eval_sampling": policy.eval_sampling,
            }
            for policy in blueprint.policies
        },
        "algorithm": repr(algorithm),
        "reward_weights": dict(blueprint.rules.reward_weights),
        "failure_reward": blueprint.rules.failure_reward,
        "seed": blueprint.seed,
        "command": [sys.executable, *sys.orig_argv[1:]],
        "working_folder": os.getcwd(),
        "versions": package_versions(),
    }


def _readable(path: str) -> str:
    """Return `module:qualname` with the script's own name in place of `__main__`."""
    module, _, qualname = path.partition(":")
    main = sys.modules.get("__main__")
    if module != "__main__" or main is None:
        return path
    spec = getattr(main, "__spec__", None)
    name = spec.name if spec is not None else os.path.basename(getattr(main, "__file__", None) or module)
    return f"{name}:{qualname}"

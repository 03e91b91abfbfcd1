"""A run folder like one that a trainer leaves, without a trainer: a real store, made-up rollouts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from leyden.interfaces import Outcome
from leyden.ownership import current_owner
from leyden.spans import (
    Checkpoint,
    Choice,
    Completion,
    Kind,
    Mode,
    Record,
    Resource,
    Reward,
    Rollout,
    RolloutState,
    Span,
    Status,
    Update,
)
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import RUN, STORE, SUMMARY, checkpoint_folder, write_json
from leyden_plugins.observers.jsonl import JsonlSink

SECOND = 1_000_000_000
BEGAN = 1_760_000_000 * SECOND
SQL = "SELECT name, population FROM city WHERE population > 1000000 ORDER BY population DESC"


def call_records(
    rollout_id: str, *, number: int, role: str, answer: str, attempt: int = 1, policy: str | None = "sql"
) -> list[Record]:
    """Return one model call's span and, for a role of a policy, its completion."""
    start = BEGAN + number * SECOND // 5
    question = [
        {"role": "system", "content": f"You are the {role} of a text-to-SQL team. Tables: city, country, language."},
        {"role": "user", "content": f"Which cities are large? Try {number}."},
    ]
    times = {"start_ns": start, "end_ns": start + SECOND // 6}
    span = Span(
        span_id=f"{rollout_id}/call{number}",
        parent_id=f"{rollout_id}/{role}",
        rollout_id=rollout_id,
        attempt=attempt,
        kind=Kind.MODEL_CALL,
        name="ChatOpenAI",
        role=role,
        attributes={
            "gen_ai.request.model": policy or "gpt-x",
            "gen_ai.input.messages": question,
            "gen_ai.output.messages": [{"role": "assistant", "content": answer}],
            **({} if policy else {"gen_ai.usage.input_tokens": 40, "gen_ai.usage.output_tokens": 3}),
        },
        **times,
    )
    if policy is None:
        return [span]
    tokens = list(answer.encode())[:24]
    return [
        span,
        Completion(
            span_id=span.span_id,
            http_attempt=0,
            rollout_id=rollout_id,
            attempt=attempt,
            role=role,
            policy=policy,
            version=3,
            prompt_token_ids=list(range(30)),
            choices=[
                Choice(index=0, token_ids=tokens, logprobs=[-0.25] * len(tokens), finish_reason="stop", text=answer)
            ],
            sampling={"temperature": 1.0},
            off_distribution=False,
            status=Status.OK,
            delivered=True,
            first_token_ns=start + 1,
            **times,
        ),
    ]


def rollout_records(
    rollout_id: str, *, answer: str = SQL, reward: float = 1.0, error: str | None = None
) -> list[Record]:
    """Return the records of one rollout: writer, execute, checker, and a rewriter when the reward is below 1."""
    last = 4 if reward < 1 else 3

    def node(name: str, number: int, kind: Kind = Kind.AGENT, **attributes: object) -> Span:
        start = BEGAN + number * SECOND // 5
        return Span(
            span_id=f"{rollout_id}/{name}",
            parent_id=f"{rollout_id}/root",
            rollout_id=rollout_id,
            attempt=1,
            kind=kind,
            name=name,
            role=name if kind is Kind.AGENT else "main",
            start_ns=start - 1000,
            end_ns=start + SECOND // 6 + 1000,
            status=Status.ERROR if error and name == "execute" else Status.OK,
            error=error if name == "execute" else None,
            attributes=attributes,
        )

    root = Span(
        span_id=f"{rollout_id}/root",
        parent_id=None,
        rollout_id=rollout_id,
        attempt=1,
        kind=Kind.ROLLOUT,
        name="rollout",
        role="main",
        start_ns=BEGAN,
        end_ns=BEGAN + (last + 1) * SECOND // 5,
    )
    records: list[Record] = [
        *call_records(rollout_id, number=0, role="writer", answer=answer),
        node("writer", 0),
        node("execute", 1, Kind.TOOL, **{"gen_ai.tool.call.arguments": {"sql": answer}, "rows": 12}),
        *call_records(rollout_id, number=2, role="checker", answer="no" if reward < 1 else "yes", policy=None),
        node("checker", 2),
    ]
    if reward < 1:
        records += [
            *call_records(rollout_id, number=3, role="rewriter", answer=answer + " LIMIT 5"),
            node("rewriter", 3),
        ]
    records += [
        Reward(rollout_id=rollout_id, attempt=1, name="reward", value=reward),
        Reward(rollout_id=rollout_id, attempt=1, name="first_query", value=float(reward == 1)),
        root,
    ]
    return records


def task(number: int, question: str | None = None) -> dict[str, object]:
    return {"question": question or f"Which of the {number} largest cities speak Dutch?", "database": "world"}


async def add_finished(store: SQLiteStore, rollouts: Sequence[Rollout], records: Sequence[Sequence[Record]]) -> None:
    """Store rollouts with their records and end them as they say."""
    await store.add_rollouts([_queued(one) for one in rollouts])
    ids = [rollout.rollout_id for rollout in rollouts]
    await store.start(ids, owner=current_owner(), lease_seconds=60, versions={"sql": 3})
    await store.add_records([record for some in records for record in some])
    await store.finish(
        [
            Outcome(
                rollout_id=one.rollout_id,
                attempt=1,
                state=one.state,
                reward=one.reward,
                output=one.output,
                error=one.error,
                error_type=one.error_type,
            )
            for one in rollouts
        ]
    )


def _queued(one: Rollout) -> Rollout:
    return Rollout(
        rollout_id=one.rollout_id,
        task=one.task,
        task_id=one.task_id,
        group_id=one.group_id,
        mode=one.mode,
        step=one.step,
    )


def rollout(
    rollout_id: str,
    *,
    mode: Mode = Mode.TRAIN,
    step: int = 1,
    reward: float | None = 1.0,
    question: str | None = None,
    state: RolloutState = RolloutState.SUCCEEDED,
    error: str | None = None,
    output: object = None,
    number: int = 0,
) -> Rollout:
    """Return a finished rollout."""
    return Rollout(
        rollout_id=rollout_id,
        task=task(number, question),
        task_id=f"t{number}",
        group_id=f"s{step}-t{number}",
        mode=mode,
        step=step,
        state=state,
        reward=reward,
        output=output,
        error=error,
        error_type="ToolError" if error else None,
    )


async def make_run(folder: Path, *, steps: int = 4, groups: int = 2, size: int = 4, held_out: int = 5) -> Path:
    """Write a whole run folder; return it."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    async with await SQLiteStore.open(folder / STORE) as store:
        for step in range(steps + 1):
            rollouts, records = [], []
            for number in range(groups):
                for sample in range(size if step else 0):
                    rollout_id = f"s{step}-t{number}-{sample}"
                    good = float(rng.random() < 0.4 + 0.5 * step / steps)
                    failed = sample == 3 and number == 1
                    error = "no such column: populaton" if failed else None
                    rollouts.append(
                        rollout(
                            rollout_id,
                            step=step,
                            reward=0.0 if failed else good,
                            number=number,
                            state=RolloutState.FAILED if failed else RolloutState.SUCCEEDED,
                            error=error,
                        )
                    )
                    records.append(rollout_records(rollout_id, reward=0.0 if failed else good, error=error))
            if step in (0, steps):
                for number in range(held_out):
                    rollout_id, good = f"e{step}-t{number}", float(number < (2 if step == 0 else 4))
                    output = {"sql": SQL if good else SQL[:40], "rows": number}
                    rollouts.append(
                        rollout(rollout_id, mode=Mode.EVALUATE, step=step, reward=good, number=number, output=output)
                    )
                    records.append(rollout_records(rollout_id, reward=good))
            await add_finished(store, rollouts, records)
        await checkpoint(store, folder, step=steps, version=steps)
    write_json(folder / RUN, run_record(steps))
    write_json(folder / SUMMARY, summary(folder, steps))
    write_metrics(folder, steps)
    return folder


async def checkpoint(store: SQLiteStore, folder: Path, *, step: int, version: int) -> None:
    """Write a checkpoint with one policy, and commit it."""
    for version_ in range(1, version + 1):
        name = f"{step}-{version_}"
        await store.add_updates(
            [Update(update_id=name, policy="sql", step=version_, version=version_, rollout_ids=[name])]
        )
    policy = folder / checkpoint_folder(step) / "policies" / "sql"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text('{"model_type": "qwen3"}')
    (policy / "model.safetensors").write_bytes(b"weights of step %d" % step)
    write_json(policy.parents[1] / "prompts.json", {"checker": {"version": 1, "text": "Be strict."}})
    await store.put_resources([Resource(kind="prompt", name="checker", version=1, created_ns=1, content="Be strict.")])
    await store.commit_checkpoint(
        Checkpoint(
            checkpoint_id=f"c{step}", step=step, folder=checkpoint_folder(step), versions={"sql": version}, created_ns=1
        )
    )


def run_record(steps: int) -> dict[str, object]:
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": None, "keep_seed": False}
    return {
        "run_folder": "runs/sql",
        "total_steps": steps,
        "tasks_per_step": 2,
        "group_size": 4,
        "agent": "train:solve",
        "base_model": "examples/text_to_sql/model",
        "base_sha256": "0" * 64,
        "policies": {
            "sql": {"roles": ["writer", "rewriter"], "trainable": True, "learning_rate": 1e-5, "sampling": sampling},
            "judge": {"roles": ["judge"], "trainable": False, "learning_rate": 1e-5, "sampling": sampling},
        },
        "algorithm": "GRPO(group_size=4)",
        "seed": 7,
        "command": ["/usr/bin/python3", "train.py", "--fast"],
        "versions": {"python": "3.11.7", "leyden": "0.1.0", "torch": "2.13.0"},
    }


def estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.08, "high": mean + 0.07, "n": 60}


def summary(folder: Path, steps: int) -> dict[str, object]:
    return {
        "run_folder": str(folder),
        "checkpoint": str(folder / checkpoint_folder(steps)),
        "steps": steps,
        "seed": 7,
        "evaluations": {
            "before": {"reward": estimate(0.52), "first_query": estimate(0.41)},
            "after": {"reward": estimate(0.91), "first_query": estimate(0.86)},
            "gain": {"reward": estimate(0.39), "first_query": estimate(0.45)},
        },
        "roles": {
            "writer": {"policy": "sql", "calls": 60, "calls_per_rollout": 1.0, "reward_when_spoken": 0.91},
            "rewriter": {"policy": "sql", "calls": 14, "calls_per_rollout": 0.23, "reward_when_spoken": 0.62},
            "checker": {"policy": None, "calls": 71, "calls_per_rollout": 1.18, "reward_when_spoken": 0.9},
        },
        "examples": [
            {
                "task": task(1, "Which cities have more than a million people?"),
                "before": {"rollout": "e0-t1", "output": {"sql": SQL[:40], "rows": 0}, "reward": 0.0},
                "after": {"rollout": f"e{steps}-t1", "output": {"sql": SQL, "rows": 0}, "reward": 1.0},
            },
            {
                "task": "say hello",
                "before": {"output": "hullo", "reward": 0.0},
                "after": {"output": "hello", "reward": 1.0},
            },
        ],
        "failures": {"ToolError": 4, "TimeoutError": 1},
        "retries": 1,
        "rollouts": 5120,
        "model_calls": 12345,
        "tokens_sampled": 480_000,
        "train_seconds": 211.0,
        "train_cpu_seconds": 388.2,
        "total_seconds": 305.4,
        "peak_memory_bytes": 1_900_000_000,
    }


def write_metrics(folder: Path, steps: int) -> None:
    """Write metrics.jsonl with made-up curves."""
    sink, rng = JsonlSink(), random.Random(1)
    sink.run_started({"run_folder": str(folder)})
    for step in range(1, steps + 1):
        fraction = step / steps
        metrics = {
            "reward/mean": 0.5 + 0.42 * fraction**0.5 + rng.uniform(-0.05, 0.05),
            "loss/clip_fraction": 0.02 + 0.03 * rng.random(),
            "loss/ratio_mean": 1 + rng.uniform(-0.01, 0.01),
            "loss/ratio_max": 1.4 + rng.random(),
            "gradient_norm": 0.8 * math.exp(-fraction) + 0.1 * rng.random(),
            "loss/entropy": 0.9 - 0.6 * fraction + 0.03 * rng.random(),
            "loss/loss": -0.01 * rng.random(),
            "throughput/tokens_per_second": 2200 + 300 * rng.random(),
            "learning_rate": 1e-5 * (1 - fraction),
            "time/sample_seconds": 3 + rng.random(),
            "time/learn_seconds": 1 + 0.3 * rng.random(),
            "groups/total": 16.0,
            "groups/without_signal": float(rng.randrange(9)),
            "groups/without_signal_share": rng.randrange(9) / 16,
            "reward/role/writer": 0.5 + 0.42 * fraction**0.5 + rng.uniform(-0.05, 0.05),
            "reward/role/rewriter": 0.2 + 0.3 * fraction**0.5 + rng.uniform(-0.05, 0.05),
            "reward/name/reward": 0.5 + 0.4 * fraction,
            "advantage/std": 0.8 + 0.1 * rng.random(),
            "advantage/max": 2.1 + 0.2 * rng.random(),
            "diversity/distinct_answers": 0.8 - 0.3 * fraction,
            "rollouts/failed_share": 0.125 * rng.random(),
            "lengths/overlong_share": 0.05 * rng.random(),
            "lengths/answer_mean": 24 - 4 * fraction,
            "lengths/answer_p95": 40 - 6 * fraction,
            "lengths/answer_max": 64.0,
            "mismatch/mean": 2e-4 * (1 + rng.random()),
            "mismatch/max": 3e-3 * (1 + rng.random()),
            "rollouts/failed/ToolError": float(step),
            "rollouts/retried": 0.0,
            "acme/own": float(step),
        }
        if step % max(1, steps // 4) == 0 and step < steps:
            metrics |= {"evaluation/reward": 0.52 + 0.38 * fraction, "evaluation/first_query": 0.41 + 0.44 * fraction}
        sink.step_finished(step, metrics)
    sink.run_finished({})

"""Text that somebody recorded, learnt by a real model: tokenised anew, trained offline, said by the app's policy."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import leyden
from leyden.interfaces import Outcome
from leyden.ownership import current_owner
from leyden.spans import Kind, Mode, RolloutState
from leyden.sqlite import SQLiteStore
from leyden.testing.records import a_rollout, a_span
from leyden_plugins.algorithms.sft import FineTuning, stored_rows
from leyden_plugins.engines.transformers import TransformersEngine
from tests.running.small import Notes, ask
from tests.tiny import tiny_checkpoint

ANSWERS = {"Why?": "Rain.", "Who?": "Ann."}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    leyden.uninstrument()


def answers(task: object) -> float:
    return float(ask(str(task), temperature=0.0, max_tokens=8) == ANSWERS[str(task)])


async def record(path: Path) -> None:
    """Write a store of rollouts whose calls are text alone."""
    path.parent.mkdir()
    async with await SQLiteStore.open(path) as store:
        names = [f"r{index}" for index in range(len(ANSWERS))]
        await store.add_rollouts([a_rollout(name, group_id=name, mode=Mode.RECORDED) for name in names])
        await store.start(names, owner=current_owner(), lease_seconds=60.0, versions={})
        spans = [
            a_span(
                name,
                kind=Kind.MODEL_CALL,
                name="chat",
                attributes={
                    "gen_ai.input.messages": [{"role": "user", "content": asked}],
                    "gen_ai.output.messages": [{"role": "assistant", "content": said}],
                    "gen_ai.response.finish_reasons": ["stop"],
                },
            )
            for name, (asked, said) in zip(names, ANSWERS.items(), strict=True)
        ]
        await store.add_records(spans)
        await store.finish([Outcome(rollout_id=name, attempt=1, state=RolloutState.SUCCEEDED) for name in names])


def test_a_policy_says_what_was_recorded(tmp_path: Path) -> None:
    asyncio.run(record(tmp_path / "production" / "store.db"))
    engine = TransformersEngine(tiny_checkpoint(tmp_path / "model"), seed=0)
    trainer = leyden.Trainer(
        answers,
        val_tasks=list(ANSWERS),
        policies=[leyden.Policy("me", learning_rate=3e-3)],
        engine=engine,
        algorithm=FineTuning(source=tmp_path / "production", epochs=40, batch_size=2),
        run=tmp_path / "run",
        workers=0,
        sinks=[Notes()],
        checkpoint_every=40,
    )
    with trainer:
        summary = trainer.fit()
    asyncio.run(engine.stop())
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.0, 1.0)


def test_the_same_text_becomes_rows_for_another_trainer(tmp_path: Path) -> None:
    asyncio.run(record(tmp_path / "production" / "store.db"))
    engine = TransformersEngine(tiny_checkpoint(tmp_path / "model"), seed=0)

    async def rows(keep: float | None) -> list[dict[str, list[int]]]:
        return await stored_rows(tmp_path / "production", leyden.Policy("me"), engine=engine, keep=keep)

    async def both() -> tuple[list[str], int]:
        found = await rows(None)
        spelled = [engine.decode([label for label in row["labels"] if label != -100]) for row in found]
        kept = len(await rows(0.5))
        await engine.stop()
        return spelled, kept

    assert asyncio.run(both()) == (["Rain.<|end|>", "Ann.<|end|>"], 0)  # nobody rewarded them

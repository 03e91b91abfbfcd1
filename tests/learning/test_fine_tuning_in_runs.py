"""Fine-tuning in whole runs: teachers, chains of phases over one store, and a kill in the second phase."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

import leyden
from leyden.errors import ConfigurationError
from leyden.interfaces import Batch
from leyden.spans import RolloutState, Update
from leyden.sqlite import SQLiteStore
from leyden.testing.fakes import END_TOKEN
from leyden_plugins.algorithms.preference import DPO
from leyden_plugins.algorithms.rl import GRPO
from leyden_plugins.algorithms.sft import Distillation, FineTuning, RejectionSampling
from tests.capture.servers import FakeOpenAI, serving
from tests.running.small import CountingLearner, Notes, SmallEngine, odd_wins, rollout_id, small_trainer

ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}

client = httpx.Client(trust_env=False)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    leyden.uninstrument()


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    with serving() as found:
        yield found


class Measured(Notes):
    """Also keeps the metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[Mapping[str, float]] = []

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        super().step_finished(step, metrics)
        self.metrics.append(metrics)


class ComparingLearner(CountingLearner):
    """Also measures against recorded log-probabilities, as the real one does."""

    def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
        return {**super().forward_backward(policy, batch), "mismatch/mean": 9.0, "loss/kl": 9.0, "loss/loss": 1.0}


def text_of(tokens: object) -> str:
    assert isinstance(tokens, list | tuple)
    return bytes(token for token in tokens if token < END_TOKEN).decode()


def test_the_apps_own_model_teaches_in_the_policys_tokens_with_the_tools_it_had(
    tmp_path: Path, server: FakeOpenAI
) -> None:
    def agent(task: object) -> float:
        parts: list[dict[str, object]] = [{"type": "text", "text": f"say it of {task}"}]
        for content in (f"hello {task}", [*parts, {"type": "image_url", "image_url": {"url": "data:,"}}]):
            body = {"model": "theirs", "messages": [{"role": "user", "content": content}], "tools": [TOOL]}
            client.post(f"{server.base_url}/chat/completions", json=body).raise_for_status()
        return 1.0

    learner, notes = ComparingLearner(), Measured()
    algorithm = Distillation(group_size=2)
    with small_trainer(tmp_path / "run", agent, algorithm=algorithm, learner=learner, sinks=[notes]) as trainer:
        trainer.fit(1)
    assert len(learner.samples) == 4  # two tasks, two samples, the first of two calls
    for policy, sample in learner.samples:
        prompt = text_of(sample.prompt_token_ids)
        assert policy == "me" and '"name": "look"' in prompt and "user: hello task" in prompt
        assert text_of(sample.token_ids) and sample.token_ids[-1] == END_TOKEN
    [metrics] = notes.metrics
    assert metrics["tokens/retokenised_share"] == 1.0
    assert metrics["tokens/trained"] == sum(len(sample.token_ids) for _, sample in learner.samples)
    assert metrics["loss/loss"] == 1.0
    assert not {"mismatch/mean", "loss/kl"} & metrics.keys()  # nobody knows how likely the text was
    [line] = [line for line in notes.lines if "cannot be imitated" in line]
    assert line == (
        "4 calls of policy 'me' cannot be imitated and are left out: "
        "a message holds a part of type 'image_url', which is no text"
    )


def test_a_policy_on_the_same_engine_teaches_its_exact_tokens(tmp_path: Path) -> None:
    policies = [leyden.Policy("me"), leyden.Policy("teacher", roles=["nobody"], trainable=False)]

    def agent(task: object) -> float:
        leyden.declare_roles("nobody")
        return odd_wins(task)

    learner, notes = CountingLearner(), Measured()
    algorithm = Distillation(teacher="teacher", group_size=2, keep="best")
    options = {"algorithm": algorithm, "policies": policies, "learner": learner, "sinks": [notes]}
    with small_trainer(tmp_path / "run", agent, **options) as trainer:
        trainer.fit(2)
    assert [text_of(sample.token_ids) for _, sample in learner.samples] == ["ok"] * 4
    assert [metrics["tokens/retokenised_share"] for metrics in notes.metrics] == [0.0, 0.0]
    assert ledger(tmp_path / "run")[0].rollout_ids[0].startswith("s1.taught-")


# ---- stored rollouts -----------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Return the folder of a run of two steps: eight rollouts of one call, every other one rewarded."""
    with small_trainer(tmp_path / "earlier") as trainer:
        trainer.fit(2)
    return tmp_path / "earlier"


def offline(run: Path, algorithm: object, **options: object) -> leyden.Trainer:
    """Return a trainer without agent and tasks."""
    return small_trainer(run, None, algorithm=algorithm, tasks=(), **options)


@pytest.mark.parametrize("exact", [False, True])
def test_stored_rollouts_are_imitated_without_agent_tasks_or_steps(tmp_path: Path, earlier: Path, exact: bool) -> None:
    learner, notes = CountingLearner(), Measured()
    algorithm = FineTuning(source=earlier, epochs=2, batch_size=2, keep=1.0, exact=exact)
    with offline(tmp_path / "run", algorithm, learner=learner, sinks=[notes, "report", "jsonl"]) as trainer:
        summary = trainer.fit()
    assert (summary["steps"], summary["train_rollouts"], learner.steps) == (2, 0, {"me": 2 * 2})
    assert [text_of(sample.token_ids) for _, sample in learner.samples] == ["ok"] * 8
    assert {text_of(sample.prompt_token_ids)[:10] for _, sample in learner.samples} == {"user: task"}
    assert [metrics["tokens/retokenised_share"] for metrics in notes.metrics] == [float(not exact)] * 2
    assert [metrics["rollouts/kept"] for metrics in notes.metrics] == [4.0, 4.0]
    assert (tmp_path / "run" / "report.html").exists()
    assert [update.version for update in ledger(tmp_path / "run")] == [1, 2]


def test_a_stop_in_an_epoch_goes_on_with_the_rollouts_that_are_left(tmp_path: Path, earlier: Path) -> None:
    algorithm = FineTuning(source=earlier, steps_per_epoch=4, batch_size=1)
    whole, notes = CountingLearner(), Notes()
    with offline(tmp_path / "whole", algorithm, learner=whole) as trainer:
        trainer.fit()
    learner = CountingLearner()
    with offline(tmp_path / "run", algorithm, learner=learner, sinks=[notes]) as trainer:
        jobs = trainer._jobs

        def stop(step: int) -> None:
            if step == 2 and jobs.session is not None:
                jobs.session.stop_requested = True

        notes.when_step_finished = stop
        trainer.fit()
    resumed = CountingLearner()
    with offline(tmp_path / "run", algorithm, learner=resumed) as trainer:
        trainer.fit(resume=True)
    assert resumed.steps == whole.steps == {"me": 8}
    assert learner.samples + resumed.samples == whole.samples
    assert len(whole.samples) == 8


def test_stored_pairs_are_preferred_and_a_chain_goes_on_with_rl(tmp_path: Path, earlier: Path) -> None:
    learner, notes = CountingLearner(), Measured()
    chain = leyden.Chain(leyden.Phase(DPO(source=earlier, epochs=2)), leyden.Phase(GRPO(group_size=2), steps=1))
    with small_trainer(tmp_path / "run", algorithm=chain, learner=learner, sinks=[notes]) as trainer:
        assert trainer.fit()["steps"] == 3
    assert learner.steps == {"me": 3}
    assert [metrics.get("preference/pairs") for metrics in notes.metrics] == [4.0, 4.0, None]
    assert "reward/mean" in notes.metrics[2] and "reward/mean" not in notes.metrics[0]


def test_a_source_without_a_store_is_refused(tmp_path: Path) -> None:
    with (
        offline(tmp_path / "run", FineTuning(source=tmp_path / "nowhere")) as trainer,
        pytest.raises(ConfigurationError, match="nowhere' is neither a store nor a folder that holds one"),
    ):
        trainer.fit()


def ledger(run: Path) -> list[Update]:
    async def read() -> list[Update]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            return list(await store.updates())

    return asyncio.run(read())


# ---- a chain, killed ------------------------------------------------------------------------------------------------


def recipe(run: Path, agent: object, **options: object) -> leyden.Trainer:
    """Return SFT and then RL over one store, a checkpoint every step."""
    chain = leyden.Chain(
        leyden.Phase(RejectionSampling(group_size=2), steps=2, learning_rate=1e-3),
        leyden.Phase(GRPO(group_size=2), steps=3),
    )
    return small_trainer(run, agent, algorithm=chain, checkpoint_every=1, **options)


def runs_once(task: object) -> float:
    """Note that the rollout ran; the process dies before the last one of step 4 does anything."""
    name = rollout_id()
    ran = Path(os.environ["RAN"])
    if os.environ.get("DIES") and name.startswith("s4-") and len(list(ran.glob("s4-*"))) == 3:
        time.sleep(0.5)  # the store has written what ended before
        os._exit(9)
    (ran / f"{name}-{os.getpid()}").touch()
    return odd_wins(task)


def test_a_run_killed_in_its_second_phase_goes_on_there_and_pays_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ran").mkdir()
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    script = (
        "from pathlib import Path\n"
        "from tests.learning.test_fine_tuning_in_runs import recipe, runs_once\n"
        f"recipe(Path({str(tmp_path / 'run')!r}), runs_once, concurrency=1).fit()\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "DIES": "1"}, timeout=120, check=False
    )
    assert killed.returncode == 9
    learner = CountingLearner()
    with recipe(tmp_path / "run", runs_once, learner=learner) as trainer:
        summary = trainer.fit(resume=True)
    assert (summary["steps"], learner.steps) == (5, {"me": 5})
    assert [update.step for update in ledger(tmp_path / "run")] == [1, 2, 3, 4, 5]
    ran = [path.name.rpartition("-")[0] for path in (tmp_path / "ran").iterdir()]
    assert len(ran) == len(set(ran)) == 5 * 4

    async def states() -> set[RolloutState]:
        async with await SQLiteStore.open(tmp_path / "run" / "store.db", read_only=True) as store:
            return {one.state for one in await store.rollouts()}

    assert asyncio.run(states()) == {RolloutState.SUCCEEDED}


def test_the_demands_of_a_recipe_are_known_before_it_runs(tmp_path: Path) -> None:
    with recipe(tmp_path / "run", odd_wins, engine=SmallEngine()) as trainer:
        assert trainer.fit()["steps"] == 5

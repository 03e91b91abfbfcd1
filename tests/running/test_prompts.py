"""Prompts as what a run trains: read, tried, remembered, put in force, resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import leyden
from leyden.errors import ConfigurationError, RoleError
from leyden.interfaces import Demands
from leyden.spans import Mode, Resource
from leyden.sqlite import SQLiteStore
from leyden.training.prompts import candidate_name
from leyden.training.runfolder import read_json
from leyden_plugins.algorithms.rl import GRPO
from tests.capture.servers import FakeOpenAI, serving
from tests.running.searching import Try, ask, prompt_trainer, two_roles
from tests.running.small import small_trainer

OWN = {"writer": "role=write", "critic": "role=judge"}
GOOD = {"writer": "role=good", "critic": "role=judge"}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def clean(server: FakeOpenAI) -> Iterator[None]:
    server.clear()
    yield
    leyden.uninstrument()


def resources(run: Path, kind: str) -> list[Resource]:
    async def read() -> list[Resource]:
        async with await SQLiteStore.open(run / "store.db", read_only=True) as store:
            return list(await store.resources(kind))

    return asyncio.run(read())


def test_a_run_without_policies_tries_prompts_and_puts_the_published_ones_in_force(
    tmp_path: Path, server: FakeOpenAI
) -> None:
    search = Try([GOOD, {"writer": "role=good", "critic": "role=good2"}])
    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), search, val_tasks=["v"]) as trainer:
        summary = trainer.fit()
    assert search.seeds == OWN
    assert search.rewards == [[1.0, 1.0], [2.0, 2.0]]
    assert {one.rollout.mode for tried in search.records for one in tried} == {Mode.SEARCH}
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.0, 2.0)
    assert {(one.name, one.version, one.content) for one in resources(tmp_path / "run", "prompt")} == {
        ("writer", 0, "role=write"),
        ("critic", 0, "role=judge"),
        ("writer", 1, "role=good"),
        ("critic", 1, "role=good2"),
    }
    assert len(resources(tmp_path / "run", "candidate")) == 3, "the agent's own and two"


def test_the_evaluation_of_a_later_trainer_uses_the_prompts_of_the_checkpoint(
    tmp_path: Path, server: FakeOpenAI
) -> None:
    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), Try([GOOD])) as trainer:
        trainer.fit()
    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), Try([])) as trainer:
        assert trainer.evaluate(["v"]).estimate().mean == 1.0


def test_what_was_tried_before_is_taken_from_the_store_also_after_a_failure(tmp_path: Path, server: FakeOpenAI) -> None:
    class Dies(Try):
        async def run(self, session: object) -> None:
            async for _ in session.steps():  # type: ignore[attr-defined]
                await session.try_prompts(GOOD, [0, 1])  # type: ignore[attr-defined]
                raise RuntimeError("killed")

    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), Dies([])) as trainer:
        with pytest.raises(RuntimeError, match="killed"):
            trainer.fit()
    paid = len(server.seen)
    search = Try([GOOD], tasks=[0, 1, 1, 2])
    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), search, prompts=OWN) as trainer:
        trainer.fit(resume=True)
    assert search.rewards == [[1.0, 1.0, 1.0, 1.0]]
    assert len(server.seen) - paid == 2, "two roles on one new task"


def test_a_resumed_run_has_the_published_prompts_in_force(tmp_path: Path, server: FakeOpenAI) -> None:
    chain = leyden.Chain(leyden.Phase(Try([GOOD])), leyden.Phase(Stops([])))
    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), chain, checkpoint_every=1) as trainer:
        with pytest.raises(RuntimeError, match="in the second phase"):
            trainer.fit()
    again = Try([{"writer": "role=good", "critic": "role=good"}])
    chain = leyden.Chain(leyden.Phase(Try([])), leyden.Phase(again))
    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), chain) as trainer:
        trainer.fit(resume=True)
    assert again.seeds == GOOD
    prompts = read_json(tmp_path / "run" / "checkpoints" / "step-000002" / "prompts.json")
    assert prompts == {"writer": {"version": 1, "text": "role=good"}, "critic": {"version": 2, "text": "role=good"}}


class Stops(Try):
    async def run(self, session: object) -> None:
        async for _ in session.steps():  # type: ignore[attr-defined]
            raise RuntimeError("in the second phase")


def test_the_same_prompts_under_other_weights_are_another_candidate() -> None:
    assert candidate_name(GOOD, {"a": 1}) == candidate_name(dict(reversed(GOOD.items())), {"a": 1})
    assert len({candidate_name(GOOD, {"a": 1}), candidate_name(GOOD, {"a": 2}), candidate_name(OWN, {"a": 1})}) == 3


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_prompt_that_differs_from_call_to_call_is_refused(tmp_path: Path, server: FakeOpenAI) -> None:
    def agent(task: object) -> float:
        return float(len(ask(server, "writer", f"the task is {task}", task)))

    with prompt_trainer(tmp_path / "run", agent, Try([]), prompts=["writer"]) as trainer:
        with pytest.raises(ConfigurationError, match="3 different system prompts, such as 'the task is a'"):
            trainer.fit()


def test_a_role_that_does_not_speak_is_refused_with_those_that_do(tmp_path: Path, server: FakeOpenAI) -> None:
    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), Try([]), prompts=["writter"]) as trainer:
        with pytest.raises(RoleError, match=r"'writter' has not spoken .* \['critic', 'writer'\]"):
            trainer.fit()


@pytest.mark.parametrize("prompts", ["writer", [""], {"writer": ""}, {"writer": 3}, [3]])
def test_prompts_that_are_no_roles_or_texts_are_refused(tmp_path: Path, prompts: object) -> None:
    with pytest.raises(ConfigurationError, match="must be role names"):
        prompt_trainer(tmp_path, lambda task: 1.0, Try([]), prompts=prompts)


def test_a_role_that_nobody_named_gets_no_prompt(tmp_path: Path, server: FakeOpenAI) -> None:
    with prompt_trainer(tmp_path / "run", two_roles(server, OWN), Try([{"poet": "rhyme"}])) as trainer:
        with pytest.raises(ConfigurationError, match=r"roles \['poet'\] are not in Trainer"):
            trainer.fit()


def test_a_program_s_prompts_cannot_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="prompts of a program cannot be replaced"):
        prompt_trainer(tmp_path, leyden.Command(["true"]), Try([]))


def test_an_algorithm_gets_what_it_asks_for_or_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="name their roles"):
        prompt_trainer(tmp_path, lambda task: 1.0, Try([]), prompts=())
    with pytest.raises(ConfigurationError, match="runs the agent"):
        prompt_trainer(tmp_path, None, Try([]))
    with pytest.raises(ConfigurationError, match="improves none"):
        small_trainer(tmp_path, prompts=["main"])
    with pytest.raises(ConfigurationError, match="needs an engine"):
        small_trainer(tmp_path, engine=None)
    with pytest.raises(ConfigurationError, match="val_tasks are to be run"):
        prompt_trainer(tmp_path, None, Offline(), prompts=(), val_tasks=["v"])
    with pytest.raises(ConfigurationError, match="nothing ahead of a step"):
        prompt_trainer(tmp_path, lambda task: 1.0, Try([]), max_staleness=1)


def test_the_number_of_steps_is_said_once(tmp_path: Path) -> None:
    with small_trainer(tmp_path / "a") as trainer, pytest.raises(ConfigurationError, match="say fit"):
        trainer.fit()
    with prompt_trainer(tmp_path / "b", lambda task: 1.0, Try([])) as trainer:
        with pytest.raises(ConfigurationError, match=r"takes 1 steps, but fit was asked for 3"):
            trainer.fit(3)


class Offline(Try):
    """Learns from nothing."""

    def __init__(self) -> None:
        super().__init__([], demands=Demands(steps=1, runs_agent=False, trains=False))

    async def run(self, session: object) -> None:
        async for step in session.steps():  # type: ignore[attr-defined]
            await session.finish_step(step, [], {"anything": 1.0})  # type: ignore[attr-defined]


def test_an_algorithm_that_runs_nothing_needs_neither_agent_nor_tasks(tmp_path: Path) -> None:
    with prompt_trainer(tmp_path / "run", None, Offline(), tasks=(), prompts=()) as trainer:
        assert trainer.fit()["rollouts"] == 0


def test_given_prompts_are_in_force_while_weights_are_trained(tmp_path: Path) -> None:
    with small_trainer(tmp_path / "run", prompts={"main": "be brief"}, algorithm=GRPO(group_size=2)) as trainer:
        trainer.fit(1)

    async def inputs() -> list[object]:
        async with await SQLiteStore.open(tmp_path / "run" / "store.db", read_only=True) as store:
            names = [one.rollout_id for one in await store.rollouts()]
            return [
                span.attributes["gen_ai.input.messages"][0]  # type: ignore[index]
                for one in await store.records(names)
                for span in one.spans
                if "gen_ai.input.messages" in span.attributes
            ]

    found = asyncio.run(inputs())
    assert len(found) == 4 and all(one == {"role": "system", "content": "be brief"} for one in found)

"""Preference losses: their gradient is autograd's of the published formula, over whole rollouts of several turns."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Demands, Group, Loss, Objective, Transition
from leyden.roles import Policy
from leyden_plugins.algorithms.preference import DPO, Pair, Preference, SimPO, pairs_of
from leyden_plugins.algorithms.preference.pairs import returns_of
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import POLICY, RecordedSession, call, choice, group, records, transition
from tests.learning.conftest import VOCABULARY

RETURNS = {"r0": 0.2, "r1": 1.0, "r2": 0.0, "r3": 1.0}


def turns(seed: int = 0) -> list[Transition]:
    """Return four rollouts of two turns and one of another role; all begin with one answer that is the same."""
    rng = random.Random(seed)

    def draw(least: int, most: int) -> list[int]:
        return [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(least, most))]

    prompt, opening = draw(5, 5), draw(3, 3)
    found: list[Transition] = []
    for rollout_id, value in RETURNS.items():
        observation = draw(2, 4)
        places = [
            (prompt, opening, "writer", 0),
            ([*prompt, *opening, *observation], draw(1, 6), "writer", 1),
            (draw(4, 4), draw(2, 3), "checker", 0),
        ]
        found += [
            transition(
                prompt=before,
                tokens=answer,
                rollout_id=rollout_id,
                role=role,
                span_id=f"{rollout_id}-{role}-{turn}",
                turn=turn,
                value=value,
                temperature=0.7,  # what it was sampled at, which likelihoods do not look at
            )
            for before, answer, role, turn in places
        ]
    return found


def log_likelihood(model: PreTrainedModel, calls: Sequence[Transition], rollout_id: str) -> Tensor:
    """Return log p of a rollout's answers, one call after the other."""
    total = torch.zeros(())
    for one in calls:
        if one.rollout_id == rollout_id:
            tokens = torch.tensor([[*one.prompt_token_ids, *one.token_ids]])
            logprobs = model(tokens).logits[0].log_softmax(-1)
            first = len(one.prompt_token_ids)
            total = total + sum(logprobs[first + at - 1, token] for at, token in enumerate(one.token_ids))
    return total


def length(calls: Sequence[Transition], rollout_id: str) -> int:
    return sum(len(one.token_ids) for one in calls if one.rollout_id == rollout_id)


BEST_WORST = [("r1", "r2")]
ALL = [("r0", "r2"), ("r1", "r0"), ("r1", "r2"), ("r3", "r0"), ("r3", "r2")]


def dpo_loss(
    model: PreTrainedModel, base: PreTrainedModel, calls: Sequence[Transition], pairs: Sequence[tuple[str, str]]
) -> Tensor:
    """Rafailov et al. 2023, equation 7, at beta 0.3."""

    def log_ratio(rollout_id: str) -> Tensor:
        with torch.no_grad():
            reference = log_likelihood(base, calls, rollout_id)
        return log_likelihood(model, calls, rollout_id) - reference

    margins = [0.3 * (log_ratio(chosen) - log_ratio(rejected)) for chosen, rejected in pairs]
    return -logsigmoid(torch.stack(margins)).mean()


def simpo_loss(
    model: PreTrainedModel, base: PreTrainedModel, calls: Sequence[Transition], pairs: Sequence[tuple[str, str]]
) -> Tensor:
    """Meng et al. 2024, equation 6, at beta 2.5 and gamma 0.8."""

    def mean(rollout_id: str) -> Tensor:
        return log_likelihood(model, calls, rollout_id) / length(calls, rollout_id)

    return -logsigmoid(torch.stack([2.5 * (mean(one) - mean(other)) - 0.8 for one, other in pairs])).mean()


@pytest.mark.parametrize(
    ("algorithm", "closed_form", "pairs"),
    [
        (DPO(beta=0.3), dpo_loss, BEST_WORST),
        (DPO(beta=0.3, pairs="all"), dpo_loss, ALL),
        (SimPO(beta=2.5, gamma=0.8), simpo_loss, BEST_WORST),
        (SimPO(beta=2.5, gamma=0.8, pairs="all"), simpo_loss, ALL),
    ],
    ids=["dpo", "dpo of all pairs", "simpo", "simpo of all pairs"],
)
def test_loss_and_gradient_are_those_of_the_formula(
    checkpoint: Path, algorithm: Preference, closed_form: Callable[..., Tensor], pairs: list[tuple[str, str]]
) -> None:
    calls = turns()
    learner = TorchLearner()
    learner.open([POLICY], str(checkpoint), seed=0)
    moved = learner._trainees["sql"].model
    torch.manual_seed(1)
    with torch.no_grad():  # away from the reference, so that margins are not 0
        for parameter in moved.parameters():
            parameter += 0.05 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter)
    oracle = copy.deepcopy(moved)
    theirs = closed_form(oracle, load_model(checkpoint), calls, pairs)
    theirs.backward()

    session = RecordedSession(groups=lambda _: [], learner=learner)
    annotated, metrics = asyncio.run(algorithm.annotate(session, POLICY, algorithm._paired(calls)))
    learner.forward_backward("sql", [Objective(loss=Loss(name="policy_gradient"), samples=mdp.samples(annotated))])
    assert metrics["preference/loss"] == pytest.approx(theirs.item(), rel=1e-5)
    assert metrics["preference/pairs"] == len(pairs)
    for (name, ours), parameter in zip(moved.named_parameters(), oracle.parameters(), strict=True):
        assert ours.grad is not None and parameter.grad is not None
        assert float((ours.grad - parameter.grad).norm() / parameter.grad.norm()) < 1e-5, name


def test_at_the_reference_the_margin_is_0_and_a_step_opens_it(checkpoint: Path) -> None:
    policy = Policy("sql", learning_rate=1e-2)
    learner = TorchLearner()
    learner.open([policy], str(checkpoint), seed=0)
    rollouts = [
        records(call([1, 2], choice([number + 3, 4])), rollout_id=f"r{number}", total=float(number))
        for number in range(3)
    ]
    session = RecordedSession(
        groups=lambda _: [Group(group_id="g0", task={}, rollouts=rollouts)],
        policies=[policy],
        total_steps=3,
        learner=learner,
    )
    asyncio.run(DPO().run(session))
    first, *_, last = session.finished
    assert (first["preference/margin"], first["preference/accuracy"]) == (0.0, 0.0)
    assert first["preference/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert last["preference/margin"] > 0 and last["preference/accuracy"] == 1.0
    assert last["preference/loss"] < first["preference/loss"]
    assert "loss/loss" not in last  # of the surrogate, which says nothing


def test_every_optimizer_step_has_margins_of_its_own(checkpoint: Path) -> None:
    policy = Policy("sql", learning_rate=1e-2)
    learner = TorchLearner()
    learner.open([policy], str(checkpoint), seed=0)
    groups = [group(0.0, 1.0, group_id=name) for name in ("g0", "g1")]  # the same tokens twice
    session = RecordedSession(groups=lambda _: groups, policies=[policy], learner=learner)
    asyncio.run(DPO(updates_per_step=2).run(session))
    first, second = ([abs(sample.advantages[0]) for sample in batch.samples] for _, [[batch]] in session.updates)
    assert first == [0.05, 0.05]  # beta * sigmoid(0)
    assert all(value < 0.05 for value in second)


# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_pairs_are_of_rollouts_that_differ_by_enough() -> None:
    returns = {"a": 0.5, "b": 1.0, "c": 0.0, "d": 1.0}
    assert pairs_of(returns, "best_worst", least_gap=0.0) == [Pair("b", "c")]
    assert pairs_of(returns, "best_worst", least_gap=1.5) == []
    assert pairs_of({"a": 1.0, "b": 1.0}, "all", least_gap=0.0) == []
    assert pairs_of(returns, "all", least_gap=0.75) == [Pair("b", "c"), Pair("d", "c")]


def test_a_rollouts_return_is_the_policys_own() -> None:
    calls = [transition(value=1.0, span_id="a"), transition(value=0.0, span_id="b", turn=1)]
    assert returns_of(calls) == {"g0": {"r0": 0.5}}


def test_groups_of_equal_rewards_take_no_update() -> None:
    session = RecordedSession(groups=lambda _: [group(1.0, 1.0)])
    asyncio.run(SimPO().run(session))
    assert session.updates == []
    assert session.finished[0]["tokens/trained"] == 0.0


# ---- stored groups -------------------------------------------------------------------------------------------------


def test_pairs_of_stored_groups_are_trained_without_running_anything(checkpoint: Path) -> None:
    learner = TorchLearner()
    learner.open([POLICY], str(checkpoint), seed=0)
    algorithm = DPO(source="prod", epochs=2, batch_size=1)
    assert algorithm.demands == Demands(steps=2, runs_agent=False)
    assert DPO().demands == Demands()
    sources = {"prod": [group(0.0, 1.0), group(0.3, 0.3, group_id="g1"), group(0.0, 0.5, 0.2, group_id="g2")]}
    session = RecordedSession(groups=lambda _: [], total_steps=2, learner=learner, sources=sources)
    asyncio.run(algorithm.run(session))
    assert [len(batch.samples) for _, [[batch]] in session.updates] == [2, 2, 2, 2]
    assert session.asked_exact == [False]
    assert [metrics["preference/pairs"] for metrics in session.finished] == [1.0, 1.0]


def test_a_source_without_pairs_is_refused() -> None:
    session = RecordedSession(groups=lambda _: [], sources={"prod": [group(1.0), group(1.0, 1.0, group_id="g1")]})
    with pytest.raises(ConfigurationError, match="source='prod' has no pairs: none of its 2 groups"):
        asyncio.run(SimPO(source="prod").run(session))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DPO(group_size=1), "group_size=1"),
        (lambda: DPO(beta=0.0), "beta=0.0"),
        (lambda: SimPO(gamma=-1.0), "gamma=-1.0"),
        (lambda: DPO(pairs="some"), "pairs='some'"),  # type: ignore[arg-type]
        (lambda: DPO(least_gap=-1.0), "least_gap=-1.0"),
        (lambda: DPO(epochs=2), "are of stored groups"),
        (lambda: DPO(exact=True), "are of stored groups"),
        (lambda: DPO(source="prod", updates_per_step=2), "cuts sampled groups"),
        (lambda: DPO(source=""), "names no run"),
    ],
)
def test_options_outside_their_range_are_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make()


def test_margins_far_apart_do_not_overflow() -> None:
    class Far(SimPO):
        def margin(self, chosen: object, rejected: object) -> float:
            return -4000.0

    class Silent(RecordedSession):
        async def logprobs(self, policy: object, transitions: Sequence[Transition], **_: object) -> list[list[float]]:  # type: ignore[override]
            return [[-1.0] * len(one.token_ids) for one in transitions]

    calls = [replace(one, value=float(index)) for index, one in enumerate(turns()[::3])]
    _, metrics = asyncio.run(Far().annotate(Silent(groups=lambda _: []), POLICY, calls))
    assert metrics["preference/loss"] == 4000.0

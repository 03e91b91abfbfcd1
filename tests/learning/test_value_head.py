"""The value head: it begins at 0, learns returns, reaches the trunk, and is saved but never published."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Loss, Objective, Sample
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import POLICY, rich_transitions, sample

VOCABULARY = 24
VALUE = Loss(name="policy_gradient", value_coefficient=0.5)
ADAPTED = Policy("sql", lora=LoRA(rank=4))


def opened(checkpoint: Path, policy: Policy = POLICY) -> TorchLearner:
    learner = TorchLearner()
    learner.open([policy], str(checkpoint), seed=0)
    return learner


def tensors(learner: TorchLearner) -> dict[str, Tensor]:
    found = learner.weights("sql").tensors
    assert found is not None
    return {name: one.clone() for name, one in found.items() if isinstance(one, Tensor)}


def are_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def valued(seed: int = 0, *, advantage: float = 0.0) -> list[Sample]:
    """Return samples whose return is told by their first answer token, without or with a policy gradient."""
    found = []
    for one in mdp.samples(mdp.weigh(rich_transitions(VOCABULARY, seed=seed), "token_mean")):
        length = len(one.token_ids)
        found.append(replace(one, returns=[one.token_ids[0] / VOCABULARY] * length, advantages=[advantage] * length))
    return found


def step(learner: TorchLearner, samples: list[Sample], learning_rate: float = 1e-3) -> dict[str, float]:
    metrics = learner.forward_backward("sql", [Objective(loss=VALUE, samples=samples)])
    learner.optim_step("sql", learning_rate)
    return metrics


@pytest.mark.parametrize("policy", [POLICY, ADAPTED], ids=["full", "adapter"])
def test_a_new_head_predicts_zero_for_every_token(checkpoint: Path, policy: Policy) -> None:
    samples = valued()
    assert opened(checkpoint, policy).values("sql", samples) == [[0.0] * len(one.token_ids) for one in samples]


@pytest.mark.parametrize("policy", [POLICY, ADAPTED], ids=["full", "adapter"])
def test_a_value_is_read_from_the_hidden_state_that_predicts_the_token(checkpoint: Path, policy: Policy) -> None:
    learner = opened(checkpoint, policy)
    generator = torch.Generator().manual_seed(0)
    head = learner._trainees["sql"].value_head()
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias.fill_(0.3)
    model = load_model(checkpoint)  # a new adapter does not change it
    samples = valued()
    for one, found in zip(samples, learner.values("sql", samples), strict=True):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([[*one.prompt_token_ids, *one.token_ids]])).last_hidden_state[0]
        expected = (hidden @ head.weight[0].detach() + 0.3)[len(one.prompt_token_ids) - 1 : -1]
        assert found == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("policy", [POLICY, ADAPTED], ids=["full", "adapter"])
def test_the_head_learns_returns(checkpoint: Path, policy: Policy) -> None:
    learner = opened(checkpoint, policy)
    samples = valued()
    metrics = [step(learner, samples) for _ in range(60)]
    assert metrics[0]["loss/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[-1]["loss/explained_variance"] > 0.5
    assert metrics[-1]["loss/value_loss"] < 0.3 * metrics[0]["loss/value_loss"]


def test_value_metrics_are_those_of_their_formulas(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    samples = valued()
    for _ in range(5):
        step(learner, samples)
    without = [replace(sample([1, 2], [3]), weights=[0.0])]  # takes no part
    values = torch.tensor([value for one in learner.values("sql", samples) for value in one], dtype=torch.float64)
    returns = torch.tensor([value for one in samples for value in one.returns or ()], dtype=torch.float64)
    metrics = step(learner, [*samples, *without])
    assert metrics["loss/value_loss"] == pytest.approx(float((values - returns).square().mean() / 2), rel=1e-5)
    explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics["loss/explained_variance"] == pytest.approx(float(explained), abs=1e-5)


def test_the_value_term_has_the_gradient_of_finite_differences_in_the_trunk(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    samples = valued()
    for _ in range(3):  # a head of zeros sends nothing into the trunk
        step(learner, samples)
    model = learner._trainees["sql"].model
    learner.forward_backward("sql", [Objective(loss=VALUE, samples=samples)])
    parameter = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert parameter.grad is not None
    direction = parameter.grad / parameter.grad.norm()
    totals = []
    for sign in (1, -2):
        with torch.no_grad():
            parameter += sign * 1e-2 * direction
        squares = [
            weight * (value - target) ** 2 / 2
            for one, found in zip(samples, learner.values("sql", samples), strict=True)
            for weight, value, target in zip(one.weights, found, one.returns or (), strict=True)
        ]
        totals.append(0.5 * sum(squares))
    assert (totals[0] - totals[1]) / 2e-2 == pytest.approx(float(parameter.grad.norm()), rel=1e-2)


def test_a_new_head_does_not_move_the_trunk(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    before = tensors(learner)
    step(learner, valued())
    assert are_bit_equal(before, tensors(learner))
    step(learner, valued())
    assert not are_bit_equal(before, tensors(learner))


@pytest.mark.parametrize("policy", [POLICY, ADAPTED], ids=["full", "adapter"])
def test_a_loaded_head_continues_bit_for_bit(checkpoint: Path, tmp_path: Path, policy: Policy) -> None:
    learner = opened(checkpoint, policy)
    for seed in (0, 1):
        step(learner, valued(seed, advantage=1.0))
    learner.save(tmp_path)
    resumed = opened(checkpoint, policy)
    resumed.load(tmp_path)
    assert resumed.values("sql", valued()) == learner.values("sql", valued())
    for one in (learner, resumed):
        step(one, valued(2, advantage=1.0))
    assert are_bit_equal(tensors(learner), tensors(resumed))
    assert resumed.values("sql", valued()) == learner.values("sql", valued())


def test_loading_a_checkpoint_from_before_the_head_forgets_it(checkpoint: Path, tmp_path: Path) -> None:
    learner = opened(checkpoint)
    learner.save(tmp_path)
    for _ in range(2):
        step(learner, valued())
    learner.load(tmp_path)
    assert {value for one in learner.values("sql", valued()) for value in one} == {0.0}


@pytest.mark.parametrize("policy", [POLICY, ADAPTED], ids=["full", "adapter"])
def test_the_head_is_neither_published_nor_exported(checkpoint: Path, tmp_path: Path, policy: Policy) -> None:
    learner = opened(checkpoint, policy)
    names, count = set(tensors(learner)), len(list(learner._trainees["sql"].trained()))
    step(learner, valued())
    assert set(tensors(learner)) == names
    assert len(list(learner._trainees["sql"].trained())) == count + 2
    learner.export("sql", tmp_path)
    assert not [file.name for file in tmp_path.iterdir() if "value" in file.name]


def test_the_head_learns_ten_times_as_fast_and_its_gradient_counts_in_the_norm(checkpoint: Path) -> None:
    learner = opened(checkpoint, replace(POLICY, max_gradient_norm=1e9))
    trainee = learner._trainees["sql"]
    learner.forward_backward("sql", [Objective(loss=VALUE, samples=valued(advantage=1.0))])
    squares = [float(one.grad.square().sum()) for one in trainee.trained() if one.grad is not None]
    bias = next(one for one in trainee.trained() if one.shape == (1,))
    embedding = trainee.parameters["model.embed_tokens.weight"]
    before = embedding.detach().clone()
    assert learner.optim_step("sql", 1e-3)["gradient_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    # The first step of Adam is the learning rate, whatever the gradient's size.
    assert abs(bias.item()) == pytest.approx(1e-2, rel=1e-3)
    assert float((embedding - before).abs().max()) == pytest.approx(1e-3, rel=1e-3)


def test_a_policy_without_a_value_term_makes_no_head(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    learner.forward_backward("sql", [Objective(loss=Loss(name="policy_gradient"), samples=valued())])
    assert learner._trainees["sql"].head is None


def test_a_value_term_without_returns_is_refused_before_anything_is_computed(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match="no sample has 'returns'"):
        opened(checkpoint).forward_backward("sql", [Objective(loss=VALUE, samples=[sample([1], [2])])])

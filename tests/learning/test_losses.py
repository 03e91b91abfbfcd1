"""The losses against finite differences, a closed form, and TRL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Loss
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.learners.torch.losses import Tokens, cross_entropy, loss_function, policy_gradient_clip
from leyden_plugins.torch_models.loading import load_model
from leyden_plugins.torch_models.logprobs import logits_at, token_logprobs
from tests.learning.builders import POLICY, transition

CLIP = Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.3})


def tokens(logprobs: Tensor, *, old: Tensor, advantages: Tensor, weights: Tensor | None = None) -> Tokens:
    return Tokens(
        logprobs=logprobs,
        sampled_logprobs=old,
        advantages=advantages,
        weights=torch.ones_like(old) if weights is None else weights,
    )


def test_the_log_probability_is_that_of_the_tempered_softmax() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    chosen = torch.tensor([0, 6, 3, 3, 1])
    temperature = torch.tensor([1.0, 0.5, 2.0, 0.7, 1.0], dtype=torch.float64)
    expected = [torch.log_softmax(logits[i] / temperature[i], -1)[chosen[i]] for i in range(5)]
    assert torch.allclose(token_logprobs(logits, chosen, temperature), torch.stack(expected))


def test_the_gradient_of_a_softmax_bandit_has_its_closed_form() -> None:
    """On policy, d/d logits of -w r A is -(w A / T) (onehot(a) - pi): the policy gradient theorem, one step."""
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0, 1, 2, 3, 1, 2])
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, -1.0, 3.0], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
    temperature = 0.7
    logprobs = token_logprobs(logits, actions, temperature)
    loss = policy_gradient_clip(
        tokens(logprobs, old=logprobs.detach(), advantages=advantages, weights=weights), clip_low=0.2, clip_high=0.2
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    policy = torch.softmax(logits.detach() / temperature, -1)
    taken = torch.nn.functional.one_hot(actions, 4).double()
    expected = -(weights * advantages)[:, None] / temperature * (taken - policy)
    assert torch.allclose(gradient, expected)
    assert loss.item() == pytest.approx(-float((weights * advantages).sum()))


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "is_cut"),
    [
        (1.1, 2.0, 2.2, False),
        (1.5, 2.0, 2.6, True),  # clipped at 1 + clip_high
        (1.5, -2.0, -3.0, False),  # the pessimistic side is never clipped
        (0.9, -1.0, -0.9, False),
        (0.5, -1.0, -0.8, True),  # clipped at 1 - clip_low
        (0.5, 1.0, 0.5, False),
    ],
)
def test_the_ratio_is_clipped_only_where_that_lowers_the_gain(
    ratio: float, advantage: float, gain: float, is_cut: bool
) -> None:
    old = torch.tensor([-2.0], dtype=torch.float64)
    logprobs = (old + torch.tensor([ratio], dtype=torch.float64).log()).requires_grad_()
    loss = loss_function(CLIP)(tokens(logprobs, old=old, advantages=torch.tensor([advantage], dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(-gain)
    assert float(gradient) == pytest.approx(0.0 if is_cut else -ratio * advantage)


@pytest.mark.parametrize("name", ["policy_gradient_clip", "cross_entropy"])
def test_the_gradient_through_the_model_equals_finite_differences(checkpoint: Path, name: str) -> None:
    model = load_model(checkpoint).double()
    generator = torch.Generator().manual_seed(1)
    # Not token 0: padding has a zero embedding, where a normed model is all but discontinuous.
    input_ids = torch.randint(1, 24, (3, 8), generator=generator)
    index = torch.arange(24).reshape(3, 8)[:, 3:7].flatten()
    targets = input_ids[:, 4:].flatten()
    old = token_logprobs(logits_at(model, input_ids, index), targets, 0.8).detach()
    # Ratios well inside and well outside the clip range, never at its kinks.
    old = old - torch.tensor([0.0, 0.1, 0.5, -0.5] * 3, dtype=torch.float64)
    advantages = torch.randn(12, dtype=torch.float64, generator=generator)
    weights = torch.rand(12, dtype=torch.float64, generator=generator)
    function = loss_function(CLIP if name == "policy_gradient_clip" else Loss(name=name))

    def value() -> Tensor:
        logprobs = token_logprobs(logits_at(model, input_ids, index), targets, 0.8)
        return function(tokens(logprobs, old=old, advantages=advantages, weights=weights))

    parameters = list(model.parameters())
    gradient = [one.detach() for one in torch.autograd.grad(value(), parameters)]
    size = float(torch.cat([one.flatten() for one in gradient]).norm())
    noise = [torch.randn(one.shape, dtype=torch.float64, generator=generator) for one in parameters]
    spread = float(torch.cat([one.flatten() for one in noise]).norm())
    # Half along the gradient, which gives a large slope, half anywhere, which shows what the gradient may lack.
    direction = [one / size + way / spread for one, way in zip(gradient, noise, strict=True)]
    slope = sum(float((one * way).sum()) for one, way in zip(gradient, direction, strict=True))
    epsilon, found = 1e-3, []  # the model's norms are computed in float32 whatever its type, so no smaller
    with torch.no_grad():
        for sign in (1, -2):  # to +epsilon, then from there to -epsilon
            for parameter, way in zip(parameters, direction, strict=True):
                parameter += sign * epsilon * way
            found.append(float(value()))
    assert (found[0] - found[1]) / (2 * epsilon) == pytest.approx(slope, rel=1e-4)


def test_cross_entropy_is_the_weighted_negative_log_likelihood() -> None:
    logprobs = torch.tensor([-1.0, -3.0])
    weighted = tokens(logprobs, old=logprobs, advantages=torch.zeros(2), weights=torch.tensor([0.5, 0.25]))
    assert float(cross_entropy(weighted)) == pytest.approx(1.25)


def test_an_unknown_loss_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"loss 'dpo' is unknown.*policy_gradient_clip"):
        loss_function(Loss(name="dpo"))


def test_options_a_loss_does_not_have_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"exactly the options \['clip_high', 'clip_low'\], got \['clip_low'\]"
    ):
        loss_function(Loss(name="policy_gradient_clip", options={"clip_low": 0.2}))


# ---- TRL as an oracle ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_trainer(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return TRL's GRPO trainer on the checkpoint; only its loss is used."""
    pytest.importorskip("trl", reason="TRL is the oracle of this test: pip install 'leyden[dev]'")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=5,
        epsilon=0.2,
        epsilon_high=0.3,
        beta=0.0,
        temperature=0.7,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    return GRPOTrainer(
        model=load_model(checkpoint),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 4}),
        processing_class=AutoTokenizer.from_pretrained(str(checkpoint)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("normalisation", "loss_type"), [("per_rollout", "grpo"), ("token_mean", "bnpo")])
def test_one_call_rollouts_give_the_loss_and_gradient_of_trl(
    checkpoint: Path, trl_trainer: Any, normalisation: mdp.Normalisation, loss_type: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    calls = []
    for number, (prompt_length, answer_length) in enumerate([(3, 5), (6, 2), (4, 4), (6, 1)]):
        prompt, answer = (
            torch.randint(1, 24, (n,), generator=generator).tolist() for n in (prompt_length, answer_length)
        )
        calls.append(
            transition(
                prompt=prompt,
                tokens=answer,
                # Off policy by up to a factor e, so that both sides of the clip are reached.
                logprobs=(-4 + 2 * torch.rand(answer_length, generator=generator)).tolist(),
                rollout_id=f"r{number}",
                span_id=f"s{number}",
                temperature=0.7,
                advantage=[1.0, -0.5, 2.0, -1.5][number],
            )
        )
    learner = TorchLearner()
    learner.open([POLICY], str(checkpoint), seed=0)
    ours = learner.forward_backward("sql", mdp.rows(mdp.weigh(calls, normalisation)), CLIP)
    our_gradients = gradients_of(learner)
    assert 0 < ours["loss/clip_fraction"] < 1

    model = trl_trainer.model.eval()
    model.zero_grad()
    trl_trainer.loss_type = loss_type
    theirs = trl_trainer._compute_loss(model, trl_inputs(calls))
    theirs.backward()
    assert ours["loss/loss"] == pytest.approx(theirs.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        difference = (our_gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(difference) < 1e-5, name


def trl_inputs(calls: list[Any]) -> dict[str, Tensor]:
    """Lay calls out as TRL does: prompts padded on the left, completions on the right."""
    prompts = max(len(one.prompt_token_ids) for one in calls)
    answers = max(len(one.token_ids) for one in calls)
    inputs = {
        "prompt_ids": torch.zeros(len(calls), prompts, dtype=torch.long),
        "prompt_mask": torch.zeros(len(calls), prompts, dtype=torch.long),
        "completion_ids": torch.zeros(len(calls), answers, dtype=torch.long),
        "completion_mask": torch.zeros(len(calls), answers, dtype=torch.long),
        "old_per_token_logps": torch.zeros(len(calls), answers),
        "advantages": torch.tensor([one.advantage for one in calls]),
    }
    for number, one in enumerate(calls):
        inputs["prompt_ids"][number, prompts - len(one.prompt_token_ids) :] = torch.tensor(one.prompt_token_ids)
        inputs["prompt_mask"][number, prompts - len(one.prompt_token_ids) :] = 1
        inputs["completion_ids"][number, : len(one.token_ids)] = torch.tensor(one.token_ids)
        inputs["completion_mask"][number, : len(one.token_ids)] = 1
        inputs["old_per_token_logps"][number, : len(one.token_ids)] = torch.tensor(one.logprobs)
    return inputs


def gradients_of(learner: TorchLearner) -> dict[str, Tensor]:
    """Return the gradients that wait for the next optimizer step."""
    model = learner._trainees["sql"].model
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

"""The losses and their added terms against finite differences and closed forms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leyden.errors import ConfigurationError
from leyden.interfaces import Loss
from leyden.interfaces.learner import KLEstimator
from leyden_plugins.learners.torch.entropies import token_entropies
from leyden_plugins.learners.torch.losses import Tokens, check_inputs, divergence, loss_function
from leyden_plugins.torch_models.loading import load_model
from leyden_plugins.torch_models.logprobs import logits_at, token_logprobs
from tests.learning.builders import sample

RANGE = {"clip_low": 0.2, "clip_high": 0.3}
CLIP = Loss(name="policy_gradient_clip", options=RANGE)
GSPO = Loss(name="gspo", options=RANGE)
CISPO = Loss(name="cispo", options=RANGE)
PLAIN = Loss(name="policy_gradient")
NAN = float("nan")


def tokens(logprobs: Tensor, **given: Tensor | None) -> Tokens:
    """Return tokens, each of a call of its own, on policy, with advantage 0 and weight 1 where nothing is given."""
    now = logprobs.detach()
    defaults: dict[str, Any] = {
        "sampled_logprobs": now,
        "old_logprobs": now,
        "advantages": torch.zeros_like(now),
        "weights": torch.ones_like(now),
        "samples": torch.arange(len(now)),
    }
    return Tokens(logprobs=logprobs, **(defaults | given))


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slopes(total: Tensor, of: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(total, of)
    return gradient


def test_the_log_probability_is_that_of_the_tempered_softmax() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    chosen = torch.tensor([0, 6, 3, 3, 1])
    temperature = torch.tensor([1.0, 0.5, 2.0, 0.7, 1.0], dtype=torch.float64)
    expected = [torch.log_softmax(logits[i] / temperature[i], -1)[chosen[i]] for i in range(5)]
    assert torch.allclose(token_logprobs(logits, chosen, temperature), torch.stack(expected))


@pytest.mark.parametrize("loss_named", [CLIP, GSPO, CISPO, PLAIN], ids=lambda loss: loss.name)
def test_on_policy_every_surrogate_has_the_closed_gradient_of_a_softmax_bandit(loss_named: Loss) -> None:
    """On policy, d/d logits of -w r A is -(w A / T) (onehot(a) - pi): the policy gradient theorem, one step."""
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0, 1, 2, 3, 1, 2])
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, -1.0, 3.0], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
    temperature = 0.7
    logprobs = token_logprobs(logits, actions, temperature)
    loss = loss_function(loss_named)(tokens(logprobs, advantages=advantages, weights=weights)).total
    (gradient,) = torch.autograd.grad(loss, logits)
    policy = torch.softmax(logits.detach() / temperature, -1)
    taken = torch.nn.functional.one_hot(actions, 4).double()
    expected = -(weights * advantages)[:, None] / temperature * (taken - policy)
    assert torch.allclose(gradient, expected)
    if loss_named in (CLIP, GSPO):
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
    value = loss_function(CLIP)(tokens(logprobs, old_logprobs=old, advantages=doubles(advantage)))
    assert value.total.item() == pytest.approx(-gain)
    assert bool(value.clipped) == is_cut
    assert float(slopes(value.total, logprobs)) == pytest.approx(0.0 if is_cut else -ratio * advantage)


def test_gspo_clips_a_calls_geometric_mean_ratio() -> None:
    """GSPO, equation 7: s = exp(mean log ratio); d s / d log p_t = s / T."""
    moves = doubles(0.5, -0.3, 0.4, 0.3, 0.7, -0.1)  # means 0.2 (kept), 0.5 (cut) and -0.1 (kept)
    old = torch.full((6,), -2.0, dtype=torch.float64)
    logprobs = (old + moves).requires_grad_()
    call = torch.tensor([7, 7, 7, 3, 3, 9])
    advantages = doubles(2.0, 2.0, 2.0, 1.0, 1.0, -1.0)
    weights = doubles(0.1, 0.1, 0.1, 0.2, 0.2, 0.5)
    value = loss_function(GSPO)(
        tokens(logprobs, old_logprobs=old, advantages=advantages, weights=weights, samples=call)
    )
    first, last = torch.tensor([0.2, -0.1], dtype=torch.float64).exp().tolist()
    assert value.total.item() == pytest.approx(-(0.3 * 2 * first + 0.4 * 1.3 - 0.5 * last))
    assert value.clipped.tolist() == [False, False, False, True, True, False]
    expected = doubles(*[-0.3 * 2 * first / 3] * 3, 0.0, 0.0, 0.5 * last)
    assert torch.allclose(slopes(value.total, logprobs), expected)


def test_cispo_bounds_the_ratio_and_keeps_every_tokens_gradient() -> None:
    """MiniMax-M1, equations 4 and 5: the gradient is -sg(clip(r)) A, also beyond the clip."""
    ratio = doubles(0.5, 0.9, 1.1, 2.0, 2.0)
    advantages = doubles(1.0, 1.0, -1.0, 1.0, 0.0)
    old = torch.full((5,), -2.0, dtype=torch.float64)
    logprobs = (old + ratio.log()).requires_grad_()
    value = loss_function(CISPO)(tokens(logprobs, old_logprobs=old, advantages=advantages))
    bounded = doubles(0.8, 0.9, 1.1, 1.3, 1.3)
    assert torch.allclose(slopes(value.total, logprobs), -bounded * advantages)
    assert value.total.item() == pytest.approx(-float((bounded * advantages * logprobs.detach()).sum()))
    assert value.clipped.tolist() == [True, False, False, True, False]


# ---- added terms -----------------------------------------------------------------------------------------------


def enumerated(reference_logits: Tensor, logits: Tensor, estimator: str) -> tuple[float, Tensor]:
    """Return a divergence estimator's expectation over a whole softmax policy, and that of its gradient."""
    policy = torch.softmax(logits.detach(), -1)
    logprobs = torch.log_softmax(logits, -1)
    each = divergence(logprobs, torch.log_softmax(reference_logits, -1), estimator)
    expectation = (policy * each).sum()  # the policy is a constant here: it was sampled from
    return expectation.item(), slopes(expectation, logits)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_has_the_expectation_and_the_gradient_that_its_docstring_says(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, dtype=torch.float64, generator=generator)
    logits = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    q = torch.log_softmax(reference, -1)

    def towards() -> Tensor:
        p = torch.log_softmax(logits, -1)
        return (p.exp() * (p - q)).sum()

    def away() -> Tensor:
        return (q.exp() * (q - torch.log_softmax(logits, -1))).sum()

    value, gradient = enumerated(reference, logits, estimator)
    if estimator != "k2":
        assert value == pytest.approx(towards().item())
    expected = {"k1": torch.zeros(5), "k2": slopes(towards(), logits), "k3": slopes(away(), logits)}
    assert torch.allclose(gradient, expected[estimator].double(), atol=1e-12)


@pytest.mark.parametrize(("estimator", "value", "slope"), [("k1", 0.4, 1.0), ("k2", 0.4**2 / 2, 0.4)])
def test_a_sample_without_reference_takes_no_part_in_the_divergence(
    estimator: KLEstimator, value: float, slope: float
) -> None:
    logprobs = doubles(-1.0, -2.0).requires_grad_()
    loss = Loss(name="policy_gradient", kl_coefficient=0.5, kl_estimator=estimator)
    given = tokens(logprobs, weights=doubles(2.0, 3.0), reference_logprobs=doubles(-1.4, NAN))
    total = loss_function(loss)(given).total
    assert total.item() == pytest.approx(2.0 * 0.5 * value)
    assert torch.allclose(slopes(total, logprobs), doubles(2.0 * 0.5 * slope, 0.0))


@pytest.mark.parametrize("chunk", [1, 14, 1000])
def test_entropies_and_their_gradients_are_those_of_the_tempered_softmax(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leyden_plugins.learners.torch.entropies.CHUNK_ELEMENTS", chunk)
    logits = (3 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    temperature = doubles(1.0, 0.5, 2.0, 0.7, 1.0)
    expected = torch.distributions.Categorical(logits=logits.detach() / temperature[:, None]).entropy()
    assert torch.allclose(token_entropies(logits, temperature), expected)
    assert torch.autograd.gradcheck(lambda one: token_entropies(one, temperature), (logits,))


def test_the_entropy_is_rewarded_by_its_coefficient() -> None:
    entropy = doubles(1.5, 0.5).requires_grad_()
    loss = Loss(name="policy_gradient", entropy_coefficient=0.1)
    total = loss_function(loss)(tokens(doubles(-1.0, -1.0), weights=doubles(2.0, 3.0), entropies=entropy)).total
    assert total.item() == pytest.approx(-0.1 * (2 * 1.5 + 3 * 0.5))


@pytest.mark.parametrize(
    ("value", "old", "expected", "slope"),
    [
        (0.5, 0.4, 0.5 * 0.5**2, -0.5),  # within the clip
        (0.9, 0.2, 0.5 * 0.6**2, 0.0),  # moved too far towards the return: the clipped error is larger
        (-0.5, 0.2, 0.5 * 1.5**2, -1.5),  # moved too far away: the error itself is larger
        (0.9, NAN, 0.5 * 0.1**2, -0.1),  # nothing to clip to
    ],
)
def test_a_value_may_not_profit_from_moving_further_than_its_clip(
    value: float, old: float, expected: float, slope: float
) -> None:
    """PPO's clipped value loss, for a return of 1 and a clip of 0.2."""
    values = doubles(value).requires_grad_()
    loss = Loss(name="policy_gradient", value_coefficient=0.5, value_clip=0.2)
    given = tokens(doubles(-1.0), weights=doubles(3.0), values=values, old_values=doubles(old), returns=doubles(1.0))
    total = loss_function(loss)(given).total
    assert total.item() == pytest.approx(3 * 0.5 * expected)
    assert float(slopes(total, values)) == pytest.approx(3 * 0.5 * slope)


def test_a_sample_without_returns_takes_no_part_in_the_value_term() -> None:
    values = doubles(0.5, 0.7).requires_grad_()
    loss = Loss(name="policy_gradient", value_coefficient=1.0)
    total = loss_function(loss)(tokens(doubles(-1.0, -1.0), values=values, returns=doubles(NAN, 1.0))).total
    assert total.item() == pytest.approx(0.5 * 0.3**2)
    assert torch.allclose(slopes(total, values), doubles(0.0, -0.3))


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (
            Loss(name="policy_gradient", kl_coefficient=0.1),
            "kl_coefficient=0.1, but no sample has 'reference_logprobs'",
        ),
        (Loss(name="policy_gradient", value_coefficient=0.5), "value_coefficient=0.5, but no sample has 'returns'"),
        (Loss(name="policy_gradient", value_coefficient=0.5, value_clip=0.2), "no sample has 'returns'"),
    ],
)
def test_a_term_without_its_inputs_is_refused(loss: Loss, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        check_inputs(loss, [sample([1], [2])])


def test_a_value_clip_needs_earlier_values() -> None:
    loss = Loss(name="policy_gradient", value_coefficient=0.5, value_clip=0.2)
    with pytest.raises(ConfigurationError, match=r"value_clip=0\.2, but no sample has 'values'"):
        check_inputs(loss, [replace(sample([1], [2]), returns=[1.0])])


# ---- through the model -----------------------------------------------------------------------------------------


EVERY_TERM = Loss(name="gspo", options=RANGE, kl_coefficient=0.3, entropy_coefficient=0.2)


@pytest.mark.parametrize("loss", [CLIP, GSPO, PLAIN, Loss(name="cross_entropy"), EVERY_TERM], ids=lambda one: one.name)
def test_the_gradient_through_the_model_equals_finite_differences(checkpoint: Path, loss: Loss) -> None:
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
    function = loss_function(loss)
    temperature = torch.full((12,), 0.8, dtype=torch.float64)

    def value() -> Tensor:
        logits = logits_at(model, input_ids, index)
        given = tokens(
            token_logprobs(logits, targets, 0.8),
            old_logprobs=old,
            advantages=advantages,
            weights=weights,
            samples=torch.arange(3).repeat_interleave(4),
            reference_logprobs=old.flip(0) / 2,
            entropies=token_entropies(logits, temperature),
        )
        return function(given).total

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
    weighted = tokens(logprobs, weights=torch.tensor([0.5, 0.25]))
    assert float(loss_function(Loss(name="cross_entropy"))(weighted).total) == pytest.approx(1.25)


def test_an_unknown_loss_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"loss 'dpo' is unknown.*policy_gradient_clip"):
        loss_function(Loss(name="dpo"))


def test_options_a_loss_does_not_have_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"exactly the options \['clip_high', 'clip_low'\], got \['clip_low'\]"
    ):
        loss_function(Loss(name="policy_gradient_clip", options={"clip_low": 0.2}))
    with pytest.raises(ConfigurationError, match="kl_estimator='k4' is unknown"):
        loss_function(Loss(name="policy_gradient", kl_estimator="k4"))  # type: ignore[arg-type]  # wrong on purpose

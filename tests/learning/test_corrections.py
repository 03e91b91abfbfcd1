"""Importance sampling of stale samples: the weights, what they do to a known gradient, and when they are computed."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy
import pytest

from leyden.errors import ConfigurationError
from leyden.interfaces import Objective, Sample, Transition
from leyden.roles import Policy
from leyden_plugins.algorithms.rl import GRPO, GSPO, ImportanceSampling, LightningRL, PolicyGradient, Reinforce, Replay
from tests.learning.builders import RecordedSession, group
from tests.learning.test_estimators import LOGITS, PROBABILITIES, REWARDS, expected_gradient, score, true_gradient

OLD = [-1.0, -0.5, -3.0]
SAMPLED = [-1.2, -2.0, -0.5]
RATIOS = numpy.exp(numpy.array(OLD) - numpy.array(SAMPLED))  # 1.22, 4.48, 0.08


# ---- the weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (ImportanceSampling(), numpy.minimum(RATIOS, 2.0)),
        (ImportanceSampling(floor=0.5), numpy.clip(RATIOS, 0.5, 2.0)),
        (ImportanceSampling(cap=math.inf), RATIOS),
        (ImportanceSampling(mode="mask"), RATIOS * (RATIOS <= 2.0)),
        (ImportanceSampling(mode="mask", floor=0.5, cap=5.0), RATIOS * (RATIOS >= 0.5)),
        (ImportanceSampling(level="sequence"), [RATIOS.prod()] * 3),
        (ImportanceSampling(level="sequence", cap=1.0, floor=0.5), [0.5] * 3),
        (ImportanceSampling(level="sequence", mode="mask", floor=0.5), [0.0] * 3),
    ],
)
def test_weights_are_limited_ratios(correction: ImportanceSampling, expected: Sequence[float]) -> None:
    assert correction.weights(OLD, SAMPLED) == pytest.approx(list(expected))


def test_samples_of_the_learners_own_distribution_have_weight_1() -> None:
    for correction in (ImportanceSampling(mode="mask", cap=1.0, floor=1.0), ImportanceSampling(level="sequence")):
        assert correction.weights(OLD, OLD) == [1.0, 1.0, 1.0]


def test_a_ratio_beyond_all_numbers_is_truncated_like_any_other() -> None:
    assert ImportanceSampling().weights([0.0], [-1e4]) == [2.0]


@pytest.mark.parametrize(
    "options", [{"level": "call"}, {"mode": "drop"}, {"cap": 0.5}, {"floor": -0.1}, {"floor": 1.5}]
)
def test_options_outside_their_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"ImportanceSampling\("):
        ImportanceSampling(**options)  # type: ignore[arg-type]


# ---- a known gradient --------------------------------------------------------------------------------------------

STALE = [0.6, 0.3, 0.1]
"""What the answers are drawn with; the weights have moved to `PROBABILITIES` since."""


def corrected(correction: ImportanceSampling, calls: list[Transition]) -> list[Transition]:
    annotated = Reinforce(baseline="none").advantages(calls, ())
    return [correction.correct(one, [math.log(PROBABILITIES[one.token_ids[0]])]) for one in annotated]


def test_without_correction_stale_samples_give_another_gradient() -> None:
    found = expected_gradient(
        lambda calls: Reinforce(baseline="none").advantages(calls, ()), group_size=1, drawn_with=STALE
    )
    assert found != pytest.approx(true_gradient(), abs=0.05)


def test_untruncated_weights_restore_the_gradient() -> None:
    correction = ImportanceSampling(cap=math.inf)
    found = expected_gradient(lambda calls: corrected(correction, calls), group_size=1, drawn_with=STALE)
    assert found == pytest.approx(true_gradient())


def test_truncated_weights_give_the_gradient_of_what_both_distributions_say() -> None:
    correction = ImportanceSampling(cap=1.5)
    found = expected_gradient(lambda calls: corrected(correction, calls), group_size=1, drawn_with=STALE)
    shared = [min(p, 1.5 * mu) for p, mu in zip(PROBABILITIES, STALE, strict=True)]
    assert shared != PROBABILITIES
    expected = [
        sum(shared[action] * REWARDS[action] * score(action)[index] for action in range(len(LOGITS)))
        for index in range(len(LOGITS))
    ]
    assert found == pytest.approx(expected)


# ---- when they are computed --------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MovedSession(RecordedSession):
    """A session whose weights find every recorded token more likely by a factor of exp(shift)."""

    shift: float = 1.0
    asked: list[tuple[int, bool]] = field(default_factory=list)

    async def logprobs(
        self, policy: Policy, transitions: Sequence[Transition], *, reference: bool = False
    ) -> Sequence[Sequence[float]]:
        self.asked.append((len(transitions), reference))
        return [[logprob + self.shift for logprob in one.logprobs] for one in transitions]


def run(algorithm: PolicyGradient, **options: object) -> MovedSession:
    groups = [group(1.0, 0.0), group(1.0, 1.0, group_id="g1")]
    session = MovedSession(groups=lambda _step: groups, **options)  # type: ignore[arg-type]
    asyncio.run(algorithm.run(session))
    return session


def only_objective(session: RecordedSession) -> Objective:
    ((_, ((objective,),)),) = session.updates
    return objective


def test_a_synchronous_run_takes_the_recorded_log_probabilities() -> None:
    session = run(GRPO())
    assert session.asked == []
    assert all(sample.old_logprobs is None for sample in only_objective(session).samples)


@pytest.mark.parametrize("algorithm", [GRPO(correction=ImportanceSampling()), GRPO(replay=Replay(groups=1, max_age=2))])
def test_a_correction_or_replay_asks_the_learner_once_for_the_calls_that_move(algorithm: GRPO) -> None:
    session = run(algorithm)
    assert session.asked == [(2, False)]  # the group without signal costs nothing
    samples = only_objective(session).samples
    assert len(samples) == 2
    for sample in samples:
        assert sample.old_logprobs == [0.0, 0.0]
        assert sample.weights == pytest.approx([2.0 / 8] * 2)  # e, truncated at 2; 4 rollouts of 2 tokens


def test_an_asynchronous_run_corrects_by_itself_and_says_so() -> None:
    session = run(GRPO(), max_staleness=1)
    assert weights(only_objective(session).samples) == pytest.approx([0.25] * 4)
    assert session.finished[0]["correction/mean"] == 2.0
    assert session.finished[0]["mismatch/mean"] == pytest.approx(1.0)


def test_an_asynchronous_run_can_be_left_uncorrected() -> None:
    session = run(GRPO(correction=None), max_staleness=1)
    assert session.asked == []
    assert weights(only_objective(session).samples) == pytest.approx([0.125] * 4)


@pytest.mark.parametrize("algorithm", [GSPO(), LightningRL(token_level=GSPO(), normalisation="per_call")])
def test_a_ratio_a_call_is_corrected_a_call(algorithm: PolicyGradient) -> None:
    wide = replace(algorithm, correction=ImportanceSampling(level="sequence", cap=100.0))
    session = run(wide)
    assert weights(only_objective(session).samples) == pytest.approx([math.exp(2.0) / 8] * 4)  # both tokens' product
    automatic = run(algorithm, max_staleness=1, shift=0.25)
    assert weights(only_objective(automatic).samples) == pytest.approx([math.exp(0.5) / 8] * 4)
    with pytest.raises(ConfigurationError, match="one ratio a call"):
        replace(algorithm, correction=ImportanceSampling(level="token"))


def test_a_call_that_is_masked_altogether_is_not_computed() -> None:
    session = run(GRPO(correction=ImportanceSampling(mode="mask")))
    assert session.updates == []
    assert session.finished[0]["correction/zero_share"] == 1.0


def weights(samples: Sequence[Sample]) -> list[float]:
    return [weight for sample in samples for weight in sample.weights]

"""The torch learner: exact log-probabilities, metrics, steps and bit-equal checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from leyden import mdp
from leyden.errors import ConfigurationError, LeydenError
from leyden.interfaces import Batch, Loss, Objective, Sample
from leyden.roles import Policy
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.learners.torch.preflight import is_same
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import POLICY, rich_transitions, sample
from tests.learning.conftest import write_checkpoint

CLIP = Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})
VOCABULARY = 24


def opened(checkpoint: Path, *policies: Policy, **options: object) -> TorchLearner:
    learner = TorchLearner(**options)  # type: ignore[arg-type]  # a test hands its options through
    learner.open(policies or [POLICY], str(checkpoint), seed=0)
    return learner


def tensors(learner: TorchLearner, policy: str = "sql") -> dict[str, Tensor]:
    found = learner.weights(policy).tensors
    assert found is not None
    return {name: one.clone() for name, one in found.items() if isinstance(one, Tensor)}


def are_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def batch_of(*samples: Sample, loss: Loss = CLIP) -> Batch:
    return [Objective(loss=loss, samples=samples)]


def plain_logprobs(model: PreTrainedModel, one: Sample) -> list[float]:
    """Return what a plain forward pass says of the answer."""
    start, answer = len(one.prompt_token_ids), torch.tensor(one.token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*one.prompt_token_ids, *one.token_ids]])).logits[0, start - 1 : -1]
    found: list[float] = torch.log_softmax(logits / one.temperature, -1).gather(1, answer[:, None])[:, 0].tolist()
    return found


# ---- log-probabilities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["calls", "merged", "packed"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 8192])
def test_logprobs_are_those_of_a_plain_forward_pass_at_each_samples_temperature(
    checkpoint: Path, layout: str, micro_batch_tokens: int
) -> None:
    learner = opened(checkpoint, layout=layout, micro_batch_tokens=micro_batch_tokens)
    samples = mdp.samples(rich_transitions(VOCABULARY, temperatures=(1.0, 0.7)))
    assert {one.temperature for one in samples} == {1.0, 0.7}
    model = load_model(checkpoint)
    for one, found in zip(samples, learner.logprobs("sql", samples), strict=True):
        assert found == pytest.approx(plain_logprobs(model, one), abs=1e-5)


def test_the_ratio_is_one_before_the_first_update(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    model = load_model(checkpoint)
    calls = []
    for one in rich_transitions(VOCABULARY, temperatures=(1.0, 0.7)):
        recorded = plain_logprobs(model, mdp.samples([one])[0])
        calls.append(replace(one, logprobs=recorded))
    metrics = learner.forward_backward("sql", batch_of(*mdp.samples(mdp.weigh(calls, "per_rollout"))))
    assert metrics["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["loss/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["loss/clip_fraction"] == 0
    assert metrics["loss/kl"] == pytest.approx(0.0, abs=1e-9)
    expected = sum(sum(one.logprobs) for one in calls) / sum(len(one.logprobs) for one in calls)
    assert metrics["loss/entropy"] == pytest.approx(-expected, rel=1e-5)


def test_layers_with_a_sliding_window_are_computed_exactly(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tied=False, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    model = load_model(tmp_path)
    samples = [sample([1, 2, 3, 4, 5, 6, 7, 8], [9, number]) for number in range(3)]
    for one, found in zip(samples, opened(tmp_path).logprobs("sql", samples), strict=True):
        assert found == pytest.approx(plain_logprobs(model, one), abs=1e-5)


# ---- metrics ----------------------------------------------------------------------------------------------------


def test_metrics_count_tokens_positions_and_padding(checkpoint: Path) -> None:
    samples = [sample([1] * 8, [2, 3]), sample([4] * 10, [5, 6])]
    metrics = opened(checkpoint).forward_backward("sql", batch_of(*samples))
    assert metrics["loss/tokens"] == 4
    assert metrics["loss/positions"] == 24
    assert metrics["loss/padding_fraction"] == pytest.approx(2 / 24)


def test_metrics_describe_the_distance_to_the_weights_that_sampled(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    (now,) = learner.logprobs("sql", [sample([1, 2], [3, 4])])
    shifted = sample([1, 2], [3, 4], logprobs=[now[0] - 0.5, now[1] + 0.1], advantage=1.0)
    metrics = learner.forward_backward("sql", batch_of(shifted))
    up, down = torch.tensor([0.5, -0.1], dtype=torch.float64).exp().tolist()
    assert metrics["loss/ratio_mean"] == pytest.approx((up + down) / 2, rel=1e-5)
    assert metrics["loss/ratio_max"] == pytest.approx(up, rel=1e-5)
    assert metrics["loss/clip_fraction"] == 0.5
    assert metrics["loss/kl"] == pytest.approx(((up - 1 - 0.5) + (down - 1 + 0.1)) / 2, rel=1e-4)
    assert metrics["loss/loss"] == pytest.approx(-(1.2 + down), rel=1e-5)


def test_the_ratio_is_to_where_the_update_began_and_the_divergence_to_what_sampled(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    (now,) = learner.logprobs("sql", [sample([1, 2], [3, 4])])
    stale = sample([1, 2], [3, 4], logprobs=[now[0] - 1.0, now[1] - 1.0])
    began = replace(stale, old_logprobs=[now[0] - 0.1, now[1] - 0.1])
    metrics = learner.forward_backward("sql", batch_of(began))
    near, far = torch.tensor([0.1, 1.0], dtype=torch.float64).exp().tolist()
    assert metrics["loss/ratio_mean"] == pytest.approx(near, rel=1e-5)
    assert metrics["loss/clip_fraction"] == 0
    assert metrics["loss/kl"] == pytest.approx(far - 1 - 1.0, rel=1e-4)


# ---- steps and checkpoints -------------------------------------------------------------------------------------


def trained_step(learner: TorchLearner, seed: int, learning_rate: float = 1e-2) -> dict[str, float]:
    samples = mdp.samples(mdp.weigh(rich_transitions(VOCABULARY, seed=seed), "per_rollout"))
    learner.forward_backward("sql", batch_of(*samples))
    return learner.optim_step("sql", learning_rate)


def test_a_step_changes_the_weights_and_clears_the_gradient(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    before = tensors(learner)
    metrics = trained_step(learner, 0)
    assert metrics["gradient_norm"] > 0
    assert metrics["learning_rate"] == 1e-2
    assert not are_bit_equal(before, tensors(learner))
    assert all(one.grad is None for one in learner._trainees["sql"].model.parameters())


def test_zero_advantages_leave_the_weights_bit_equal(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    before = tensors(learner)
    silent = [sample([1, 2], [3, 4], advantage=0.0), sample([1, 2], [5], advantage=0.0)]
    learner.forward_backward("sql", batch_of(*silent))
    assert learner.optim_step("sql", 1.0)["gradient_norm"] == 0
    assert are_bit_equal(before, tensors(learner))


def test_the_gradient_is_clipped_to_the_policys_norm(checkpoint: Path) -> None:
    # After one step of plain AdamW the update does not show the norm; the second moments do.
    learner = opened(checkpoint, Policy("sql", max_gradient_norm=0.5))
    learner.forward_backward("sql", batch_of(sample([1, 2], [3, 4], logprobs=[-3.0, -3.0], advantage=50.0)))
    norm = learner.optim_step("sql", 1e-3)["gradient_norm"]
    assert norm > 0.5
    state = learner._trainees["sql"].optimizer.state_dict()["state"]
    first_moments = torch.cat([one["exp_avg"].flatten() for one in state.values()])
    assert float(first_moments.norm()) == pytest.approx((1 - 0.9) * 0.5, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_before_the_step(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    before = tensors(learner)
    learner.forward_backward("sql", batch_of(sample([1, 2], [3], weight=float("nan"))))
    with pytest.raises(LeydenError, match=r"gradient of policy 'sql' has norm nan"):
        learner.optim_step("sql", 1e-3)
    assert are_bit_equal(before, tensors(learner))


def test_a_loaded_checkpoint_continues_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    learner = opened(checkpoint)
    trained_step(learner, 0)
    learner.save(tmp_path / "step1")
    saved, random_state = tensors(learner), torch.get_rng_state()
    trained_step(learner, 1)
    expected = tensors(learner)

    torch.manual_seed(99)
    resumed = opened(checkpoint)
    resumed.load(tmp_path / "step1")
    assert are_bit_equal(saved, tensors(resumed))
    assert torch.equal(torch.get_rng_state(), random_state)
    trained_step(resumed, 1)
    assert are_bit_equal(expected, tensors(resumed))


def test_without_the_optimizers_state_the_continuation_differs(checkpoint: Path, tmp_path: Path) -> None:
    """Shows that the test above would notice a checkpoint of weights alone."""
    learner = opened(checkpoint)
    trained_step(learner, 0)
    learner.export("sql", tmp_path / "weights")
    trained_step(learner, 1)
    fresh = opened(tmp_path / "weights")
    trained_step(fresh, 1)
    assert not are_bit_equal(tensors(learner), tensors(fresh))


def test_loading_undoes_later_steps_and_drops_waiting_gradients(checkpoint: Path, tmp_path: Path) -> None:
    learner = opened(checkpoint)
    trained_step(learner, 0)
    learner.save(tmp_path)
    saved = tensors(learner)
    trained_step(learner, 1)
    learner.forward_backward("sql", batch_of(sample([1, 2], [3])))
    learner.load(tmp_path)
    assert are_bit_equal(saved, tensors(learner))
    assert learner.optim_step("sql", 0.0)["gradient_norm"] == 0


@pytest.mark.parametrize("kind", ["checkpoint", "tied_checkpoint"])
def test_an_export_loads_as_a_hugging_face_model(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    learner = opened(request.getfixturevalue(kind))
    trained_step(learner, 0)
    learner.export("sql", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert AutoTokenizer.from_pretrained(str(tmp_path)).convert_ids_to_tokens([3]) == ["w3"]
    assert are_bit_equal(dict(model.named_parameters()), tensors(learner))
    one = sample([1, 2], [3, 4])
    assert learner.logprobs("sql", [one])[0] == pytest.approx(plain_logprobs(model, one), abs=1e-6)


def test_policies_have_their_own_weights_optimizer_and_gradient(checkpoint: Path, tmp_path: Path) -> None:
    learner = opened(checkpoint, POLICY, Policy("other"), Policy("judge", trainable=False))
    other = tensors(learner, "other")
    trained_step(learner, 0)
    assert are_bit_equal(other, tensors(learner, "other"))
    assert learner.optim_step("other", 1e-2)["gradient_norm"] == 0
    with pytest.raises(ConfigurationError, match=r"policy 'judge' is not open.*\['other', 'sql'\]"):
        learner.weights("judge")
    learner.save(tmp_path)
    with pytest.raises(ConfigurationError, match=r"holds the policies \['other', 'sql'\].*trains \['sql'\]"):
        opened(checkpoint).load(tmp_path)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens=0"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_options_it_cannot_honour_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        TorchLearner(**options)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="device='cuda', but torch finds no CUDA device"):
        TorchLearner(device="cuda")


def test_samples_without_log_probabilities_are_refused(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    with pytest.raises(ConfigurationError, match=r"temperature 0\.0"):
        learner.logprobs("sql", [sample([1], [2], temperature=0.0)])
    with pytest.raises(ConfigurationError, match="a prompt of 0 tokens"):
        learner.logprobs("sql", [sample([], [2])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_caps_its_logits_is_refused_at_start(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="Gemma2ForCausalLM gives other log-probabilities than its head alone"):
        opened(tmp_path, dtype=dtype)


def test_rounding_in_bfloat16_is_no_difference_and_in_float32_it_is() -> None:
    ours, own = torch.tensor([-1.0, -2.0, -12.0]), torch.tensor([-1.01, -2.0, -12.125])
    assert is_same(ours, own, dtype="bfloat16")
    assert not is_same(ours, own, dtype="float32")
    assert not is_same(ours, own + 1, dtype="bfloat16")
    assert not is_same(ours, own * float("nan"), dtype="bfloat16")

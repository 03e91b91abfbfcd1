"""The torch learner: exact log-probabilities, equal gradients in every layout, bit-equal checkpoints."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from leyden import mdp
from leyden.errors import ConfigurationError, LeydenError
from leyden.interfaces import Loss, TrainingRow
from leyden.roles import Policy
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.learners.torch.batching import STRETCH, micro_batches
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import POLICY, rich_transitions, row, transition
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


def gradient(checkpoint: Path, rows: Sequence[TrainingRow], loss: Loss = CLIP, **options: object) -> Tensor:
    """Return the whole gradient as one vector."""
    learner = opened(checkpoint, **options)
    learner.forward_backward("sql", rows, loss)
    model = learner._trainees["sql"].model
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def plain_logprobs(model: PreTrainedModel, one: TrainingRow) -> list[float]:
    """Return what a plain forward pass says of the masked tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([list(one.token_ids)])).logits[0] / one.temperature
    return [float(torch.log_softmax(logits[t - 1], -1)[one.token_ids[t]]) for t in range(len(one.mask)) if one.mask[t]]


# ---- log-probabilities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 8192])
def test_logprobs_are_those_of_a_plain_forward_pass_at_each_rows_temperature(
    checkpoint: Path, share_prefixes: bool, micro_batch_tokens: int
) -> None:
    learner = opened(checkpoint, share_prefixes=share_prefixes, micro_batch_tokens=micro_batch_tokens)
    rows = mdp.rows(rich_transitions(VOCABULARY, temperatures=(1.0, 0.7)), "merged")
    assert {one.temperature for one in rows} == {1.0, 0.7}
    model = load_model(checkpoint)
    for one, found in zip(rows, learner.logprobs("sql", rows), strict=True):
        assert found == pytest.approx(plain_logprobs(model, one), abs=1e-5)


def test_the_ratio_is_one_before_the_first_update(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    model = load_model(checkpoint)
    calls = []
    for one in rich_transitions(VOCABULARY, temperatures=(1.0, 0.7)):
        recorded = plain_logprobs(model, mdp.rows([one], "calls")[0])
        calls.append(replace(one, logprobs=recorded))
    metrics = learner.forward_backward("sql", mdp.rows(mdp.weigh(calls, "per_rollout")), CLIP)
    assert metrics["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["loss/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["loss/clip_fraction"] == 0
    assert metrics["loss/kl"] == pytest.approx(0.0, abs=1e-9)
    expected = sum(sum(one.logprobs) for one in calls) / sum(len(one.logprobs) for one in calls)
    assert metrics["loss/entropy"] == pytest.approx(-expected, rel=1e-5)


def test_layers_with_a_sliding_window_are_computed_exactly(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tied=False, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    model = load_model(tmp_path)
    rows = [row([1, 2, 3, 4, 5, 6, 7, 8], [9, number]) for number in range(3)]
    for one, found in zip(rows, opened(tmp_path).logprobs("sql", rows), strict=True):
        assert found == pytest.approx(plain_logprobs(model, one), abs=1e-5)


# ---- layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalisation", ["per_rollout", "per_call", "token_mean"])
@pytest.mark.parametrize("loss", [CLIP, Loss(name="cross_entropy")], ids=lambda loss: loss.name)
def test_every_layout_gives_the_same_gradient(checkpoint: Path, normalisation: mdp.Normalisation, loss: Loss) -> None:
    calls = mdp.weigh(rich_transitions(VOCABULARY, temperatures=(1.0, 0.7)), normalisation)
    reference = gradient(checkpoint, mdp.rows(calls, "calls"), loss, share_prefixes=False, micro_batch_tokens=1)
    assert relative(gradient(checkpoint, mdp.rows(calls, "merged"), loss, share_prefixes=False), reference) < 1e-5
    assert relative(gradient(checkpoint, mdp.rows(calls, "merged"), loss), reference) < 1e-5
    assert relative(gradient(checkpoint, mdp.rows(calls, "calls"), loss), reference) < 1e-5
    assert relative(gradient(checkpoint, mdp.rows(calls, "calls")[::-1], loss, micro_batch_tokens=60), reference) < 1e-5


def test_tied_embeddings_get_the_same_gradient_too(tied_checkpoint: Path) -> None:
    calls = mdp.weigh(rich_transitions(VOCABULARY), "per_rollout")
    reference = gradient(tied_checkpoint, mdp.rows(calls, "calls"), share_prefixes=False)
    assert relative(gradient(tied_checkpoint, mdp.rows(calls, "merged")), reference) < 1e-5


def test_rows_with_one_prompt_share_its_positions() -> None:
    rows = [row([1] * 20, [2, number]) for number in range(8)]
    (batch,) = micro_batches(rows, budget=8192, share_prefixes=True)
    assert batch.input_ids_B_T.shape == (1, 20 + 1 + 8)
    assert sorted(batch.row_N.tolist()) == sorted([*range(8)] * 2)


def test_a_budget_bounds_a_micro_batch_and_padding_stays_small() -> None:
    rows = [row([number] * (5 + number), [1]) for number in range(40)]
    batches = list(micro_batches(rows, budget=64, share_prefixes=False))
    for batch in batches:
        count, length = batch.input_ids_B_T.shape
        assert count == 1 or count * length <= 64
        assert batch.padding <= (1 - 1 / STRETCH) * count * length
    assert sorted(one for batch in batches for one in batch.row_N.tolist()) == [*range(40)]


def test_metrics_count_tokens_positions_and_padding(checkpoint: Path) -> None:
    rows = [row([1] * 8, [2, 3]), row([4] * 10, [5, 6])]
    metrics = opened(checkpoint).forward_backward("sql", rows, CLIP)
    assert metrics["loss/tokens"] == 4
    assert metrics["loss/positions"] == 24
    assert metrics["loss/padding_fraction"] == pytest.approx(2 / 24)


def test_metrics_describe_the_distance_to_the_weights_that_sampled(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    (now,) = learner.logprobs("sql", [row([1, 2], [3, 4])])
    shifted = row([1, 2], [3, 4], logprobs=[now[0] - 0.5, now[1] + 0.1], advantage=1.0)
    metrics = learner.forward_backward("sql", [shifted], CLIP)
    up, down = torch.tensor([0.5, -0.1], dtype=torch.float64).exp().tolist()
    assert metrics["loss/ratio_mean"] == pytest.approx((up + down) / 2, rel=1e-5)
    assert metrics["loss/ratio_max"] == pytest.approx(up, rel=1e-5)
    assert metrics["loss/clip_fraction"] == 0.5
    assert metrics["loss/kl"] == pytest.approx(((up - 1 - 0.5) + (down - 1 + 0.1)) / 2, rel=1e-4)
    assert metrics["loss/loss"] == pytest.approx(-(1.2 + down), rel=1e-5)


# ---- steps and checkpoints -------------------------------------------------------------------------------------


def trained_step(learner: TorchLearner, seed: int, learning_rate: float = 1e-2) -> dict[str, float]:
    rows = mdp.rows(mdp.weigh(rich_transitions(VOCABULARY, seed=seed), "per_rollout"))
    learner.forward_backward("sql", rows, CLIP)
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
    rows = [row([1, 2], [3, 4], advantage=0.0), row([1, 2], [5], advantage=0.0)]
    learner.forward_backward("sql", rows, CLIP)
    assert learner.optim_step("sql", 1.0)["gradient_norm"] == 0
    assert are_bit_equal(before, tensors(learner))


def test_the_gradient_is_clipped_to_the_policys_norm(checkpoint: Path) -> None:
    # After one step of plain AdamW the update does not show the norm; the second moments do.
    learner = opened(checkpoint, Policy("sql", max_gradient_norm=0.5))
    learner.forward_backward("sql", [row([1, 2], [3, 4], logprobs=[-3.0, -3.0], advantage=50.0)], CLIP)
    norm = learner.optim_step("sql", 1e-3)["gradient_norm"]
    assert norm > 0.5
    state = learner._trainees["sql"].optimizer.state_dict()["state"]
    first_moments = torch.cat([one["exp_avg"].flatten() for one in state.values()])
    assert float(first_moments.norm()) == pytest.approx((1 - 0.9) * 0.5, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_before_the_step(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    before = tensors(learner)
    learner.forward_backward("sql", [row([1, 2], [3], weight=float("nan"))], CLIP)
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
    learner.forward_backward("sql", [row([1, 2], [3])], CLIP)
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
    one = row([1, 2], [3, 4])
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


def test_rows_without_log_probabilities_are_refused(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    with pytest.raises(ConfigurationError, match=r"temperature 0\.0"):
        learner.logprobs("sql", [row([1], [2], temperature=0.0)])
    with pytest.raises(ConfigurationError, match=r"mask\[0\]=True"):
        learner.logprobs("sql", mdp.rows([transition(prompt=[], tokens=[2])], "calls"))


def test_a_model_that_caps_its_logits_is_refused_at_start(tmp_path: Path) -> None:
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
        opened(tmp_path)

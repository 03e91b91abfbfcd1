"""Bfloat16 with float32 masters: no update is lost, what is published is what computes, and checkpoints are exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from leyden import mdp
from leyden.interfaces import Batch, Loss, Objective
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.learners.torch.trainee import Trainee
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import rich_transitions
from tests.learning.conftest import VOCABULARY

FULL, ADAPTED = Policy("p"), Policy("p", lora=LoRA(rank=4, alpha=8))
CLIP = Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})
SMALL_RATE = 1e-5


def opened(checkpoint: Path, policy: Policy = FULL, *, dtype: str = "bfloat16", **options: object) -> TorchLearner:
    learner = TorchLearner(dtype=dtype, **options)  # type: ignore[arg-type]  # a test hands its options through
    learner.open([policy], str(checkpoint), seed=0)
    return learner


def batch_of(seed: int = 0, *, loss: Loss = CLIP) -> Batch:
    samples = mdp.samples(mdp.weigh(rich_transitions(VOCABULARY, seed=seed), "per_rollout"))
    return [Objective(loss=loss, samples=samples)]


def trained_step(learner: TorchLearner, seed: int = 0, rate: float = SMALL_RATE) -> None:
    learner.forward_backward("p", batch_of(seed))
    learner.optim_step("p", rate)


def trainee_of(learner: TorchLearner) -> Trainee:
    return learner._trainees["p"]


def published(learner: TorchLearner) -> dict[str, Tensor]:
    found = learner.weights("p").tensors
    assert found is not None
    return {name: one.clone() for name, one in found.items() if isinstance(one, Tensor)}


def masters(learner: TorchLearner) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in trainee_of(learner).parameters.items()}


def are_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_updates_that_weights_in_bfloat16_would_lose_add_up(checkpoint: Path) -> None:
    """The old way beside it: AdamW on the rounded weights themselves, with the gradients of the same batches."""
    learner = opened(checkpoint)
    lossy = {name: torch.nn.Parameter(one) for name, one in published(learner).items()}
    optimizer = torch.optim.AdamW(lossy.values(), lr=SMALL_RATE, weight_decay=0.0, fused=True)
    name = "model.layers.0.mlp.up_proj.weight"
    start, exact_start = lossy[name].detach().clone(), masters(learner)[name]
    for _ in range(60):
        learner.forward_backward("p", batch_of())
        for key, parameter in lossy.items():
            gradient = trainee_of(learner).parameters[key].grad
            assert gradient is not None
            parameter.grad = gradient.to(torch.bfloat16)
        optimizer.step()
        learner.optim_step("p", SMALL_RATE)
    large = start.abs() > 0.1  # half a step of bfloat16 there is 0.00024 or more: 24 updates of 1e-5
    assert int(large.sum()) > 500
    assert torch.equal(lossy[name].detach()[large], start[large])
    moved = (masters(learner)[name] - exact_start).abs()
    assert float(moved[large].median()) > 20 * SMALL_RATE
    assert int((published(learner)[name] != start)[large].sum()) > 100


def test_what_is_published_is_the_master_rounded_and_what_the_model_computes_with(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    trained_step(learner, rate=1e-2)
    found = published(learner)
    assert {one.dtype for one in found.values()} == {torch.bfloat16}
    assert are_bit_equal(found, {name: one.to(torch.bfloat16) for name, one in masters(learner).items()})
    assert are_bit_equal(found, {name: one.detach() for name, one in trainee_of(learner).model.named_parameters()})


@pytest.mark.parametrize("policy", [FULL, ADAPTED], ids=["full", "adapter"])
def test_gradients_and_moments_are_float32(checkpoint: Path, policy: Policy) -> None:
    learner = opened(checkpoint, policy)
    learner.forward_backward("p", batch_of())
    trainee = trainee_of(learner)
    assert {one.dtype for one in trainee.computed.values()} == {torch.bfloat16}
    assert all(one.grad is None for one in trainee.computed.values())
    gradients = [one.grad for one in trainee.parameters.values()]
    assert {one.dtype for one in gradients if one is not None} == {torch.float32}
    learner.optim_step("p", 1e-3)
    moments = [one[key] for one in trainee.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert {one.dtype for one in moments} == {torch.float32}


def test_gradients_of_many_micro_batches_add_up_in_float32(checkpoint: Path) -> None:
    """In bfloat16 the sum of 256 equal gradients stops growing long before."""
    learner = opened(checkpoint, micro_batch_tokens=1, layout="calls")
    one = batch_of(loss=Loss(name="cross_entropy"))[0]
    few = [Objective(loss=one.loss, samples=one.samples[:1])]
    learner.forward_backward("p", few)
    single = {name: one.grad.clone() for name, one in trainee_of(learner).parameters.items() if one.grad is not None}
    trainee_of(learner).optimizer.zero_grad()
    learner.forward_backward("p", [Objective(loss=one.loss, samples=[one.samples[0]] * 256)])
    for name, parameter in trainee_of(learner).parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, 256 * single[name], rtol=1e-4, atol=0), name


def test_the_gradient_is_close_to_that_of_float32(checkpoint: Path, tied_checkpoint: Path) -> None:
    for folder in (checkpoint, tied_checkpoint):
        found = []
        for dtype in ("float32", "bfloat16"):
            learner = opened(folder, dtype=dtype)
            learner.forward_backward("p", batch_of(loss=Loss(name="policy_gradient")))
            parameters = trainee_of(learner).parameters.values()
            found.append(torch.cat([one.grad.flatten() for one in parameters if one.grad is not None]))
        assert found[0].shape == found[1].shape
        assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05


@pytest.mark.parametrize("policy", [FULL, ADAPTED], ids=["full", "adapter"])
def test_a_checkpoint_keeps_float32_and_continues_bit_for_bit(checkpoint: Path, tmp_path: Path, policy: Policy) -> None:
    learner = opened(checkpoint, policy)
    for seed in range(3):
        trained_step(learner, seed)
    learner.save(tmp_path)
    saved = masters(learner)
    trained_step(learner, 3)
    resumed = opened(checkpoint, policy)
    resumed.load(tmp_path)
    assert are_bit_equal(masters(resumed), saved)
    assert any(not torch.equal(one, one.to(torch.bfloat16).float()) for one in saved.values())  # rounding would show
    trained_step(resumed, 3)
    assert are_bit_equal(masters(resumed), masters(learner))
    assert are_bit_equal(published(resumed), published(learner))


def test_a_checkpoint_of_tied_weights_holds_them_once(tied_checkpoint: Path, tmp_path: Path) -> None:
    learner = opened(tied_checkpoint)
    trained_step(learner)
    learner.save(tmp_path)
    tensors = load_file(tmp_path / "p" / "model.safetensors")
    assert {one.dtype for one in tensors.values()} == {torch.float32}
    assert are_bit_equal(tensors, masters(learner))


def test_an_export_is_what_was_sampled_from(checkpoint: Path, tmp_path: Path) -> None:
    learner = opened(checkpoint)
    trained_step(learner, rate=1e-3)
    learner.export("p", tmp_path)
    assert are_bit_equal(load_file(tmp_path / "model.safetensors"), published(learner))
    samples = batch_of()[0].samples
    other = opened(tmp_path)
    assert other.logprobs("p", samples) == learner.logprobs("p", samples)


def test_a_value_head_beside_it_stays_float32_and_is_trained(checkpoint: Path, tmp_path: Path) -> None:
    learner = opened(checkpoint)
    loss = Loss(name="policy_gradient", value_coefficient=1.0)
    samples = [replace(one, returns=[1.0] * len(one.token_ids)) for one in batch_of()[0].samples]
    for _ in range(2):
        learner.forward_backward("p", [Objective(loss=loss, samples=samples)])
        learner.optim_step("p", 1e-3)
    head = trainee_of(learner).value_head()
    assert head.weight.dtype == torch.float32
    values = learner.values("p", samples)
    assert max(abs(value) for one in values for value in one) > 1e-3
    learner.save(tmp_path)
    resumed = opened(checkpoint)
    resumed.load(tmp_path)
    assert resumed.values("p", samples) == values


def test_a_base_in_bfloat16_is_not_changed_by_an_adapter(checkpoint: Path) -> None:
    learner = opened(checkpoint, ADAPTED)
    trained_step(learner, rate=1e-2)
    fresh = dict(load_model(checkpoint, dtype="bfloat16").named_parameters())
    base = {
        name.replace(".base_layer", ""): one.detach()
        for name, one in trainee_of(learner).model.named_parameters()
        if ".lora_" not in name
    }
    assert are_bit_equal(base, fresh)


def test_in_float32_the_model_computes_with_the_masters_themselves(checkpoint: Path) -> None:
    trainee = trainee_of(opened(checkpoint, dtype="float32"))
    assert all(trainee.parameters[name] is one for name, one in trainee.computed.items())

"""The losses against TRL's GRPO trainer, value and gradient: rollouts of one call, where its terms and ours agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leyden import mdp
from leyden.interfaces import Loss, Objective, Transition
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import POLICY, transition

RANGE = {"clip_low": 0.2, "clip_high": 0.3}
CLIP = Loss(name="policy_gradient_clip", options=RANGE)
GSPO = Loss(name="gspo", options=RANGE)


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
        use_bias_correction_kl=False,  # GRPO's own term, not DeepSeek-V3.2's, which multiplies it by the ratio
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


@dataclass(frozen=True)
class Oracle:
    """What TRL calls one of our losses, and the weights of our tokens that stand for its normalisation."""

    loss_type: str
    weigh: Callable[[Sequence[Transition]], Sequence[Transition]]
    loss: Loss
    importance_sampling_level: str = "token"
    beta: float = 0.0
    entropy_coef: float = 0.0


def per_rollout(calls: Sequence[Transition]) -> Sequence[Transition]:
    return mdp.weigh(calls, "per_rollout")


def token_mean(calls: Sequence[Transition]) -> Sequence[Transition]:
    return mdp.weigh(calls, "token_mean")


def constant(calls: Sequence[Transition]) -> Sequence[Transition]:
    """Dr. GRPO divides by the longest answer there may be, which is 5 here."""
    return [replace(one, weight=1 / (len(calls) * 5)) for one in calls]


ORACLES = {
    "grpo": Oracle("grpo", per_rollout, CLIP),
    "bnpo": Oracle("bnpo", token_mean, CLIP),
    "dapo": Oracle("dapo", token_mean, CLIP),
    "dr_grpo": Oracle("dr_grpo", constant, CLIP),
    "gspo": Oracle("grpo", per_rollout, GSPO, importance_sampling_level="sequence"),
    # TRL's epsilon_high is the bound itself, and there is none below.
    "cispo": Oracle("cispo", token_mean, Loss(name="cispo", options={"clip_low": 1.0, "clip_high": -0.7})),
    "kl": Oracle("grpo", per_rollout, replace(CLIP, kl_coefficient=0.4), beta=0.4),
    "entropy": Oracle("dapo", token_mean, replace(CLIP, entropy_coefficient=0.1), entropy_coef=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_one_call_rollouts_give_the_loss_and_gradient_of_trl(checkpoint: Path, trl_trainer: Any, name: str) -> None:
    oracle = ORACLES[name]
    generator = torch.Generator().manual_seed(3)
    calls = []
    for number, (prompt_length, answer_length) in enumerate([(3, 5), (6, 2), (4, 4), (6, 1)]):
        prompt, answer = (
            torch.randint(1, 24, (n,), generator=generator).tolist() for n in (prompt_length, answer_length)
        )
        one = transition(
            prompt=prompt,
            tokens=answer,
            # Off policy by up to a factor e, so that both sides of the clip are reached.
            logprobs=(-4 + 2 * torch.rand(answer_length, generator=generator)).tolist(),
            rollout_id=f"r{number}",
            span_id=f"s{number}",
            temperature=0.7,
            advantage=[1.0, -0.5, 2.0, -1.5][number],
        )
        calls.append(replace(one, reference_logprobs=(-3 * torch.rand(answer_length, generator=generator)).tolist()))
    learner = TorchLearner()
    learner.open([POLICY], str(checkpoint), seed=0)
    ours = learner.forward_backward("sql", [Objective(loss=oracle.loss, samples=mdp.samples(oracle.weigh(calls)))])
    our_gradients = gradients_of(learner)
    assert 0 < ours["loss/clip_fraction"] < 1

    model = trl_trainer.model.eval()
    model.zero_grad()
    trl_trainer.loss_type, trl_trainer.beta = oracle.loss_type, oracle.beta
    trl_trainer.importance_sampling_level = oracle.importance_sampling_level
    trl_trainer.entropy_coef, trl_trainer._entropy_bonus_enabled = oracle.entropy_coef, oracle.entropy_coef > 0
    theirs = trl_trainer._compute_loss(model, trl_inputs(calls))
    theirs.backward()
    # The loss is a sum of terms around 1 that nearly cancel: float32 leaves it a few 1e-7.
    assert ours["loss/loss"] == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    for parameter_name, parameter in model.named_parameters():
        difference = (our_gradients[parameter_name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(difference) < 1e-5, parameter_name


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
        "ref_per_token_logps": torch.zeros(len(calls), answers),
        "num_items_in_batch": torch.tensor(sum(len(one.token_ids) for one in calls)),
        "advantages": torch.tensor([one.advantage for one in calls]),
    }
    for number, one in enumerate(calls):
        inputs["prompt_ids"][number, prompts - len(one.prompt_token_ids) :] = torch.tensor(one.prompt_token_ids)
        inputs["prompt_mask"][number, prompts - len(one.prompt_token_ids) :] = 1
        inputs["completion_ids"][number, : len(one.token_ids)] = torch.tensor(one.token_ids)
        inputs["completion_mask"][number, : len(one.token_ids)] = 1
        inputs["old_per_token_logps"][number, : len(one.token_ids)] = torch.tensor(one.logprobs)
        inputs["ref_per_token_logps"][number, : len(one.token_ids)] = torch.tensor(one.reference_logprobs)
    return inputs


def gradients_of(learner: TorchLearner) -> dict[str, Tensor]:
    """Return the gradients that wait for the next optimizer step."""
    model = learner._trainees["sql"].model
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

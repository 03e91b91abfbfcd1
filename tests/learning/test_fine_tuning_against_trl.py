"""Fine-tuning and DPO against TRL's trainers, loss and gradient, on the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leyden import mdp
from leyden.interfaces import Loss, Objective, Transition
from leyden_plugins.algorithms.preference import DPO
from leyden_plugins.algorithms.sft import sft_rows
from leyden_plugins.algorithms.sft.imitation import imitation
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models.loading import load_model
from tests.learning.builders import POLICY, RecordedSession, rich_transitions, transition
from tests.learning.conftest import VOCABULARY
from tests.learning.test_losses_against_trl import gradients_of
from tests.learning.test_preference import turns

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is the oracle of this test: pip install 'leyden[dev]'")


def tokenizer_of(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(checkpoint))


def moved_model(checkpoint: Path) -> Any:
    """Return the checkpoint's model a little away from where it was."""
    model = load_model(checkpoint)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter)
    return model


def same_gradients(ours: dict[str, Tensor], model: Any) -> None:
    for name, parameter in model.named_parameters():
        difference = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(difference) < 1e-5, name


@pytest.mark.parametrize("layout", ["calls", "merged"])
def test_rows_given_to_trls_sft_trainer_have_our_loss_and_gradient(
    checkpoint: Path, trl: Any, tmp_path: Path, layout: Any
) -> None:
    from datasets import Dataset

    calls = rich_transitions(VOCABULARY)
    rows = sft_rows(calls, layout=layout)
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    assert labelled == sum(len(one.token_ids) for one in calls)
    if layout == "merged":
        assert sum(len(row["input_ids"]) for row in rows) < sum(len(row["input_ids"]) for row in sft_rows(calls))
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows),
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=load_model(checkpoint),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(checkpoint),
    )
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    theirs.backward()

    learner = TorchLearner()
    learner.open([POLICY], str(checkpoint), seed=0)
    ours = learner.forward_backward("sql", imitation(calls, "token_mean"))
    assert ours["loss/loss"] == pytest.approx(theirs.item(), rel=1e-5)
    same_gradients(gradients_of(learner), trainer.model)


class AsTokens:
    """Mixed into TRL's trainer, which would tokenise texts: rows come as token ids."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def preference_rows(calls: Sequence[Transition], pairs: Sequence[tuple[str, str]]) -> list[dict[str, list[int]]]:
    """Return single-turn pairs as TRL takes them."""
    by_rollout = {one.rollout_id: one for one in calls}
    return [
        {
            "prompt_ids": list(by_rollout[chosen].prompt_token_ids),
            "chosen_ids": list(by_rollout[chosen].token_ids),
            "rejected_ids": list(by_rollout[rejected].token_ids),
        }
        for chosen, rejected in pairs
    ]


@pytest.fixture(scope="module")
def dpo_trainer(checkpoint: Path, trl: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return TRL's DPO trainer on weights that have moved from their reference; only its loss is used."""
    from datasets import Dataset

    class Trainer(AsTokens, trl.DPOTrainer):  # type: ignore[misc]  # a class of an optional package
        pass

    config = trl.DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")),
        beta=0.3,
        per_device_train_batch_size=2,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    rows = preference_rows(single_turns(), [("r0", "r1"), ("r2", "r3")])
    return Trainer(
        model=moved_model(checkpoint),
        ref_model=load_model(checkpoint),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(checkpoint),
    )


def single_turns() -> list[Transition]:
    """Return two groups of two rollouts, one call each."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number, answer_length in enumerate([5, 2, 4, 1]):
        prompt = torch.randint(1, VOCABULARY, (4,), generator=torch.Generator().manual_seed(number // 2)).tolist()
        answer = torch.randint(1, VOCABULARY, (answer_length,), generator=generator).tolist()
        found.append(
            transition(
                prompt=prompt,
                tokens=answer,
                rollout_id=f"r{number}",
                span_id=f"s{number}",
                group_id=f"g{number // 2}",
                value=1.0 - number % 2,
            )
        )
    return found


def our_update(checkpoint: Path, calls: Sequence[Transition]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the metrics and the gradient of one batch."""
    learner = TorchLearner()
    learner.open([POLICY], str(checkpoint), seed=0)
    with torch.no_grad():
        moved = moved_model(checkpoint)
        for ours, other in zip(learner._trainees["sql"].model.parameters(), moved.parameters(), strict=True):
            ours.copy_(other)
    session = RecordedSession(groups=lambda _: [], learner=learner)
    algorithm = DPO(beta=0.3)
    annotated, metrics = asyncio.run(algorithm.annotate(session, POLICY, algorithm._paired(calls)))
    learner.forward_backward("sql", [Objective(loss=Loss(name="policy_gradient"), samples=mdp.samples(annotated))])
    return metrics, gradients_of(learner)


def test_single_turn_pairs_have_the_loss_and_gradient_of_trls_dpo_trainer(checkpoint: Path, dpo_trainer: Any) -> None:
    model = dpo_trainer.model.eval()
    model.zero_grad()
    # In the order of the rows: a loader would shuffle them, which changes nothing but rounding.
    inputs = dpo_trainer.data_collator([dict(row) for row in dpo_trainer.train_dataset])
    theirs = dpo_trainer._compute_loss(model, inputs, False)
    theirs.backward()
    metrics, gradients = our_update(checkpoint, single_turns())
    assert metrics["preference/loss"] == pytest.approx(theirs.item(), rel=1e-5)
    same_gradients(gradients, model)


def test_turns_of_a_rollout_have_the_loss_and_gradient_of_trls_with_a_mask_of_holes(
    checkpoint: Path, dpo_trainer: Any
) -> None:
    """Two turns in one row, what stood between them masked: the answers of both are the completion."""
    calls = [one for one in turns() if one.role == "writer" and one.rollout_id in ("r1", "r2")]
    rows = [rollout_row([one for one in calls if one.rollout_id == name]) for name in ("r1", "r2")]
    width = max(len(tokens) for tokens, _ in rows)
    inputs = {
        "input_ids": torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in rows]),
        "completion_mask": torch.tensor([mask + [0] * (width - len(mask)) for _, mask in rows]),
    }
    model = dpo_trainer.model.eval()
    model.zero_grad()
    theirs = dpo_trainer._compute_loss(model, inputs, False)
    theirs.backward()
    metrics, gradients = our_update(checkpoint, [replace(one, group_id="g0") for one in calls])
    assert metrics["preference/loss"] == pytest.approx(theirs.item(), rel=1e-5)
    same_gradients(gradients, model)


def rollout_row(calls: Sequence[Transition]) -> tuple[list[int], list[int]]:
    """Return the last turn's whole sequence, and which of its tokens some turn answered."""
    last = calls[-1]
    tokens = [*last.prompt_token_ids, *last.token_ids]
    mask = [0] * len(tokens)
    for one in calls:
        first = len(one.prompt_token_ids)
        mask[first : first + len(one.token_ids)] = [1] * len(one.token_ids)
    return tokens, mask

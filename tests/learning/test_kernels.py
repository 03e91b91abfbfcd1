"""Which attention kernel rows take, and what the learner does on a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from leyden import mdp
from leyden.interfaces import Announces, Loss, Objective, ReleasesMemory, Sample
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch import TorchLearner
from tests.learning.builders import rich_transitions, sample
from tests.learning.conftest import VOCABULARY
from tests.learning.memory import write_model

FULL, ADAPTED = Policy("p"), Policy("p", lora=LoRA(rank=4, alpha=8))
LOSS = Loss(name="policy_gradient", entropy_coefficient=0.1)


def opened(folder: Path, policy: Policy = FULL, **options: Any) -> TorchLearner:
    learner = TorchLearner(**options)
    learner.open([policy], str(folder), seed=0)
    return learner


def samples_of() -> list[Sample]:
    return mdp.samples(mdp.weigh(rich_transitions(VOCABULARY, temperatures=(1.0, 0.7)), "per_rollout"))


def gradient(learner: TorchLearner, samples: Sequence[Sample]) -> Tensor:
    learner.forward_backward("p", [Objective(loss=LOSS, samples=samples)])
    parameters = learner._trainees["p"].parameters.values()
    return torch.cat([one.grad.flatten().cpu() for one in parameters if one.grad is not None])


@pytest.mark.parametrize("layout", ["calls", "merged"])
def test_plain_rows_take_the_causal_kernel_without_a_mask(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """SDPA's flash kernel takes no mask; padded rows need none, since nobody looks to the right."""
    usual, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> Tensor:
        seen.append((attn_mask is None, is_causal))
        return usual(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    learner = opened(checkpoint, layout=layout)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    gradient(learner, [sample([1] * 8, [2, 3]), sample([4] * 9, [5, 6])])
    assert set(seen) == {(True, True)}


def test_releasing_memory_changes_nothing_on_a_cpu(checkpoint: Path) -> None:
    learner = opened(checkpoint)
    assert isinstance(learner, ReleasesMemory) and isinstance(learner, Announces)
    before = learner.logprobs("p", [sample([1, 2], [3])])
    learner.release_memory()
    assert learner.logprobs("p", [sample([1, 2], [3])]) == before


# ---- on CUDA ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_flash_kernel_alone_can_compute_plain_rows(tmp_path: Path) -> None:
    folder = write_model(tmp_path, hidden=256, layers=2)
    learner = opened(folder, layout="calls", device="cuda", dtype="bfloat16")
    samples = [sample([1] * 90, [2, 3]), sample([4] * 100, [5, 6])]
    usual = gradient(learner, samples)
    learner._trainees["p"].optimizer.zero_grad()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = gradient(learner, samples)
    assert float((found - usual).norm() / usual.norm()) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("policy", [FULL, ADAPTED], ids=["full", "adapter"])
@pytest.mark.parametrize("layout", ["calls", "packed"])
def test_bfloat16_on_cuda_has_nearly_the_gradient_of_float32_on_a_cpu(
    checkpoint: Path, checkpointing: bool, policy: Policy, layout: str
) -> None:
    """Packed rows go through FlexAttention's blocks here."""
    found = []
    cuda = {"device": "cuda", "dtype": "bfloat16", "layout": layout, "activation_checkpointing": checkpointing}
    for options in ({"layout": "calls"}, cuda):
        learner = opened(checkpoint, policy, **options)
        gradient(learner, samples_of())
        learner._trainees["p"].optimizer.zero_grad()
        found.append(gradient(learner, samples_of()))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("policy", [FULL, ADAPTED], ids=["full", "adapter"])
def test_an_update_on_cuda_stays_within_the_plan(tmp_path: Path, checkpointing: bool, policy: Policy) -> None:
    folder = write_model(tmp_path, hidden=1024, layers=8, vocabulary=50_000)
    learner = opened(
        folder,
        policy,
        device="cuda",
        dtype="bfloat16",
        layout="calls",
        micro_batch_tokens=4096,
        activation_checkpointing=checkpointing,
    )
    assert learner._situation is not None
    plan = learner._situation.plan.total(recompute=checkpointing)
    torch.cuda.reset_peak_memory_stats()
    samples = [sample([1] * 1000, [2] * 1000, weight=1e-3)] * 4
    for _ in range(2):
        gradient(learner, samples)
        learner.optim_step("p", 1e-5)
    assert 0.5 * plan < torch.cuda.max_memory_allocated() < 1.15 * plan


@pytest.mark.gpu
def test_released_memory_goes_back_to_the_device(tmp_path: Path) -> None:
    learner = opened(write_model(tmp_path, hidden=512, layers=4), device="cuda", layout="calls")
    gradient(learner, [sample([1] * 1000, [2] * 1000, weight=1e-3)] * 4)
    learner.optim_step("p", 1e-5)
    before, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    learner.release_memory()
    assert torch.cuda.memory_reserved() < reserved
    assert torch.cuda.mem_get_info()[0] > before

"""Activation checkpointing: the gradient stays, what is kept shrinks, and layers are computed again as they ran."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Loss, Objective, Sample
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch import TorchLearner, advice, batching
from leyden_plugins.torch_models import logprobs
from tests.learning.builders import rich_transitions, sample
from tests.learning.conftest import VOCABULARY
from tests.learning.memory import LiveBytes, write_model

FULL, ADAPTED = Policy("p"), Policy("p", lora=LoRA(rank=4, alpha=8))
LOSS = Loss(name="policy_gradient", entropy_coefficient=0.1)


def samples_of(seed: int = 0) -> list[Sample]:
    return mdp.samples(mdp.weigh(rich_transitions(VOCABULARY, seed=seed, temperatures=(1.0, 0.7)), "per_rollout"))


def opened(checkpoint: Path, *policies: Policy, **options: Any) -> TorchLearner:
    learner = TorchLearner(**options)
    learner.open(policies, str(checkpoint), seed=0)
    return learner


def gradient(learner: TorchLearner, policy: str = "p", samples: list[Sample] | None = None) -> Tensor:
    parameters = learner._trainees[policy].parameters.values()
    learner._trainees[policy].optimizer.zero_grad()
    learner.forward_backward(policy, [Objective(loss=LOSS, samples=samples or samples_of())])
    return torch.cat([one.grad.flatten() for one in parameters if one.grad is not None])


@contextmanager
def counted_layers(learner: TorchLearner) -> Iterator[list[str]]:
    """Note each time the first layer's MLP begins, and under which kind of attention."""
    model = learner._trainees["p"].model
    seen: list[str] = []
    hook = model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(
        lambda *_: seen.append(model.config._attn_implementation)
    )
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("policy", [FULL, ADAPTED], ids=["full", "adapter"])
@pytest.mark.parametrize("layout", ["calls", "merged", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_bit_for_bit_the_same(checkpoint: Path, policy: Policy, layout: str, dtype: str) -> None:
    options = {"layout": layout, "dtype": dtype, "micro_batch_tokens": 100}
    kept = opened(checkpoint, policy, activation_checkpointing=False, **options)
    again = opened(checkpoint, policy, activation_checkpointing=True, **options)
    for learner in (kept, again):
        gradient(learner)
        learner.optim_step("p", 1e-2)  # so that no factor is 0
    assert torch.equal(gradient(kept), gradient(again))


def test_each_layer_runs_again_going_backward_and_once_without_a_gradient(checkpoint: Path) -> None:
    for checkpointing, runs in ((False, 1), (True, 2)):
        learner = opened(checkpoint, FULL, activation_checkpointing=checkpointing)
        with counted_layers(learner) as seen:
            gradient(learner, samples=[sample([1, 2], [3])])
            assert len(seen) == runs
            learner.logprobs("p", [sample([1, 2], [3])])
            assert len(seen) == runs + 1


def test_a_layer_computed_again_uses_the_adapter_that_spoke(checkpoint: Path) -> None:
    writer, checker = Policy("writer", lora=LoRA(rank=4)), Policy("checker", lora=LoRA(rank=2))
    found = []
    for checkpointing in (False, True):
        learner = opened(checkpoint, writer, checker, activation_checkpointing=checkpointing)
        for name in ("writer", "checker", "writer"):
            gradient(learner, name)
            learner.optim_step(name, 1e-2)
        found.append(torch.cat([gradient(learner, "writer"), gradient(learner, "checker")]))
    assert torch.equal(*found)


def test_a_layer_computed_again_takes_the_same_blocks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has no backward pass on a CPU; the same blocks as an explicit mask stand for it."""

    def dense(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask, **options: Any
    ) -> tuple[Tensor, None]:
        rows, _, length, _ = query.shape
        mask = create_mask(attention_mask.mask_mod, rows, 1, length, length, device="cpu")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    reference = gradient(opened(checkpoint, FULL, layout="packed"))
    for module in (batching, logprobs):
        monkeypatch.setattr(module, "uses_blocks", lambda model: True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", dense)
    learner = opened(checkpoint, FULL, layout="packed", activation_checkpointing=True)
    with counted_layers(learner) as seen:
        found = gradient(learner)
    assert "flex_attention" in seen
    assert seen[::2] == seen[1::2]  # forward, then again; one micro-batch after the other
    assert learner._trainees["p"].model.config._attn_implementation == "sdpa"
    assert float((found - reference).norm() / reference.norm()) < 1e-5


def test_what_is_kept_between_forward_and_backward_shrinks(tmp_path: Path) -> None:
    write_model(tmp_path, hidden=64, layers=6)
    peaks = {}
    for checkpointing in (False, True):
        learner = opened(tmp_path, FULL, activation_checkpointing=checkpointing, layout="calls")
        one = [sample([1] * 500, [2] * 12)]
        gradient(learner, samples=one)  # gradients stand from here on
        with LiveBytes() as live:
            learner.forward_backward("p", [Objective(loss=LOSS, samples=one)])
        peaks[checkpointing] = live.peak
    assert peaks[True] < 0.5 * peaks[False]


def test_models_of_other_families_recompute_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    found = [gradient(opened(tmp_path, FULL, activation_checkpointing=one)) for one in (False, True)]
    assert torch.equal(*found)


def test_layers_that_cannot_be_computed_again_are_refused_or_left(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "layers_of", lambda model: [])
    with pytest.raises(ConfigurationError, match="activation_checkpointing=True, but Qwen3ForCausalLM has no layers"):
        opened(checkpoint, FULL, activation_checkpointing=True)
    monkeypatch.setattr(advice, "device_memory", lambda device: (1000, 10**12))
    learner = TorchLearner()
    learner.device = "cuda"  # as if there was one
    assert not advice.situation_of(learner, str(checkpoint), [FULL]).recompute


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="activation_checkpointing='always' is unknown"):
        TorchLearner(activation_checkpointing="always")  # type: ignore[arg-type]  # wrong on purpose

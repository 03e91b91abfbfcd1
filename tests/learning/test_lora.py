"""Policies with an adapter: PEFT as the oracle, one base for all of them, bit-equal checkpoints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Batch, Loss, Objective, Sample
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models.loading import load_model
from leyden_plugins.torch_models.logprobs import token_logprobs
from tests.learning.builders import rich_transitions, sample

VOCABULARY = 24
CLIP = Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})
WRITER = Policy("writer", lora=LoRA(rank=4, alpha=8))
CHECKER = Policy("checker", lora=LoRA(rank=2, alpha=3, targets=["q_proj", "down_proj"]))
FULL = Policy("full")


def opened(checkpoint: Path, *policies: Policy, seed: int = 0, **options: Any) -> TorchLearner:
    learner = TorchLearner(**options)
    learner.open(policies, str(checkpoint), seed=seed)
    return learner


def tensors(learner: TorchLearner, policy: str = "writer") -> dict[str, Tensor]:
    found = learner.weights(policy).tensors
    assert found is not None
    return {name: one.clone() for name, one in found.items() if isinstance(one, Tensor)}


def are_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def samples_of(seed: int = 0) -> list[Sample]:
    return mdp.samples(mdp.weigh(rich_transitions(VOCABULARY, seed=seed), "per_rollout"))


def batch_of(seed: int = 0, loss: Loss = CLIP) -> Batch:
    return [Objective(loss=loss, samples=samples_of(seed))]


def trained_step(learner: TorchLearner, policy: str = "writer", seed: int = 0) -> None:
    learner.forward_backward(policy, batch_of(seed))
    learner.optim_step(policy, 1e-2)


def flat(values: list[list[float]]) -> list[float]:
    return [value for one in values for value in one]


# ---- PEFT as an oracle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["checkpoint", "tied_checkpoint"])
def test_an_exported_adapter_gives_peft_the_same_logprobs_and_gradient(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(kind)
    learner = opened(checkpoint, WRITER)
    trained_step(learner)  # so that B is not 0
    learner.export("writer", tmp_path)
    theirs = PeftModel.from_pretrained(load_model(checkpoint), str(tmp_path), is_trainable=True).eval()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(checkpoint)
    assert are_bit_equal(load_file(tmp_path / "adapter_model.safetensors"), tensors(learner))

    samples = [replace(one, temperature=0.7) for one in samples_of(seed=3)]
    total = torch.zeros(())
    for one, found in zip(samples, learner.logprobs("writer", samples), strict=True):
        logits = theirs(torch.tensor([[*one.prompt_token_ids, *one.token_ids]])).logits[0]
        logprobs = token_logprobs(logits[len(one.prompt_token_ids) - 1 : -1], torch.tensor(one.token_ids), 0.7)
        assert found == pytest.approx(logprobs.tolist(), abs=1e-5)
        total = total - (torch.tensor(one.weights) * torch.tensor(one.advantages) * logprobs).sum()
    total.backward()
    learner.forward_backward("writer", [Objective(loss=Loss(name="policy_gradient"), samples=samples)])
    ours = learner._trainees["writer"].parameters
    expected = {name.replace(".default.", "."): one.grad for name, one in theirs.named_parameters() if "lora" in name}
    assert expected.keys() == ours.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None
        assert float((parameter.grad - expected[name]).norm() / expected[name].norm()) < 1e-4, name


def test_a_new_adapter_says_what_the_base_says(checkpoint: Path) -> None:
    learner = opened(checkpoint, WRITER, FULL)
    samples = samples_of()
    assert flat(learner.logprobs("writer", samples)) == flat(learner.logprobs("full", samples))
    assert learner.weights("writer").lora == WRITER.lora
    assert learner.weights("full").lora is None


def test_a_layout_does_not_change_an_adapters_gradient(checkpoint: Path) -> None:
    def gradient(layout: str) -> Tensor:
        learner = opened(checkpoint, WRITER, layout=layout)
        trained_step(learner)
        learner.forward_backward("writer", batch_of(1))
        found = [one.grad.flatten() for one in learner._trainees["writer"].parameters.values() if one.grad is not None]
        return torch.cat(found)

    calls, packed = gradient("calls"), gradient("packed")
    assert float((calls - packed).norm() / calls.norm()) < 1e-4


# ---- several policies on one base ------------------------------------------------------------------------------


def test_adapters_share_one_base_which_training_leaves_bit_equal(checkpoint: Path) -> None:
    learner = opened(checkpoint, WRITER, CHECKER, FULL)
    writer, checker, full = (learner._trainees[name] for name in ("writer", "checker", "full"))
    base = {name: one for name, one in writer.model.named_parameters() if ".lora_" not in name}
    assert writer.model is checker.model
    assert all(base[name] is one for name, one in checker.model.named_parameters() if ".lora_" not in name)
    assert not {id(one) for one in base.values()} & {id(one) for one in full.model.parameters()}
    for name in ("writer", "checker", "full"):
        trained_step(learner, name)
    fresh = dict(load_model(checkpoint).named_parameters())
    assert are_bit_equal({name.replace(".base_layer", ""): one for name, one in base.items()}, fresh)
    assert all(one.grad is None for one in base.values())


def test_training_one_policy_changes_no_other(checkpoint: Path) -> None:
    together = opened(checkpoint, WRITER, CHECKER, FULL)
    before = {name: tensors(together, name) for name in ("checker", "full")}
    trained_step(together, "writer")
    for name, tensor in before.items():
        assert are_bit_equal(tensors(together, name), tensor)
    # Their passes and steps interleaved, each gives what it gives alone.
    names = ("checker", "writer", "full")
    for seed in (1, 2):
        for name in names:
            together.forward_backward(name, batch_of(seed))
        for name in reversed(names):
            together.optim_step(name, 1e-2)
    for policy, seeds in ((WRITER, (0, 1, 2)), (CHECKER, (1, 2)), (FULL, (1, 2))):
        alone = opened(checkpoint, policy)
        for seed in seeds:
            trained_step(alone, policy.name, seed)
        assert are_bit_equal(tensors(alone, policy.name), tensors(together, policy.name)), policy.name


def test_an_adapters_start_depends_on_the_seed_and_its_name_alone(checkpoint: Path) -> None:
    first = tensors(opened(checkpoint, WRITER, CHECKER))
    assert are_bit_equal(first, tensors(opened(checkpoint, CHECKER, WRITER)))
    assert not are_bit_equal(first, tensors(opened(checkpoint, WRITER, seed=1)))
    twin = tensors(opened(checkpoint, replace(WRITER, name="twin")), "twin")
    assert not are_bit_equal(first, twin)


def test_each_policy_has_its_own_norm_and_weight_decay(checkpoint: Path) -> None:
    decayed = replace(WRITER, weight_decay=0.5)
    plain, shrunk = opened(checkpoint, WRITER), opened(checkpoint, decayed)
    for learner in (plain, shrunk):
        learner.forward_backward("writer", batch_of())
        learner.optim_step("writer", 1e-2)
    name = next(one for one in tensors(plain) if "lora_A" in one)
    start = tensors(opened(checkpoint, WRITER))[name]
    assert torch.allclose(tensors(plain)[name] - tensors(shrunk)[name], 1e-2 * 0.5 * start, atol=1e-6)


# ---- reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policies", [[WRITER], [FULL], [FULL, WRITER]], ids=["adapter", "full", "both"])
def test_the_reference_is_the_base_whatever_was_trained(checkpoint: Path, policies: list[Policy]) -> None:
    learner = opened(checkpoint, *policies)
    samples = samples_of()
    start = learner.logprobs(policies[0].name, samples)
    trained_step(learner, policies[0].name)
    assert learner.logprobs(policies[0].name, samples, reference=True) == start
    assert flat(learner.logprobs(policies[0].name, samples)) != flat(start)


def test_asking_for_the_reference_does_not_disturb_a_policy(checkpoint: Path) -> None:
    plain, asked = opened(checkpoint, WRITER), opened(checkpoint, WRITER)
    trained_step(plain)
    asked.forward_backward("writer", batch_of())
    asked.logprobs("writer", samples_of(), reference=True)
    asked.optim_step("writer", 1e-2)
    trained_step(plain, seed=1)
    trained_step(asked, seed=1)
    assert are_bit_equal(tensors(plain), tensors(asked))


def test_a_divergence_pulls_a_trained_policy_back_to_its_reference(checkpoint: Path) -> None:
    learner = opened(checkpoint, WRITER)
    trained_step(learner)
    samples = [replace(one, advantages=[0.0] * len(one.token_ids)) for one in samples_of()]
    filled = [
        replace(one, reference_logprobs=values)
        for one, values in zip(samples, learner.logprobs("writer", samples, reference=True), strict=True)
    ]
    loss = Loss(name="policy_gradient", kl_coefficient=1.0, kl_estimator="k2")
    distances = []
    for _ in range(4):
        metrics = learner.forward_backward("writer", [Objective(loss=loss, samples=filled)])
        learner.optim_step("writer", 1e-3)
        distances.append(metrics["loss/kl_reference"])
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9 * distances[0]


# ---- checkpoints -----------------------------------------------------------------------------------------------


def test_a_loaded_checkpoint_continues_every_policy_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    policies = (WRITER, FULL, CHECKER)
    names = [policy.name for policy in policies]
    learner = opened(checkpoint, *policies)
    for name in names:
        trained_step(learner, name)
    learner.save(tmp_path)
    for name in names:
        trained_step(learner, name, seed=1)
    resumed = opened(checkpoint, *reversed(policies), seed=5)
    resumed.load(tmp_path)
    for name in names:
        trained_step(resumed, name, seed=1)
    assert all(are_bit_equal(tensors(learner, name), tensors(resumed, name)) for name in names)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (replace(WRITER, lora=LoRA(rank=8, alpha=8)), r"has \(rank, alpha, targets\) \(4, 8.*has \(8, 8"),
        (replace(WRITER, lora=LoRA(rank=4, alpha=16)), r"\(4, 8, .*\(4, 16"),
        (replace(WRITER, lora=None), "lacks 'model.safetensors'"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(
    checkpoint: Path, tmp_path: Path, other: Policy, match: str
) -> None:
    opened(checkpoint, WRITER).save(tmp_path)
    with pytest.raises(ConfigurationError, match=match):
        opened(checkpoint, other).load(tmp_path)


def test_a_checkpoint_of_full_weights_is_refused_for_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    opened(checkpoint, replace(WRITER, lora=None)).save(tmp_path)
    with pytest.raises(ConfigurationError, match="'writer' was not an adapter when it was saved"):
        opened(checkpoint, WRITER).load(tmp_path)


# ---- refusals and types ----------------------------------------------------------------------------------------


def test_a_target_that_no_layer_has_is_refused_with_those_there_are(checkpoint: Path) -> None:
    policy = Policy("writer", lora=LoRA(targets=["q_proj", "c_attn"]))
    with pytest.raises(
        ConfigurationError, match=r"targets \['c_attn'\] are no linear layers.*'down_proj', 'gate_proj'"
    ):
        opened(checkpoint, policy)


def test_layers_that_keep_their_weight_transposed_get_an_adapter_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    learner = opened(tmp_path / "base", Policy("writer", lora=LoRA(rank=2, targets=["c_attn", "c_fc"])))
    trained_step(learner)
    learner.export("writer", tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load_model(tmp_path / "base"), str(tmp_path / "adapter"))
    logits = theirs(torch.tensor([[1, 2, 3, 4]])).logits[0].detach()
    expected = token_logprobs(logits[1:3], torch.tensor([3, 4])).tolist()
    assert learner.logprobs("writer", [sample([1, 2], [3, 4])])[0] == pytest.approx(expected, abs=1e-5)


def test_factors_stay_in_float32_on_a_base_in_bfloat16(checkpoint: Path) -> None:
    learner = opened(checkpoint, WRITER, dtype="bfloat16")
    assert {one.dtype for one in tensors(learner).values()} == {torch.float32}
    before = tensors(learner)
    learner.forward_backward("writer", batch_of())
    learner.optim_step("writer", 1e-6)  # lost in bfloat16's eight bits
    changed = [name for name, one in tensors(learner).items() if not torch.equal(one, before[name])]
    assert changed


def test_an_adapter_that_the_model_does_not_use_is_refused_at_start(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose fused code reads the weights of a layer instead of calling it."""
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "forward", lambda self, x: self.base_layer(x))
    with pytest.raises(ConfigurationError, match="adapter of policy 'writer' does not change what Qwen3ForCausalLM"):
        opened(checkpoint, WRITER)

"""The memory plan against what is measured: saved tensors, parameters, optimizer state, the peak of a whole update."""

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leyden.errors import ConfigurationError
from leyden.interfaces import Loss, Objective, Sample
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch import TorchLearner, advice, head, memory
from leyden_plugins.learners.torch.memory import GIB, Plan, Settings, plan_of
from leyden_plugins.torch_models.loading import outline
from tests.learning.builders import sample
from tests.learning.memory import LiveBytes, write_model

FULL, ADAPTED = Policy("full"), Policy("adapted", lora=LoRA(rank=4, alpha=8))
LOSS = Loss(name="policy_gradient")
LENGTH = 256


def opened(folder: Path, *policies: Policy, **options: Any) -> TorchLearner:
    learner = TorchLearner(**{"micro_batch_tokens": LENGTH, "layout": "calls", **options})
    learner.open(policies, str(folder), seed=0)
    return learner


def planned(learner: TorchLearner) -> Plan:
    assert learner._situation is not None
    return learner._situation.plan


def row(length: int = LENGTH) -> list[Sample]:
    """Return a sample whose row fills a micro-batch; few of its tokens are trained."""
    return [sample([1] * (length - 8), [2] * 8)]


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def kept_by_layers(learner: TorchLearner, samples: Sequence[Sample]) -> int:
    """Return the bytes of all storages that a forward pass saves, weights left out."""
    (trainee,) = learner._trainees.values()
    weights = {one.untyped_storage().data_ptr() for one in trainee.model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(one: Tensor) -> Tensor:
        kept[one.untyped_storage().data_ptr()] = one
        return one

    (part,) = learner._micro_batches(trainee, samples)
    with trainee.speaking(), torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        learner._tokens(trainee, part, LOSS)
    return sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in weights)


# ---- counted exactly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_gradients_and_optimizer_are_those_there_are(tmp_path: Path, dtype: str, tied: bool) -> None:
    second = Policy("second", lora=LoRA(rank=2, targets=["q_proj", "down_proj"]))
    learner = opened(write_model(tmp_path, hidden=32, layers=2, tied=tied), FULL, ADAPTED, second, dtype=dtype)
    plan, trainees = planned(learner), list(learner._trainees.values())
    models = {id(one): one for trainee in trainees for one in trainee.model.parameters()}
    masters = [one for trainee in trainees for one in trainee.parameters.values() if id(one) not in models]
    assert plan.weights == bytes_of(list(models.values()))
    assert plan.masters == bytes_of(masters)
    gradients = []
    for trainee in trainees:
        learner.forward_backward(trainee.policy.name, [Objective(loss=LOSS, samples=row())])
        gradients.append(bytes_of([one.grad for one in trainee.parameters.values() if one.grad is not None]))
        learner.optim_step(trainee.policy.name, 1e-3)
    assert plan.gradients == max(gradients)
    states = [state for trainee in trainees for state in trainee.optimizer.state.values()]
    assert plan.optimizer == bytes_of([state[key] for state in states for key in ("exp_avg", "exp_avg_sq")])


def test_the_bytes_of_a_trained_value_are_those_that_are_documented(tmp_path: Path) -> None:
    model = outline(write_model(tmp_path, hidden=32, layers=1))
    values = sum(one.numel() for one in model.parameters())
    for dtype, expected in (("float32", 16), ("bfloat16", 18)):
        settings = Settings(dtype=dtype, positions=1, device="cpu", masks=False)
        assert plan_of(model, [FULL], settings).kept == expected * values


# ---- activations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "layers"), [(64, 3), (160, 2)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("policy", [FULL, ADAPTED], ids=["full", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_are_saved(
    tmp_path: Path, hidden: int, layers: int, family: str, policy: Policy, dtype: str
) -> None:
    folder = write_model(tmp_path, hidden=hidden, layers=layers, family=family)
    learner = opened(folder, policy, dtype=dtype)
    assert planned(learner).activations == pytest.approx(kept_by_layers(learner, row()), rel=0.2)


def test_activations_under_an_explicit_mask_are_those_that_are_saved(tmp_path: Path) -> None:
    learner = opened(write_model(tmp_path, hidden=64, layers=3), FULL, layout="packed")
    samples = [sample([1] * (LENGTH - 16), [number] * 8) for number in (2, 3)]
    assert planned(learner).activations == pytest.approx(kept_by_layers(learner, samples), rel=0.2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("policy", [FULL, ADAPTED], ids=["full", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_peaks_near_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool, policy: Policy, dtype: str
) -> None:
    monkeypatch.setitem(head.BLOCK_ELEMENTS, "cpu", 1 << 15)
    folder = write_model(tmp_path, hidden=64, layers=6, vocabulary=1000)
    learner = opened(folder, policy, dtype=dtype, activation_checkpointing=checkpointing, micro_batch_tokens=1024)
    plan = planned(learner)
    there = plan.weights + plan.masters
    with LiveBytes() as live:
        for _ in range(2):  # a second micro-batch finds gradients there, a second step moments
            learner.forward_backward(policy.name, [Objective(loss=LOSS, samples=row(1024) * 2)])
            learner.optim_step(policy.name, 1e-3)
    assert live.peak + there == pytest.approx(plan.total(recompute=checkpointing), rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_closed_learner_holds_no_weights(tmp_path: Path, checkpointing: bool) -> None:
    learner = opened(write_model(tmp_path, hidden=32, layers=2), FULL, activation_checkpointing=checkpointing)
    weights = weakref.ref(learner._trainees[FULL.name].model.lm_head.weight)
    gc.disable()  # whoever needs the memory next cannot wait for it
    try:
        learner.close()
        assert weights() is None
    finally:
        gc.enable()


def test_the_logits_of_a_head_that_cannot_be_cut_are_planned_whole(tmp_path: Path) -> None:
    model = outline(write_model(tmp_path, hidden=32, layers=1, vocabulary=100_000))
    settings = Settings(dtype="float32", positions=4096, device="cpu", masks=False)
    cut = plan_of(model, [FULL], settings).logits
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert cut == head.BLOCK_ELEMENTS["cpu"] * 20
    assert plan_of(model, [FULL], settings).logits == 4096 * 100_000 * 20


# ---- what is said ----------------------------------------------------------------------------------------------


def test_the_plan_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "device_memory", lambda device: (3 * GIB, 4 * GIB))
    learner = opened(write_model(tmp_path, hidden=32, layers=2), FULL, dtype="bfloat16", activation_checkpointing=True)
    (line,) = learner.notes()
    assert line.startswith("training takes up to ")
    for part in ("weights", "float32 masters", "AdamW", "gradients", "activations of 256 positions, recomputed"):
        assert part in line
    assert line.endswith("'cpu' had 3 GiB free of 4 GiB when the learner started")


def test_what_may_not_fit_says_what_would_take_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, hidden=64, layers=4)
    monkeypatch.setattr(advice, "device_memory", lambda device: (1000, GIB))
    learner = opened(folder, FULL, activation_checkpointing=False, micro_batch_tokens=8192)
    note = learner.notes()[1]
    for change in ("activation_checkpointing=True", "micro_batch_tokens=2048", "dtype='bfloat16'", "lora=LoRA()"):
        assert f"{change} takes " in note.replace("Policy(lora=LoRA())", "lora=LoRA()")
    assert "an engine that sleeps" in note
    learner.forward_backward("full", [Objective(loss=LOSS, samples=row())])  # only a note


def test_a_change_is_planned_as_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, hidden=64, layers=4)
    monkeypatch.setattr(advice, "device_memory", lambda device: (1000, 1000 * GIB))
    note = opened(folder, FULL, micro_batch_tokens=8192, dtype="float32").notes()[1]
    other = opened(folder, FULL, micro_batch_tokens=8192, dtype="bfloat16").notes()[0]
    assert note.split("dtype='bfloat16' takes ")[1].split(";")[0] == other.split("up to ")[1].split(":")[0]


def test_what_no_batch_could_make_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, hidden=64, layers=4)
    monkeypatch.setattr(advice, "device_memory", lambda device: (1_500_000, 1_500_000))
    with pytest.raises(
        ConfigurationError, match=r"training \['full'\] keeps .* MiB on 'cpu'.*Policy\(lora=LoRA\(\)\) takes"
    ):
        opened(folder, FULL)
    opened(folder, ADAPTED)


def test_auto_recomputes_on_a_gpu_only_where_the_plan_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(write_model(tmp_path, hidden=64, layers=4))
    learner = TorchLearner()
    found = {}
    for device in ("cpu", "cuda"):
        learner.device = device
        plan = plan_of(outline(folder), [FULL], Settings(dtype="float32", positions=8192, device=device, masks=False))
        for free in (plan.total(recompute=False) // 2, plan.total(recompute=False) * 2):
            monkeypatch.setattr(advice, "device_memory", lambda device, free=free: (free, free))
            situation = advice.situation_of(learner, folder, [FULL])
            found[device, free < plan.total(recompute=False)] = situation.recompute
    assert found == {("cpu", True): False, ("cpu", False): False, ("cuda", True): True, ("cuda", False): False}


def test_a_system_that_does_not_say_what_memory_it_has_gets_the_plan_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(memory.os, "sysconf", unknown)
    (line,) = opened(write_model(tmp_path, hidden=32, layers=1), FULL).notes()
    assert "free" not in line


def test_a_run_that_trains_nothing_has_no_plan(tmp_path: Path) -> None:
    folder = write_model(tmp_path, hidden=32, layers=1)
    assert TorchLearner().notes() == []
    assert opened(folder, Policy("judge", trainable=False)).notes() == []

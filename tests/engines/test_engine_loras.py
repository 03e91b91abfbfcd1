"""LoRA policies on one base: each row's log-probabilities are those of PEFT's own model, in every batch."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from leyden.errors import ConfigurationError, EngineError
from leyden.interfaces import Loss, Objective, Sample, Weights
from leyden.roles import LoRA, Policy
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models import FusedNetwork
from tests.engines.adapters import TARGETS, Adapter, adapter, adapters
from tests.engines.asking import Answered, ask, plain_logprobs, reference, request, running
from tests.tiny import VOCABULARY, tiny_checkpoint

pytestmark = pytest.mark.anyio

NAMES = ("sql", "critic", "planner")


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def assert_oracle(model: Any, prompt: Sequence[int], got: Answered, temperature: float = 1.0) -> None:
    """The recorded log-probabilities are those of `model`, to 1e-5 and float32's own rounding of large values."""
    wanted = plain_logprobs(model, prompt, got.token_ids, temperature)
    torch.testing.assert_close(torch.tensor(got.logprobs), wanted, atol=1e-5, rtol=2e-6)


async def publish(engine: TransformersEngine, made: Sequence[Adapter], version: int = 1) -> None:
    for name, one in zip(NAMES, made, strict=True):
        await engine.publish(name, version, one.weights)


def record_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of rows of each decode step from now on."""
    rows: list[int] = []
    decode = FusedNetwork.decode

    def counted(self: FusedNetwork, weights: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(tokens))
        return decode(self, weights, tokens, *rest)

    monkeypatch.setattr(FusedNetwork, "decode", counted)
    return rows


async def test_every_row_of_a_mixed_batch_has_the_logprobs_of_its_own_adapter(family: tuple[Path, str]) -> None:
    folder, _ = family
    made = adapters(folder)
    models: dict[str, Any] = {"base": reference(folder)} | dict(zip(NAMES, (one.model for one in made), strict=True))
    (start,) = prompts(40)
    asked = [
        (name, prompt, temperature)
        for prompt in (start, start[:33] + prompts(20, seed=1)[0], *prompts(1, 2, 17, 70))
        for name in models
        for temperature in (1.0, 0.7)
    ]
    async with running(folder, *NAMES) as engine:
        await publish(engine, made)
        for _ in range(2):  # the second time out of the prefix cache
            answers = await asyncio.gather(
                *(ask(engine, request(p, model=n, temperature=t, max_tokens=3 + len(p) % 9)) for n, p, t in asked)
            )
            for (name, prompt, temperature), answer in zip(asked, answers, strict=True):
                assert_oracle(models[name], prompt, answer, temperature)


async def test_greedy_answers_equal_generate_of_peft(family: tuple[Path, str]) -> None:
    folder, _ = family
    made = adapters(folder)
    asked = prompts(5, 9, 30)
    async with running(folder, *NAMES) as engine:
        await publish(engine, made)
        answers = await asyncio.gather(
            *(
                ask(engine, request(prompt, model=name, temperature=0.0, max_tokens=12))
                for name in NAMES
                for prompt in asked
            )
        )
    pairs = [(one.model, prompt) for one in made for prompt in asked]
    for (model, prompt), answer in zip(pairs, answers, strict=True):
        model.generation_config.eos_token_id = None
        tokens = torch.tensor([prompt])
        wanted = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12
        )
        assert answer.token_ids == wanted[0, len(prompt) :].tolist()


async def test_rows_of_all_adapters_and_of_the_base_take_one_decode_step_together(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts(20)
    async with running(qwen, *NAMES) as engine:
        await publish(engine, adapters(qwen))
        rows = record_rows(monkeypatch)
        generations = [await engine.generate(request(prompt, model=name, max_tokens=6)) for name in (*NAMES, "base")]
        for generation in generations:
            assert [delta async for delta in generation.deltas]
        assert rows == [4] * 6


async def test_a_mixed_batch_samples_what_each_row_samples_alone(qwen: Path) -> None:
    asked = [
        request(prompt, model=name, seed=number, max_tokens=20)
        for number, prompt in enumerate(prompts(3, 20, 21, 45))
        for name in (*NAMES, "base")
    ]
    async with running(qwen, *NAMES, prefix_cache_tokens=0) as engine:
        await publish(engine, adapters(qwen))
        alone = [await ask(engine, one) for one in asked]
        together = await asyncio.gather(*(ask(engine, one) for one in asked))
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=2e-6)


async def test_rows_of_adapters_join_and_leave_at_any_step(qwen: Path) -> None:
    made = adapters(qwen)
    models: dict[str, Any] = {"base": reference(qwen)} | dict(zip(NAMES, (one.model for one in made), strict=True))
    rng = random.Random(3)
    asked = [
        (rng.choice([*NAMES, "base"]), prompt, rng.randrange(1, 60))
        for prompt in prompts(*(rng.randrange(1, 90) for _ in range(60)))
    ]

    async def later(number: int, name: str, prompt: list[int], length: int) -> None:
        await asyncio.sleep(0.003 * (number % 23))
        assert_oracle(models[name], prompt, await ask(engine, request(prompt, model=name, max_tokens=length)))

    async with running(qwen, *NAMES, max_batch_size=12) as engine:
        await publish(engine, made)
        await asyncio.gather(*(later(number, *item) for number, item in enumerate(asked)))
        assert engine.running == 0


async def test_a_full_policy_beside_adapters_is_served_as_before(qwen: Path) -> None:
    (one, *_), changed = adapters(qwen), reference(qwen)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    (prompt,) = prompts(20)
    async with running(qwen, "sql", "full") as engine:
        await engine.publish("sql", 1, one.weights)
        await engine.publish("full", 1, Weights(tensors=changed.state_dict()))
        answers = await asyncio.gather(*(ask(engine, request(prompt, model=name)) for name in ("sql", "full", "base")))
    for model, answer in zip((one.model, changed, reference(qwen)), answers, strict=True):
        assert_oracle(model, prompt, answer)


async def test_a_request_keeps_the_adapter_it_began_with_and_the_next_ones_prefix_is_new(
    family: tuple[Path, str],
) -> None:
    folder, _ = family
    first, second, _ = adapters(folder)
    (prompt,) = prompts(40)
    async with running(folder, "sql") as engine:
        await engine.publish("sql", 1, first.weights)
        old = await engine.generate(request(prompt, model="sql", stream=True, max_tokens=60))
        began = await anext(old.deltas)
        await engine.publish("sql", 2, second.weights)
        new = await engine.generate(request(prompt, model="sql", stream=True, max_tokens=20))
        deltas = {1: [began, *[delta async for delta in old.deltas]], 2: [delta async for delta in new.deltas]}
        assert (old.version, new.version) == (1, 2)
    for version, model in ((1, first.model), (2, second.model)):
        got = Answered(
            token_ids=[token for delta in deltas[version] for token in delta.token_ids],
            logprobs=[value for delta in deltas[version] for value in delta.logprobs],
        )
        assert_oracle(model, prompt, got)


async def test_old_versions_of_an_adapter_are_freed_when_idle(qwen: Path) -> None:
    import gc
    import weakref

    first, second, third = adapters(qwen)
    (prompt,) = prompts(30)
    async with running(qwen, "sql", "critic") as engine:
        await engine.publish("sql", 1, first.weights)
        await engine.publish("critic", 1, third.weights)
        served = weakref.ref(engine._served["sql"][1].adapter)
        long = asyncio.create_task(ask(engine, request(prompt, model="critic", max_tokens=120)))
        await ask(engine, request(prompt, model="sql"))
        await engine.publish("sql", 2, second.weights)
        assert_oracle(second.model, prompt, await ask(engine, request(prompt, model="sql")))
        gc.collect()
        assert served() is None
        assert_oracle(third.model, prompt, await long)


async def test_a_peft_folder_is_published_like_tensors(qwen: Path, tmp_path: Path) -> None:
    one = adapters(qwen)[0]
    folder = one.save(tmp_path / "adapter")
    async with running(qwen, "a", "b", "c") as engine:
        await engine.publish("a", 1, Weights(folder=folder))
        await engine.publish("b", 1, one.weights)
        await engine.publish("c", 1, Weights(folder=folder, lora=one.lora))
        assert engine.sha256("a") == engine.sha256("b") == engine.sha256("c") != engine.sha256("base")


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"up_proj": 7}},
        {"alpha_pattern": {r"layers\.1\.mlp\.up_proj": 2.5}},
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.(q|up)_proj"},
    ],
)
async def test_a_folder_means_what_peft_reads_in_it(qwen: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    targets = config.pop("target_modules", ["q_proj", "up_proj"])
    made = adapter(qwen, rank=4, alpha=6, targets=("q_proj", "up_proj"), **config)
    folder = made.save(tmp_path / "adapter")
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"target_modules": targets}))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32), folder).eval()
    (prompt,) = prompts(20)
    async with running(qwen, "sql") as engine:
        await engine.publish("sql", 1, Weights(folder=folder))
        assert_oracle(model, prompt, await ask(engine, request(prompt, model="sql")))


async def test_published_factors_are_copied(family: tuple[Path, str]) -> None:
    folder, _ = family
    made = adapters(folder)[0]
    weights = made.weights
    async with running(folder, "sql") as engine:
        await engine.publish("sql", 1, weights)
        before = engine.sha256("sql")
        for tensor in (weights.tensors or {}).values():
            tensor.data.zero_()  # type: ignore[attr-defined]
        assert engine.sha256("sql") == before


async def test_the_output_head_of_tied_weights_takes_an_adapter_of_its_own(tmp_path: Path) -> None:
    for family, targets in (("qwen3", ("lm_head", "q_proj")), ("gpt2", ("lm_head", "c_attn"))):
        folder = tiny_checkpoint(tmp_path / family, family, tie_word_embeddings=True)
        made = adapter(folder, rank=4, alpha=8, targets=targets)
        (prompt,) = prompts(20)
        async with running(folder, "sql") as engine:
            await engine.publish("sql", 1, made.weights)
            assert_oracle(made.model, prompt, await ask(engine, request(prompt, model="sql")))
            assert_oracle(reference(folder), prompt, await ask(engine, request(prompt)))


def without(weights: Weights, part: str) -> Weights:
    tensors = {name: tensor for name, tensor in (weights.tensors or {}).items() if part not in name}
    return Weights(lora=weights.lora, tensors=tensors)


def renamed(weights: Weights, old: str, new: str) -> Weights:
    return Weights(lora=weights.lora, tensors={k.replace(old, new): v for k, v in (weights.tensors or {}).items()})


async def test_tensors_that_are_no_adapter_of_this_model_are_refused(qwen: Path) -> None:
    weights = adapter(qwen, rank=4, alpha=8, targets=TARGETS["fused"][0]).weights
    tensors = dict(weights.tensors or {})
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    cases = [
        (without(weights, "lora_B"), r"lacks 'base_model.model.model.layers.0.mlp.down_proj.lora_B.weight'"),
        (without(weights, "layers.1."), r"missing \['model.layers.1.mlp.down_proj'"),
        (renamed(weights, "q_proj", "w_proj"), r"unknown \['model.layers.0.self_attn.w_proj'"),
        (renamed(weights, "lora_A.", "lora_A.default."), r"is not a factor of a LoRA; the names are those of PEFT"),
        (Weights(tensors=tensors), r"say its rank and alpha: Weights\(lora=\)"),
        (Weights(tensors={}, lora=weights.lora), "holds no tensors"),
        (Weights(tensors=tensors, lora=LoRA(rank=5, alpha=8)), r"lora_A of .* is \(4, .*has rank=5"),
        (Weights(tensors=tensors, lora=LoRA(rank=4, alpha=8, targets=["q_proj"])), "unknown"),
        (Weights(tensors=tensors | {name: tensors[name][:, :5]}, lora=weights.lora), r"must be \(rank, 32\)"),
        (Weights(tensors=tensors | {name: tensors[name] * torch.nan}, lora=weights.lora), "hold NaN or infinity"),
        (Weights(lora=weights.lora), "neither tensors nor a folder"),
    ]
    async with running(qwen, "sql") as engine:
        for wrong, message in cases:
            with pytest.raises(ConfigurationError, match=message):
                await engine.publish("sql", 1, wrong)
        assert engine.sha256("sql") == engine.sha256("base")


async def test_folders_that_cannot_be_served_are_refused(qwen: Path, tmp_path: Path) -> None:
    folder = adapter(qwen, rank=4, alpha=8, targets=("q_proj",)).save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    strange = {name.replace("q_proj", "norm"): tensor for name, tensor in tensors.items()}
    cases: list[tuple[dict[str, Any], dict[str, torch.Tensor], LoRA | None, str]] = [
        ({"peft_type": "IA3"}, tensors, None, "type 'IA3', not 'LORA'"),
        ({"use_dora": True}, tensors, None, r"use_dora=True, weight-decomposed adapters \(DoRA\): not served; merge"),
        ({"modules_to_save": ["lm_head"]}, tensors, None, "modules_to_save"),
        ({"bias": "all"}, tensors, None, "trains biases"),
        ({"r": "4"}, tensors, None, "both must be numbers"),
        ({}, tensors, LoRA(rank=4, alpha=9), "lora_alpha=8.*alpha=9.*leave Weights.lora out"),
        ({}, {name.replace("layers.1", "layers.9"): t for name, t in tensors.items()}, None, "does not have"),
        ({}, {n: t for n, t in strange.items() if "input" not in n}, None, "does not have"),
    ]
    async with running(qwen, "sql") as engine:
        for changes, stored, lora, message in cases:
            (folder / "adapter_config.json").write_text(json.dumps(config | changes))
            save_file(stored, folder / "adapter_model.safetensors")
            with pytest.raises(ConfigurationError, match=message):
                await engine.publish("sql", 1, Weights(folder=folder, lora=lora))
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(ConfigurationError, match=r"lacks 'adapter_model.safetensors'"):
            await engine.publish("sql", 1, Weights(folder=folder))
        (folder / "adapter_config.json").write_text("[")
        with pytest.raises(ConfigurationError, match="cannot be read"):
            await engine.publish("sql", 1, Weights(folder=folder))


async def test_an_adapter_that_overflows_fails_its_own_requests_and_nobody_elses(qwen: Path) -> None:
    made = adapters(qwen)
    tensors = {name: tensor * 1e30 for name, tensor in (made[0].weights.tensors or {}).items()}  # type: ignore[operator]
    (prompt,) = prompts(20)
    async with running(qwen, "sql", "critic") as engine:
        await engine.publish("sql", 1, Weights(tensors=tensors, lora=made[0].lora))
        await engine.publish("critic", 1, made[1].weights)
        for _ in range(2):
            asked = [asyncio.create_task(ask(engine, request(prompt, model="critic", max_tokens=80))) for _ in range(5)]
            with pytest.raises(EngineError, match="the logits are not numbers"):
                await ask(engine, request(prompt, model="sql", n=3))
            for answer in await asyncio.gather(*asked):
                assert_oracle(made[1].model, prompt, answer)
            answers = await asyncio.gather(*(ask(engine, request(p)) for p in prompts(*range(1, 12))))
            for other, answer in zip(prompts(*range(1, 12)), answers, strict=True):
                assert_oracle(reference(qwen), other, answer)


async def test_what_the_learner_trains_is_what_the_engine_samples_with(qwen: Path, tmp_path: Path) -> None:
    policies = [Policy("sql", lora=LoRA(rank=4, alpha=8)), Policy("critic", lora=LoRA(rank=2, targets=["q_proj"]))]
    learner = TorchLearner(threads=None)
    learner.open(policies, str(qwen), seed=0)
    (prompt,) = prompts(30)
    async with running(qwen, "sql", "critic", "again") as engine:
        for policy in policies:
            before = sample_of(prompt, await ask(engine, request(prompt, model=policy.name)))
            learner.forward_backward(policy.name, [Objective(loss=Loss(name="policy_gradient"), samples=[before])])
            learner.optim_step(policy.name, 0.05)
            await engine.publish(policy.name, 1, learner.weights(policy.name))
        answers = await asyncio.gather(*(ask(engine, request(prompt, model=policy.name)) for policy in policies))
        for policy, answer in zip(policies, answers, strict=True):
            (wanted,) = learner.logprobs(policy.name, [sample_of(prompt, answer)])
            assert answer.logprobs == pytest.approx(wanted, abs=3e-5)
            (base,) = learner.logprobs(policy.name, [sample_of(prompt, answer)], reference=True)
            assert answer.logprobs != pytest.approx(base, abs=1e-2)
        learner.export("sql", tmp_path)
        await engine.publish("again", 1, Weights(folder=tmp_path))
        assert engine.sha256("again") == engine.sha256("sql") != engine.sha256("critic")
    learner.close()


def sample_of(prompt: Sequence[int], answer: Answered) -> Sample:
    count = len(answer.token_ids)
    return Sample(
        prompt_token_ids=prompt,
        token_ids=answer.token_ids,
        weights=[1.0] * count,
        advantages=[1.0] * count,
        logprobs=answer.logprobs,
    )

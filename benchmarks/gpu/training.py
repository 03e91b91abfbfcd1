"""One optimizer step of this learner against TRL's GRPO on the same batch: tokens a second, FLOP utilisation, memory.

Both get the same groups of one-call rollouts (a shared prompt, answers of given lengths), the same loss and the same
optimizer (fused AdamW); loss and gradient of both are equal, which `tests/learning/test_losses_against_trl.py` shows.
TRL computes at most `--trl-batch` sequences at once, with and without its gradient checkpointing; the quicker counts.

    python -m benchmarks.gpu.training --size 0.5b
    python -m benchmarks.gpu.training --size tiny --device cpu --dtype float32 --prompt 100 --answer 50   # a trial
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from benchmarks.gpu.models import SHAPES, make
from benchmarks.gpu.results import keep
from leyden.interfaces import Loss, Objective, Sample
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.torch_models import load_model, load_tokenizer

PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "NVIDIA GeForce RTX 4090": 165e12}
"""Dense bfloat16 with float32 accumulation, from the makers' data sheets; by the beginning of the device's name."""

RATE = 1e-6


def batch_of(groups: int, group: int, prompt: int, answer: int, *, seed: int = 0) -> list[Sample]:
    """Return one-call rollouts; answers are half to full length, and recorded far from where the model is."""
    rng = random.Random(seed)
    found: list[Sample] = []
    for _ in range(groups):
        shared = [rng.randrange(300, 1000) for _ in range(prompt)]
        for _ in range(group):
            tokens = [rng.randrange(300, 1000) for _ in range(rng.randint(max(1, answer // 2), answer))]
            weight = 1 / (groups * group * len(tokens))
            found.append(
                Sample(
                    prompt_token_ids=shared,
                    token_ids=tokens,
                    weights=[weight] * len(tokens),
                    advantages=[rng.choice([-1.0, 1.0])] * len(tokens),
                    logprobs=[-11.0] * len(tokens),
                )
            )
    return found


def flops_of(model: PreTrainedModel, samples: Sequence[Sample]) -> float:
    """Return the floating-point operations that the batch needs at least: forward and backward, 3 x the forward pass.

    A matrix of P parameters takes 2 P a token (Kaplan et al. 2020, section 2.1); attention takes 4 T H a layer and
    token for T keys, half of that on average because it is causal. The head counts for trained tokens only. Recomputed
    activations do not count (model FLOP utilisation, Chowdhery et al. 2022, appendix B); nor does what sharing saves.
    """
    config = model.config.get_text_config()
    inner = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name)
    head = config.vocab_size * config.hidden_size
    total = 0.0
    for one in samples:
        length = len(one.prompt_token_ids) + len(one.token_ids)
        attention = 2 * config.num_hidden_layers * config.hidden_size * length
        total += length * (2 * inner + attention) + len(one.token_ids) * 2 * head
    return 3 * total


def ours(options: argparse.Namespace, samples: Sequence[Sample]) -> tuple[Callable[[], None], PreTrainedModel]:
    """Return one step of this project's learner."""
    learner = TorchLearner(
        device=options.device, dtype=options.dtype, micro_batch_tokens=options.micro_batch_tokens, threads=None
    )
    lora = LoRA(rank=options.lora) if options.lora else None
    learner.open([Policy("p", learning_rate=RATE, lora=lora)], str(options.model), seed=0)
    loss = Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})

    def step() -> None:
        learner.forward_backward("p", [Objective(loss=loss, samples=samples)])
        learner.optim_step("p", RATE)

    return step, load_model(options.model, dtype=options.dtype)


def trl(options: argparse.Namespace, samples: Sequence[Sample], *, checkpointing: bool) -> Callable[[], None]:
    """Return one step of TRL's GRPO trainer: its loss, micro-batch by micro-batch, and fused AdamW."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    on_cuda = torch.device(options.device).type == "cuda"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="leyden-trl-"),
        per_device_train_batch_size=options.group,
        num_generations=options.group,
        max_completion_length=options.answer,
        epsilon=0.2,
        beta=0.0,
        temperature=1.0,
        report_to=[],
        use_cpu=not on_cuda,
        bf16=on_cuda and options.dtype == "bfloat16",
        gradient_checkpointing=checkpointing,
    )
    peft: dict[str, Any] = {}
    if options.lora:
        from peft import LoraConfig

        peft["peft_config"] = LoraConfig(
            r=options.lora, lora_alpha=2 * options.lora, target_modules=list(LoRA(rank=options.lora).targets)
        )
    trainer = GRPOTrainer(
        # Float32 weights under autocast: this is how TRL trains in bfloat16 by default.
        model=load_model(options.model, device=options.device),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * options.group}),
        processing_class=load_tokenizer(options.model),
        **peft,
    )
    trainer.current_gradient_accumulation_steps = 1
    model: Any = trainer.model.to(options.device).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    parts = [samples[i : i + options.trl_batch] for i in range(0, len(samples), options.trl_batch)]
    laid_out = [trl_inputs(part, device=options.device) for part in parts]

    def step() -> None:
        for inputs in laid_out:
            with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=config.bf16):
                loss = trainer._compute_loss(model, inputs)
            (loss / len(laid_out)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def trl_inputs(samples: Sequence[Sample], *, device: str) -> dict[str, Tensor]:
    """Lay samples out as TRL does: prompts padded on the left, completions on the right."""
    prompts, answers = (
        max(len(ids) for ids in side)
        for side in zip(*((s.prompt_token_ids, s.token_ids) for s in samples), strict=True)
    )
    count = len(samples)
    found = {
        "prompt_ids": torch.zeros(count, prompts, dtype=torch.long),
        "prompt_mask": torch.zeros(count, prompts, dtype=torch.long),
        "completion_ids": torch.zeros(count, answers, dtype=torch.long),
        "completion_mask": torch.zeros(count, answers, dtype=torch.long),
        "old_per_token_logps": torch.zeros(count, answers),
        "num_items_in_batch": torch.tensor(sum(len(one.token_ids) for one in samples)),
        "advantages": torch.tensor([one.advantages[0] for one in samples]),
    }
    for number, one in enumerate(samples):
        found["prompt_ids"][number, prompts - len(one.prompt_token_ids) :] = torch.tensor(one.prompt_token_ids)
        found["prompt_mask"][number, prompts - len(one.prompt_token_ids) :] = 1
        found["completion_ids"][number, : len(one.token_ids)] = torch.tensor(one.token_ids)
        found["completion_mask"][number, : len(one.token_ids)] = 1
        found["old_per_token_logps"][number, : len(one.token_ids)] = torch.tensor(one.logprobs)
    return {name: tensor.to(device) for name, tensor in found.items()}


def timed(step: Callable[[], None], *, repetitions: int, device: str) -> tuple[float, float]:
    """Return the median seconds of a step, after two that warm up, and the most GiB of the device that were in use."""
    on_cuda = torch.device(device).type == "cuda"
    seconds: list[float] = []
    for number in range(repetitions + 2):
        if number == 2 and on_cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else 0.0
    return sorted(seconds[2:])[repetitions // 2], peak


def figures_of(seconds: float, gib: float, samples: Sequence[Sample], flops: float) -> dict[str, float]:
    """Return what one side did."""
    tokens = sum(len(one.prompt_token_ids) + len(one.token_ids) for one in samples)
    found = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_gib": gib}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for prefix, value in PEAK_FLOPS.items() if name.startswith(prefix)), None)
    if peak is not None:
        found["model_flop_utilisation"] = flops / seconds / peak
    return found


def main() -> None:
    """Measure both sides, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="0.5b")
    parser.add_argument("--models", type=Path, default=Path("build/models"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=500)
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384)
    parser.add_argument("--trl-batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    options.model = make(options.size, options.models / options.size)
    samples = batch_of(options.groups, options.group, options.prompt, options.answer)
    step, model = ours(options, samples)
    flops = flops_of(model, samples)
    del model
    found = {"leyden": figures_of(*timed(step, repetitions=options.repetitions, device=options.device), samples, flops)}
    del step
    for checkpointing in (False, True):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        name = "trl with gradient checkpointing" if checkpointing else "trl"
        try:
            theirs = trl(options, samples, checkpointing=checkpointing)
            measured = timed(theirs, repetitions=options.repetitions, device=options.device)
            found[name] = figures_of(*measured, samples, flops)
            del theirs
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory with --trl-batch {options.trl_batch}")
    best = max(one["tokens_per_second"] for name, one in found.items() if name != "leyden")
    keep(
        f"training/{options.size}" + (f"/lora{options.lora}" if options.lora else ""),
        {**found, "ratio_to_trl": found["leyden"]["tokens_per_second"] / best},
    )


if __name__ == "__main__":
    main()

"""How long new weights take from the learner to vLLM, and how long sleeping and waking take: seconds, and memory.

    python -m benchmarks.gpu.pushes --size 1.5b --python VLLM_PYTHON             # whole weights
    python -m benchmarks.gpu.pushes --size 1.5b --python VLLM_PYTHON --lora 16
    python -m benchmarks.gpu.pushes --size tiny --device cpu --dtype float32 --python VLLM_PYTHON   # a trial on a CPU

Learner and server share the device, as in a colocated run: with `--sleep` the server leaves it while the learner works.
One step is what a run does between two samplings: sleep, update, wake, push. Its parts are timed one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch

from benchmarks.gpu.models import SHAPES, make
from benchmarks.gpu.results import keep
from benchmarks.gpu.training import RATE, batch_of
from leyden.interfaces import Loss, Objective
from leyden.roles import LoRA, Policy
from leyden.training.versions import checkable_weights
from leyden_plugins.engines.vllm import VLLMEngine
from leyden_plugins.learners.torch import TorchLearner

LOSS = Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})


async def measure(options: argparse.Namespace) -> dict[str, object]:
    """Return the median seconds of each part of a step, and the device's free memory in GiB after each."""
    model = make(options.size, options.models / options.size)
    policy = Policy("p", learning_rate=RATE, lora=LoRA(rank=options.lora) if options.lora else None)
    engine = VLLMEngine(
        model,
        python=options.python,
        context_length=4096,
        dtype=options.dtype,
        sleep=options.sleep,
        gpu_memory_utilization=None if options.device == "cpu" else options.share,
        kv_cache_bytes=64 * 2**20 if options.device == "cpu" else None,
    )
    await engine.start([policy])
    learner = TorchLearner(device=options.device, dtype=options.dtype, threads=None)
    learner.open([policy], str(model), seed=0)
    print(*learner.notes(), sep="\n")
    samples = batch_of(options.groups, 8, options.prompt, options.answer)
    seconds: dict[str, list[float]] = {}
    free: dict[str, float] = {}

    async def timed(name: str, work: Callable[[], Awaitable[object]]) -> None:
        began = time.perf_counter()
        await work()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        if torch.cuda.is_available():
            free[name] = torch.cuda.mem_get_info()[0] / 2**30

    def update() -> None:
        learner.forward_backward("p", [Objective(loss=LOSS, samples=samples)])
        learner.optim_step("p", RATE)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    async def release() -> None:
        await asyncio.to_thread(learner.release_memory)

    try:
        for version in range(1, options.repetitions + 2):
            if version == 2:
                seconds.clear()  # the first step warms everything up
            if options.sleep:
                await timed("sleep", engine.sleep)
            await timed("update", lambda: asyncio.to_thread(update))
            if options.sleep:
                await timed("release", release)
                await timed("wake", engine.wake)
            await timed("push", lambda number=version: engine.publish("p", number, checkable_weights(learner, "p")))
    finally:
        learner.close()
        await engine.stop()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": medians, "step_seconds": sum(medians.values()), "free_gib_after": free}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="0.5b")
    parser.add_argument("--models", type=Path, default=Path("build/models"))
    parser.add_argument("--python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--sleep", action="store_true")
    parser.add_argument("--share", type=float, default=0.4, help="of the device's memory for the server")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=500)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    name = f"pushes/{options.size}" + (f"/lora{options.lora}" if options.lora else "")
    keep(name + ("/sleep" if options.sleep else ""), asyncio.run(measure(options)))


if __name__ == "__main__":
    main()

"""Sampling through gateway and vLLM against the same vLLM alone: tokens a second, not streamed and streamed.

One server is started; a client in a process of its own asks it directly, then through the gateway, in turns, as many
questions at once. Alone it is asked as an app asks, and once more with token ids and log-probabilities, which is what
training needs and part of the cost.

    python -m benchmarks.gpu.sampling --size 0.5b --python VLLM_PYTHON
    python -m benchmarks.gpu.sampling --size tiny --python VLLM_PYTHON --requests 64 --concurrency 16   # a trial
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.models import SHAPES, make
from benchmarks.gpu.results import keep
from leyden.interfaces import Access
from leyden.roles import AGENTS_OWN, RESERVED_MODEL
from leyden.spans import Completion, Record
from leyden_plugins.engines.vllm import VLLMEngine
from leyden_plugins.gateway import HttpGateway


async def client(url: str, key: str, options: argparse.Namespace, *flags: str) -> float:
    """Return the tokens a second that came back."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.gpu.client", url, key, RESERVED_MODEL),
        *("--concurrency", str(options.concurrency), "--requests", str(options.requests)),
        *("--words", str(options.words), "--tokens", str(options.tokens), *flags),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"the client failed with status {process.returncode}")
    return float(json.loads(output)["tokens_per_second"])


async def measure(options: argparse.Namespace) -> dict[str, object]:
    """Return the median of each way of asking, and what the gateway keeps of the server's speed."""
    recorded = 0

    async def record(records: Sequence[Record]) -> None:
        nonlocal recorded
        recorded += sum(len(c.token_ids) for one in records if isinstance(one, Completion) for c in one.choices)

    engine = VLLMEngine(
        make(options.size, options.models / options.size),
        python=options.python,
        context_length=options.context,
        kv_cache_bytes=64 * 2**20 if options.size == "tiny" else None,
    )
    await engine.start([])
    gateway = HttpGateway()
    await gateway.start(engine, record)
    key = gateway.admit(Access(rollout_id="measured", attempt=1, models={RESERVED_MODEL: AGENTS_OWN}))
    bare = f"{engine.urls[0]}/v1"
    ways = {
        "vllm": (bare, "none"),
        "vllm with ids": (bare, "none", "--ids"),
        "gateway": (gateway.base_url, key),
        "vllm streamed": (bare, "none", "--stream"),
        "vllm with ids streamed": (bare, "none", "--stream", "--ids"),
        "gateway streamed": (gateway.base_url, key, "--stream"),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for _ in range(options.repetitions):
            for name, (url, token, *flags) in ways.items():
                found[name].append(await client(url, token, options, *flags))
    finally:
        await gateway.revoke("measured")
        await gateway.stop()
        await engine.stop()
    speeds = {name: statistics.median(values) for name, values in found.items()}
    return {
        "tokens_per_second": speeds,
        "gateway_to_vllm": speeds["gateway"] / speeds["vllm"],
        "gateway_to_vllm_with_ids": speeds["gateway"] / speeds["vllm with ids"],
        "gateway_to_vllm_streamed": speeds["gateway streamed"] / speeds["vllm streamed"],
        "gateway_to_vllm_with_ids_streamed": speeds["gateway streamed"] / speeds["vllm with ids streamed"],
        "tokens_recorded": recorded,
        "each": {name: [round(value) for value in values] for name, values in found.items()},
    }


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="0.5b")
    parser.add_argument("--models", type=Path, default=Path("build/models"))
    parser.add_argument("--python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--words", type=int, default=100, help="of a question")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    keep(f"sampling/{options.size}", asyncio.run(measure(options)))


if __name__ == "__main__":
    main()

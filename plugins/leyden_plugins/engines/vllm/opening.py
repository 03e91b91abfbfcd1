"""Put an engine's parts together, and take them apart."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from leyden.errors import ConfigurationError
from leyden.looping import LoopThread
from leyden_plugins.engines.servers.model import ModelFacts, read_model
from leyden_plugins.engines.vllm.checking import TEXT, probe_prompt
from leyden_plugins.engines.vllm.environments import probe
from leyden_plugins.engines.vllm.flags import Options
from leyden_plugins.engines.vllm.fleet import Fleet
from leyden_plugins.engines.vllm.folders import Folders, bytes_in, local_folder
from leyden_plugins.engines.vllm.policies import Plan, Policies, serving_for
from leyden_plugins.engines.vllm.replica import Needs

PROBES = 4
"""Prompts on which log-probabilities at two temperatures are compared."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Everything that is there while the engine runs."""

    facts: ModelFacts
    fleet: Fleet
    policies: Policies
    folders: Folders
    keeper: LoopThread
    """The loop that looks after the servers."""
    context_length: int = 0

    async def close(self) -> None:
        """End what was started, and remove what was written but for logs."""
        await self.keeper.submit(self.fleet.stop()).wait()
        await asyncio.to_thread(self.keeper.close)
        await asyncio.to_thread(self.folders.remove)


async def open_servers(options: Options, wanted: Plan) -> Running:
    """Start or find the servers, and examine them.

    Raises:
        ConfigurationError: a model, an environment or a server that cannot be used.
        EngineError: a server does not come up.
    """
    facts = await asyncio.to_thread(read_model, options.model)
    dtype = facts.dtype if options.dtype == "auto" else options.dtype
    serving = serving_for(wanted, dtype, options.max_loras, options.max_lora_rank)
    environment = None if options.urls else await asyncio.to_thread(probe, options.python)
    if options.sleep and environment is not None and environment.is_cpu:
        raise ConfigurationError(
            f"sleep=True frees a GPU's memory, and python={options.python!r} has vLLM for CPU, which has no sleep "
            "mode; leave it out"
        )
    base = await asyncio.to_thread(local_folder, options.model)
    log_folder = options.log_folder or Path(tempfile.mkdtemp(prefix="leyden-vllm-log-"))
    log_folder.mkdir(parents=True, exist_ok=True)
    # Twice for the version that comes beside the one that is there, once more for the others who use that memory.
    make = partial(Folders, options.weights_folder, needed=3 * bytes_in(base), is_tied=facts.is_tied)
    folders = await asyncio.to_thread(make)
    keeper = LoopThread("leyden-vllm")
    prompt = probe_prompt(facts.prompts.encode(TEXT), facts.prompts.vocabulary)
    policies = Policies(serving, folders, prompt, keeper.loop, base)
    fleet = Fleet(options, environment, serving, log_folder=log_folder, restore=policies.restore)
    running = Running(facts=facts, fleet=fleet, policies=policies, folders=folders, keeper=keeper)
    needs = Needs(
        loras=serving.max_loras > 0, whole_weights=wanted.whole is not None, sleep=options.sleep, folder=folders.root
    )
    try:
        limit = await keeper.submit(come_up(fleet, needs, prompt)).wait()
    except BaseException:
        await running.close()
        raise
    return replace(running, context_length=min(limit, options.context_length or limit))


async def come_up(fleet: Fleet, needs: Needs, prompt: list[int]) -> int:
    """Start the servers and let requests in; return how many tokens each may have."""
    await fleet.start()
    prompts = [prompt[: 1 + len(prompt) * part // PROBES] for part in range(PROBES)]
    limits = [await replica.examine(needs, prompts) for replica in fleet.replicas]
    fleet.open()
    return min(limits)

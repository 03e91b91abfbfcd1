"""Leyden trains the agents people already have: chosen roles, exact tokens, no code change."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leyden.chain import Chain as Chain
    from leyden.chain import Phase as Phase
    from leyden.context import declare_roles as declare_roles
    from leyden.context import headers as headers
    from leyden.context import role as role
    from leyden.context import tool as tool
    from leyden.deploying.deployment import deploy as deploy
    from leyden.endpoints import Endpoint as Endpoint
    from leyden.endpoints import endpoint as endpoint
    from leyden.feedback import reward as reward
    from leyden.instrumentation import instrument as instrument
    from leyden.instrumentation import uninstrument as uninstrument
    from leyden.lastcall import last_call as last_call
    from leyden.recording import Recording as Recording
    from leyden.recording import record as record
    from leyden.rewards import NO_REWARD as NO_REWARD
    from leyden.rewards import emit_event as emit_event
    from leyden.rewards import emit_message as emit_message
    from leyden.rewards import emit_reward as emit_reward
    from leyden.roles import LoRA as LoRA
    from leyden.roles import Policy as Policy
    from leyden.roles import Sampling as Sampling
    from leyden.running.agents import per_rollout as per_rollout
    from leyden.running.command import Command as Command
    from leyden.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

HOMES = {
    "Chain": "leyden.chain",
    "Command": "leyden.running.command",
    "Endpoint": "leyden.endpoints",
    "LoRA": "leyden.roles",
    "NO_REWARD": "leyden.rewards",
    "Phase": "leyden.chain",
    "Policy": "leyden.roles",
    "Recording": "leyden.recording",
    "Sampling": "leyden.roles",
    "Trainer": "leyden.training.trainer",
    "declare_roles": "leyden.context",
    "deploy": "leyden.deploying.deployment",
    "emit_event": "leyden.rewards",
    "emit_message": "leyden.rewards",
    "emit_reward": "leyden.rewards",
    "endpoint": "leyden.endpoints",
    "headers": "leyden.context",
    "instrument": "leyden.instrumentation",
    "last_call": "leyden.lastcall",
    "per_rollout": "leyden.running.agents",
    "record": "leyden.recording",
    "reward": "leyden.feedback",
    "role": "leyden.context",
    "tool": "leyden.context",
    "uninstrument": "leyden.instrumentation",
}
"""Public name -> its module, imported on first use: an agent's process should not pay for the trainer."""

__all__ = sorted(HOMES)


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'leyden' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

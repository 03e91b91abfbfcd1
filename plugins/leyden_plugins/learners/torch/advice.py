"""What to say about a memory plan: a line before the first step, what to change, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from leyden.errors import ConfigurationError
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch.memory import GIB, SHARE, Plan, Settings, device_memory, plan_of
from leyden_plugins.learners.torch.preflight import attends_fully
from leyden_plugins.learners.torch.recomputing import layers_of
from leyden_plugins.torch_models.loading import outline

if TYPE_CHECKING:
    from leyden_plugins.learners.torch import TorchLearner


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A plan, where it came from, and the memory there is."""

    policies: Sequence[Policy]
    settings: Settings
    recompute: bool
    can_recompute: bool
    room: tuple[int, int] | None
    """Bytes free, and all."""
    planned: Callable[[Sequence[Policy], Settings], Plan]
    """What other policies or settings would take."""

    @property
    def plan(self) -> Plan:
        """Of the policies and settings as they are."""
        return self.planned(self.policies, self.settings)


def situation_of(learner: TorchLearner, source: str, policies: Sequence[Policy]) -> Situation:
    """Plan the memory, and decide what `activation_checkpointing="auto"` means: yes on a GPU that it takes to fit.

    Raises:
        ConfigurationError: there is no such model, or activation checkpointing was asked for and its layers cannot be
            computed again.
    """
    model = outline(source)
    on_cuda = torch.device(learner.device).type == "cuda"
    packs = learner.layout in ("auto", "packed") and attends_fully(model)
    settings = Settings(
        dtype=learner.dtype,
        positions=learner.micro_batch_tokens,
        device=learner.device,
        masks=packs and not (on_cuda and model._supports_flex_attn),
    )
    can_recompute, wanted = bool(layers_of(model)), learner.activation_checkpointing
    if wanted is True and not can_recompute:
        raise ConfigurationError(
            f"activation_checkpointing=True, but {type(model).__name__} has no layers that can be computed again; "
            "use 'auto' or False, and a smaller micro_batch_tokens"
        )
    room = device_memory(learner.device)
    if wanted == "auto":
        is_tight = room is not None and plan_of(model, policies, settings).total(recompute=False) > SHARE * room[0]
        wanted = on_cuda and can_recompute and is_tight
    return Situation(
        policies=policies,
        settings=settings,
        recompute=wanted,
        can_recompute=can_recompute,
        room=room,
        planned=lambda policies, settings: plan_of(model, policies, settings),
    )


def refuse_impossible(situation: Situation) -> None:
    """Refuse what cannot fit into all the memory of the device, even with no activations at all.

    What does not fit beside others now may fit later: an engine that sleeps leaves its part.

    Raises:
        ConfigurationError: says what takes how much, and what to change.
    """
    plan = situation.plan
    if situation.room is not None and plan.kept > situation.room[1]:
        raise ConfigurationError(
            f"training {[policy.name for policy in situation.policies]!r} keeps {_gib(plan.kept)} on "
            f"{situation.settings.device!r} (weights {_gib(plan.weights + plan.masters)}, AdamW "
            f"{_gib(plan.optimizer)}, gradients {_gib(plan.gradients)}), which has {_gib(situation.room[1])}"
            + "".join(f"; {change}" for change in _changes(situation, lambda other: other.kept))
        )


def lines_of(situation: Situation) -> list[str]:
    """Return what the user should read before the first step."""
    plan, settings = situation.plan, situation.settings
    activations = plan.recomputed if situation.recompute else plan.activations
    parts = {
        "weights": plan.weights,
        "their float32 masters": plan.masters,
        "AdamW": plan.optimizer,
        "gradients": plan.gradients,
        f"activations of {settings.positions:,} positions"
        + (", recomputed layer by layer" if situation.recompute else ""): activations,
        "the backward pass": max(plan.working, plan.logits),
    }
    total = plan.total(recompute=situation.recompute)
    found = f"training takes up to {_gib(total)}: " + ", ".join(
        f"{n} {_gib(size)}" for n, size in parts.items() if size
    )
    if situation.room is None:
        return [found]
    free, whole = situation.room
    lines = [f"{found}; {settings.device!r} had {_gib(free)} free of {_gib(whole)} when the learner started"]
    if total > free:
        changes = _changes(situation, lambda other: other.total(recompute=situation.recompute))
        if not situation.recompute and situation.can_recompute:
            changes.insert(0, f"activation_checkpointing=True takes {_gib(plan.total(recompute=True))}")
        lines.append(
            "note: that may not fit; TorchLearner and Policy can take less: "
            + "; ".join(changes)
            + "; or leave more to the learner: a smaller share of the device for the engine, or an engine that sleeps"
        )
    return lines


def _changes(situation: Situation, size: Callable[[Plan], int]) -> list[str]:
    """Return the changes that would help, each with what would be taken then."""
    settings, policies = situation.settings, situation.policies
    other: dict[str, Plan] = {}
    if settings.positions > 1024:
        fewer = replace(settings, positions=settings.positions // 4)
        other[f"micro_batch_tokens={fewer.positions}"] = situation.planned(policies, fewer)
    if settings.dtype == "float32":
        other["dtype='bfloat16'"] = situation.planned(policies, replace(settings, dtype="bfloat16"))
    if any(policy.lora is None for policy in policies):
        adapted = [replace(policy, lora=policy.lora or LoRA()) for policy in policies]
        other["Policy(lora=LoRA())"] = situation.planned(adapted, settings)
    now = size(situation.plan)
    return [f"{change} takes {_gib(size(plan))}" for change, plan in other.items() if size(plan) < now]


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"

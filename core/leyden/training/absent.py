"""What stands in for the parts that a run does not need.

A search for prompts with closed models has no policy, so no engine, gateway or learner; learning from stored rollouts
has no agent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from leyden.errors import ConfigurationError
from leyden.interfaces import (
    Access,
    AttemptResult,
    Batch,
    Engine,
    Generation,
    GenerationRequest,
    RolloutSpec,
    Sample,
    Weights,
)
from leyden.roles import Policy
from leyden.spans import Record
from leyden.usage import Usage


class NoEngine:
    """Serves nothing."""

    context_length = 0
    keeps_versions = True
    model = ""

    def sha256(self, model: str) -> str:
        return ""

    def models(self) -> Sequence[str]:
        return ()

    async def start(self, policies: Sequence[Policy]) -> None:
        """Start nothing."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Refuse.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(f"model {request.model!r} is asked for, but this run has no engine")

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        """Take nothing."""

    async def stop(self) -> None:
        """Stop nothing."""


class NoLearner:
    """Learns nothing; its checkpoints are empty."""

    def open(self, policies: Sequence[Policy], model: str, *, seed: int) -> None:
        """Load nothing."""

    def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
        raise _no_policy(policy)

    def logprobs(self, policy: str, samples: Sequence[Sample], *, reference: bool = False) -> Sequence[Sequence[float]]:
        raise _no_policy(policy)

    def values(self, policy: str, samples: Sequence[Sample]) -> Sequence[Sequence[float]]:
        raise _no_policy(policy)

    def optim_step(self, policy: str, learning_rate: float) -> Mapping[str, float]:
        raise _no_policy(policy)

    def weights(self, policy: str) -> Weights:
        raise _no_policy(policy)

    def export(self, policy: str, folder: Path) -> None:
        raise _no_policy(policy)

    def save(self, folder: Path) -> None:
        """Write an empty folder."""
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, folder: Path) -> None:
        """Read nothing."""

    def close(self) -> None:
        """Free nothing."""


class NoGateway:
    """Opens no door: no role of this run has a policy."""

    base_url = ""

    async def start(self, engine: Engine, record: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        """Open nothing."""

    def admit(self, access: Access) -> str:
        """Return a token that nobody asks for."""
        return "none"

    async def revoke(self, rollout_id: str) -> None:
        """Close nothing."""

    async def hold(self) -> None:
        """Hold nothing."""

    def release(self) -> None:
        """Let go of nothing."""

    async def stop(self) -> None:
        """Stop nothing."""


class NoExecutor:
    """Runs nothing."""

    async def start(self, sink: Callable[[Sequence[Record]], Awaitable[None]]) -> None:
        """Get nothing ready."""

    async def run(self, spec: RolloutSpec) -> AttemptResult:
        """Refuse.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(f"rollout {spec.rollout_id!r} is to be run, but the Trainer was given no agent")

    def usages(self) -> Sequence[Usage]:
        return ()

    async def stop(self) -> None:
        """Stop nothing."""


def _no_policy(name: str) -> ConfigurationError:
    return ConfigurationError(f"policy {name!r} is to be trained, but this run has no policies")

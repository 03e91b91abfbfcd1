"""Several algorithms one after the other, in one run over one store.

One idea: a phase sees the same session, only fewer steps; what a phase has published, weights or prompts, is what the
next one begins with.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from leyden.errors import ConfigurationError
from leyden.interfaces import Algorithm, Demands, Session, demands_of
from leyden.roles import Policy


@dataclass(frozen=True)
class Phase:
    """An algorithm and how many steps it has.

    Raises:
        ConfigurationError: the algorithm does not know itself how many steps it takes, and nobody says.
    """

    algorithm: Algorithm
    steps: int | None = None
    """`None`: as many as the algorithm takes by itself."""
    learning_rate: float | None = None
    """In place of the policies' own: fine-tuning often wants another one than RL."""

    def __post_init__(self) -> None:
        own = demands_of(self.algorithm).steps
        if self.steps is None and own is None:
            raise ConfigurationError(f"Phase({self.algorithm!r}) needs steps=")
        if self.steps is not None and self.steps < 1:
            raise ConfigurationError(f"steps={self.steps!r} of a phase must be at least 1")
        if self.learning_rate is not None and not self.learning_rate >= 0:
            raise ConfigurationError(f"learning_rate={self.learning_rate!r} of a phase must be at least 0")
        if self.steps is not None and own is not None and self.steps != own:
            raise ConfigurationError(f"{self.algorithm!r} takes {own} steps by itself; leave steps={self.steps!r} out")

    @property
    def length(self) -> int:
        """Return its steps."""
        return self.steps or demands_of(self.algorithm).steps or 1


class Chain:
    """Runs phases one after the other: fine-tuning, then RL, then prompts. Implements `leyden.interfaces.Algorithm`.

    `fit()` needs no number of steps; a resume goes on in the phase that was under way.
    """

    def __init__(self, *phases: Phase) -> None:
        """Take the phases in order.

        Raises:
            ConfigurationError: there is none.
        """
        if not phases or not all(isinstance(phase, Phase) for phase in phases):
            raise ConfigurationError(f"Chain takes phases, such as Chain(Phase(GRPO(), steps=20)), got {phases!r}")
        self.phases = phases

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.phases))})"

    @property
    def group_size(self) -> int:
        """Return the rollouts a task of the first phase that samples."""
        sampling = [phase for phase in self.phases if demands_of(phase.algorithm).runs_agent]
        return (sampling or self.phases)[0].algorithm.group_size

    @property
    def demands(self) -> Demands:
        """Return what all phases together ask for."""
        every = [demands_of(phase.algorithm) for phase in self.phases]
        return Demands(
            steps=sum(phase.length for phase in self.phases),
            runs_agent=any(one.runs_agent for one in every),
            trains=any(one.trains for one in every),
            prompts=any(one.prompts for one in every),
            synchronous=True,
        )

    def check(self, policies: Sequence[Policy]) -> None:
        """Let every phase check its options.

        Raises:
            ConfigurationError: what a phase refuses.
        """
        for phase in self.phases:
            phase.algorithm.check(policies)

    async def run(self, session: Session) -> None:
        """Run the phases that are not over yet."""
        end = 0
        for phase in self.phases:
            end += phase.length
            if session.step < end and not session.stop_requested:
                await phase.algorithm.run(cast(Session, _Part(session, phase, end)))


class _Part:
    """A session with the steps and the learning rate of one phase."""

    def __init__(self, session: Session, phase: Phase, end: int) -> None:
        self._session = session
        self._end = end
        rate = phase.learning_rate
        own = session.policies
        self.policies = own if rate is None else [replace(policy, learning_rate=rate) for policy in own]

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def steps(self) -> AsyncIterator[int]:
        """Yield the steps still to do of this phase."""
        return self._session.steps(until=self._end)

"""An algorithm of a third party: it samples every step and leaves the weights alone."""

from collections.abc import Sequence

from leyden.errors import ConfigurationError
from leyden.interfaces import Session
from leyden.roles import Policy


class Acme:
    """Measure the mean reward of every step."""

    def __init__(self, group_size: int = 2) -> None:
        self.group_size = group_size

    def check(self, policies: Sequence[Policy]) -> None:
        """Refuse a group of one.

        Raises:
            ConfigurationError: the group is too small.
        """
        if self.group_size < 2:
            raise ConfigurationError(f"group_size={self.group_size!r} must be at least 2")

    async def run(self, session: Session) -> None:
        """Sample and report until the steps are done."""
        async for step in session.steps():
            groups = await session.sample(step, group_size=self.group_size)
            await session.finish_step(step, groups, {"acme/groups": float(len(groups))})

"""What a trainer refuses before anything is loaded: arguments that do not fit what its algorithm asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leyden.errors import ConfigurationError
from leyden.interfaces import Demands
from leyden.roles import Policy
from leyden.running.command import Command


def wanted_prompts(prompts: Mapping[str, str] | Sequence[str]) -> dict[str, str | None]:
    """Return role -> its prompt, `None` where nobody has told it.

    Raises:
        ConfigurationError: a name or a text that is none.
    """
    wanted: dict[str, str | None] = dict(prompts) if isinstance(prompts, Mapping) else dict.fromkeys(prompts)
    names_and_texts: list[object] = [*wanted, *(text for text in wanted.values() if text is not None)]
    if isinstance(prompts, str) or not all(isinstance(one, str) and one for one in names_and_texts):
        raise ConfigurationError(
            f"prompts={prompts!r} must be role names, such as ['writer'], or role -> system prompt"
        )
    return wanted


def check_demands(
    demands: Demands, *, agent: object, has_engine: bool, policies: Sequence[Policy], prompts: Mapping[str, str | None]
) -> None:
    """Refuse a trainer that lacks what its algorithm asks for.

    Raises:
        ConfigurationError: names what is missing.
    """
    if demands.runs_agent and agent is None:
        raise ConfigurationError("this algorithm runs the agent; give Trainer(agent, ...)")
    if policies and not has_engine:
        raise ConfigurationError(
            f"policy {policies[0].name!r} needs an engine: Trainer(engine=TransformersEngine(...))"
        )
    if demands.prompts and not prompts:
        raise ConfigurationError("this algorithm improves prompts; name their roles: Trainer(prompts=['writer'])")
    untold = [role for role, text in prompts.items() if text is None]
    if untold and not demands.prompts:
        raise ConfigurationError(
            f"prompts of roles {untold!r} are named without a text, but this algorithm improves none; give the texts "
            "that should be in force, or a prompt algorithm such as GEPA"
        )
    if prompts and isinstance(agent, Command):
        raise ConfigurationError(
            "the prompts of a program cannot be replaced: its calls do not pass this process. Run the agent as a "
            "Python function, or leave prompts= out"
        )

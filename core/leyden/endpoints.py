"""An address and a key that say who calls, for agents that hand them to another process or language.

One idea: inside a rollout the address names the rollout and the role, and so does the key, for clients that let
only one of the two be set. In a deployed app it is simply where the trained role is served.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import quote

from leyden import context, wire
from leyden.errors import ConfigurationError
from leyden.roles import MAIN_ROLE


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a trained role's model answers."""

    base_url: str
    """For OpenAI's clients; ends in `/v1`."""
    api_key: str = field(repr=False)
    """Good for one rollout, until it ends."""
    model: str
    """The name it is served under."""

    @property
    def anthropic_base_url(self) -> str:
        """For Anthropic's clients, which add `/v1` themselves."""
        return self.base_url.removesuffix("/v1")


def endpoint(role: str = MAIN_ROLE) -> Endpoint:
    """Return where another process calls the model of `role`, on behalf of the rollout that runs here.

    Raises:
        ConfigurationError: nothing is trained or deployed here, or `role` is in no policy and keeps its own endpoint.
    """
    frame = context.current()
    rollout = frame.rollout if frame else None
    routing = rollout.routing if rollout else wire.default_routing()
    if routing is None:
        raise ConfigurationError(
            f"leyden.endpoint({role!r}) was called outside a rollout and without a deployment, so there is no address; "
            "call it inside the agent that a Trainer runs, or after leyden.deploy"
        )
    route = routing.route_of(role)
    if route is None:
        kept = sorted({pattern for each in routing.routes for pattern in each.kept_roles})
        raise ConfigurationError(
            f"role {role!r} is in no policy, so its calls go to its own endpoint; policies take "
            f"{[list(each.roles or ['*']) for each in routing.routes]!r}" + (f" except {kept!r}" if kept else "")
        )
    if rollout is None:
        return Endpoint(base_url=routing.base_url, api_key=routing.token, model=route.model)
    rollout.declared_roles.add(role)
    named = quote(role, safe="")
    root = routing.base_url.rstrip("/").removesuffix("/v1")
    return Endpoint(
        base_url=f"{root}/rollout/{quote(rollout.rollout_id, safe='')}/role/{named}/v1",
        # Whose calls these are: what comes from elsewhere has no other way to say where in the tree it belongs.
        api_key=":".join(filter(None, (routing.token, named, frame.span_id if frame else None))),
        model=route.model,
    )

"""Policies, the roles they train, and the routing that sends a role's calls to its policy.

A role pattern is a shell pattern (`fnmatch`): `writer`, `team.*`. The first policy whose pattern matches takes
the role; a role in no policy keeps its own endpoint.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from leyden.errors import ConfigurationError, RoleError

MAIN_ROLE = "main"
"""The role of a call outside any named agent or node."""

RESERVED_MODEL = "base"
"""The name under which an engine serves the weights it was started with."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a policy is sampled. `None` keeps what the agent asked for."""

    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    """0 samples from the whole vocabulary."""
    max_tokens: int | None = None
    keep_seed: bool = False
    """False drops the agent's `seed`, so that the samples of a group differ."""
    keep_format: bool = False
    """False lets the policy write freely where the agent asks for a format (`response_format`) or insists on a tool
    call: with a mask its tokens would not be its own choice, and could not be trained."""

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature < 0:
            raise ConfigurationError(f"temperature must be at least 0, got {self.temperature!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigurationError(f"top_k must be 0 (off) or more, got {self.top_k!r}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigurationError(f"max_tokens must be at least 1, got {self.max_tokens!r}")


AGENTS_OWN = Sampling(temperature=None, top_p=None, top_k=None, max_tokens=None, keep_seed=True, keep_format=True)
"""Leaves every sampling parameter to the agent: the default of evaluation."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A low-rank adapter on the shared base weights, W + (alpha / rank) B A (Hu et al. 2021, section 4.1).

    Raises:
        ConfigurationError: a value that no adapter could have.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last names of the linear layers that get one; the default is every layer of attention and MLP."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or isinstance(self.targets, str) or not list(self.targets):
            raise ConfigurationError(
                f"LoRA(rank={self.rank!r}, alpha={self.alpha!r}, targets={self.targets!r}): rank is at least 1, alpha "
                "above 0, and targets a list of layer names that is not empty"
            )


@dataclass(frozen=True)
class Policy:
    """Trainable weights, and the roles that speak with them.

    Raises:
        ConfigurationError: a value that no learner could honour.
    """

    name: str
    roles: Sequence[str] | None = field(default=None, kw_only=True)
    """Shell patterns of role names; `None` takes every role."""
    trainable: bool = field(default=True, kw_only=True)
    """False: served and recorded, never trained (frozen opponents, judges on our engine)."""
    lora: LoRA | None = field(default=None, kw_only=True)
    """An adapter on the base that all policies with one share; `None` trains a full copy of the weights."""
    freeze_after: int | None = field(default=None, kw_only=True)
    """The last step that trains it; afterwards it goes on speaking as it is. `None`: never."""
    learning_rate: float = field(default=1e-5, kw_only=True)
    """Adapters want about ten times what full weights do."""
    final_learning_rate_fraction: float = field(default=1.0, kw_only=True)
    """The learning rate falls linearly to this fraction of itself at the last step; 1 keeps it constant."""
    sampling: Sampling = field(default=Sampling(), kw_only=True)
    """Replaces the agent's own values in training rollouts."""
    eval_sampling: Sampling = field(default=AGENTS_OWN, kw_only=True)
    max_gradient_norm: float = field(default=1.0, kw_only=True)
    betas: tuple[float, float] = field(default=(0.9, 0.95), kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.name or self.name == RESERVED_MODEL or "/" in self.name:
            raise ConfigurationError(
                f"policy name {self.name!r} is not usable: it must be non-empty, without '/', and not "
                f"{RESERVED_MODEL!r}, which names the untrained weights"
            )
        if isinstance(self.roles, str):
            raise ConfigurationError(f"Policy.roles is a list of names, got the string {self.roles!r}")
        if self.roles is not None and not list(self.roles):
            raise ConfigurationError(f"policy {self.name!r} has an empty roles list; roles=None takes every role")
        if self.learning_rate < 0 or self.max_gradient_norm <= 0 or not 0 <= self.final_learning_rate_fraction <= 1:
            raise ConfigurationError(
                f"policy {self.name!r}: learning_rate={self.learning_rate!r} must be at least 0, "
                f"max_gradient_norm={self.max_gradient_norm!r} above 0 and "
                f"final_learning_rate_fraction={self.final_learning_rate_fraction!r} in [0, 1]"
            )
        if self.freeze_after is not None and self.freeze_after < 0:
            raise ConfigurationError(f"policy {self.name!r}: freeze_after={self.freeze_after!r} must be at least 0")

    def is_trained_at(self, step: int) -> bool:
        """Say whether `step` (from 1) updates it."""
        return self.trainable and (self.freeze_after is None or step <= self.freeze_after)


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where the calls of some roles go."""

    model: str
    """The name the gateway or server knows: the policy's name in training."""
    roles: tuple[str, ...] | None = None
    """Shell patterns; `None` matches every role."""
    kept_roles: tuple[str, ...] = ()
    """Shell patterns of roles that keep their own endpoint although `roles` matches them: an untrained policy before
    this one took them in training, and it is not deployed."""


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the wire needs to reroute trained roles; crosses process borders as it is."""

    base_url: str
    """OpenAI-style base, ending in `/v1`."""
    token: str
    """Sent as the bearer token in place of the user's key."""
    routes: tuple[Route, ...] = ()
    prompts: dict[str, str] = {}
    """Role -> system prompt that replaces the agent's own."""
    fallback: bool = False
    """On a connection error send the app's own request instead (deployment only)."""
    on_lost_context: str = "error"
    """`error` refuses a call whose rollout is unknown while rollouts run here; `pass` lets it through."""

    def route_of(self, role: str) -> Route | None:
        """Return the first route whose pattern matches `role`, or `None` for a role that keeps its endpoint."""
        for route in self.routes:
            if matches(route.roles, role):
                return None if matches(route.kept_roles, role) else route
        return None


def matches(patterns: Sequence[str] | None, role: str) -> bool:
    """Say whether `role` fits one of `patterns`; `None` fits every role."""
    return patterns is None or any(fnmatch.fnmatchcase(role, pattern) for pattern in patterns)


def routes_for(policies: Iterable[Policy]) -> tuple[Route, ...]:
    """Return one route a policy, in order.

    Raises:
        ConfigurationError: two policies have one name, or one literal role is named twice.
    """
    routes: list[Route] = []
    names: set[str] = set()
    owner: dict[str, str] = {}
    for policy in policies:
        if policy.name in names:
            raise ConfigurationError(f"two policies are named {policy.name!r}; names must differ")
        names.add(policy.name)
        for pattern in policy.roles or ():
            if pattern in owner:
                raise ConfigurationError(
                    f"role {pattern!r} is in policies {owner[pattern]!r} and {policy.name!r}; a role has one policy"
                )
            owner[pattern] = policy.name
        routes.append(Route(model=policy.name, roles=None if policy.roles is None else tuple(policy.roles)))
    return tuple(routes)


def check_roles(policies: Iterable[Policy], spoken: Mapping[str, int], declared: Iterable[str]) -> list[str]:
    """Compare the policies' patterns with the roles seen; return a warning for each pattern of a silent role.

    A role that speaks only now and then need not be in the first rollouts, and not every framework knows it before it
    is made; so a policy is refused only when none of its patterns matches anybody.

    Args:
        policies: the run's policies.
        spoken: role -> number of model calls it made.
        declared: roles the adapters know of (graph nodes, agent names), silent or not.

    Raises:
        RoleError: no pattern of a policy matches a role that spoke or one that was declared; lists both.
    """
    known = set(declared)
    seen = (
        f"Roles that made model calls: {dict(sorted(spoken.items()))!r}; "
        f"roles the framework declared: {sorted(known)!r}"
    )
    warnings: list[str] = []
    for policy in policies:
        patterns = list(policy.roles or ())
        silent = [pattern for pattern in patterns if not any(matches([pattern], role) for role in spoken)]
        unknown = [pattern for pattern in silent if not any(matches([pattern], role) for role in known)]
        if patterns and unknown == patterns:
            raise RoleError(
                f"policy {policy.name!r} trains role {patterns[0]!r}, but no such role exists. {seen}. "
                "Name one of these in Policy(roles=[...])"
            )
        for pattern in silent:
            names = ", ".join(repr(role) for role in sorted(known) if matches([pattern], role))
            if names:
                warnings.append(f"policy {policy.name!r}: declared, but no model call yet: {names}")
            else:
                warnings.append(
                    f"policy {policy.name!r}: nobody has spoken as {pattern!r} yet; is it spelled right? {seen}"
                )
    return warnings

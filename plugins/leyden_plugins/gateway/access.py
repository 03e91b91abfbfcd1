"""Decide who may call: one token an attempt, good for that attempt's own rollout and policies.

One idea: `TOKEN:ROLE` (the role percent-encoded) is a key too, and stands for the URL that names both, for clients
that let their user set a key but no URL. `TOKEN:ROLE:SPAN` also says below which span the calls belong.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from leyden.interfaces import Access, GenerationRequest, SamplingParameters
from leyden.roles import MAIN_ROLE, Sampling, matches
from leyden.spans import new_id
from leyden_plugins.gateway.conversations import Conversations
from leyden_plugins.gateway.exchange import Exchange
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal

LONGEST_NAME = 4096
"""Characters of a role, span or rollout name in a header or path, percent-encoded."""

NAMED = re.compile(r"(?P<token>.+?):(?P<role>[^:]*)(?::(?P<span>[0-9a-f]{16}))?")
"""A key that says who speaks."""


@dataclass(eq=False)
class Admission:
    """A token's rights and what was done with them."""

    access: Access
    is_open: bool = False
    """Many callers share it, whatever rollout they say they belong to: an ordinary endpoint."""
    next_attempt: dict[str, int] = field(default_factory=dict)
    """Span -> the first HTTP attempt number that is free, so that no record shares its key."""
    memory: Memory = field(default_factory=Memory)
    """What its callers may refer back to."""
    conversations: Conversations = field(default_factory=Conversations)
    """Its answered calls, which later ones go on from."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who makes one call."""

    admission: Admission
    role: str
    role_is_fixed: bool
    """The path or the key names the role, so the model name of the body means nothing."""
    span_id: str
    has_span: bool
    """An adapter writes the span; otherwise the gateway does."""
    parent_id: str | None
    http_attempt: int
    model: str | None = None
    """What the agent called its model before the wire named the policy; its answer says so too."""

    @property
    def access(self) -> Access:
        return self.admission.access

    def policy(self, model: str) -> str:
        """Return the policy that answers.

        Raises:
            Refusal: neither the model's name nor the role leads to a policy of this access.
        """
        if not self.role_is_fixed and model in self.access.models:
            return model
        for route in self.access.routes:
            if route.model in self.access.models and matches(route.roles, self.role):
                return route.model
        if self.role_is_fixed:
            routed = [role for route in self.access.routes for role in route.roles or ()]
            message = f"role {self.role!r} is in no policy; routed are {routed!r}; send others to their own endpoint"
        else:
            message = f"model {model!r} is not served; served are {sorted(self.access.models)!r}"
        raise Refusal(404, message, code="model_not_found", param="model")


def sampling_for(replacement: Sampling, asked: SamplingParameters) -> SamplingParameters:
    """Return what is really used: the policy's values where it has some, the agent's elsewhere."""
    return replace(
        asked,
        temperature=asked.temperature if replacement.temperature is None else replacement.temperature,
        top_p=asked.top_p if replacement.top_p is None else replacement.top_p,
        top_k=asked.top_k if replacement.top_k is None else replacement.top_k,
        max_tokens=asked.max_tokens if replacement.max_tokens is None else replacement.max_tokens,
        seed=asked.seed if replacement.keep_seed else None,
    )


def request_for(replacement: Sampling, asked: GenerationRequest) -> GenerationRequest:
    """Return what the engine is really asked: with the policy's sampling and, unless it keeps formats, no mask."""
    request = replace(asked, sampling=sampling_for(replacement, asked.sampling))
    if replacement.keep_format:
        return request
    choice = "auto" if asked.forces_tool else asked.tool_choice
    return replace(request, response_format=None, tool_choice=choice)


class AccessTable:
    """The tokens in force."""

    def __init__(self, anybody: Admission | None = None) -> None:
        """`anybody` is the admission of whoever comes, with or without a key."""
        self._admissions: dict[str, Admission] = {}
        self._anybody = anybody

    def admit(self, admission: Admission, token: str | None = None) -> str:
        """Issue a token."""
        # 256 random bits: finding it through the dictionary's timing is not a thing to defend against.
        token = token or f"leyden-{secrets.token_urlsafe(32)}"
        self._admissions[token] = admission
        return token

    def revoke(self, rollout_id: str) -> None:
        """Take back every token of a rollout."""
        for token, admission in list(self._admissions.items()):
            if admission.access.rollout_id == rollout_id:
                del self._admissions[token]

    def admission(self, exchange: Exchange) -> tuple[Admission, str | None, str | None]:
        """Return the admission of a request's key, and the role and the parent span that the key names.

        Raises:
            Refusal: the key is missing or unknown; the message does not repeat it.
        """
        if self._anybody is not None:
            return self._anybody, None, None
        for key in exchange.keys:
            if key in self._admissions:
                return self._admissions[key], None, None
            named = NAMED.fullmatch(key)
            if named is not None and named["token"] in self._admissions:
                return (
                    self._admissions[named["token"]],
                    unquoted(named["role"], "the role in the API key"),
                    named["span"],
                )
        raise Refusal(
            401,
            "the API key is unknown, or belongs to a rollout that is over"
            if exchange.keys
            else "no API key was given; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            code="invalid_api_key",
        )

    def identify(self, exchange: Exchange, rollout_id: str | None, role: str | None) -> Caller:
        """Return who calls; `rollout_id` and `role` are those of the path, if it names them.

        Raises:
            Refusal: the token is wrong, or good for another rollout or attempt only.
        """
        admission, in_key, parent_id = self.admission(exchange)
        role = None if admission.is_open else role or in_key
        if not admission.is_open:
            check_rollout(exchange, admission.access, rollout_id)
        span_id = None if admission.is_open else name(exchange, "x-leyden-span")
        attempt = 0 if admission.is_open else http_attempt(exchange)
        attempt = max(attempt, admission.next_attempt.get(span_id, 0)) if span_id else attempt
        if span_id:
            admission.next_attempt[span_id] = attempt + 1
        return Caller(
            admission=admission,
            role=role or name(exchange, "x-leyden-role") or MAIN_ROLE,
            role_is_fixed=role is not None,
            span_id=span_id or new_id(),
            has_span=span_id is not None,
            parent_id=name(exchange, "x-leyden-parent") or parent_id,
            model=name(exchange, "x-leyden-model"),
            http_attempt=attempt if span_id else 0,
        )

    def models(self, exchange: Exchange) -> Sequence[str]:
        """Return the models that a request's token may use."""
        return tuple(self.admission(exchange)[0].access.models)


def check_rollout(exchange: Exchange, access: Access, in_path: str | None) -> None:
    """Refuse a token used for another rollout than its own, or for an earlier attempt."""
    for claimed in (in_path, name(exchange, "x-leyden-rollout")):
        if claimed is not None and claimed != access.rollout_id:
            raise Refusal(401, f"the API key is not good for rollout {claimed!r}", code="invalid_api_key")
    attempt = exchange.header("x-leyden-attempt")
    if attempt is not None and attempt != str(access.attempt):
        raise Refusal(401, f"the API key is not good for attempt {attempt[:20]!r}", code="invalid_api_key")


def name(exchange: Exchange, header: str) -> str | None:
    """Return a percent-encoded header's text; `None` when it is absent or empty."""
    return unquoted(exchange.header(header), header)


def unquoted(value: str | None, where: str) -> str | None:
    """Undo percent-encoding.

    Raises:
        Refusal: it is too long.
    """
    if value is not None and len(value) > LONGEST_NAME:
        raise Refusal(400, f"{where} is longer than {LONGEST_NAME} characters", code="invalid_value", param=where)
    return unquote(value) or None if value else None


def http_attempt(exchange: Exchange) -> int:
    """Return the number that the client gave this HTTP attempt; 0 when it gave none."""
    value = exchange.header("x-leyden-http-attempt") or "0"
    if not (value.isascii() and value.isdigit() and len(value) <= 6):
        raise Refusal(
            400,
            f"x-leyden-http-attempt must be a whole number from 0, got {value[:20]!r}",
            code="invalid_value",
            param="x-leyden-http-attempt",
        )
    return int(value)

"""Read the sampling fields that OpenAI's protocols share."""

from __future__ import annotations

from collections.abc import Mapping

from leyden.interfaces import SamplingParameters
from leyden_plugins.gateway.refusal import Refusal

FIELDS = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "seed",
        "stop",
        "max_tokens",
        "max_completion_tokens",
        "n",
    }
)
"""`top_k` and `min_p` are not OpenAI's; every open server takes them."""

MOST_CHOICES = 128
MOST_STOPS = 16


def wrong(field: str, value: object, expected: str) -> Refusal:
    """Return the refusal of a field's value."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return Refusal(400, f"{field} must be {expected}, got {shown}", code="invalid_value", param=field)


def read_sampling(body: Mapping[str, object]) -> SamplingParameters:
    """Return what `body` asks for; an absent or null field keeps its default.

    Raises:
        Refusal: names the field that has a wrong type or range.
    """
    top_k = whole(body, "top_k", -1, 2**31)
    longest = whole(body, "max_completion_tokens", 1, 2**31)
    if longest is None:
        longest = whole(body, "max_tokens", 1, 2**31)
    return SamplingParameters(
        temperature=number(body, "temperature", 0.0, 2.0, 1.0),
        top_p=number(body, "top_p", 1e-6, 1.0, 1.0),
        # -1 is how vLLM's clients switch it off.
        top_k=max(top_k or 0, 0),
        min_p=number(body, "min_p", 0.0, 1.0, 0.0),
        frequency_penalty=number(body, "frequency_penalty", -2.0, 2.0, 0.0),
        presence_penalty=number(body, "presence_penalty", -2.0, 2.0, 0.0),
        seed=whole(body, "seed", -(2**63), 2**64 - 1),
        stop=read_stop(body.get("stop")),
        max_tokens=longest,
        n=whole(body, "n", 1, MOST_CHOICES) or 1,
    )


def number(body: Mapping[str, object], field: str, least: float, most: float, default: float) -> float:
    """Return a number within bounds."""
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise wrong(field, value, f"a number from {least:g} to {most:g}")
    return float(value)


def whole(body: Mapping[str, object], field: str, least: int, most: int) -> int | None:
    """Return a whole number within bounds, or `None` when it is absent."""
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise wrong(field, value, f"a whole number from {least} to {most}")
    return value


def flag(body: Mapping[str, object], field: str) -> bool:
    """Return a boolean; False when it is absent."""
    value = body.get(field)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise wrong(field, value, "true or false")
    return value


def read_stop(value: object) -> tuple[str, ...]:
    """Return the stop strings."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(stop, str) and stop for stop in stops)
    ):
        raise wrong("stop", value, f"a non-empty string or a list of at most {MOST_STOPS} of them")
    return tuple(stops)

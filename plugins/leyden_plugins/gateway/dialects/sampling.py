"""Read the sampling fields that OpenAI's chat and completion protocols share."""

from __future__ import annotations

from collections.abc import Mapping

from leyden.interfaces import SamplingParameters
from leyden_plugins.gateway.dialects.fields import number, whole, wrong

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
MOST_TOKENS = 2**31


def read_sampling(body: Mapping[str, object]) -> SamplingParameters:
    """Return what `body` asks for; an absent or null field keeps its default.

    Raises:
        Refusal: names the field that has a wrong type or range.
    """
    longest = whole(body, "max_completion_tokens", 1, MOST_TOKENS)
    if longest is None:
        longest = whole(body, "max_tokens", 1, MOST_TOKENS)
    return SamplingParameters(
        temperature=read_temperature(body),
        top_p=read_top_p(body),
        top_k=read_top_k(body),
        min_p=number(body, "min_p", 0.0, 1.0, 0.0),
        frequency_penalty=number(body, "frequency_penalty", -2.0, 2.0, 0.0),
        presence_penalty=number(body, "presence_penalty", -2.0, 2.0, 0.0),
        seed=whole(body, "seed", -(2**63), 2**64 - 1),
        stop=read_stop(body, "stop"),
        max_tokens=longest,
        n=whole(body, "n", 1, MOST_CHOICES) or 1,
    )


def read_temperature(body: Mapping[str, object]) -> float:
    """Return the temperature."""
    return number(body, "temperature", 0.0, 2.0, 1.0)


def read_top_p(body: Mapping[str, object]) -> float:
    """Return the share of the probability that is sampled from."""
    return number(body, "top_p", 1e-6, 1.0, 1.0)


def read_top_k(body: Mapping[str, object]) -> int:
    """Return how many tokens are sampled from; vLLM's clients switch it off with -1."""
    return max(whole(body, "top_k", -1, 2**31) or 0, 0)


def read_stop(body: Mapping[str, object], field: str) -> tuple[str, ...]:
    """Return the stop strings."""
    value = body.get(field)
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(stop, str) and stop for stop in stops)
    ):
        raise wrong(field, value, f"a non-empty string or a list of at most {MOST_STOPS} of them")
    return tuple(stops)

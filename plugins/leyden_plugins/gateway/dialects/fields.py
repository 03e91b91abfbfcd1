"""Read single fields of a request body, each refused by its own name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from leyden_plugins.gateway.refusal import Refusal

NOTHING: Mapping[str, tuple[object, ...]] = {}


def wrong(field: str, value: object, expected: str) -> Refusal:
    """Return the refusal of a field's value."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return Refusal(400, f"{field} must be {expected}, got {shown}", code="invalid_value", param=field)


def unsupported(field: str, why: str = "is not supported by this server; remove it") -> Refusal:
    """Return the refusal of a field."""
    return Refusal(400, f"{field!r} {why}", code="unsupported_field", param=field)


def check_names(
    body: Mapping[str, object],
    known: Collection[str],
    neutral: Mapping[str, tuple[object, ...]] = NOTHING,
) -> None:
    """Refuse a field that is not `known`, unless it is null or has a value of `neutral`, which means nothing.

    Raises:
        Refusal: names the field.
    """
    for name, value in body.items():
        if name in known or value is None or value in neutral.get(name, ()):
            continue
        raise unsupported(name)


def string(body: Mapping[str, object], field: str) -> str:
    """Return a string that must be there."""
    value = body.get(field)
    if not isinstance(value, str):
        raise wrong(field, value, "a string")
    return value


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


def flag(body: Mapping[str, object], field: str, default: bool = False) -> bool:
    """Return a boolean."""
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(field, value, "true or false")
    return value


def mapping(body: Mapping[str, object], field: str) -> Mapping[str, object]:
    """Return an object; an empty one when it is absent."""
    value = body.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(field, value, "an object")
    return value

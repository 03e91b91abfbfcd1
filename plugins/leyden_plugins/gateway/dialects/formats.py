"""Read the form that an answer must have, in whatever shape a protocol asks for it."""

from __future__ import annotations

from collections.abc import Mapping

from leyden_plugins.gateway.dialects.fields import wrong

UNNAMED = "answer"
"""The name of a schema that was given none."""


def read_format(value: object, where: str, *, nested: str | None = None) -> Mapping[str, object] | None:
    """Return the form in the shape of `GenerationRequest.response_format`; `None` for free text.

    Args:
        value: the field's value.
        where: the field's name.
        nested: the key under which the protocol puts name and schema, where they do not stand beside `type`.

    Raises:
        Refusal: it is no form that JSON can have.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong(where, value, "an object with a type")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        raise wrong(where, value, "of type 'text', 'json_object' or 'json_schema'")
    described = value if nested is None else value.get(nested)
    schema = described.get("schema") if isinstance(described, dict) else None
    name = described.get("name") if isinstance(described, dict) else None
    if not isinstance(schema, dict) or not isinstance(name, str | None):
        raise wrong(where, value, "a 'json_schema' with a schema, and a string as its name")
    return {"type": "json_schema", "name": name or UNNAMED, "schema": schema}

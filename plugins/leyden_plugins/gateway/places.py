"""What the paths of the gateway say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from leyden_plugins.gateway.access import unquoted


@dataclass(frozen=True)
class Place:
    """What a request's path says."""

    tail: str
    """Below `/v1/`."""
    rollout_id: str | None = None
    role: str | None = None


def place_of(path: str) -> Place | None:
    """Read `/v1/...` or `/rollout/{rollout_id}/role/{role}/v1/...`; `None` for any other path."""
    if path.startswith("/v1/"):
        return Place(path[4:])
    parts = path.split("/", 6)
    if len(parts) == 7 and parts[1] == "rollout" and parts[3] == "role" and parts[5] == "v1":
        rollout_id, role = unquoted(parts[2], "the rollout's id"), unquoted(parts[4], "the role's name")
        if rollout_id and role:
            return Place(parts[6], rollout_id, role)
    return None


def model_list(models: Sequence[str]) -> dict[str, object]:
    """Return the list of models that OpenAI's and Anthropic's clients both understand."""
    data = [
        {
            "id": model,
            "object": "model",
            "type": "model",
            "display_name": model,
            "created": 0,
            "created_at": "1970-01-01T00:00:00Z",
            "owned_by": "leyden",
        }
        for model in models
    ]
    first, last = (models[0], models[-1]) if models else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": False}

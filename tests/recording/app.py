"""A little app with two speakers, in front of a local model server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

import leyden
from leyden.interfaces import Group
from leyden.training.stored import groups_of

client = httpx.Client(trust_env=False)


def say(base_url: str, role: str, text: str) -> str:
    """Return what a role's model answers."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    with leyden.role(role):
        reply = client.post(f"{base_url}/chat/completions", json=body)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


def answer(base_url: str, question: str) -> str:
    """Let the writer answer, and the critic look at it."""
    said = say(base_url, "writer", question)
    return say(base_url, "critic", said)


def recorded(folder: Path, **weights: float) -> list[Group]:
    """Return what a folder holds."""
    return asyncio.run(groups_of(folder, reward_weights=weights or {"reward": 1.0}))

"""What an export folder says to people: SERVE.md, and PROMPTS.md with what has changed in the prompts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from leyden.deploying.exported import Export, ExportedPolicy
from leyden.training.prompts import Prompt

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""


def prompt_diff(before: str, after: str, *, role: str) -> str:
    """Return a unified diff of a role's prompts, with all of both texts in sight."""
    longest = max(before.count("\n"), after.count("\n")) + 1
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"{role} before", f"{role} now", n=longest, lineterm=""
    )
    return "\n".join(lines)


def prompts_page(prompts: Mapping[str, Prompt], own: Mapping[str, str]) -> str:
    """Return the text of PROMPTS.md.

    Args:
        prompts: role -> the prompt that is exported.
        own: role -> what it said before any search, where that is known.
    """
    sections = ["# Prompts"]
    for role, prompt in prompts.items():
        before = own.get(role)
        sections.append(f"## {role}, version {prompt.version}")
        if before is not None and before != prompt.text:
            sections.append(_fenced(prompt_diff(before, prompt.text, role=role), "diff"))
        sections.append(_fenced(prompt.text, "text"))
    return "\n\n".join(sections) + "\n"


def _fenced(text: str, language: str) -> str:
    """Return a block that no fence inside the text can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def instructions(described: Export, folder: str) -> str:
    """Return the text of SERVE.md."""
    if not described.policies:
        return DEPLOY.format(folder=folder, roles=_code(list(described.prompts)) or "no role")
    rows = [
        f"| `{one.model}` | {one.version} | "
        + ("every role" if one.roles is None else _code(one.roles))
        + (f" except {_code(one.kept_roles)}" if one.kept_roles else "")
        + f" | `{one.folder}` |"
        for one in described.policies.values()
    ]
    return SERVE.format(
        folder=folder,
        name=next(iter(described.policies)),
        rows="\n".join(rows),
        vllm="\n".join(vllm_lines(described)),
        prompts=f", sets the prompts of {_code(list(described.prompts))}" if described.prompts else "",
    )


def _code(roles: Sequence[str]) -> str:
    return ", ".join(f"`{role}`" for role in roles)


def vllm_lines(described: Export) -> list[str]:
    """Return a command line for each policy of whole weights, and one for all LoRAs on a base."""
    lines = []
    loras: dict[str, list[ExportedPolicy]] = {}
    for one in described.policies.values():
        if one.base_model is None:
            lines.append(f"    vllm serve {one.folder} --served-model-name {one.model}")
        else:
            loras.setdefault(one.base_model, []).append(one)
    for base, policies in loras.items():
        wanted = max(one.lora_rank or 1 for one in policies)
        rank = next((rank for rank in VLLM_RANKS if rank >= wanted), wanted)
        modules = " ".join(f"{one.model}={one.folder}" for one in policies)
        lines.append(
            f"    vllm serve {base} --enable-lora --max-loras {len(policies)} --max-lora-rank {rank} "
            f"--lora-modules {modules}"
        )
    return lines


SERVE = """\
# Serve these policies

| policy | version | roles | folder |
|---|--:|---|---|
{rows}

## Serve

From the folder above this one, on this machine:

    leyden serve {folder} --port 8000

or, as ordinary Hugging Face (or PEFT) folders, with any server, from inside this folder:

{vllm}

## Call: two lines, nothing of Leyden

Where the app makes the client of a trained role, give it the server and the model's name:

    llm = ChatOpenAI(
        base_url="http://127.0.0.1:8000/v1", api_key="none",
        model="{name}",
    )

## Call: no line changed in the agents

    import leyden
    leyden.deploy("{folder}", base_url="http://127.0.0.1:8000/v1")

sends exactly the roles of the table to the server{prompts} and leaves every other call alone.
"""

DEPLOY = """\
# Use these prompts

    import leyden
    leyden.deploy("{folder}")

puts them in the place of the system prompts of {roles}, in whatever framework those speak, and leaves every
other call alone. There is nothing to serve: no weights were trained. `PROMPTS.md` shows what has changed, for who would
rather write it into the app.
"""

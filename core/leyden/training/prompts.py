"""Prompts as something that is trained: what they are now, what others would do, and which are in force.

One idea: rollouts under a candidate are named after it, its tasks and the weights, so that asking for the same again,
also after a kill, finds them in the store and pays nothing. A candidate is what it changes: a prompt that was read from
rollouts is left to the agent, so that those rollouts are already the first ones of the seeds.
One trap: what is read from rollouts is what a model was sent. A prompt with something of the task in it differs from
call to call and cannot be replaced by one text; it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from leyden.errors import ConfigurationError, RoleError
from leyden.interfaces import RolloutRecords, Store
from leyden.spans import FINISHED, Kind, Mode, Resource, Rollout, now_ns
from leyden.training.runfolder import read_json, write_json

PROMPTS = "prompts.json"
"""In a checkpoint: role -> the prompt in force, and its version."""

SEED_TASKS = 3
"""Tasks that are run to read a role's own prompt."""

Run = Callable[[Sequence[Rollout], Mapping[str, str]], Awaitable[Sequence[RolloutRecords]]]
"""Runs rollouts under prompts; returns their records in order."""


class Prompt(msgspec.Struct, frozen=True):
    """A prompt in force."""

    version: int
    text: str


class Prompts:
    """The prompts of a run."""

    def __init__(
        self, wanted: Mapping[str, str | None], *, store: Store, tasks: Sequence[object], run: Run, folder: Path | None
    ) -> None:
        """Wire it.

        Args:
            wanted: role -> its prompt now; `None`: to be read from rollouts.
            store: keeps candidates and versions.
            tasks: to try candidates on.
            run: runs them.
            folder: of the checkpoint that the run goes on from.
        """
        self.in_force: dict[str, Prompt] = {
            role: Prompt(0, text) for role, text in wanted.items() if text is not None
        } | of_checkpoint(folder)
        self._wanted = wanted
        self._read: dict[str, str] = {}
        """Role -> the agent's own prompt, where it was read from rollouts."""
        self._store = store
        self._tasks = tasks
        self._run = run

    @property
    def texts(self) -> dict[str, str]:
        """Return role -> the prompt in force."""
        return {role: prompt.text for role, prompt in self.in_force.items()}

    async def seeds(self, versions: Mapping[str, int]) -> dict[str, str]:
        """Return role -> its prompt now, read from rollouts where nobody has told it.

        Raises:
            ConfigurationError: a role's system prompt differs from call to call, or it has none.
            RoleError: a role that does not speak.
        """
        unknown = [role for role in self._wanted if role not in self.in_force]
        if not unknown:
            return {role: self.in_force[role].text for role in self._wanted}
        first = range(min(SEED_TASKS, len(self._tasks)))
        records = await self.attempt(self.texts, first, versions)
        self._read = {role: spoken_prompt(records, role) for role in unknown}
        return self.texts | self._read

    def _changes(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Return the prompts that are not the agent's own anyway."""
        return {role: text for role, text in prompts.items() if self._read.get(role) != text}

    async def attempt(
        self, prompts: Mapping[str, str], tasks: Sequence[int], versions: Mapping[str, int]
    ) -> Sequence[RolloutRecords]:
        """Run tasks under these prompts, each once, or take what the store has of it."""
        prompts = self._changes(prompts)
        name = candidate_name(prompts, versions)
        content = json.dumps({"prompts": dict(prompts), "versions": dict(versions)}, sort_keys=True, ensure_ascii=False)
        if not await self._store.resources("candidate", name):
            found = Resource(kind="candidate", name=name, version=1, created_ns=now_ns(), content=content)
            await self._store.put_resources([found])
        wanted = dict.fromkeys(tasks)
        planned = [
            Rollout(
                rollout_id=rollout_name(name, index),
                task=self._tasks[index],
                task_id=f"t{index}",
                group_id=rollout_name(name, index),
                mode=Mode.SEARCH,
                step=0,
            )
            for index in wanted
        ]
        by_task = dict(zip(wanted, await self._run(planned, prompts), strict=True))
        return [by_task[index] for index in tasks]

    async def is_tried(
        self, prompts: Mapping[str, str], tasks: Sequence[int], versions: Mapping[str, int]
    ) -> list[bool]:
        """Say of which tasks the store has a finished rollout under these prompts."""
        name = candidate_name(self._changes(prompts), versions)
        searched = await self._store.rollouts(mode=Mode.SEARCH)
        finished = {rollout.rollout_id for rollout in searched if rollout.state in FINISHED}
        return [rollout_name(name, index) in finished for index in tasks]

    async def publish(self, prompts: Mapping[str, str]) -> None:
        """Put prompts in force, each changed one under a new version; what a role said before them is version 0.

        Raises:
            ConfigurationError: a prompt for a role that the trainer was not told of.
        """
        if unknown := sorted(prompts.keys() - self._wanted.keys()):
            raise ConfigurationError(f"prompts of roles {unknown!r} are not in Trainer(prompts={list(self._wanted)!r})")
        changed = {
            role: Prompt(await self._store.next_version(f"prompt:{role}"), text)
            for role, text in prompts.items()
            if self.texts.get(role) != text
        }
        firsts = await self._firsts(changed)
        await self._store.put_resources(
            [
                Resource(kind="prompt", name=role, version=one.version, created_ns=now_ns(), content=one.text)
                for role, one in (*firsts.items(), *changed.items())
            ]
        )
        self.in_force |= changed

    async def _firsts(self, roles: Collection[str]) -> dict[str, Prompt]:
        """Return what these roles said before any search, where it is known and not in the store yet."""
        told = {role: text for role, text in self._wanted.items() if text is not None} | self._read
        return {
            role: Prompt(0, told[role])
            for role in roles
            if role in told and not await self._store.resources("prompt", role)
        }


def candidate_name(prompts: Mapping[str, str], versions: Mapping[str, int]) -> str:
    """Return a name for prompts under the weights that speak them: 12 hex digits."""
    content = json.dumps([dict(prompts), dict(versions)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:12]


def rollout_name(candidate: str, task: int) -> str:
    """Return the name of a candidate's rollout on a task."""
    return f"c{candidate}-t{task}"


def spoken_prompt(records: Sequence[RolloutRecords], role: str) -> str:
    """Return the one system prompt with which a role spoke.

    Raises:
        ConfigurationError: several, or none.
        RoleError: the role did not speak.
    """
    calls = [span for one in records for span in one.spans if span.kind is Kind.MODEL_CALL and span.role == role]
    if not calls:
        spoke = sorted({span.role for one in records for span in one.spans if span.kind is Kind.MODEL_CALL})
        raise RoleError(
            f"role {role!r} has not spoken in the first {len(records)} rollouts, so its prompt cannot be read; roles "
            f"that did: {spoke!r}. Name one of these, or give the text: Trainer(prompts={{{role!r}: '...'}})"
        )
    found = list(dict.fromkeys(system_prompt(span.attributes.get("gen_ai.input.messages")) for span in calls))
    if None in found:
        raise ConfigurationError(
            f"role {role!r} has made calls without a system message, so there is no prompt to improve; give the text "
            f"that should stand there: Trainer(prompts={{{role!r}: '...'}})"
        )
    if len(found) > 1:
        raise ConfigurationError(
            f"role {role!r} has spoken with {len(found)} different system prompts, such as {found[0]!r:.120} and "
            f"{found[1]!r:.120}: one text cannot take the place of all. Move what changes into the user's message, or "
            f"give the text that should stand there: Trainer(prompts={{{role!r}: '...'}})"
        )
    return str(found[0])


def system_prompt(messages: object) -> str | None:
    """Return the text of the system message that chat messages begin with."""
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, dict) or first.get("role") not in ("system", "developer"):
        return None
    content = first.get("content")
    if isinstance(content, list):  # in parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")


def write(folder: Path, prompts: Mapping[str, Prompt]) -> None:
    """Write the prompts in force into a checkpoint."""
    write_json(folder / PROMPTS, dict(prompts))


def of_checkpoint(folder: Path | None) -> dict[str, Prompt]:
    """Return the prompts in force in a checkpoint."""
    if folder is None or not (folder / PROMPTS).exists():
        return {}
    return msgspec.convert(read_json(folder / PROMPTS), dict[str, Prompt])

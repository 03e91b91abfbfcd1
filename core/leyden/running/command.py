"""An agent that is a program of its own, in any language: `leyden.Command(["node", "agent.mjs"])`.

One idea: the program needs nothing of Leyden. It finds its model where every client looks for it
(`OPENAI_BASE_URL`, `ANTHROPIC_BASE_URL` and their keys), its task in `LEYDEN_TASK`, and says how well it did on its
standard output, in a file or with a `POST`.
One trap: a program may leave children behind, so it runs in a process group of its own, which ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from leyden import context, wire
from leyden.context import Frame, scope
from leyden.endpoints import Endpoint, endpoint
from leyden.errors import CommandError, ConfigurationError, RewardError
from leyden.running.inbox import Inbox
from leyden.spans import Kind

RewardFrom = Literal["stdout", "file", "post"]

OUTPUT_BYTES = 1 << 20
"""How much of each output stream is kept: its end."""

ENVIRONMENT_BYTES = 100_000
"""The longest task that travels in `LEYDEN_TASK`: Linux takes 128 KiB a variable. It is always in the file too."""

SHOWN = 2000
"""How many characters of an output stand in a span or an error."""

REWARD_FILE = "reward.json"

GRACE_SECONDS = 1.0
"""How long a program that was told to end may take before it is killed; less than a cancelled agent has."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a program ended."""

    status: int
    stdout: str
    stderr: str


class Command:
    """An agent that is started anew for each rollout.

    The program gets these variables, besides its parent's own:

    - `LEYDEN_TASK`, the task as JSON, and `LEYDEN_TASK_FILE`, a file that holds it; `LEYDEN_ROLLOUT_ID`;
    - `OPENAI_BASE_URL`, `OPENAI_API_KEY`, `ANTHROPIC_BASE_URL`, `ANTHROPIC_API_KEY`: the gateway, for role `role`;
    - for each of `roles`, `LEYDEN_BASE_URL_WRITER` and `LEYDEN_API_KEY_WRITER` (here for a role `writer`);
    - `LEYDEN_REWARD_FILE` or `LEYDEN_REWARD_URL`, where `reward` asks for one of them.

    A status other than 0 is the agent's failure. Calls of the program reach the gateway alone, so a role that no
    policy takes keeps whatever endpoint the program finds without Leyden.
    """

    def __init__(
        self,
        argv: Sequence[str] | Callable[[object], Sequence[str]],
        *,
        role: str = "main",
        roles: Sequence[str] = (),
        reward: RewardFrom | None = "stdout",
        environment: Mapping[str, str] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Remember what to run.

        Args:
            argv: the program and its arguments, or a function that makes them of the task.
            role: who speaks when the program calls a model at the usual address.
            roles: more roles, each with an address of its own.
            reward: where the reward is found: a number, or an object of named numbers, as JSON on the last line of
                the standard output, in the file, or in the body of a `POST`. `None`: nowhere; the standard output
                is the agent's output, for `Trainer(reward=...)`.
            environment: more variables.
            folder: where it runs; default: here.

        Raises:
            ConfigurationError: nothing to run, or a `reward` that is none of these.
        """
        if not callable(argv) and (isinstance(argv, str) or not argv):
            raise ConfigurationError(f"Command takes a program and its arguments as a list, got {argv!r}")
        if reward is not None and reward not in get_args(RewardFrom):
            raise ConfigurationError(f"reward must be one of {get_args(RewardFrom)!r} or None, got {reward!r}")
        self.argv = argv
        self.role = role
        self.roles = tuple(roles)
        self.reward = reward
        self.environment = dict(environment or {})
        self.folder = folder

    def __repr__(self) -> str:
        return f"Command({self.argv!r})"

    async def __call__(self, task: object) -> object:
        """Run the program on a task; return its reward, or its standard output where it gives none.

        Raises:
            CommandError: it cannot be started, or ended with a status other than 0.
            RewardError: its reward is missing or cannot be read.
        """
        argv = list(self.argv(task) if callable(self.argv) else self.argv)
        with contextlib.ExitStack() as stack:
            span = stack.enter_context(scope(Kind.AGENT, Path(argv[0]).name))
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leyden-", ignore_cleanup_errors=True)))
            variables = self._variables(task, place)
            mail = stack.enter_context(Inbox.shared().opened()) if self.reward == "post" else None
            if mail is not None:
                variables["LEYDEN_REWARD_URL"] = mail.url
            ended = await run(argv, environment={**os.environ, **variables}, folder=self.folder, place=place)
            if span is not None:
                span.attributes |= {"process.command_args": argv, "process.exit.code": ended.status}
                span.attributes["leyden.stdout"] = ended.stdout[-SHOWN:]
            if ended.status != 0:
                raise CommandError(
                    f"{argv[0]!r} ended with status {ended.status!r}; the end of its error output:\n"
                    f"{ended.stderr[-SHOWN:] or ended.stdout[-SHOWN:] or '(nothing)'}"
                )
            match self.reward:
                case "stdout":
                    return read_reward(last_line(ended.stdout), f"the last line of {argv[0]!r}'s standard output")
                case "file":
                    return read_reward(read_file(place / REWARD_FILE), f"the reward file of {argv[0]!r}")
                case "post":
                    assert mail is not None
                    return mail.rewards() or read_reward("", f"what {argv[0]!r} sent to LEYDEN_REWARD_URL")
            return ended.stdout

    def _variables(self, task: object, place: Path) -> dict[str, str]:
        text = json.dumps(task)
        (place / "task.json").write_text(text)
        variables = {"LEYDEN_TASK_FILE": str(place / "task.json")}
        frame = context.current()
        if frame is not None and frame.rollout is not None:
            variables["LEYDEN_ROLLOUT_ID"] = frame.rollout.rollout_id
        main = self._endpoint(self.role)
        if main is not None:
            variables |= {"OPENAI_BASE_URL": main.base_url, "OPENAI_API_KEY": main.api_key}
            variables |= {"ANTHROPIC_BASE_URL": main.anthropic_base_url, "ANTHROPIC_API_KEY": main.api_key}
            # A proxy of the user's must not be asked for this machine.
            direct = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1"]))
            variables |= {"NO_PROXY": direct, "no_proxy": direct}
        if len(text) <= ENVIRONMENT_BYTES:
            variables["LEYDEN_TASK"] = text
        if self.reward == "file":
            variables["LEYDEN_REWARD_FILE"] = str(place / REWARD_FILE)
        for role in self.roles:
            other, suffix = self._endpoint(role), re.sub(r"\W", "_", role).upper()
            if other is not None:
                variables[f"LEYDEN_BASE_URL_{suffix}"] = other.base_url
                variables[f"LEYDEN_API_KEY_{suffix}"] = other.api_key
        return {**variables, **self.environment}

    @staticmethod
    def _endpoint(role: str) -> Endpoint | None:
        """Return where a role finds its policy; `None` for one that no policy takes."""
        return endpoint(role) if wire.is_routed(replace(context.current() or Frame(), role=role)) else None


async def run(
    argv: Sequence[str], *, environment: Mapping[str, str], folder: str | os.PathLike[str] | None, place: Path
) -> Ended:
    """Run a program to its end; one whose task is cancelled is ended, with all it has started.

    Its outputs go to files in `place`: the end of a pipe would come only when the last child has let go of it.

    Raises:
        CommandError: it cannot be started.
    """
    with (place / "stdout").open("wb") as stdout, (place / "stderr").open("wb") as stderr:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            raise CommandError(f"{argv[0]!r} cannot be started: {error}; is it installed, and on the PATH?") from error
    try:
        status = await process.wait()
    except BaseException:
        await end(process)
        raise
    end_group(process.pid, signal.SIGKILL)
    return Ended(status=status, stdout=tail(place / "stdout"), stderr=tail(place / "stderr"))


async def end(process: asyncio.subprocess.Process) -> None:
    """End a program and what it has started: first politely, then not."""
    end_group(process.pid, signal.SIGTERM)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                await process.wait()
    finally:  # also when a second cancellation does not wait
        end_group(process.pid, signal.SIGKILL)
    await process.wait()


def end_group(leader: int, how: signal.Signals) -> None:
    """Send a signal to a process group, if anybody is left in it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, how)


def tail(path: Path) -> str:
    """Return the last part of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - OUTPUT_BYTES))
        return file.read().decode(errors="replace")


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def read_file(path: Path) -> str:
    """Return the text of a file; empty when it is not there."""
    return path.read_text(errors="replace") if path.is_file() else ""


def read_reward(text: str, where: str) -> object:
    """Return a reward written as JSON: a number, or an object of named numbers.

    Raises:
        RewardError: it is missing, or neither.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not is_reward(value):
        raise RewardError(
            f"{where} holds no reward: {text[:200]!r}; write a number such as 0.5, or an object such as "
            '{"reward": 0.5, "brevity": 1.0}'
        )
    return value


def is_reward(value: object) -> bool:
    """Say whether a JSON value is a reward."""
    if isinstance(value, dict):
        return bool(value) and all(is_reward(item) and not isinstance(item, dict) for item in value.values())
    return isinstance(value, (int, float))

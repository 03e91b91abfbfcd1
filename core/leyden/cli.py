"""The `leyden` command line: look at runs, take policies out of them, go on with them.

One idea: what is wrong is one line on stderr with exit status 2; `LEYDEN_DEBUG=1` shows the traceback. Commands of
plugins (`serve`, `report`, those of third parties) are functions of their arguments and parse these themselves.
One trap: help and listings must import no torch and no framework.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from leyden import __version__
from leyden.deploying.export import export
from leyden.deploying.exported import POLICIES
from leyden.doctor import doctor
from leyden.errors import ConfigurationError, LeydenError, PluginError
from leyden.feedback import joined, read
from leyden.hookspecs import KINDS, Component
from leyden.interfaces import RolloutRecords
from leyden.plugins import Plugins, load_plugins
from leyden.rewards import DEFAULT_REWARD
from leyden.show import one_line, printable, program, span_tree, task_text, token_trees
from leyden.spans import FINISHED, Mode, Rollout, RolloutState
from leyden.spantree import model_calls
from leyden.sqlite import SQLiteStore
from leyden.training.runfolder import RESUME_STEPS_VARIABLE, RESUME_VARIABLE, RUN, STORE, read_json
from leyden.training.stored import store_files

RUNS = Path("runs")
"""Where `Trainer` puts runs that were not named."""


Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _quiet_logging()
    try:
        return _run(given)
    except BrokenPipeError:
        # The reader (`head`, a pager) has gone; without this the interpreter complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if _is_debugging():
            raise
        text = " ".join(printable(str(error)).split())
        if not isinstance(error, LeydenError):
            text = f"{type(error).__name__}: {text} (LEYDEN_DEBUG=1 shows where)"
        print(f"leyden: {text}", file=sys.stderr)
        return 2


def _run(given: list[str]) -> int:
    if given and given[0] not in COMMANDS and not given[0].startswith("-"):
        plugins = load_plugins()
        if given[0] in plugins.names("command"):
            command = cast("Callable[[Sequence[str]], int]", plugins.get("command", given[0]))
            return command(given[1:])
    if not given:
        _parser().print_help()
        return 0
    options = _parser().parse_args(given)
    return COMMANDS[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leyden", description="Train the agents you already have. Commands for runs and what comes of them."
    )
    parser.add_argument("--version", action="version", version=f"leyden {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("rollouts", help="list a run's rollouts")
    one.add_argument("run", nargs="?", help="run folder; default the newest under runs/")
    one.add_argument("--mode", choices=[mode.value for mode in Mode])
    one.add_argument("--step", type=int)
    one.add_argument("--state", choices=[state.value for state in RolloutState])
    one.add_argument("--limit", type=_positive, default=50, help="show the last so many (default 50)")

    one = commands.add_parser("show", help="show a rollout's span tree")
    one.add_argument("run", nargs="?", help="run folder; may be left out for the newest under runs/")
    one.add_argument("rollout", nargs="?", help="its id or the start of it; default the last finished one")
    one.add_argument("--text", action="store_true", help="whole prompts and answers")
    one.add_argument("--tokens", action="store_true", help="token ids and log-probabilities")
    one.add_argument("--tree", action="store_true", help="the merged token tree of each policy instead")

    one = commands.add_parser("export", help="write a run's policies and prompts to a folder for the app")
    one.add_argument("run", help="run folder")
    one.add_argument("out", help="folder to make")
    one.add_argument("--step", type=int, help="of the checkpoint; default the latest")

    one = commands.add_parser("resume", help="go on with a run from its latest checkpoint")
    one.add_argument("run", help="run folder")
    one.add_argument("--steps", type=_positive, help="steps in all, in place of the script's own number")

    commands.add_parser("doctor", help="check this machine and what is installed")
    commands.add_parser("plugins", help="list what plugins offer")
    for name, component in _plugin_commands().items():
        if name not in COMMANDS:
            commands.add_parser(name, help=component.summary, add_help=False)
    return parser


def _plugin_commands() -> dict[str, Component]:
    try:
        plugins = load_plugins()
    except PluginError:  # the help must stand even where plugins clash; `leyden doctor` says what clashes
        return {}
    return {name: plugins.components["command", name] for name in plugins.names("command")}


# ---- looking at a run ------------------------------------------------------------------------------------------


def rollouts_command(options: argparse.Namespace) -> int:
    """Print a table of rollouts."""
    folder = _run_folder(options.run)
    found = asyncio.run(_rollouts(folder, options))
    shown = found[-options.limit :]
    records = asyncio.run(_records(folder, [rollout.rollout_id for rollout in shown]))
    header = ("rollout", "mode", "step", "state", "reward", "calls", "task")
    rows = [
        (
            printable(one.rollout.rollout_id),
            one.rollout.mode.value,
            str(one.rollout.step),
            one.rollout.state.value,
            "-" if one.rollout.reward is None else f"{one.rollout.reward:g}",
            str(model_calls(one)),
            one_line(task_text(one.rollout.task), 500),
        )
        for one in records
    ]
    for line in table(header, rows, right=("step", "reward", "calls")):
        print(line)
    if len(shown) < len(found):
        print(f"the last {len(shown)} of {len(found)} rollouts; --limit {len(found)} shows all")
    return 0


def show_command(options: argparse.Namespace) -> int:
    """Print one rollout's span tree."""
    folder, wanted = options.run, options.rollout
    if folder is not None and wanted is None and not (Path(folder) / STORE).is_file():
        folder, wanted = None, folder
    records = asyncio.run(_one_rollout(_run_folder(folder), wanted))
    if options.tree:
        print(token_trees(records, color=_may_color()))
        return 0
    print(span_tree(records, all_text=options.text, tokens=options.tokens, color=_may_color()))
    return 0


async def _rollouts(folder: Path, options: argparse.Namespace) -> Sequence[Rollout]:
    found: list[Rollout] = []
    for path in store_files(folder):
        async with await SQLiteStore.open(path, read_only=True) as store:
            found += await store.rollouts(
                mode=None if options.mode is None else Mode(options.mode),
                step=options.step,
                state=None if options.state is None else RolloutState(options.state),
            )
    return found


async def _records(folder: Path, rollout_ids: Sequence[str]) -> Sequence[RolloutRecords]:
    found: list[RolloutRecords] = []
    for path in store_files(folder):
        async with await SQLiteStore.open(path, read_only=True) as store:
            own = {one.rollout_id for one in await store.rollouts()}
            found += await store.records([one for one in rollout_ids if one in own])
    return joined(found, read(folder), reward_weights={DEFAULT_REWARD: 1.0})


async def _one_rollout(folder: Path, wanted: str | None) -> RolloutRecords:
    """Find a rollout by the start of its id; without one the last finished.

    Raises:
        ConfigurationError: none or several.
    """
    every = await _rollouts(folder, argparse.Namespace(mode=None, step=None, state=None))
    if wanted is None:
        finished = [one.rollout_id for one in every if one.state in FINISHED]
        if not finished:
            raise ConfigurationError(f"{str(folder)!r} holds no finished rollout yet")
        found = [finished[-1]]
    else:
        ids = [one.rollout_id for one in every]
        found = [wanted] if wanted in ids else [one for one in ids if one.startswith(wanted)]
    if len(found) != 1:
        near = f"{len(found)} rollouts start like this: {', '.join(found[:5])}" if found else "there is none"
        where = shlex.quote(str(folder))
        raise ConfigurationError(
            f"rollout {wanted!r} in {str(folder)!r}: {near}; `{program()} rollouts {where}` lists them"
        )
    return (await _records(folder, found))[0]


def _run_folder(given: str | None) -> Path:
    """Return the run folder, checked.

    Raises:
        ConfigurationError: there is no run.
    """
    if given is not None:
        folder = Path(given)
        if not (folder / STORE).is_file():
            raise ConfigurationError(f"{given!r} is not a run folder: it holds no {STORE}")
        return folder
    stores = sorted(RUNS.glob(f"*/{STORE}"), key=lambda path: path.stat().st_mtime)
    if not stores:
        raise ConfigurationError(f"there is no run under {str(RUNS)!r}; name the run folder")
    return stores[-1].parent


# ---- going on with a run ---------------------------------------------------------------------------------------


def export_command(options: argparse.Namespace) -> int:
    """Write policies out and say what to do with them."""
    out = export(options.run, options.out, step=options.step)
    print(f"wrote {out}; {out / 'SERVE.md'} says how to use it")
    if (out / POLICIES).is_dir():
        print(f"first: {program()} serve {shlex.quote(str(out))}")
    return 0


def resume_command(options: argparse.Namespace) -> int:
    """Start the run's own script again, told to go on.

    Raises:
        ConfigurationError: the folder does not say how its run was started.
    """
    folder = _run_folder(options.run)
    record = read_json(folder / RUN)
    command = record.get("command")
    if not isinstance(command, list) or not command or not all(isinstance(part, str) for part in command):
        raise ConfigurationError(
            f"{str(folder / RUN)!r} does not say how the run was started; call fit(steps, resume=True) in your script"
        )
    environment = {**os.environ, RESUME_VARIABLE: str(folder.resolve())}
    if options.steps is not None:
        environment[RESUME_STEPS_VARIABLE] = str(options.steps)
    print(f"{RESUME_VARIABLE}={folder.resolve()} {shlex.join(command)}", flush=True)
    try:
        os.chdir(str(record.get("working_folder", ".")))  # relative paths in the command mean what they meant
        # Taking this process's place leaves Ctrl-C to the trainer alone, which then ends its step.
        os.execve(sys.executable, [sys.executable, *command[1:]], environment)
    except OSError as error:
        raise ConfigurationError(f"cannot start {shlex.join(command)}: {error}") from error


# ---- this machine ----------------------------------------------------------------------------------------------


def doctor_command(options: argparse.Namespace) -> int:
    """Print what was found; 1 when something is broken."""
    findings = doctor()
    for finding in findings:
        print(f"{finding.mark:7} {finding.text}")
    return 1 if any(finding.is_broken for finding in findings) else 0


def plugins_command(options: argparse.Namespace) -> int:
    """Print every component and every plugin that was skipped."""
    plugins: Plugins = load_plugins()
    rows = [
        (kind, name, plugins.components[kind, name].plugin, plugins.components[kind, name].summary)
        for kind in KINDS
        for name in plugins.names(kind)
    ]
    for line in table(("kind", "name", "plugin", "summary"), rows):
        print(line)
    for broken in plugins.broken:
        why = f"{type(broken.error).__name__}: {one_line(str(broken.error), 500)}"
        print(f"skipped: plugin {broken.name!r} of {broken.package}: {why}")
    return 0


# ---- printing --------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> list[str]:
    """Return aligned lines; the last column is cut at the terminal's width."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    room = max(20, shutil.get_terminal_size((120, 24)).columns - sum(widths[:-1]) - 2 * (len(header) - 1))
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row[:-1], widths, header, strict=False)
        ]
        lines.append("  ".join([*cells, one_line(row[-1], room)]).rstrip())
    return lines


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _may_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _is_debugging() -> bool:
    return os.environ.get("LEYDEN_DEBUG", "") not in ("", "0")


class _OneLine(logging.Formatter):
    """Leaves tracebacks out."""

    def formatException(self, ei: object) -> str:
        return ""


def _quiet_logging() -> None:
    """Print warnings of Leyden as one line each, unless somebody has set logging up already."""
    logger = logging.getLogger("leyden")
    if _is_debugging() or logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("leyden: %(message)s"))
    logger.addHandler(handler)


COMMANDS: dict[str, Command] = {
    "rollouts": rollouts_command,
    "show": show_command,
    "export": export_command,
    "resume": resume_command,
    "doctor": doctor_command,
    "plugins": plugins_command,
}

if __name__ == "__main__":
    sys.exit(main())

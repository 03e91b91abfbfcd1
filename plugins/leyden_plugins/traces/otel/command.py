"""`leyden traces receive | import | export`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from leyden import feedback
from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden.interfaces import RolloutRecords
from leyden.rewards import DEFAULT_REWARD
from leyden.show import printable
from leyden.spans import Mode, Span
from leyden.sqlite import SQLiteStore
from leyden.training.stored import store_files
from leyden_plugins.traces.otel.assembling import Rules
from leyden_plugins.traces.otel.importing import import_files
from leyden_plugins.traces.otel.receiving import Receiver
from leyden_plugins.traces.otel.sending import send

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PORT = 4318
"""Of OTLP over HTTP, by convention."""
ROLLOUTS_A_READ = 64


def traces_command(arguments: Sequence[str]) -> int:
    """Run `leyden traces`; return the exit status.

    Raises:
        ConfigurationError: an option that cannot be honoured, or a server that refuses what it is sent.
        DatasetError: a file holds no traces.
        StoreError: the folder's store cannot be opened.
    """
    options = parser().parse_args(arguments)
    if options.action == "receive":
        return receive(options)
    return import_(options) if options.action == "import" else export(options)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    found = argparse.ArgumentParser(prog="leyden traces", description="Traces of other tools in, a run's traces out.")
    actions = found.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = actions.add_parser("receive", help="take spans over OTLP/HTTP until Ctrl-C")
    one.add_argument("out", type=Path, help="folder to make or go on with")
    one.add_argument("--port", type=int, default=PORT, help=f"0 takes a free one (default {PORT})")
    one.add_argument("--host", default="127.0.0.1", help="another one than loopback needs --token-env")
    one.add_argument("--token-env", help="variable with the token that senders must give as bearer")
    one.add_argument("--quiet", type=float, default=5.0, help="seconds without a span that end a trace (default 5)")
    _add_rules(one)
    one = actions.add_parser("import", help="read files: OTLP's JSON, JSON lines of a collector, protobuf")
    one.add_argument("files", type=Path, nargs="+")
    one.add_argument("out", type=Path, help="folder to make or go on with")
    _add_rules(one)
    one = actions.add_parser("export", help="send a run's rollouts to an OTLP/HTTP address")
    one.add_argument("run", help="run folder or store")
    one.add_argument("--to", required=True, help="such as http://127.0.0.1:6006/v1/traces")
    one.add_argument("--header", action="append", default=[], metavar="KEY=VALUE", help="may be given several times")
    one.add_argument("--mode", choices=[mode.value for mode in Mode], help="only rollouts of this mode")
    return found


def _add_rules(one: argparse.ArgumentParser) -> None:
    one.add_argument("--task-from", metavar="ATTRIBUTE", help="names the task; default what the root span was given")
    one.add_argument("--role-from", metavar="RULE", help="attribute, or a Python function MODULE:FUNCTION(span)")
    one.add_argument("--without-root", action="store_true", help="the root spans go elsewhere; traces are whole")


def rules_of(options: argparse.Namespace) -> Rules:
    """Return the rules that the options say.

    Raises:
        ConfigurationError: there is no such function.
    """
    role = options.role_from
    is_function = role is not None and ":" in role
    return Rules(
        task_from=options.task_from,
        role_from=None if is_function else role,
        role=_function(role) if is_function else None,
        without_root=options.without_root,
    )


def _function(name: str) -> Callable[[Span], str | None]:
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own module lies in the folder they are in
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"--role-from {name!r}: {error}; give MODULE:FUNCTION or an attribute") from error
    if not callable(found):
        raise ConfigurationError(f"--role-from {name!r} is {type(found).__name__!r}, not a function of a span")
    return cast("Callable[[Span], str | None]", found)


def import_(options: argparse.Namespace) -> int:
    """Import files."""
    told(asyncio.run(import_files(options.files, options.out, rules_of(options))))
    print(f"wrote {options.out}; train from it with FineTuning(source={str(options.out)!r})")
    return 0


def receive(options: argparse.Namespace) -> int:
    """Receive until Ctrl-C."""
    token = os.environ.get(options.token_env) if options.token_env else None
    if options.token_env and not token:
        raise ConfigurationError(f"--token-env {options.token_env!r}: there is no such variable, or it is empty")
    if options.host not in LOOPBACK and token is None:
        raise ConfigurationError(f"--host {options.host!r} lets other machines send; give --token-env too")
    with extra("otel"):
        import uvicorn
    receiver = Receiver(options.out, rules_of(options), token=token, quiet_seconds=options.quiet)
    server = uvicorn.Server(
        uvicorn.Config(
            receiver.app, host=options.host, port=options.port, log_level="warning", lifespan="on", access_log=False
        )
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
        asyncio.run(_serve(server, options))
    told(receiver.noticed)
    return 0 if server.started else 2


async def _serve(server: object, options: argparse.Namespace) -> None:
    import uvicorn

    assert isinstance(server, uvicorn.Server)
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    if server.started:
        port = server.servers[0].sockets[0].getsockname()[1]
        print(f"receiving at http://{options.host}:{port}/v1/traces into {options.out}; Ctrl-C ends", flush=True)
    await serving


def export(options: argparse.Namespace) -> int:
    """Send a run's rollouts."""
    count = send(_stored(options.run, options.mode), options.to, headers=_headers(options.header))
    print(f"sent {count} spans to {options.to}")
    return 0


def _headers(given: Sequence[str]) -> Mapping[str, str]:
    pairs = [one.partition("=") for one in given]
    for name, is_pair, _ in pairs:
        if not is_pair or not name:
            raise ConfigurationError(f"--header {name!r} must be KEY=VALUE")
    return {name: value for name, _, value in pairs}


def _stored(run: str, mode: str | None) -> Iterator[RolloutRecords]:
    """Yield a run's rollouts that have begun, some at a time, with the rewards that came afterwards."""
    later = feedback.read(run)
    for path in store_files(run):
        names = asyncio.run(_names(path, mode))
        for start in range(0, len(names), ROLLOUTS_A_READ):
            records = asyncio.run(_records(path, names[start : start + ROLLOUTS_A_READ]))
            yield from feedback.joined(records, later, reward_weights={DEFAULT_REWARD: 1.0})


async def _names(path: Path, mode: str | None) -> list[str]:
    async with await SQLiteStore.open(path, read_only=True) as store:
        found = await store.rollouts(mode=Mode(mode) if mode else None)
    return [one.rollout_id for one in found if one.attempt > 0]


async def _records(path: Path, names: Sequence[str]) -> Sequence[RolloutRecords]:
    async with await SQLiteStore.open(path, read_only=True) as store:
        return await store.records(names)


def told(noticed: Counter[str]) -> None:
    """Print what was noticed."""
    for text, count in noticed.items():
        print(f"{count} {printable(text)}")

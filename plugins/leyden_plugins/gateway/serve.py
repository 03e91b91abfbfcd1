"""Serve an engine as an ordinary endpoint for OpenAI's and Anthropic's clients: no rollouts, records or trainer.

One idea: the endpoint has a thread and a loop of its own and calls `engine.generate` there, so it works beside a
trainer that uses the same engine from another loop, and beside none.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leyden.deploying.exported import ADAPTER_CONFIG, EXPORT_FILE, POLICIES, read_adapter_config, read_export
from leyden.errors import ConfigurationError
from leyden.interfaces import Access, Engine, Generation, GenerationRequest, Weights
from leyden.looping import LoopThread
from leyden.plugins import load_plugins
from leyden.roles import AGENTS_OWN, RESERVED_MODEL, Policy
from leyden_plugins.gateway.access import AccessTable, Admission
from leyden_plugins.gateway.app import App, Limits
from leyden_plugins.gateway.dialects.spoken import DIALECTS
from leyden_plugins.gateway.memory import MOST_REMEMBERED, Memory
from leyden_plugins.gateway.server import HOST, BackgroundServer

ANY_KEY = "not-needed"
"""What clients that insist on a key may send where none is checked."""

ENGINE = "transformers"

HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
"""How names on the Hugging Face Hub look; a relative path of two parts does too."""


@dataclass(frozen=True)
class Endpoint:
    """Where a served engine answers."""

    base_url: str
    """`http://127.0.0.1:PORT/v1`."""
    api_key: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class Served:
    """What stands behind one model name."""

    engine: Engine
    model: str
    """The engine's own name for it."""
    adapter: Path | None = None
    """PEFT's folder of a LoRA, which the engine is given under that name when it has started."""


class ServedModels:
    """Generates with the engine that a model name stands for."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._models = models
        engines = list({id(served.engine): served.engine for served in models.values()}.values())
        self.forces_tools = all(getattr(engine, "forces_tools", False) for engine in engines)
        self.constrains_format = all(getattr(engine, "constrains_format", False) for engine in engines)
        if len(engines) == 1:
            # Spelling single tokens needs to know whose they are; with several engines it is not offered.
            self.decode = getattr(engines[0], "decode", None)
        if all(hasattr(engine, "prompt") for engine in engines):
            self.prompt = self._prompt

    async def generate(self, request: GenerationRequest) -> Generation:
        """Begin a generation; the access has checked the name."""
        served = self._models[request.model]
        return await served.engine.generate(replace(request, model=served.model))

    def _prompt(self, request: GenerationRequest) -> Sequence[int]:
        served = self._models[request.model]
        counting: Any = served.engine  # not every engine counts; this is offered only where all do
        tokens: Sequence[int] = counting.prompt(replace(request, model=served.model))
        return tokens


@contextlib.contextmanager
def serve(
    engine: Engine,
    model: str = RESERVED_MODEL,
    *,
    names: Sequence[str] = (),
    api_key: str | None = None,
    port: int = 0,
) -> Iterator[Endpoint]:
    """Serve one of an engine's models until the block ends; the engine is started if need be, and left running.

    Args:
        engine: may be in use elsewhere, before and afterwards.
        model: the engine's own name for it.
        names: what clients call it; `model` when empty.
        api_key: what clients must send; `None` lets every process of this machine in.
        port: 0 takes a free one.

    Raises:
        ConfigurationError: the port is taken, or the engine cannot start.
    """
    with serve_models(
        {name: Served(engine, model) for name in names or (model,)}, api_key=api_key, port=port
    ) as endpoint:
        yield endpoint


@contextlib.contextmanager
def serve_models(
    models: Mapping[str, Served], *, api_key: str | None = None, port: int = 0, stop_engines: bool = False
) -> Iterator[Endpoint]:
    """Serve several models, of one engine or many, under one address.

    Args:
        models: what clients call a model -> what stands behind it.
        api_key: what clients must send; `None` lets every process of this machine in.
        port: 0 takes a free one.
        stop_engines: stop them at the end, for a caller who uses them for nothing else.

    Raises:
        ConfigurationError: the port is taken, or an engine cannot start.
    """
    admission = Admission(
        Access(rollout_id="", attempt=0, models=dict.fromkeys(models, AGENTS_OWN)),
        is_open=True,
        memory=Memory(MOST_REMEMBERED),
    )
    access = AccessTable(anybody=admission if api_key is None else None)
    if api_key is not None:
        access.admit(admission, api_key)
    app = App(engine=ServedModels(models), access=access, dialects=DIALECTS, record=None, limits=Limits())
    server = BackgroundServer()
    engines = {id(served.engine): served.engine for served in models.values()}.values()

    async def start() -> None:
        for engine in engines:
            loras = {served.model: served.adapter for served in models.values() if served.engine is engine}
            await start_engine(engine, {model: folder for model, folder in loras.items() if folder is not None})
        await server.start(app, port)

    async def stop() -> None:
        await server.stop()
        for engine in engines if stop_engines else ():
            await engine.stop()

    with contextlib.ExitStack() as stack:
        thread = LoopThread("leyden-serve")
        stack.callback(thread.close)
        stack.callback(lambda: thread.submit(stop()).result())
        thread.submit(start()).result()
        yield Endpoint(f"http://{HOST}:{server.port}/v1", api_key or ANY_KEY, tuple(models))


@contextlib.contextmanager
def serve_folder(
    folder: Path, *, model_name: str | None = None, api_key: str | None = None, port: int = 0, engine: str = ENGINE
) -> Iterator[Endpoint]:
    """Serve a checkpoint folder, or every model of an export, until the block ends.

    Args:
        folder: an export, a run's checkpoint, a Hugging Face folder, or PEFT's folder of a LoRA.
        model_name: what clients call a single checkpoint; its folder's name by default.
        api_key: what clients must send; `None` lets every process of this machine in.
        port: 0 takes a free one.
        engine: an installed engine plugin, which is called with a folder.

    Raises:
        ConfigurationError: there is no checkpoint in `folder`, or `model_name` is given for several.
    """
    folders = model_folders(folder, model_name)
    make_engine = load_plugins().get("engine", engine)
    with serve_models(served_from(folders, make_engine), api_key=api_key, port=port, stop_engines=True) as endpoint:
        yield endpoint


def serve_checkpoint(
    folder: Path, *, model_name: str | None = None, api_key: str | None = None, port: int = 8000, engine: str = ENGINE
) -> None:
    """Serve a folder as `serve_folder` does and say where; return on Ctrl-C.

    Raises:
        ConfigurationError: there is no checkpoint in `folder`, or the port is taken.
    """
    with (
        contextlib.suppress(KeyboardInterrupt),
        serve_folder(folder, model_name=model_name, api_key=api_key, port=port, engine=engine) as endpoint,
    ):
        key = "any key" if api_key is None else "the key that was given"
        print(f"serving {', '.join(endpoint.models)} at {endpoint.base_url} ({key}); Ctrl-C stops", flush=True)
        threading.Event().wait()


async def start_engine(engine: Engine, loras: Mapping[str, Path]) -> None:
    """Start an engine and publish LoRAs to it, by the engine's own names.

    Raises:
        ConfigurationError: the base cannot be loaded, or an adapter is not one of it.
    """
    try:
        await engine.start([Policy(model) for model in loras])
        for model, adapter in loras.items():
            await engine.publish(model, 1, Weights(folder=adapter))
    except ConfigurationError as error:
        if not loras:
            raise
        folders = ", ".join(repr(str(folder)) for folder in loras.values())
        raise ConfigurationError(
            f"cannot serve {folders} on {engine.model!r}, the base named in {ADAPTER_CONFIG}: {error}"
        ) from error


def served_from(folders: Mapping[str, Path], make_engine: Callable[[str], Engine]) -> dict[str, Served]:
    """Make an engine for each folder of whole weights, and one for all LoRAs on one base.

    Raises:
        ConfigurationError: a LoRA names no base, or a folder that is not there.
    """
    models: dict[str, Served] = {}
    bases: dict[str, Engine] = {}
    for name, folder in folders.items():
        base = base_of(folder)
        if base is None:
            models[name] = Served(make_engine(str(folder)), RESERVED_MODEL)
            continue
        if base not in bases:
            bases[base] = make_engine(base)
        # Clients may call it what they like; the engine's own name follows the rules for policies.
        models[name] = Served(bases[base], f"lora-{len(models)}", adapter=folder)
    return models


def base_of(folder: Path) -> str | None:
    """Return the base of the LoRA in `folder`: a folder, or a Hugging Face name. `None`: it holds whole weights.

    Raises:
        ConfigurationError: it names none, or a folder that is not there.
    """
    adapter = read_adapter_config(folder)
    if adapter is None:
        return None
    base = adapter.base_model_name_or_path
    for place in (Path(base), folder / base) if base else ():
        if place.is_dir():
            return str(place.resolve())
    if base is None or re.fullmatch(HUB_NAME, base) is None:
        raise ConfigurationError(
            f"the LoRA in {str(folder)!r} needs its base, but base_model_name_or_path in its {ADAPTER_CONFIG} is "
            f"{base!r}, which is no folder here; write there the folder or Hugging Face name of the weights that it "
            "was trained on"
        )
    return base


def is_model(folder: Path) -> bool:
    """Say whether a folder holds whole weights or a LoRA."""
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def model_folders(folder: Path, model_name: str | None = None) -> dict[str, Path]:
    """Return the checkpoints in `folder`: what clients call them -> where they lie.

    Raises:
        ConfigurationError: there is none, or `model_name` is given for several.
    """
    if (folder / EXPORT_FILE).is_file():
        described = read_export(folder)
        found = {policy.model: folder / policy.folder for policy in described.policies.values()}
        if not found:
            raise ConfigurationError(
                f"{str(folder)!r} holds prompts only, so there is nothing to serve; in the app: "
                f"leyden.deploy({str(folder)!r})"
            )
    elif is_model(folder):
        found = {folder.resolve().name: folder}
    else:
        found = {path.name: path for path in sorted(folder.glob(f"{POLICIES}/*")) if is_model(path)}
    if not found:
        of_run = sorted(folder.glob("checkpoints/step-*"))
        raise ConfigurationError(
            f"{str(folder)!r} holds no model: no {EXPORT_FILE}, no config.json, no {ADAPTER_CONFIG} and no "
            f"{POLICIES}; give "
            + (f"one of its checkpoints, such as {str(of_run[-1])!r}" if of_run else "an export, a checkpoint")
            + " or a Hugging Face folder"
        )
    if model_name is None:
        return found
    if len(found) > 1:
        raise ConfigurationError(
            f"{str(folder)!r} holds several models, {sorted(found)!r}, which keep their names; leave out {model_name!r}"
        )
    return {model_name: next(iter(found.values()))}

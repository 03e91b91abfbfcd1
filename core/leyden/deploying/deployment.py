"""Put trained roles back into the running app: `leyden.deploy("OUT", base_url=...)`.

It routes the exported roles to a server of the trained models, where there are any, and sets the exported prompts.
Nothing else of Leyden runs: no trainer, no store, no torch. Calls are not recorded, and other roles stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from leyden import wire
from leyden.deploying.exported import Export, read_export
from leyden.errors import ConfigurationError
from leyden.instrumentation import instrument, is_instrumented, is_used, uninstrument
from leyden.roles import Route, Routing


class Deployment:
    """Routing that is in force until `close`; a context manager."""

    def __init__(self, export: Export, routing: Routing) -> None:
        self.export = export
        self.routing = routing
        self.is_closed = False
        self.was_instrumented = is_instrumented()
        self.had_wire = wire.is_installed()
        wire.set_default_routing(routing)
        instrument()

    def close(self) -> None:
        """Give every role back its own model and prompt. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        wire.set_default_routing(None)
        if not self.was_instrumented and not is_used():
            uninstrument()
            if self.had_wire:
                wire.install()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def deploy(
    folder: str | Path, base_url: str | None = None, *, fallback: bool = False, api_key: str | None = None
) -> Deployment:
    """Send the roles of an export to a server of the trained models, and set their prompts.

    Args:
        folder: what `leyden export` wrote.
        base_url: an OpenAI-compatible server of the trained models, such as `http://127.0.0.1:8000/v1`; none for an
            export without policies, whose roles keep the app's own model.
        fallback: when the server cannot be reached, let the app's own model answer.
        api_key: sent to that server in place of the app's own key.

    Raises:
        ConfigurationError: the folder holds no readable export, the address is missing, not one or of no use, or an
            export is deployed already.
    """
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise ConfigurationError(f"base_url {base_url!r} is not an address; write 'http://HOST:PORT/v1'")
    if wire.default_routing() is not None:
        raise ConfigurationError("an export is deployed in this process already; close it first")
    export = read_export(Path(folder))
    if export.policies and base_url is None:
        raise ConfigurationError(
            f"{str(folder)!r} holds the policies {sorted(export.policies)!r}; say where they are served: "
            "leyden.deploy(folder, base_url='http://HOST:PORT/v1')"
        )
    if not export.policies and (base_url is not None or fallback or api_key is not None):
        raise ConfigurationError(
            f"{str(folder)!r} holds prompts only, so nothing would be sent to base_url={base_url!r}; say "
            "leyden.deploy(folder)"
        )
    routing = Routing(
        base_url=(base_url or "").rstrip("/"),
        token=api_key or "none",
        routes=tuple(
            Route(
                model=policy.model,
                roles=None if policy.roles is None else tuple(policy.roles),
                kept_roles=tuple(policy.kept_roles),
            )
            for policy in export.policies.values()
        ),
        prompts=export.prompts,
        fallback=fallback,
    )
    return Deployment(export, routing)

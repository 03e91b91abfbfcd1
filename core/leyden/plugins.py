"""Find, check and hold the plugins that are installed.

Pluggy's own entry-point loader is not used: it aborts on the first broken plugin, and it accepts a misspelt
hook in silence. Here plugins are loaded one by one. A broken one is logged with its traceback and skipped, so
that an unrelated package cannot stop a training run; two plugins that claim one name are refused, because
which of them wins would depend on the order of installation.
"""

import difflib
import logging
import os
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import pluggy

from leyden import hookspecs
from leyden.errors import ConfigurationError, MissingExtraError, PluginError
from leyden.hookspecs import API_VERSION, ENTRY_POINT_GROUP, KINDS, Component, Kind, Registry

logger = logging.getLogger(__name__)

DISABLE_VARIABLE = "LEYDEN_PLUGINS_DISABLE"
"""Environment variable: names of plugins not to load, separated by commas."""


@dataclass(frozen=True)
class BrokenPlugin:
    """Say which plugin was skipped and why; the traceback is in the log."""

    name: str
    package: str
    """The distribution it came from, with its version."""
    error: Exception


class Accepted(NamedTuple):
    """A plugin that has passed every check."""

    plugin: object
    registry: Registry


class Observers:
    """Tell every plugin that observes. An observer that fails is logged; the others still hear."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self.manager = manager

    def rollout_finished(self, *, rollout: object) -> None:
        """Tell observers that a rollout has reached its final state."""
        self.tell("rollout_finished", rollout=rollout)

    def step_finished(self, *, step: int, metrics: dict[str, float]) -> None:
        """Tell observers that an optimizer step is complete. Each gets its own copy of `metrics`."""
        self.tell("step_finished", step=step, metrics=metrics)

    def tell(self, hook: str, **arguments: object) -> None:
        """Call `hook` of one plugin after the other, in the order of loading."""
        plugins = self.manager.list_name_plugin()
        for name, plugin in plugins:
            others = [other for _, other in plugins if other is not plugin]
            alone = self.manager.subset_hook_caller(hook, others)
            own = {key: dict(value) if isinstance(value, dict) else value for key, value in arguments.items()}
            try:
                alone(**own)
            except Exception:
                logger.exception("plugin %r failed in %s; the run goes on", name, hook)


class Plugins:
    """Hold what the loaded plugins offer. Nothing is imported until `get` is called."""

    def __init__(
        self,
        components: dict[tuple[Kind, str], Component],
        *,
        manager: pluggy.PluginManager,
        broken: tuple[BrokenPlugin, ...] = (),
    ) -> None:
        self.components = components
        self.broken = broken
        self.hook = Observers(manager)
        self.loaded = tuple(name for name, _ in manager.list_name_plugin())

    def names(self, kind: Kind) -> tuple[str, ...]:
        """List the names registered for `kind`, sorted."""
        return tuple(sorted(name for known, name in self.components if known == kind))

    def get(self, kind: Kind, name: str) -> Any:
        """Import and return the component `name`.

        The result is `Any` because its type follows from `kind`; callers annotate it with the interface.

        Raises:
            ConfigurationError: no such kind or name; the message suggests the nearest.
            MissingExtraError: the component's dependencies are not installed.
            PluginError: the component cannot be imported.
        """
        component = self.components.get((kind, name))
        if component is None:
            raise ConfigurationError(self.unknown(kind, name))
        try:
            return component.load()
        except MissingExtraError:
            raise
        except Exception as error:
            raise PluginError(
                f"the {kind} {name!r} of plugin {component.plugin!r} cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error

    def unknown(self, kind: str, name: str) -> str:
        """Say that `name` is not known, what is, and which plugins might have offered it."""
        if kind not in KINDS:
            return f"{kind!r} is not a kind of component; kinds are {', '.join(KINDS)}"
        known = self.names(kind)
        near = difflib.get_close_matches(name, known, n=1)
        message = f"no {kind} is named {name!r}"
        message += f"; did you mean {near[0]!r}?" if near else "."
        message += f" Known: {', '.join(known) or 'none'}."
        if self.broken:
            message += f" Plugins skipped because they failed to load: {', '.join(b.name for b in self.broken)}."
        return message


def load_plugins(
    entries: Iterable[metadata.EntryPoint] | None = None, *, disabled: AbstractSet[str] | None = None
) -> Plugins:
    """Load every plugin that is installed and not disabled.

    Args:
        entries: instead of the installed entry points of the group `leyden`.
        disabled: names to leave out, instead of those in `LEYDEN_PLUGINS_DISABLE`.

    Raises:
        PluginError: two plugins have one name, or two plugins register one component.
    """
    if entries is None:
        entries = metadata.entry_points(group=ENTRY_POINT_GROUP)
    if disabled is None:
        disabled = disabled_names(os.environ.get(DISABLE_VARIABLE, ""))
    manager = new_manager()
    components: dict[tuple[Kind, str], Component] = {}
    broken: list[BrokenPlugin] = []
    for entry in in_order(entries):
        if entry.name in disabled:
            continue
        try:
            accepted = accept(entry)
        except Exception as error:
            logger.exception("plugin %r from %s is broken and was skipped", entry.name, package_of(entry))
            broken.append(BrokenPlugin(entry.name, package_of(entry), error))
            continue
        merge(components, accepted.registry)
        manager.register(accepted.plugin, name=entry.name)
    return Plugins(components, manager=manager, broken=tuple(broken))


def accept(entry: metadata.EntryPoint) -> Accepted:
    """Import one plugin, check it against the contract and let it register.

    It is tried in a manager of its own, so that a plugin refused half-way leaves nothing behind.

    Raises:
        Exception: whatever the plugin raised, or `PluginError` where it breaks the contract.
    """
    plugin = entry.load()
    version = getattr(plugin, "leyden_api_version", None)
    if version != API_VERSION:
        raise PluginError(
            f"plugin {entry.name!r} states leyden_api_version = {version!r}; this Leyden speaks version {API_VERSION}"
        )
    trial = new_manager()
    trial.register(plugin, name=entry.name)
    trial.check_pending()
    if not trial.get_hookcallers(plugin):
        raise PluginError(
            f"plugin {entry.name!r} ({entry.value}) implements no hook; "
            "decorate its leyden_register with leyden.hookspecs.hookimpl"
        )
    registry = Registry(entry.name)
    trial.hook.leyden_register(registry=registry)
    return Accepted(plugin, registry)


def in_order(entries: Iterable[metadata.EntryPoint]) -> list[metadata.EntryPoint]:
    """Put the built-in plugin first and the others by name, so that no order depends on installation.

    Raises:
        PluginError: two plugins have one name.
    """
    by_name: dict[str, metadata.EntryPoint] = {}
    for entry in entries:
        other = by_name.setdefault(entry.name, entry)
        if other is not entry:
            raise PluginError(
                f"two plugins are named {entry.name!r}: one from {package_of(other)} and one from "
                f"{package_of(entry)}; uninstall one of the packages"
            )
    return sorted(by_name.values(), key=lambda entry: (entry.name != "builtin", entry.name))


def merge(components: dict[tuple[Kind, str], Component], registry: Registry) -> None:
    """Add one plugin's components to those of the others.

    Raises:
        PluginError: another plugin has registered one of them.
    """
    for key, component in registry.components.items():
        other = components.setdefault(key, component)
        if other is not component:
            raise PluginError(
                f"plugins {other.plugin!r} and {component.plugin!r} both register the {component.kind} "
                f"{component.name!r}; switch one off with {DISABLE_VARIABLE}={component.plugin}"
            )


def new_manager() -> pluggy.PluginManager:
    """Return an empty manager that knows Leyden's hooks."""
    manager = pluggy.PluginManager("leyden")
    manager.add_hookspecs(hookspecs)
    return manager


def disabled_names(value: str) -> frozenset[str]:
    """Read the names in `LEYDEN_PLUGINS_DISABLE`."""
    return frozenset(name.strip() for name in value.split(",") if name.strip())


def package_of(entry: metadata.EntryPoint) -> str:
    """Name the distribution that an entry point came from, with its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value

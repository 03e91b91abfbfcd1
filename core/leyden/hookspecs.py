"""Fix the contract between Leyden and a plugin: what it registers, and what it may observe.

A plugin is a module (or object) named by an entry point of the group `leyden`. It states the version of this
contract and implements the hooks it wants:

    from leyden.hookspecs import Registry, hookimpl, lazy

    leyden_api_version = 1

    @hookimpl
    def leyden_register(registry: Registry) -> None:
        registry.algorithm("acme-grpo", lazy("acme_leyden.grpo:AcmeGRPO"), summary="Acme's baseline")

The one trap: nothing heavy may be imported when the plugin module is, because listing plugins imports all of
them. `lazy` postpones an import until somebody asks for the component.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, get_args

import pluggy

from leyden.errors import PluginError

API_VERSION = 1
"""The version of this contract. A plugin that states another one is skipped with a message."""

ENTRY_POINT_GROUP = "leyden"

hookspec = pluggy.HookspecMarker("leyden")
hookimpl = pluggy.HookimplMarker("leyden")

Kind = Literal[
    "framework",
    "algorithm",
    "engine",
    "gateway",
    "learner",
    "store",
    "executor",
    "dialect",
    "sink",
    "credit",
    "command",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

Load = Callable[[], object]
"""Import the component and return it: a class, or a function where the kind is a function."""


@dataclass(frozen=True)
class Component:
    """Name one thing that a plugin offers, without importing it."""

    kind: Kind
    name: str
    load: Load
    summary: str
    """One line for listings; may be empty."""
    plugin: str
    """The plugin that registered it."""


def lazy(path: str) -> Load:
    """Return a `load` that imports `path`, written "module:attribute", when it is called.

    Raises:
        PluginError: `path` is not of that form.
    """
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise PluginError(f"{path!r} does not name a component; write 'package.module:Attribute'")

    def load() -> object:
        return getattr(import_module(module), attribute)

    return load


class Registry:
    """Collect what one plugin offers. `leyden_register` receives one and calls its methods.

    Names are lower case with hyphens and stand for the component in options, the command line and listings.
    """

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.components: dict[tuple[Kind, str], Component] = {}

    def framework(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer an adapter: a class that tells who speaks inside an agent framework."""
        self.add("framework", name, load, summary)

    def algorithm(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer an algorithm class: RL, prompt optimisation, fine-tuning."""
        self.add("algorithm", name, load, summary)

    def engine(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer an engine class, which answers model calls with token ids."""
        self.add("engine", name, load, summary)

    def gateway(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer a gateway class: the door through which agents reach the engine."""
        self.add("gateway", name, load, summary)

    def learner(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer a learner class, which updates the weights of policies."""
        self.add("learner", name, load, summary)

    def store(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer a store class."""
        self.add("store", name, load, summary)

    def executor(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer an executor class, which runs rollouts."""
        self.add("executor", name, load, summary)

    def dialect(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer a dialect class: one HTTP protocol that the gateway speaks."""
        self.add("dialect", name, load, summary)

    def sink(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer a sink class, which shows or keeps metrics."""
        self.add("sink", name, load, summary)

    def credit(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer a credit function, which turns rewards into returns."""
        self.add("credit", name, load, summary)

    def command(self, name: str, load: Load, *, summary: str = "") -> None:
        """Offer a sub-command of `leyden`: a function of its arguments, which returns the exit status."""
        self.add("command", name, load, summary)

    def add(self, kind: Kind, name: str, load: Load, summary: str) -> None:
        """Record one component.

        Raises:
            PluginError: the plugin registers this name twice, or `load` cannot be called.
        """
        if (kind, name) in self.components:
            raise PluginError(f"plugin {self.plugin!r} registers the {kind} {name!r} twice; rename one")
        if not callable(load):
            raise PluginError(
                f"plugin {self.plugin!r} registers the {kind} {name!r} with {load!r}, which cannot be "
                "called; pass a function that imports it, such as lazy('package.module:Attribute')"
            )
        self.components[kind, name] = Component(kind, name, load, summary, self.plugin)


@hookspec
def leyden_register(registry: Registry) -> None:
    """Register what the plugin offers. Called once, when plugins are loaded."""


@hookspec
def rollout_finished(rollout: object) -> None:
    """Observe a rollout that has reached its final state. What this raises is logged, never passed on."""


@hookspec
def step_finished(step: int, metrics: Mapping[str, float]) -> None:
    """Observe an optimizer step that is complete. What this raises is logged, never passed on."""

"""The policies of an engine and the versions of their weights on its servers.

One idea: each version of a LoRA has a name of its own on the servers, so it is there beside the others until no
request runs on it. Whole weights replace those that were there, so a policy with them is alone.
One trap: waiting for requests to end must not keep a server from being restarted, for they may wait for that. So
weights change under a lock which is not held while requests are waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leyden.errors import ConfigurationError, EngineError
from leyden.interfaces import Weights
from leyden.roles import RESERVED_MODEL, Policy
from leyden_plugins.engines.servers.http import Refused, Unreachable
from leyden_plugins.engines.vllm.checking import compare
from leyden_plugins.engines.vllm.flags import RANKS, Serving, rank_of
from leyden_plugins.engines.vllm.fleet import ASLEEP, Fleet, on_all
from leyden_plugins.engines.vllm.folders import Folders, folder_digest, lora_rank
from leyden_plugins.engines.vllm.replica import Replica
from leyden_plugins.torch_models.adapters import is_adapter

TRIES = 3
CHANGING = "weights change"


@dataclass(eq=False, kw_only=True)
class Served:
    """One version of one policy."""

    version: int
    name: str | None = None
    """On the servers; `None`: the weights that they have beside adapters."""
    folder: Path | None = None
    """Its weights; `None`: those the servers were started with."""
    running: int = 0
    is_retired: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the policies want of the servers."""

    whole: str | None
    """The one policy whose weights are replaced."""
    loras: int
    largest_rank: int


def plan(policies: Sequence[Policy]) -> Plan:
    """Say what these policies want.

    Raises:
        ConfigurationError: a server cannot have them all.
    """
    whole = [policy.name for policy in policies if policy.trainable and policy.lora is None]
    if whole and len(policies) > 1:
        others = [policy.name for policy in policies if policy.name != whole[0]]
        raise ConfigurationError(
            f"policy {whole[0]!r} trains all weights, of which a vLLM server has one set, and {others!r} would be "
            f"served from them too; give {whole[0]!r} a LoRA: Policy({whole[0]!r}, lora=LoRA())"
        )
    ranks = [policy.lora.rank for policy in policies if policy.lora is not None]
    return Plan(whole=whole[0] if whole else None, loras=len(ranks), largest_rank=max(ranks, default=0))


def serving_for(wanted: Plan, dtype: str, max_loras: int | None, max_lora_rank: int | None) -> Serving:
    """Return how servers are started: two versions of every LoRA side by side, unless other numbers were asked for.

    Raises:
        ConfigurationError: a LoRA is larger than what was asked for.
    """
    if not wanted.loras and max_loras is None:
        return Serving(dtype=dtype, max_loras=0, max_lora_rank=RANKS[0])
    rank = max_lora_rank or rank_of(wanted.largest_rank or 16)
    if wanted.largest_rank > rank:
        raise ConfigurationError(f"a policy has a LoRA of rank {wanted.largest_rank!r}, above max_lora_rank={rank!r}")
    return Serving(dtype=dtype, max_loras=max_loras or 2 * wanted.loras, max_lora_rank=rank)


class Policies:
    """What is served under each name; `publish`, `restore` and `forget` run on the fleet's loop."""

    def __init__(
        self, serving: Serving, folders: Folders, probe: Sequence[int], loop: asyncio.AbstractEventLoop, base: Path
    ) -> None:
        self.served = {RESERVED_MODEL: Served(version=0)}
        self.whole: str | None = None
        """The policy whose weights are replaced, if there is one."""
        self._serving, self._folders, self._probe, self._base = serving, folders, probe, base
        self._loop = loop
        self._adapters: dict[str, Served] = {}
        self._broken: str | None = None
        self._running = 0
        """Requests on all versions."""
        # Nobody else has this name, nor had it before: servers keep prefixes by the names of adapters.
        self._label = uuid.uuid4().hex[:8]
        self._numbers = itertools.count(1)
        self._changing = asyncio.Lock()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """What can be asked for now."""
        return [name for name in self.served if name != RESERVED_MODEL or not self._is_replaced]

    @property
    def _is_replaced(self) -> bool:
        return self.whole is not None and self.served[self.whole].folder is not None

    def add(self, policies: Sequence[Policy], wanted: Plan) -> None:
        """Serve the base, as version 0, under the names of new policies."""
        known = set(self.served) - {RESERVED_MODEL}
        new = [policy.name for policy in policies if policy.name not in known]
        # One that was served untrained may come again to train all weights.
        others = [name for name in known if name != wanted.whole or self.served[name].name is not None]
        if (others and wanted.whole is not None) or (new and known and self.whole is not None):
            raise ConfigurationError(
                f"this engine serves {sorted(known)!r}, and a policy that trains all weights cannot be served beside "
                f"others ({[policy.name for policy in policies]!r} came now); stop the engine, or use another one"
            )
        if wanted.loras and not self._serving.max_loras:
            raise ConfigurationError(
                "the servers were started without LoRAs; start the engine with all policies, or with max_loras="
            )
        if wanted.largest_rank > self._serving.max_lora_rank:
            raise ConfigurationError(
                f"a policy has a LoRA of rank {wanted.largest_rank!r}, and the servers were started for at most "
                f"{self._serving.max_lora_rank!r}; say max_lora_rank="
            )
        self.whole = wanted.whole or self.whole
        for name in new:
            self.served[name] = Served(version=0)

    # ---- requests, on any loop ---------------------------------------------------------------------------------

    def check(self, model: str) -> None:
        """Refuse what is not served.

        Raises:
            ConfigurationError: no such name, or the base after its weights were replaced.
        """
        if model == RESERVED_MODEL and self._is_replaced:
            raise ConfigurationError(
                f"{RESERVED_MODEL!r} is not served any more: policy {self.whole!r} trains all weights, and a vLLM "
                "server has one set of them. Give the policy a LoRA, or serve the base with an engine of its own"
            )
        if model not in self.served:
            raise ConfigurationError(f"model {model!r} is not served; these are: {self.names!r}")

    def admit(self, model: str, fleet: Fleet) -> Served | None:
        """Count a request on the version that is served now; `None` while the entrance is shut.

        In one step: a change of weights that begins now waits for this request, or the request for the change.

        Raises:
            EngineError: what is served is not what was published.
        """
        with self._lock:
            if not fleet.entrance.is_open:
                return None
            if self._broken is not None:  # while weights change it is too, but then the entrance is shut
                raise EngineError(self._broken)
            served = self.served[model]
            served.running += 1
            self._running += 1
            return served

    def release(self, served: Served, fleet: Fleet, _: object = None) -> None:
        """Count it out; the last one on an old version lets that go."""
        with self._lock:
            served.running -= 1
            self._running -= 1
            is_last = served.is_retired and served.running == 0
        if is_last and fleet.failure is None:
            asyncio.run_coroutine_threadsafe(self._forget(served, fleet), self._loop)

    def digest(self, model: str) -> str:
        """Return the SHA-256 over the files of what is served under a name."""
        if model != RESERVED_MODEL:  # a run notes what it began from, whatever is served by now
            self.check(model)
        return folder_digest(self.served[model].folder or self._base)

    # ---- weights, on the fleet's loop --------------------------------------------------------------------------

    async def publish(self, fleet: Fleet, policy: str, version: int, weights: Weights) -> None:
        """Serve new weights, checked; begins again when a server dies meanwhile.

        Raises:
            ConfigurationError: an unknown policy, or weights that it cannot have.
            EngineError: a server does not serve what it was given.
        """
        self._check_publish(policy, weights)
        if not fleet.entrance.is_open:
            raise EngineError("the engine is asleep; wake it before weights are published")
        folder = await asyncio.to_thread(self._folders.write, weights)
        try:
            self._check_folder(folder, policy, weights)
            push = self._publish_lora if is_adapter(folder) else self._publish_whole
            for tries_left in reversed(range(TRIES)):
                await fleet.all_ready()
                try:
                    await push(fleet, policy, version, weights, folder)
                    return
                except (EngineError, ConfigurationError) as error:
                    is_gone = isinstance(error, Unreachable)
                    # A server whose engine has died refuses whatever it is asked for, with any status.
                    is_refused = isinstance(error, Refused) or isinstance(error.__cause__, Refused)
                    if not tries_left or not (is_gone or is_refused):
                        raise
                    are_down = await asyncio.gather(*(fleet.suspect(replica) for replica in fleet.replicas))
                    if not is_gone and not any(are_down):
                        raise
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        finally:
            fleet.entrance.open(CHANGING)

    def _check_publish(self, policy: str, weights: Weights) -> None:
        if policy not in self.served or policy == RESERVED_MODEL:
            known = [name for name in self.served if name != RESERVED_MODEL]
            raise ConfigurationError(f"cannot publish to {policy!r}; policies: {known!r}")
        if weights.tensors is None and weights.folder is None:
            raise ConfigurationError("these weights have neither tensors nor a folder")

    def _check_folder(self, folder: Path, policy: str, weights: Weights) -> None:
        if not is_adapter(folder):
            if policy != self.whole:
                raise ConfigurationError(
                    f"policy {policy!r} was started with a LoRA, or as one that is not trained; these are whole weights"
                )
            return
        rank, most = lora_rank(folder, weights.lora), self._serving.max_lora_rank
        if not self._serving.max_loras or policy == self.whole:
            raise ConfigurationError(f"policy {policy!r} was started without a LoRA, and these weights are one")
        if rank > most:
            raise ConfigurationError(f"this LoRA has rank {rank!r}; the servers were started for at most {most!r}")

    async def _publish_lora(self, fleet: Fleet, policy: str, version: int, weights: Weights, folder: Path) -> None:
        name = f"{policy}@{version}-{self._label}{next(self._numbers)}"
        new = Served(version=version, name=name, folder=folder)
        async with self._changing:
            try:
                await on_all(fleet.replicas, lambda one: one.add_lora(name, folder))
                for replica in fleet.replicas:
                    await compare(replica, name, weights, self._probe, self._serving.dtype)
            except BaseException:
                await on_all(fleet.replicas, lambda one: one.remove_lora(name))
                raise
            with self._lock:
                before, self.served[policy] = self.served[policy], new
                self._adapters[name] = new
                before.is_retired = before.name is not None
                is_idle = before.is_retired and before.running == 0
        if is_idle:
            await self._forget(before, fleet)

    async def _forget(self, served: Served, fleet: Fleet) -> None:
        name, folder = served.name, served.folder
        assert name is not None and folder is not None  # adapters have both
        async with self._changing:
            del self._adapters[name]
            await on_all(fleet.replicas, lambda one: one.remove_lora(name))
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _publish_whole(self, fleet: Fleet, policy: str, version: int, weights: Weights, folder: Path) -> None:
        await self._quiet(fleet, CHANGING)
        async with self._changing:
            broken_before, unchanged = self._broken, 0
            self._broken = f"a push of version {version!r} of {policy!r} failed, and what the servers serve is unknown"

            async def replace(replica: Replica) -> None:
                nonlocal unchanged
                try:
                    await replica.replace_weights(folder)
                except ConfigurationError:
                    unchanged += 1
                    raise

            try:
                await on_all(fleet.replicas, replace)
                for replica in fleet.replicas:
                    await compare(replica, replica.base, weights, self._probe, self._serving.dtype)
            except ConfigurationError:
                if unchanged == len(fleet.replicas):
                    self._broken = broken_before
                raise
            self._broken = None
            with self._lock:
                before = self.served[policy]
                self.served[policy] = Served(version=version, folder=folder)
        if before.folder is not None:
            await asyncio.to_thread(shutil.rmtree, before.folder, ignore_errors=True)

    async def _quiet(self, fleet: Fleet, reason: str) -> None:
        """Let no request in, and wait for those that are."""
        with self._lock:
            fleet.entrance.shut(reason)
        while self._running:
            await asyncio.sleep(0.01)

    async def restore(self, replica: Replica) -> None:
        """Give a server that was started again everything that is served, old versions with running requests too."""
        async with self._changing:
            for name, served in self._adapters.items():
                assert served.folder is not None  # adapters have one
                await replica.add_lora(name, served.folder)
            folder = None if self.whole is None else self.served[self.whole].folder
            if folder is not None:
                await replica.replace_weights(folder)

    # ---- sleep, on the fleet's loop ----------------------------------------------------------------------------

    async def sleep(self, fleet: Fleet) -> None:
        """Let the servers free their memory once nothing runs."""
        if fleet.is_asleep:
            return
        try:
            await self._quiet(fleet, ASLEEP)
            await fleet.all_ready()
        except BaseException:  # nobody would wake what does not sleep
            fleet.entrance.open(ASLEEP)
            raise
        fleet.is_asleep = True
        async with self._changing:
            await on_all(fleet.replicas, Replica.sleep)

    async def wake(self, fleet: Fleet) -> None:
        """Let them serve again; one that died in its sleep is started again."""
        if not fleet.is_asleep:
            return
        async with self._changing:
            await on_all(fleet.replicas, Replica.wake)
        fleet.is_asleep = False
        await fleet.all_ready()
        fleet.entrance.open(ASLEEP)

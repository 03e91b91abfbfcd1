"""One server: is it well, what can it do, and giving it weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from leyden.errors import ConfigurationError, EngineError
from leyden.roles import RESERVED_MODEL
from leyden_plugins.engines.servers.http import Http, Refused, Unreachable
from leyden_plugins.engines.vllm.asking import COMPLETIONS, Answer
from leyden_plugins.engines.vllm.environments import check_version
from leyden_plugins.engines.vllm.flags import EXTENSION, IN_SERVER
from leyden_plugins.engines.vllm.process import Process

HEALTH_SECONDS = 5.0
LOOK_SECONDS = 0.1
RESET_TRIES = 50
UNCHANGED = "the served weights are unchanged"
"""What the extension says when it refused weights before it touched the model's."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a server must be able to do."""

    loras: bool
    whole_weights: bool
    sleep: bool
    folder: Path
    """Where weights will lie."""


@dataclass(eq=False, kw_only=True)
class Replica:
    """A server, its connections and, where it is ours, its process."""

    index: int
    http: Http
    process: Process | None = None
    base: str = RESERVED_MODEL
    """The served model's name there."""
    is_ready: bool = False
    running: int = 0
    """Requests of ours."""

    async def is_healthy(self) -> bool:
        """Say whether it serves."""
        if self.process is not None and not self.process.is_running:
            return False
        try:
            await self.http.get("/health", seconds=HEALTH_SECONDS)
        except EngineError:
            return False
        return True

    async def is_gone(self) -> bool:
        """Say whether it has ended; one that is slow to answer has not."""
        if self.process is not None:
            return not self.process.is_running
        try:
            await self.http.get("/health", seconds=HEALTH_SECONDS)
        except Unreachable as error:
            return not isinstance(error.__cause__, TimeoutError)
        except Refused:
            return True
        return False

    async def wait_until_healthy(self, seconds: float) -> None:
        """Wait for it.

        Raises:
            EngineError: its process has ended, or the time is over; with the last lines of its log.
        """
        until = time.monotonic() + seconds
        while not await self.is_healthy():
            if self.process is not None and not self.process.is_running:
                raise EngineError(f"vLLM has ended while it started. {self.last_words()}")
            if time.monotonic() > until:
                raise EngineError(
                    f"vLLM at {self.http.url} is not ready after {seconds:g} seconds (start_seconds). "
                    f"{self.last_words()}"
                )
            await asyncio.sleep(LOOK_SECONDS)

    def last_words(self) -> str:
        """Return the end of its log, or that it has none here."""
        if self.process is None:
            return "It was started by somebody else, who has its log."
        return f"The end of its log ({self.process.log}):\n{self.process.tail()}"

    # ---- what it can do ----------------------------------------------------------------------------------------

    async def examine(self, needs: Needs, probe: Sequence[Sequence[int]]) -> int:
        """Check version and abilities; return how many tokens a request may have.

        Raises:
            ConfigurationError: names everything that is missing, with what gives it.
        """
        version: Any = await self.http.get("/version")
        check_version(str(version["version"]), f"the server at {self.http.url}")
        models: Any = (await self.http.get("/v1/models"))["data"]
        served = {one["id"]: one for one in models}
        # Adapters, which may be of an earlier run, have a parent.
        self.base = next(name for name, one in served.items() if one.get("parent") is None)
        routes = set((await self.http.get("/openapi.json"))["paths"])
        missing = [*self._missing_routes(needs, routes)]
        if needs.whole_weights and "/collective_rpc" in routes:
            missing += await self._missing_in_worker(needs.folder)
        if not await self._scales(probe):
            missing.append("log-probabilities at the temperature sampled with: --logprobs-mode processed_logprobs")
        if missing:
            raise ConfigurationError(f"the server at {self.http.url} lacks:\n - " + "\n - ".join(missing))
        return int(served[self.base]["max_model_len"])

    def _missing_routes(self, needs: Needs, routes: set[str]) -> list[str]:
        missing = []
        if needs.loras and "/v1/load_lora_adapter" not in routes:
            missing.append("loading of LoRAs: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora")
        changes = {"/collective_rpc", "/pause", "/resume", "/reset_prefix_cache"}
        if needs.whole_weights and changes - routes:
            missing.append(f"changes of weights ({sorted(changes - routes)[0]}): VLLM_SERVER_DEV_MODE=1")
        if needs.sleep and "/sleep" not in routes:
            missing.append("sleep: VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode")
        return missing

    async def _missing_in_worker(self, folder: Path) -> list[str]:
        try:
            seen = await self.call_workers("leyden_sees", str(folder))
        except Refused:
            return [f"Leyden's loader: PYTHONPATH={IN_SERVER} and --worker-extension-cls {EXTENSION}"]
        if all(one["sees"] for one in seen):
            return []
        return [f"sight of {str(folder)!r}: give weights_folder= on a disk that this process and the server share"]

    async def _scales(self, probe: Sequence[Sequence[int]]) -> bool:
        """Say whether log-probabilities change with the temperature: the most probable token's, at 1 and at 0.5."""
        first, second = [await self._most_probable(probe, temperature) for temperature in (1.0, 0.5)]
        return any(abs(one - other) > 1e-6 for one, other in zip(first, second, strict=True))

    async def _most_probable(self, probe: Sequence[Sequence[int]], temperature: float) -> list[float]:
        asked = {"model": self.base, "max_tokens": 1, "logprobs": 1, "return_token_ids": True, "seed": 0}
        body = asked | {"prompt": probe, "temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        answer = msgspec.convert(await self.http.post(COMPLETIONS, body, seconds=120), Answer)
        tops = [one.logprobs.top_logprobs for one in answer.choices if one.logprobs is not None]
        return [max(value for value in top[0].values() if value is not None) for top in tops if top and top[0]]

    # ---- weights -----------------------------------------------------------------------------------------------

    async def call_workers(self, method: str, *arguments: str) -> list[Any]:
        """Call a method of the extension in every worker process."""
        answer: Any = await self.http.post("/collective_rpc", {"method": method, "args": arguments})
        return list(answer["results"])

    async def add_lora(self, name: str, folder: Path) -> None:
        """Serve an adapter under a name of its own.

        Raises:
            ConfigurationError: the server cannot load it.
        """
        try:
            await self.http.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Refused as error:
            if "already been loaded" not in error.said:  # a server that was thought dead may have it
                raise ConfigurationError(
                    f"the server at {self.http.url} cannot load the adapter in {str(folder)!r}: {error.said}"
                ) from error

    async def remove_lora(self, name: str) -> None:
        """Forget an adapter; one that the server does not have is forgotten already."""
        try:
            await self.http.post("/v1/unload_lora_adapter", {"lora_name": name})
        except (Refused, Unreachable):
            return

    async def replace_weights(self, folder: Path) -> None:
        """Replace all weights while nothing runs.

        Raises:
            ConfigurationError: they are not of the served model, which goes on as it was.
            EngineError: the server failed; what it serves now is unknown.
        """
        await self.http.post("/pause?mode=wait")
        try:
            await self.call_workers("leyden_load", str(folder))
        except Refused as error:
            if UNCHANGED not in error.said:
                raise EngineError(f"the server at {self.http.url} failed to load weights: {error.said}") from error
            await self.http.post("/resume")
            raise ConfigurationError(f"the server at {self.http.url} refuses the weights: {error.said}") from error
        await self._forget_prefixes()
        await self.http.post("/resume")

    async def _forget_prefixes(self) -> None:
        for _ in range(RESET_TRIES):
            answer: Any = await self.http.post("/reset_prefix_cache")
            if not isinstance(answer, dict) or answer.get("success", True):
                return
            await asyncio.sleep(LOOK_SECONDS)
        raise EngineError(f"the server at {self.http.url} does not reset its prefix cache; old answers would go on")

    # ---- sleep -------------------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Free the device: weights go to the machine's memory, keys and values are dropped."""
        await self.http.post("/sleep?level=1&mode=wait")

    async def wake(self) -> None:
        """Serve again; a server that is gone is found so by whoever looks after it."""
        if await self.is_healthy():
            await self.http.post("/wake_up")

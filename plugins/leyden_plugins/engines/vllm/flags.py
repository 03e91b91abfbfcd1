"""The options of an engine, and the command line and environment of a server out of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leyden.errors import ConfigurationError
from leyden.roles import RESERVED_MODEL
from leyden_plugins.engines.vllm.environments import Environment

IN_SERVER = Path(__file__).with_name("in_server")
EXTENSION = "leyden_vllm.Worker"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""
OF_SERVERS = (
    *("replicas", "python", "devices", "max_loras", "max_lora_rank", "gpu_memory_utilization", "kv_cache_bytes"),
    *("arguments", "environment", "log_folder"),
)
"""Options of servers that the engine starts."""
CPU_CACHE_BYTES = 2**30
"""Without a number vLLM takes nearly all of the machine's memory on CPU."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the engine was asked for."""

    model: str
    python: str = sys.executable
    urls: Sequence[str] = ()
    replicas: int = 1
    devices: Sequence[str] | None = None
    dtype: str = "auto"
    context_length: int | None = None
    max_loras: int | None = None
    max_lora_rank: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_bytes: int | None = None
    sleep: bool = False
    weights_folder: Path | None = None
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    log_folder: Path | None = None
    start_seconds: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no server could be run with."""
        _at_least("replicas", self.replicas, 1)
        _at_least("context_length", self.context_length, 2)
        _at_least("max_loras", self.max_loras, 1)
        _at_least("kv_cache_bytes", self.kv_cache_bytes, 1)
        if self.max_lora_rank is not None and self.max_lora_rank not in RANKS:
            raise ConfigurationError(f"max_lora_rank must be one of {RANKS!r}, got {self.max_lora_rank!r}")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigurationError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}")
        if self.start_seconds <= 0:
            raise ConfigurationError(f"start_seconds must be above 0, got {self.start_seconds!r}")
        if isinstance(self.urls, str) or isinstance(self.arguments, str) or isinstance(self.devices, str):
            raise ConfigurationError("urls, arguments and devices are lists of strings, not one string")
        if self.devices is not None and len(self.devices) != self.replicas:
            raise ConfigurationError(
                f"devices={list(self.devices)!r} must name one for each of replicas={self.replicas!r}, such as '0'"
            )
        self._check_urls()

    def _check_urls(self) -> None:
        wrong = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if wrong:
            raise ConfigurationError(f"urls must begin with http:// or https://, got {wrong[0]!r}")
        if not self.urls:
            return
        defaults = Options(model=self.model)
        given = [name for name in OF_SERVERS if getattr(self, name) != getattr(defaults, name)]
        if given:
            raise ConfigurationError(
                f"{given[0]!r} is for servers that this engine starts; those at urls={list(self.urls)!r} run already, "
                "so start them with it"
            )


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What all servers of an engine have in common, known once the policies are."""

    dtype: str
    max_loras: int
    """0: no LoRAs."""
    max_lora_rank: int


def command(options: Options, environment: Environment, serving: Serving, *, port: int, seed: int) -> list[str]:
    """Return the command line of a server."""
    line = [options.python, *environment.entry, options.model]
    line += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", RESERVED_MODEL, "--seed", str(seed)]
    line += ["--dtype", serving.dtype, "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    line += ["--structured-outputs-config", '{"backend":"guidance"}', "--worker-extension-cls", EXTENSION]
    line += ["--uvicorn-log-level", "warning"]
    if options.context_length is not None:
        line += ["--max-model-len", str(options.context_length)]
    if serving.max_loras:
        line += ["--enable-lora", "--max-loras", str(serving.max_loras), "--max-lora-rank", str(serving.max_lora_rank)]
    cache_bytes = options.kv_cache_bytes
    if environment.is_cpu:
        line += ["--enforce-eager"]
        cache_bytes = cache_bytes or CPU_CACHE_BYTES
    if cache_bytes is not None:
        line += ["--kv-cache-memory-bytes", str(cache_bytes)]
    if options.gpu_memory_utilization is not None:
        line += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.sleep:
        line += ["--enable-sleep-mode"]
    return [*line, *options.arguments]


def environ(options: Options, environment: Environment, index: int) -> dict[str, str]:
    """Return the environment variables of server number `index`."""
    found = dict(os.environ)
    if options.python != sys.executable:
        # They are about this interpreter, and would put this one's packages before that one's.
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            found.pop(name, None)
    found |= {
        "VLLM_SERVER_DEV_MODE": "1",  # pause, resume, collective_rpc, sleep
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if environment.is_cpu:
        # Otherwise the first request compiles the sampler, for half a minute.
        found["TORCH_COMPILE_DISABLE"] = "1"
    if options.devices is not None:
        found["CUDA_VISIBLE_DEVICES"] = options.devices[index]
    found |= options.environment
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(IN_SERVER), found.get("PYTHONPATH"))))
    return found


def rank_of(asked: int) -> int:
    """Return the smallest rank that servers can be started with and that is enough.

    Raises:
        ConfigurationError: none is.
    """
    enough = [rank for rank in RANKS if rank >= asked]
    if not enough:
        raise ConfigurationError(f"a LoRA of rank {asked!r} is more than vLLM serves, which is {RANKS[-1]}")
    return enough[0]


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigurationError(f"{name} must be at least {least}, got {value!r}")

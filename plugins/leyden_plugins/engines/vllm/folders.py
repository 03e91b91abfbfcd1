"""Weights on their way to servers: folders in the Hugging Face and PEFT formats.

One idea: a folder stays as long as its weights are served, so that a server that was restarted gets them again.
One trap: memory. The default is a folder in /dev/shm, which is RAM: one copy of the weights served, two while they
change.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden.interfaces import Weights
from leyden.roles import LoRA
from leyden_plugins.torch_models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    adapter_config,
    check_kind,
    is_adapter,
    paired,
)

with extra("train"):
    import torch
    from safetensors.torch import save_file
    from transformers.utils.hub import cached_file

SHARED_MEMORY = Path("/dev/shm")
PREFIX, LOCK = "leyden-vllm-", "owner.lock"
HEAD = "lm_head.weight"


class Folders:
    """Writes each version's weights into a folder of its own."""

    def __init__(self, parent: Path | None, *, needed: int, is_tied: bool) -> None:
        """Make a private folder, after removing what killed processes have left of theirs.

        Args:
            parent: where; `None`: in memory if there is ample room, else where temporary files are.
            needed: bytes.
            is_tied: the head is the embeddings, and is not written.
        """
        if parent is None:
            in_memory = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > needed
            parent = SHARED_MEMORY if in_memory else Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # The system lets go of it when this process ends, however it does.
        self._lock = (self.root / LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._is_tied = is_tied
        self._numbers = itertools.count(1)

    def remove(self) -> None:
        """Remove everything. Idempotent."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()

    def write(self, weights: Weights) -> Path:
        """Write weights, or copy the folder that they came in. Blocks.

        Raises:
            ConfigurationError: there are none, or they are not what they are said to be.
        """
        folder = self.root / f"weights-{next(self._numbers)}"
        folder.mkdir(parents=True)
        try:
            if weights.tensors is None:
                copy_weights(weights.folder, folder)
            elif weights.lora is not None:
                write_lora(folder, weights.lora, weights.tensors)
            else:
                save(weights.tensors, folder / "model.safetensors", without={HEAD} if self._is_tied else set())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder


def remove_abandoned(parent: Path) -> None:
    """Remove private folders whose owners are gone: in /dev/shm they would hold memory for good."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def copy_weights(source: Path | None, folder: Path) -> None:
    """Copy a checkpoint's or an adapter's tensors with what names them."""
    if source is None or not source.is_dir():
        raise ConfigurationError(f"these weights have neither tensors nor a folder that is there, but {source!r}")
    wanted = [ADAPTER_CONFIG, ADAPTER_TENSORS] if is_adapter(source) else ["*.safetensors", "*.safetensors.index.json"]
    files = [file for pattern in wanted for file in source.glob(pattern)]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ConfigurationError(f"folder {str(source)!r} holds no weights in the safetensors format")
    for file in files:
        shutil.copyfile(file, folder / file.name)


def write_lora(folder: Path, lora: LoRA, tensors: Mapping[str, object]) -> None:
    """Write an adapter as PEFT does."""
    paired(tensors)  # refuses names that vLLM would leave out without a word
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save(tensors, folder / ADAPTER_TENSORS)


def save(tensors: Mapping[str, object], file: Path, without: frozenset[str] | set[str] = frozenset()) -> None:
    """Write tensors from any device.

    Raises:
        ConfigurationError: one of them is none.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConfigurationError(f"weight {name!r} is {type(tensor).__name__!r}, not a tensor")
        if name not in without:
            found[name] = tensor.detach().cpu().contiguous()
    save_file(found, file, metadata={"format": "pt"})


def lora_rank(folder: Path, lora: LoRA | None) -> int:
    """Return the rank of the adapter in a folder.

    Raises:
        ConfigurationError: it is more than A and B, or not what `lora` says.
    """
    config = adapter_config(folder)
    check_kind(config, lora, folder)
    return int(config["r"])


def local_folder(model: str) -> Path:
    """Return where a model's files are: the folder itself, or that of a downloaded copy."""
    if Path(model).is_dir():
        return Path(model)
    return Path(str(cached_file(model, "config.json"))).parent


def bytes_in(folder: Path) -> int:
    """Return the size of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the weights in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()

"""What an export folder holds: `leyden.json`, read by whoever serves or deploys it, and what a LoRA says of itself."""

from __future__ import annotations

from pathlib import Path

import msgspec

from leyden.errors import ConfigurationError
from leyden.training.runfolder import POLICIES as POLICIES

EXPORT_FILE = "leyden.json"
EXPORT_SCHEMA = 1
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's file beside the tensors of a LoRA; a folder of whole weights has none."""


class ExportedPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """One policy of an export."""

    model: str
    """The name it is served under."""
    folder: str
    """Its Hugging Face folder, or PEFT's folder of a LoRA, relative to the export."""
    version: int
    roles: list[str] | None
    """Patterns of the roles it speaks for; `None` is every role."""
    kept_roles: list[str] = []
    """Patterns of roles among those that it does not speak for: untrained policies before it took them in training.
    They keep their own endpoint."""
    sampling: dict[str, object] = {}
    """How it was sampled in training: for the reader. A deployed app keeps its own parameters."""
    base_sha256: str | None = None
    """Of the weights that training started from."""
    base_model: str | None = None
    """Of a LoRA: the folder or name of the weights that it is added to. `None`: the folder holds whole weights."""
    lora_rank: int | None = None
    """Of a LoRA."""


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What `leyden.json` holds."""

    policies: dict[str, ExportedPolicy]
    prompts: dict[str, str] = {}
    """Role -> the system prompt that replaces the agent's own."""
    schema: int = EXPORT_SCHEMA


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What serving needs of PEFT's adapter_config.json; its other fields are the engine's business."""

    base_model_name_or_path: str | None = None
    r: int
    rank_pattern: dict[str, int] | None = None

    @property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        return max(self.r, *(self.rank_pattern or {"": self.r}).values())


def read_adapter_config(folder: Path) -> AdapterConfig | None:
    """Return what the LoRA in a folder says of itself; `None` where the folder holds whole weights.

    Raises:
        ConfigurationError: it is not PEFT's.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=AdapterConfig)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"{str(file)!r} is not the configuration of a LoRA: {error}") from error


def read_export(folder: Path) -> Export:
    """Read an export's description.

    Raises:
        ConfigurationError: it is missing, malformed, or of another schema.
    """
    file = folder / EXPORT_FILE
    try:
        export = msgspec.json.decode(file.read_bytes(), type=Export)
    except OSError as error:
        raise ConfigurationError(
            f"{str(folder)!r} holds no readable {EXPORT_FILE} ({error.strerror}); write it with "
            f"'leyden export RUN {folder}'"
        ) from error
    except msgspec.MsgspecError as error:
        raise ConfigurationError(
            f"{str(file)!r} is not an export: {error}; write it again with 'leyden export'"
        ) from error
    if export.schema != EXPORT_SCHEMA:
        raise ConfigurationError(
            f"{str(file)!r} has schema {export.schema!r}; this Leyden reads {EXPORT_SCHEMA}: export it again or upgrade"
        )
    return export

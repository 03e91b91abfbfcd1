"""Checkpoints of the families that take each of the engine's paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint

FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "qwen3": ("fused", "qwen3", {}),
    "qwen3-tied": ("fused", "qwen3", {"tie_word_embeddings": True}),
    "qwen2": ("fused", "qwen2", {}),
    "llama": ("fused", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}}),
    "gpt2": ("generic", "gpt2", {"n_inner": 48}),
    "gpt-neox": ("generic", "gpt_neox", {"rotary_pct": 0.25}),
    "mistral": ("row by row", "mistral", {"sliding_window": 8}),
}
"""Name -> (the path it takes, its family, how it differs from the tiny default)."""


@pytest.fixture
def anyio_backend() -> str:
    """The one backend that the engine supports."""
    return "asyncio"


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint of every family, with the path it takes."""
    path, name, config = FAMILIES[request.param]
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), name, **config), path


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny default."""
    return tiny_checkpoint(tmp_path_factory.mktemp("qwen"))

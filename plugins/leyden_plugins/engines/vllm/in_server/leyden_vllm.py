"""What runs inside a vLLM server's worker processes: new weights for the served model, read from a folder.

The engine puts this file's folder on the server's PYTHONPATH and names it with `--worker-extension-cls
leyden_vllm.Worker`; it then calls the methods through `POST /collective_rpc`. This file stands alone: the server's
environment has vLLM and need not have Leyden.

The one idea: look before you leap. vLLM's reload empties the model before it reads, so a wrong folder costs the server
its life at the next request. Every file, name and shape is therefore checked first. What is refused is an exception,
which vLLM answers with status 500 and the text, less the paths in it.

The one trap: a head tied to the embeddings. On CPU vLLM computes logits from a copy of the head that is packed for the
processor. A reload writes the embeddings, whose storage the head shares, and leaves the packed copy as it was: logits
change, and are wrong. The same processor has a second one, see `leave_base_rows_alone`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.platforms import current_platform

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"

SHOWN = 3
"""How many names an error gives."""


class WeightsRefused(Exception):
    """Say why these weights cannot be loaded; the model has not been touched."""

    def __str__(self) -> str:
        # vLLM passes on the text alone, and the engine must know whether the server can go on.
        return f"the served weights are unchanged: {super().__str__()}"


class Worker:
    """Extend vLLM's worker, of which these methods become a part."""

    if TYPE_CHECKING:  # what vLLM's own class provides
        from vllm.config import LoadConfig, ModelConfig

        model_config: ModelConfig
        load_config: LoadConfig

        def get_model(self) -> torch.nn.Module: ...
        def reload_weights(self, *, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None: ...

    def leyden_sees(self, path: str) -> dict[str, bool]:
        """Tell whether this process sees a folder: `{"sees": True}`, for vLLM would turn a bare `True` into text."""
        return {"sees": Path(path).is_dir()}

    def leyden_load(self, path: str) -> dict[str, int]:
        """Replace the model's weights by those of a checkpoint folder in the Hugging Face format; no request may run.

        Raises:
            WeightsRefused: they do not fit the model, which is served as it was.
        """
        files = files_of(Path(path))
        shapes = shapes_of(files)
        check(shapes, served_shapes(self), path, optional=tied_head(self))
        # Also right on a GPU: vLLM loads layer by layer and copies the result into the tensors that CUDA graphs know.
        self.reload_weights(weights_iterator=tensors_in(files))
        if current_platform.is_cpu():
            repack_heads(self.get_model())
        return {"tensors": len(shapes)}


def leave_base_rows_alone() -> None:
    """Keep adapters out of requests that have none, on a CPU.

    There an adapter is looked up by its slot, and -1, which means none, finds the last slot: a request to the base
    model, batched with requests to adapters, is answered by whatever adapter lies there. GPU kernels skip -1. A factor
    that is 0 between the two matrices is an adapter that does nothing. To go once vLLM's own `bgmv_shrink` skips -1.
    """
    original = lora_ops.bgmv_shrink

    def bgmv_shrink(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[: len(lora_indices_tensor)][lora_indices_tensor < 0] = 0

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink


def repack_heads(model: torch.nn.Module) -> None:
    """Renew the packed copies of heads, which a reload of tied embeddings leaves as they were.

    A GPU needs none of this: it has no packed copies, and a tied head is the embeddings' own storage.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def files_of(folder: Path) -> list[Path]:
    """Return the files of a checkpoint: those its index names, or the single one.

    Raises:
        WeightsRefused: there is no checkpoint, or a file that the index names is missing.
    """
    if not folder.is_dir():
        raise WeightsRefused(f"{str(folder)!r} is no folder that the server sees")
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        raise WeightsRefused(f"{str(folder)!r} has neither {SINGLE} nor {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsRefused(f"{str(index)!r} cannot be read: {error!r}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise WeightsRefused(f"{str(folder)!r} lacks files that its index names: {missing[:SHOWN]}")
    return [folder / name for name in names]


def shapes_of(files: list[Path]) -> dict[str, list[int]]:
    """Return the shape of every tensor, from the files' headers.

    Raises:
        WeightsRefused: a file is damaged; one that ends too early is, because its header says how long it must be.
    """
    shapes: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise WeightsRefused(f"{str(path)!r} cannot be read: {error}") from error
    return shapes


def served_shapes(worker: Worker) -> dict[str, list[int]]:
    """Return the shapes of the checkpoint that the server was started with.

    Raises:
        WeightsRefused: it is not in the safetensors format, so there is nothing to compare with.
    """
    folder = worker.model_config.model
    if not Path(folder).is_dir():  # a hub name: vLLM's own function finds the copy it loaded
        patterns = ["*.safetensors", "*.json"]
        folder = download_weights_from_hf(
            folder, worker.load_config.download_dir, patterns, worker.model_config.revision
        )
    return shapes_of(files_of(Path(folder)))


def tied_head(worker: Worker) -> set[str]:
    """Return the head's name where it is the embeddings: checkpoints have it or leave it out."""
    return {HEAD} if getattr(worker.model_config.hf_text_config, "tie_word_embeddings", False) else set()


def check(shapes: Mapping[str, list[int]], served: Mapping[str, list[int]], path: str, *, optional: set[str]) -> None:
    """Compare with what is served.

    Raises:
        WeightsRefused: a name is missing or unknown, or a shape differs.
    """
    missing = sorted(served.keys() - shapes.keys() - optional)
    unknown = sorted(shapes.keys() - served.keys() - optional)
    if missing:
        raise WeightsRefused(f"{path!r} lacks {len(missing)} tensors of the served model: {missing[:SHOWN]}")
    if unknown:
        raise WeightsRefused(f"{path!r} has {len(unknown)} tensors that the served model has not: {unknown[:SHOWN]}")
    for name, shape in shapes.items():
        if shape != served.get(name, shape):
            raise WeightsRefused(f"{name!r} of {path!r} has shape {shape}, the served model's has {served[name]}")


def tensors_in(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors one by one, so that memory holds one at a time."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)


if current_platform.is_cpu():
    leave_base_rows_alone()

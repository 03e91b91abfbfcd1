"""Checkpoints of a learner: per policy its weights in float32, value head and optimizer, and torch's random state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from leyden.errors import ConfigurationError
from leyden_plugins.learners.torch.trainee import Trainee

OPTIMIZER_FILE = "optimizer.pt"
VALUE_HEAD_FILE = "value_head.pt"
RNG_FILE = "rng.pt"


def save(folder: Path, trainees: Mapping[str, Trainee], *, device: str) -> None:
    """Write one folder a policy, and the random state."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, trainee in trainees.items():
        trainee.write(folder / name, exact=True)
        torch.save(trainee.optimizer.state_dict(), folder / name / OPTIMIZER_FILE)
        if trainee.head is not None:
            torch.save(trainee.head.state_dict(), folder / name / VALUE_HEAD_FILE)
    random_states = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        random_states["cuda"] = torch.cuda.get_rng_state(device)
    torch.save(random_states, folder / RNG_FILE)


def load(folder: Path, trainees: Mapping[str, Trainee], *, device: str) -> None:
    """Restore what `save` wrote, in place; waiting gradients are dropped.

    Raises:
        ConfigurationError: the folder's policies, shapes or adapters differ from the open ones.
    """
    saved = {file.parent.name for file in folder.glob(f"*/{OPTIMIZER_FILE}")}
    if saved != set(trainees):
        raise ConfigurationError(
            f"checkpoint {str(folder)!r} holds the policies {sorted(saved)!r}, this run trains "
            f"{sorted(trainees)!r}; resume with the policies the run began with"
        )
    for name, trainee in trainees.items():
        trainee.assign(trainee.read(folder / name))
        trainee.forget()
        if (folder / name / VALUE_HEAD_FILE).is_file():
            head = trainee.value_head()
            head.load_state_dict(torch.load(folder / name / VALUE_HEAD_FILE, map_location=device, weights_only=True))
        trainee.optimizer.load_state_dict(
            torch.load(folder / name / OPTIMIZER_FILE, map_location=device, weights_only=True)
        )
    random_states = torch.load(folder / RNG_FILE, weights_only=True)
    torch.set_rng_state(random_states["cpu"])
    if "cuda" in random_states and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(random_states["cuda"], device)

"""Trainers whose model is a script and whose learner counts: a whole run takes a tenth of a second."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

import leyden
from leyden.context import current
from leyden.interfaces import Batch, Sample, Weights
from leyden.roles import Policy
from leyden.testing.fakes import FakeEngine
from leyden_plugins.algorithms.rl import GRPO

client = httpx.Client(trust_env=False)


def ask(text: str = "hello", **options: object) -> str:
    """Call the model as an app does, at an address that only the wire can make work."""
    body = {"model": "theirs", "messages": [{"role": "user", "content": text}], **options}
    reply = client.post("http://127.0.0.1:9/v1/chat/completions", json=body)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


def rollout_id() -> str:
    """Return the running rollout's id, which ends in its sample's number."""
    frame = current()
    assert frame is not None and frame.rollout is not None
    return frame.rollout.rollout_id


def odd_wins(task: object) -> float:
    """Reward every other sample, so that each group teaches something."""
    ask(str(task))
    return float(int(rollout_id()[-1]) % 2)


class SmallEngine(FakeEngine):
    """Also takes back version 0, as real engines do when a new trainer begins with them."""

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        if version == 0:
            self._versions[policy] = 0
        else:
            await super().publish(policy, version, weights)


class CountingLearner:
    """Its weights are the number of optimizer steps; it keeps the samples that it was given."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.samples: list[tuple[str, Sample]] = []

    def open(self, policies: Sequence[Policy], model: str, *, seed: int) -> None:
        self.steps = {policy.name: 0 for policy in policies if policy.trainable}

    def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
        self.samples += [(policy, sample) for objective in batch for sample in objective.samples]
        return {"loss": 0.0}

    def logprobs(self, policy: str, samples: Sequence[Sample], *, reference: bool = False) -> Sequence[Sequence[float]]:
        return [sample.logprobs for sample in samples]

    def values(self, policy: str, samples: Sequence[Sample]) -> Sequence[Sequence[float]]:
        return [[0.0] * len(sample.token_ids) for sample in samples]

    def optim_step(self, policy: str, learning_rate: float) -> Mapping[str, float]:
        self.steps[policy] += 1
        return {"gradient_norm": 1.0, "learning_rate": learning_rate}

    def weights(self, policy: str) -> Weights:
        return Weights(tensors={"steps": self.steps[policy]})

    def export(self, policy: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "steps.json").write_text(json.dumps(self.steps[policy]))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "steps.json").write_text(json.dumps(self.steps))

    def load(self, folder: Path) -> None:
        self.steps = json.loads((folder / "steps.json").read_text())

    def close(self) -> None:
        """Keep the counts: tests read them."""


class Notes:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.when_step_finished: Callable[[int], None] = lambda step: None

    def run_started(self, info: Mapping[str, object]) -> None: ...

    def progress(self, info: Mapping[str, object]) -> None: ...

    def run_finished(self, summary: Mapping[str, object]) -> None: ...

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)
        self.when_step_finished(step)

    def notice(self, text: str) -> None:
        self.lines.append(text)


def small_trainer(run: Path, agent: object = odd_wins, **options: object) -> leyden.Trainer:
    """Return a trainer of four tasks, two a step, two samples each, in this process."""
    defaults: dict[str, object] = {
        "tasks": [f"task {index}" for index in range(4)],
        "tasks_per_step": 2,
        "policies": [leyden.Policy("me")],
        "engine": SmallEngine(),
        "algorithm": GRPO(group_size=2),
        "learner": CountingLearner(),
        "run": run,
        "sinks": (),
        "workers": 0,
        "timeout_seconds": 20.0,
    }
    return leyden.Trainer(agent, **{**defaults, **options})  # type: ignore[arg-type]  # the caller's options

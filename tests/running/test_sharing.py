"""Engine and learner on one device take turns; what an engine gets to check a push with."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from leyden.errors import ConfigurationError
from leyden.interfaces import Batch, Generation, GenerationRequest, Weights
from tests.running.small import CountingLearner, SmallEngine, small_trainer


class Device:
    """What happened on it, in order; using it out of turn fails at once."""

    def __init__(self) -> None:
        self.is_engines = True
        self.events: list[str] = []

    def use(self, who: str) -> None:
        assert (who == "engine") == self.is_engines, f"{who} worked out of turn after {self.events[-3:]}"


class SleepyEngine(SmallEngine):
    sleeps = True

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    async def generate(self, request: GenerationRequest) -> Generation:
        self.device.use("engine")
        return await super().generate(request)

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        self.device.use("engine")
        await super().publish(policy, version, weights)

    async def sleep(self) -> None:
        assert self.device.is_engines
        self.device.is_engines = False
        self.device.events.append("sleep")

    async def wake(self) -> None:
        assert self.device.events[-1] == "release"
        self.device.is_engines = True
        self.device.events.append("wake")


class PoliteLearner(CountingLearner):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
        self.device.use("learner")
        return super().forward_backward(policy, batch)

    def optim_step(self, policy: str, learning_rate: float) -> Mapping[str, float]:
        self.device.use("learner")
        return super().optim_step(policy, learning_rate)

    def release_memory(self) -> None:
        self.device.events.append("release")


def test_an_engine_that_sleeps_samples_and_takes_weights_only_while_the_learner_rests(tmp_path: Path) -> None:
    device = Device()
    engine, learner = SleepyEngine(device), PoliteLearner(device)
    with small_trainer(
        tmp_path / "run", engine=engine, learner=learner, val_tasks=["held out"], evaluate_every=1
    ) as trainer:
        trainer.fit(3)
    # The comparison before the first step, then once a step.
    assert device.events == ["sleep", "release", "wake"] * 4
    assert device.is_engines, "the engine is the user's, and left awake"


def test_an_engine_that_was_not_asked_to_sleep_never_does(tmp_path: Path) -> None:
    device = Device()
    engine = SleepyEngine(device)
    engine.sleeps = False
    with small_trainer(tmp_path / "run", engine=engine) as trainer:
        trainer.fit(2)
    assert device.events == []


def test_an_engine_is_awake_again_after_an_update_that_failed(tmp_path: Path) -> None:
    device = Device()

    class Failing(PoliteLearner):
        def forward_backward(self, policy: str, batch: Batch) -> Mapping[str, float]:
            raise RuntimeError("out of memory")

    with small_trainer(tmp_path / "run", engine=SleepyEngine(device), learner=Failing(device)) as trainer:
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.fit(1)
    assert device.is_engines


def test_an_engine_that_sleeps_cannot_sample_beside_the_learner(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_staleness=2 samples while the learner works"):
        small_trainer(tmp_path / "run", engine=SleepyEngine(Device()), max_staleness=2)


def test_every_push_comes_with_the_learners_own_log_probabilities(tmp_path: Path) -> None:
    class Scoring(CountingLearner):
        """After n steps every token has log-probability -n, times its id."""

        def logprobs(self, policy, samples, *, reference=False):  # type: ignore[no-untyped-def]  # as its base
            if any(any(sample.logprobs) for sample in samples):  # these were sampled, and recorded
                return super().logprobs(policy, samples, reference=reference)
            return [[-float(self.steps[policy] * token) for token in sample.token_ids] for sample in samples]

    seen: list[tuple[int, list[float]]] = []

    class Checking(SmallEngine):
        async def publish(self, policy: str, version: int, weights: Weights) -> None:
            assert weights.logprobs is not None
            seen.append((version, list(weights.logprobs([1], [2, 3]))))
            await super().publish(policy, version, weights)

    with small_trainer(tmp_path / "run", engine=Checking(), learner=Scoring()) as trainer:
        trainer.fit(2)
    assert seen == [(0, [0.0, 0.0]), (1, [-2.0, -3.0]), (2, [-4.0, -6.0])]

"""What plugins implement: engine, learner, store, executor, framework adapter, algorithm, sink.

Each protocol states its duties: order, lengths, what may be mutated, what failure looks like.
`leyden.testing` holds fakes, and the contract suite that every store passes.
"""

from leyden.interfaces.algorithm import Algorithm, Group, Session, Transition
from leyden.interfaces.engine import Delta, Engine, Generation, GenerationRequest, SamplingParameters, Weights
from leyden.interfaces.execution import Agent, AttemptResult, Executor, FrameworkAdapter, RewardFunction, RolloutSpec
from leyden.interfaces.gateway import Access, Gateway
from leyden.interfaces.learner import Learner, Loss, TrainingRow
from leyden.interfaces.sink import MetricSink
from leyden.interfaces.store import Outcome, Owner, RolloutRecords, Store

__all__ = [
    "Access",
    "Agent",
    "Algorithm",
    "AttemptResult",
    "Delta",
    "Engine",
    "Executor",
    "FrameworkAdapter",
    "Gateway",
    "Generation",
    "GenerationRequest",
    "Group",
    "Learner",
    "Loss",
    "MetricSink",
    "Outcome",
    "Owner",
    "RewardFunction",
    "RolloutRecords",
    "RolloutSpec",
    "SamplingParameters",
    "Session",
    "Store",
    "TrainingRow",
    "Transition",
    "Weights",
]

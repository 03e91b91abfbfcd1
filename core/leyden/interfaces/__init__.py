"""What plugins implement: engine, learner, store, executor, framework adapter, algorithm, sink.

Each protocol states its duties: order, lengths, what may be mutated, what failure looks like.
`leyden.testing` holds fakes, and the contract suite that every store passes.
"""

from leyden.interfaces.algorithm import Algorithm, Demands, Group, Session, Transition, demands_of
from leyden.interfaces.engine import (
    ContinuesExactly,
    Delta,
    Engine,
    Generation,
    GenerationRequest,
    SamplingParameters,
    Sleeps,
    Tokenises,
    Weights,
    able_to_continue,
)
from leyden.interfaces.execution import (
    Agent,
    AttemptResult,
    Executor,
    FrameworkAdapter,
    GroupReward,
    RewardFunction,
    RolloutSpec,
)
from leyden.interfaces.gateway import Access, Gateway
from leyden.interfaces.learner import Announces, Batch, KLEstimator, Learner, Loss, Objective, ReleasesMemory, Sample
from leyden.interfaces.sink import MetricSink
from leyden.interfaces.store import Outcome, Owner, RolloutRecords, Store

__all__ = [
    "Access",
    "Agent",
    "Algorithm",
    "Announces",
    "AttemptResult",
    "Batch",
    "ContinuesExactly",
    "Delta",
    "Demands",
    "Engine",
    "Executor",
    "FrameworkAdapter",
    "Gateway",
    "Generation",
    "GenerationRequest",
    "Group",
    "GroupReward",
    "KLEstimator",
    "Learner",
    "Loss",
    "MetricSink",
    "Objective",
    "Outcome",
    "Owner",
    "ReleasesMemory",
    "RewardFunction",
    "RolloutRecords",
    "RolloutSpec",
    "Sample",
    "SamplingParameters",
    "Session",
    "Sleeps",
    "Store",
    "Tokenises",
    "Transition",
    "Weights",
    "able_to_continue",
    "demands_of",
]

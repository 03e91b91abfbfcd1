"""Reinforcement learning: an algorithm is an annotation of transitions, and the name of a loss.

`estimators` holds the advantages, `algorithms` the named algorithms, `policy_gradient` what they share, `corrections`
and `shaping` what stands between samples and advantages, `checks` what is refused. The learner never knows which one
wrote the advantages.
"""

from leyden_plugins.algorithms.rl.algorithms import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    DrGRPO,
    HierarchicalGRPO,
    LightningRL,
    Reinforce,
    ReinforcePlusPlus,
)
from leyden_plugins.algorithms.rl.corrections import ImportanceSampling
from leyden_plugins.algorithms.rl.policy_gradient import PolicyGradient, Replay, Scene
from leyden_plugins.algorithms.rl.shaping import Overlong

__all__ = [
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "PPO",
    "RLOO",
    "DrGRPO",
    "HierarchicalGRPO",
    "ImportanceSampling",
    "LightningRL",
    "Overlong",
    "PolicyGradient",
    "Reinforce",
    "ReinforcePlusPlus",
    "Replay",
    "Scene",
]

"""Rewards that come with Leyden: a model as judge, by any OpenAI-compatible endpoint."""

from leyden_plugins.rewards.judge import Judge
from leyden_plugins.rewards.showing import RANK_RUBRIC, SCORE_RUBRIC, final_output, trajectory

__all__ = ["RANK_RUBRIC", "SCORE_RUBRIC", "Judge", "final_output", "trajectory"]

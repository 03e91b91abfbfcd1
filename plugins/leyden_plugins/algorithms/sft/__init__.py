"""Supervised fine-tuning: on the policy's own best rollouts, on a teacher's, on stored ones; and rows for TRL."""

from leyden_plugins.algorithms.sft.imitation import Distillation, FineTuning, RejectionSampling
from leyden_plugins.algorithms.sft.keeping import kept_calls, kept_rollouts
from leyden_plugins.algorithms.sft.rows import sft_rows, stored_rows

__all__ = ["Distillation", "FineTuning", "RejectionSampling", "kept_calls", "kept_rollouts", "sft_rows", "stored_rows"]

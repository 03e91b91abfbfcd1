"""The benchmark's tasks by name."""

from __future__ import annotations

from benchmarks.prompt_tasks.desks import DESK, THREE_ROLES
from benchmarks.prompt_tasks.problem import Problem
from benchmarks.prompt_tasks.rooms import ROOM_SELECTOR

PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in (DESK, ROOM_SELECTOR, THREE_ROLES)}

"""Running agents: one attempt, here or in worker processes, and the life of rollouts."""

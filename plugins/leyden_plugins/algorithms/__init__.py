"""Algorithms: each turns rollouts into better policies or prompts."""

"""Adapters: who speaks, in each agent framework."""

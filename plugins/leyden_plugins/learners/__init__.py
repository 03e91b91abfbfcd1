"""Learners: each turns rows into gradients, and gradients into weights."""
